"""Training with a cocktail of regularisers, and the scikit-learn classifier over it.

AdamW, learning rate 1e-3, batches of 128, 105 epochs in three cosine cycles of 15, 30 and 60 epochs, a cross-entropy
that weighs each class alike, and no early stopping (section 4 of the paper). At the end of each cycle the learning rate
is near 0 and the weights are good: that is where stochastic weight averaging takes its averages and the ensemble its
snapshots.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

from saigen.nn.lookahead import Lookahead
from saigen.papers.tabular.regularization_cocktails.model import CocktailMLP
from saigen.papers.tabular.regularization_cocktails.space import Cocktail, as_cocktail
from saigen.papers.tabular.regularization_cocktails.transform import (
    EPSILON,
    Mixed,
    fgsm,
    mixed_loss,
    row_cutmix,
    row_cutout,
    row_mixup,
)

SNAPSHOTS = 3
"""How many of the last cycles the ensemble keeps."""


def cycle_ends(epochs: int, cycles: int = 3) -> tuple[int, ...]:
    """The epochs after which the learning rate starts anew: each cycle is twice as long as the one before.

    The first has ``epochs // (2^cycles - 1)`` epochs, and the last all that are left.

    >>> cycle_ends(105), cycle_ends(100)
    ((15, 45, 105), (14, 42, 100))
    """
    if epochs < 1 or cycles < 1:
        raise ValueError(f"epochs is {epochs} and cycles is {cycles}, allowed are 1 or more")
    first = max(1, epochs // (2**cycles - 1))
    ends = [first * (2**cycle - 1) for cycle in range(1, cycles)]
    return tuple(end for end in ends if end < epochs) + (epochs,)


def cosine_rate(epoch: int, ends: Sequence[int]) -> float:
    """The share of the learning rate in ``epoch`` (from 0): ``(1 + cos(pi t / T)) / 2`` at t of the T epochs of a cycle."""
    start = max((end for end in ends if end <= epoch), default=0)
    length = min(end for end in ends if end > epoch) - start
    return (1 + math.cos(math.pi * (epoch - start) / length)) / 2


def balanced_class_weights(y: Int[Tensor, "n"], num_classes: int) -> Float[Tensor, "classes"]:
    """``w_c = n / (C n_c)``: over the rows the mean of w_y is 1. A class without a row weighs 0.

    >>> balanced_class_weights(torch.tensor([0, 0, 0, 1]), 2).tolist()
    [0.6666666865348816, 2.0]
    """
    counts = torch.bincount(y, minlength=num_classes)
    return torch.where(counts > 0, len(y) / (num_classes * counts.clamp(min=1)), 0.0)


def cocktail_network(cocktail: Cocktail, in_features: int, num_classes: int, **options: Any) -> CocktailMLP:
    """``CocktailMLP`` with the regularisers of ``cocktail`` that stand in the network; ``options`` are its others."""
    return CocktailMLP(
        in_features,
        num_classes,
        batch_norm=cocktail.batch_norm,
        dropout=cocktail.dropout if cocktail.use_dropout else None,
        dropout_shape=cocktail.dropout_shape,
        skip=cocktail.skip,
        multibranch=cocktail.multibranch,
        shake_drop=cocktail.shake_drop,
        **options,
    )


def batch_loss(model: nn.Module, x: Tensor, y: Tensor, cocktail: Cocktail, weights: Tensor | None) -> Tensor:
    """The loss of a batch with the augmentation of ``cocktail``."""
    if cocktail.augmentation == "adversarial":
        loss = lambda logits, labels: F.cross_entropy(logits, labels, weights)  # noqa: E731
        adversarial = fgsm(model, x, y, EPSILON, loss=loss)
        return 0.5 * loss(model(x), y) + 0.5 * loss(model(adversarial), y)
    if cocktail.augmentation == "mixup":
        batch = row_mixup(x, y, cocktail.mixup_alpha)
    elif cocktail.augmentation == "cutout":
        batch = row_cutout(x, y, cocktail.cutout_probability, cocktail.cutout_ratio)
    elif cocktail.augmentation == "cutmix":
        batch = row_cutmix(x, y, cocktail.cutmix_probability)
    else:
        batch = Mixed(x, y, y, 1.0)
    return mixed_loss(model(batch.x), batch, weights)


def train_cocktail(
    model: nn.Module,
    x: Float[Tensor, "n d"],
    y: Int[Tensor, "n"],
    cocktail: Cocktail,
    *,
    class_weights: Float[Tensor, "classes"] | None = None,
    epochs: int = 105,
    cycles: int = 3,
    batch_size: int = 128,
    learning_rate: float | int = 1e-3,
    at_cycle_end: Callable[[int, list[nn.Module]], None] | None = None,
) -> tuple[list[nn.Module], list[float]]:
    """Trains ``model`` in place; gives the networks whose probabilities are averaged, and each epoch's mean loss.

    ``at_cycle_end(epoch, networks)`` is told what the training would give if it ended there. Everything random comes
    from torch's global generators. With batch norm, a last batch of one row joins the batch before it.
    """
    ends = cycle_ends(epochs, cycles)
    optimizer = inner = torch.optim.AdamW(
        model.parameters(),
        lr=learning_rate,
        betas=(0.9, 0.999),
        weight_decay=cocktail.weight_decay if cocktail.use_weight_decay else 0.0,
        fused=x.device.type in ("cpu", "cuda"),
    )
    if cocktail.lookahead:
        optimizer = Lookahead(inner, cocktail.lookahead_steps, cocktail.lookahead_alpha)
    average = AveragedModel(model) if cocktail.swa else None
    snapshots: list[nn.Module] = []
    networks: list[nn.Module] = [model]
    losses = []
    for epoch in range(epochs):
        for group in inner.param_groups:
            group["lr"] = learning_rate * cosine_rate(epoch, ends)
        model.train()
        total = torch.zeros((), device=x.device)
        for rows in _batches(torch.randperm(len(x)).to(x.device), batch_size):
            optimizer.zero_grad()
            loss = batch_loss(model, x[rows], y[rows], cocktail, class_weights)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        losses.append((total / len(x)).item())
        if epoch + 1 not in ends:
            continue
        networks = [model]
        if average is not None:
            average.update_parameters(model)
            # the averaged weights give the batch norms other inputs than those whose moments they know
            update_bn(_batches(x, batch_size), average)
            networks = [average.module]
        if cocktail.snapshots:
            # the last snapshot is the average, where there is one
            networks = [*snapshots[1 - SNAPSHOTS :], *networks]
            snapshots.append(copy.deepcopy(model))
        if at_cycle_end is not None:
            at_cycle_end(epoch + 1, networks)
    return [network.eval() for network in networks], losses


def _batches(rows: Tensor, size: int) -> list[Tensor]:
    parts = list(rows.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


@torch.no_grad()
def mean_probabilities(networks: Sequence[nn.Module], x: Float[Tensor, "n d"], rows: int = 8192) -> Tensor:
    """The mean over the networks of their softmax, (n, C), in double precision; each network's mode stays as it was."""
    found = []
    for network in networks:
        mode = network.training
        network.eval()
        found.append(torch.cat([network(part).double().softmax(1) for part in x.split(rows)]))
        network.train(mode)
    return torch.stack(found).mean(0)


class CocktailClassifier(ClassifierMixin, BaseEstimator):
    """A plain network with a cocktail of regularisers, as a scikit-learn classifier of tables.

    Missing cells are NaN. Columns of values have them filled with the median and are standardised; in categorical columns
    they are a category of their own, and each category becomes a column of zeros and ones. A category that was not in
    the training table is none of them.

    Args:
        cocktail: a ``Cocktail``, a mapping of its arguments, or None for the plain network; ``search_cocktail`` finds one.
        width, groups, blocks, epochs, cycles, batch_size, learning_rate: the paper's are the defaults.
        class_weight: ``"balanced"``, the paper's, a mapping of classes to weights, or None.
        categorical_features: numbers or names of columns, or a mask, of what is categorical; as in
            ``HistGradientBoostingClassifier``.
        device: where it trains and predicts.
        random_state: everything random; the global generators stay as they are.

    After ``fit``: ``classes_``, ``networks_`` (more than one for a snapshot ensemble), ``encoder_``, ``cocktail_``,
    ``loss_curve_`` (the mean loss of each epoch). Raises ``ValueError`` for values outside what is said.
    """

    # Values are checked in fit, as scikit-learn has it.
    def __init__(
        self,
        cocktail=None,
        *,
        width=512,
        groups=2,
        blocks=2,
        epochs=105,
        cycles=3,
        batch_size=128,
        learning_rate=1e-3,
        class_weight="balanced",
        categorical_features=None,
        device="cpu",
        random_state=None,
    ):
        self.cocktail = cocktail
        self.width = width
        self.groups = groups
        self.blocks = blocks
        self.epochs = epochs
        self.cycles = cycles
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.class_weight = class_weight
        self.categorical_features = categorical_features
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "CocktailClassifier":
        """Trains on the table ``X`` (n, d) with labels ``y`` (n,)."""
        return self._fit(X, y)

    def _fit(self, X: Any, y: Any, at_cycle_end: Callable[[int, np.ndarray], None] | None = None, held_out: Any = None):
        """``at_cycle_end(epoch, probabilities)`` is told, at the end of each cycle, those of the rows ``held_out``."""
        cocktail = as_cocktail(self.cocktail)
        self._check()
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_all_finite="allow-nan")
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds 1 class, {self.classes_[0]}, and a classifier needs at least 2")
        self.cocktail_ = cocktail
        self.encoder_ = table_encoder(X, self._categorical_columns(X.shape[1])).fit(X)
        rows, labels = self._encode(X), torch.from_numpy(labels).to(self.device)
        watch = None
        if at_cycle_end is not None:
            outside = self._encode(np.asarray(held_out, dtype=np.float64))

            def watch(epoch: int, networks: list[nn.Module]) -> None:
                at_cycle_end(epoch, mean_probabilities(networks, outside).cpu().numpy())

        weights = self._class_weights(labels)
        seed = int(check_random_state(self.random_state).randint(2**31))
        device = torch.device(self.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model = cocktail_network(
                cocktail, rows.shape[1], len(self.classes_), width=self.width, groups=self.groups, blocks=self.blocks
            )
            self.networks_, self.loss_curve_ = train_cocktail(
                model.to(device),
                rows,
                labels,
                cocktail,
                class_weights=weights,
                epochs=self.epochs,
                cycles=self.cycles,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                at_cycle_end=watch,
            )
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, (n, C); of a snapshot ensemble the mean."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64, ensure_all_finite="allow-nan")
        return mean_probabilities(self.networks_, self._encode(X)).cpu().numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row."""
        chosen = self.predict_proba(X).argmax(1)
        return self.classes_[chosen]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _encode(self, X: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.encoder_.transform(X), dtype=np.float32)).to(self.device)

    def _check(self) -> None:
        for name in ("width", "groups", "blocks", "epochs", "cycles", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} is {value!r}, allowed is a whole number of at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate!r}, allowed is a number above 0")
        if self.class_weight not in (None, "balanced") and not isinstance(self.class_weight, Mapping):
            raise ValueError(
                f"class_weight is {self.class_weight!r}, allowed are 'balanced', weights of classes, and None"
            )

    def _class_weights(self, labels: Tensor) -> Tensor | None:
        if self.class_weight is None:
            return None
        if self.class_weight == "balanced":
            return balanced_class_weights(labels, len(self.classes_))
        return torch.tensor([float(self.class_weight.get(label, 1.0)) for label in self.classes_], device=labels.device)

    def _categorical_columns(self, d: int) -> list[int]:
        given = [] if self.categorical_features is None else np.asarray(self.categorical_features).ravel()
        if len(given) == 0:
            return []
        if given.dtype == bool:
            if len(given) != d:
                raise ValueError(f"categorical_features masks {len(given)} columns, X has {d}")
            return np.flatnonzero(given).tolist()
        if given.dtype.kind in "UO":
            names = list(getattr(self, "feature_names_in_", []))
            if unknown := [name for name in given if name not in names]:
                raise ValueError(f"categorical_features names {unknown[0]!r}, which is no column of X")
            return [names.index(name) for name in given]
        if given.dtype.kind not in "iu" or not all(0 <= column < d for column in given):
            raise ValueError(
                f"categorical_features is {given.tolist()}, allowed are columns 0 to {d - 1}, their names, or a mask"
            )
        return [int(column) for column in given]


def table_encoder(X: np.ndarray, categorical: Sequence[int]) -> ColumnTransformer:
    """Medians and standard deviations for columns of values, a column a category for the others, NaN a category of its own."""
    values = [column for column in range(X.shape[1]) if column not in set(categorical)]
    return ColumnTransformer(
        [
            (
                "values",
                make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler()),
                values,
            ),
            ("categories", OneHotEncoder(handle_unknown="ignore", sparse_output=False), list(categorical)),
        ]
    )
