"""NPT as a classifier and a regressor of scikit-learn: the training of Section 2.6 and Appendix C around ``model.py``.

``fit`` keeps its rows: they are what a prediction looks at. With ``label_mask`` below 1 their labels are seen too.
"""

import copy
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from saigen.papers.tabular.npt.model import NonParametricTransformer
from saigen.papers.tabular.npt.optimizer import flat_then_cosine, lookahead_lamb
from saigen.papers.tabular.npt.table import (
    TableEncoder,
    cosine_tradeoff,
    known_entries,
    mask_entries,
    npt_loss,
    stratified_batches,
)

TRAIN, VALIDATION, UNLABELLED = 0, 1, 2
MOST_PARAMETERS = 4_000_000_000
CHUNK = 1024
"""Rows predicted at once."""


class _NPT(BaseEstimator):
    """What the classifier and the regressor share. Parameters:

    categorical_features: indices of the columns that hold categories (or a mask); NaN is missing, in any column.
    embedding_dim, depth, heads, dropout, kv_norm, scale, between_datapoints: the network's (``NonParametricTransformer``).
    steps, learning_rate, flat, lookahead, clip: LAMB in Lookahead, flat for the share ``flat`` and then a cosine to 0;
        gradients are clipped entry by entry, as in the official code.
    batch_size: rows of a batch, in proportion of training and validation rows; None: the whole table.
    feature_mask, label_mask, random_share: with what probability entries and labels are masked, and what share of them is
        replaced by a random value. With ``label_mask=1`` no label is ever seen, and prediction sees features alone.
    tradeoff: how much reconstructed features count at first; falls to 0 in half a cosine.
    validation_fraction, evaluate_every: the weights that do best on rows held out (their labels are masked) are kept;
        0 keeps the last. At prediction the labels of these rows are seen like all.
    transductive: predicted rows see each other, as in the paper; False: each is predicted by itself, which does not depend on
        what else is asked.
    stratify_classes: batches also have the classes in proportion.
    device, random_state.
    """

    def __init__(
        self,
        *,
        categorical_features=None,
        embedding_dim=64,
        depth=8,
        heads=8,
        dropout=0.1,
        kv_norm=False,
        scale="width",
        between_datapoints=True,
        steps=2000,
        learning_rate=1e-3,
        flat=0.7,
        lookahead=6,
        clip=1.0,
        batch_size=None,
        stratify_classes=False,
        feature_mask=0.15,
        label_mask=0.5,
        random_share=0.1,
        tradeoff=1.0,
        validation_fraction=0.2,
        evaluate_every=25,
        transductive=False,
        device="cpu",
        random_state=None,
    ):
        self.categorical_features = categorical_features
        self.embedding_dim = embedding_dim
        self.depth = depth
        self.heads = heads
        self.dropout = dropout
        self.kv_norm = kv_norm
        self.scale = scale
        self.between_datapoints = between_datapoints
        self.steps = steps
        self.learning_rate = learning_rate
        self.flat = flat
        self.lookahead = lookahead
        self.clip = clip
        self.batch_size = batch_size
        self.stratify_classes = stratify_classes
        self.feature_mask = feature_mask
        self.label_mask = label_mask
        self.random_share = random_share
        self.tradeoff = tradeoff
        self.validation_fraction = validation_fraction
        self.evaluate_every = evaluate_every
        self.transductive = transductive
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _fit(self, X, y, classes, X_unlabelled):
        self._check_options()
        random = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(int(random.randint(2**31 - 1)))
        rng = np.random.default_rng(int(random.randint(2**31 - 1)))
        self.validation_rows_ = self._held_out(y, classes, rng)
        modes = np.full(len(y), TRAIN)
        modes[self.validation_rows_] = VALIDATION
        if X_unlabelled is not None:
            X_unlabelled = validate_data(
                self, X_unlabelled, reset=False, ensure_all_finite="allow-nan", dtype=np.float64
            )
            X = np.concatenate([X, X_unlabelled])
            modes = np.concatenate([modes, np.full(len(X_unlabelled), UNLABELLED)])
        given = np.full(len(modes), np.nan)
        given[: len(y)] = y
        # Features of all rows are known when training; labels, and so their statistics, of the training rows alone.
        seen = np.where(modes == TRAIN, given, np.nan)
        self.encoder_ = TableEncoder(X, seen, self._categorical(), classes)
        columns = self.encoder_.encode(X, given)
        self.network_, self.context_rows_ = (
            self._network(generator),
            rng.permutation(np.flatnonzero(modes != UNLABELLED)),
        )
        groups = modes
        if self.stratify_classes and classes:
            groups = np.where(modes == TRAIN, 3 + np.nan_to_num(given).astype(int), modes)
        self._train(columns, modes, self._batches(groups, rng), generator, rng)
        keep = modes != UNLABELLED
        self.context_ = [column[torch.from_numpy(keep)].double() for column in columns]
        self.network_.double().eval()  # so that a row's prediction does not depend on which are computed beside it
        return self

    def _check_options(self) -> None:
        for name in ("feature_mask", "label_mask", "random_share", "tradeoff", "flat"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, allowed are 0 to 1")
        if self.label_mask == 0:
            raise ValueError("label_mask is 0, allowed is more: what is never masked is never learned")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}, allowed are 0 to below 1")
        for name in ("steps", "evaluate_every", "lookahead"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, allowed is 1 or more")
        if self.batch_size is not None and self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}, allowed is 2 or more, or None for the whole table")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, allowed is a number above 0")

    def _categorical(self) -> list[int]:
        if self.categorical_features is None:
            return []
        chosen = np.asarray(self.categorical_features)
        if chosen.dtype == bool and chosen.shape == (self.n_features_in_,):
            return np.flatnonzero(chosen).tolist()
        if chosen.size and (chosen.dtype.kind not in "iu" or chosen.min() < 0 or chosen.max() >= self.n_features_in_):
            raise ValueError(
                f"categorical_features is {self.categorical_features}, allowed are columns 0 to {self.n_features_in_ - 1}, or a mask"
            )
        return [int(column) for column in chosen]

    def _held_out(self, y, classes, rng) -> np.ndarray:
        held_out = int(self.validation_fraction * len(y))
        if held_out < (classes or 1) or len(y) - held_out < (classes or 1):
            return np.zeros(0, int)
        stratify = y if classes and np.bincount(y).min() > 1 else None
        seed = int(rng.integers(2**31))
        return train_test_split(np.arange(len(y)), test_size=held_out, stratify=stratify, random_state=seed)[1]

    def _network(self, generator: torch.Generator) -> NonParametricTransformer:
        dims, e = self.encoder_.input_dims, self.embedding_dim
        size = self.depth // 2 * 13 * ((len(dims) * e) ** 2 + e**2)
        if size > MOST_PARAMETERS:
            raise ValueError(
                f"embedding_dim is {e}, with {len(dims)} columns the network has {size:,} parameters; allowed are {MOST_PARAMETERS:,}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            return NonParametricTransformer(
                dims,
                self.encoder_.categorical,
                embedding_dim=e,
                depth=self.depth,
                heads=self.heads,
                dropout=self.dropout,
                kv_norm=self.kv_norm,
                scale=self.scale,
                between_datapoints=self.between_datapoints,
            ).to(self.device)

    def _batches(self, groups: np.ndarray, rng: np.random.Generator) -> Iterator[Tensor]:
        whole = self.batch_size is None or self.batch_size >= len(groups)
        while True:
            if whole:
                yield torch.arange(len(groups))
                continue
            for batch in stratified_batches(groups, self.batch_size, rng):
                yield torch.from_numpy(batch)

    def _train(self, columns, modes, batches, generator, rng) -> None:
        network, categorical = self.network_, self.encoder_.categorical
        optimizer = lookahead_lamb(network.parameters(), self.learning_rate, k=self.lookahead)
        factor, modes_ = flat_then_cosine(self.flat), torch.from_numpy(modes)
        known, seed = known_entries(columns), int(rng.integers(2**31))
        self.loss_curve_, self.validation_loss_, best = [], np.inf, None
        on_gpu = torch.device(self.device).type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if on_gpu else []):  # dropout draws from the global generator
            torch.manual_seed(seed)
            for step in range(self.steps):
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * factor(step, self.steps)
                rows = next(batches)
                truth = [column[rows] for column in columns]
                inputs, features, labels = self._masked(truth, known[rows], modes_[rows], generator)
                truth, inputs = ([column.to(self.device) for column in part] for part in (truth, inputs))
                share = cosine_tradeoff(step, self.steps, self.tradeoff) if self.feature_mask else 0.0
                outputs = network.train()(inputs)
                loss = npt_loss(
                    outputs, truth, features.to(self.device), labels.to(self.device), share, categorical=categorical
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_value_(network.parameters(), self.clip)
                optimizer.step()
                self.loss_curve_.append(loss.detach())
                if (step + 1) % self.evaluate_every and step + 1 < self.steps:
                    continue
                value = self._validation_loss(columns, modes, known)
                if value < self.validation_loss_:
                    self.validation_loss_, best = value, copy.deepcopy(network.state_dict())
        if best is not None:
            network.load_state_dict(best)
        self.loss_curve_ = torch.stack(self.loss_curve_).tolist()
        if not np.isfinite(self.loss_curve_).all():
            warnings.warn("the loss did not stay finite: lower learning_rate", stacklevel=4)

    def _masked(self, truth, known, modes, generator):
        """(inputs, which features, which labels are masked). Labels of validation rows never get in, nor into the loss."""
        d = len(truth) - 1
        is_label = torch.zeros_like(known)
        is_label[:, d] = True
        train = (modes == TRAIN)[:, None]
        options = {
            "categorical": self.encoder_.categorical,
            "random_share": self.random_share,
            "generator": generator,
        }
        inputs, labels = mask_entries(truth, is_label & train, self.label_mask, **options)
        inputs, _ = mask_entries(inputs, is_label & ~train, 1.0)
        if self.feature_mask == 0:
            return inputs, torch.zeros_like(known), labels
        inputs, features = mask_entries(inputs, known & ~is_label, self.feature_mask, **options)
        return inputs, features, labels

    @torch.no_grad()
    def _validation_loss(self, columns, modes, known) -> float:
        """Of the validation rows' labels, predicted from the training rows; infinite where there are none."""
        train, held_out = (torch.from_numpy(np.flatnonzero(modes == mode)) for mode in (TRAIN, VALIDATION))
        if not len(held_out):
            return np.inf
        context, queries = ([column[rows] for column in columns] for rows in (self._context(train), held_out))
        total = 0.0
        for outputs, rows in self._predicted(context, queries):
            truth = columns[-1][held_out][rows].to(self.device)
            if self.encoder_.classes:
                total -= float((outputs.log_softmax(dim=1) * truth[:, :-1]).sum())
            else:
                total += float(((outputs - truth[:, :1]) ** 2).sum())
        return total / len(held_out)

    def _context(self, rows: Tensor) -> Tensor:
        """What a prediction looks at: all of ``rows``, or as many of them, always the same, as a batch holds."""
        if self.batch_size is None or len(rows) <= self.batch_size:
            return rows
        allowed = set(rows.tolist())
        chosen = [row for row in self.context_rows_.tolist() if row in allowed][: self.batch_size]
        return torch.tensor(sorted(chosen))

    def _predicted(self, context: list[Tensor], queries: list[Tensor]) -> Iterator[tuple[Tensor, slice]]:
        """Outputs of the target column for the query rows, a chunk at a time. Their own labels are masked here."""
        network = self.network_.eval()
        if self.label_mask == 1:
            context = [*context[:-1], _token(context[-1])]
        queries = [*queries[:-1], _token(queries[-1])]
        for start in range(0, len(queries[0]), CHUNK):
            rows = slice(start, start + CHUNK)
            table = [
                torch.cat([known, asked[rows]]).to(self.device)
                for known, asked in zip(context, queries, strict=True)
            ]  # fmt: skip
            count = len(queries[0][rows])
            outputs = network(table, queries=0 if self.transductive else count)
            yield outputs[-1][-count:], rows

    @torch.no_grad()
    def _outputs(self, X, corrupt: Callable[[list[Tensor]], list[Tensor]] | None = None) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, ensure_all_finite="allow-nan", dtype=np.float64)
        rows = self._context(torch.arange(len(self.context_[0])))
        context = [column[rows] for column in self.context_]
        if corrupt is not None:
            context = corrupt(context)
        queries = self.encoder_.encode(X, None, torch.float64)
        return torch.cat([outputs for outputs, _ in self._predicted(context, queries)]).cpu().numpy()


class NPTClassifier(ClassifierMixin, _NPT):
    __doc__ = f"""A Non-Parametric Transformer that classifies the rows of a table.

    {_NPT.__doc__.split("Parameters:", 1)[1].strip()}

    After ``fit``: ``classes_``, ``network_``, ``encoder_``, ``context_``, ``loss_curve_``, ``validation_loss_``, ``validation_rows_``.

    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> model = NPTClassifier(embedding_dim=8, depth=2, heads=2, steps=150, learning_rate=1e-2, random_state=0).fit(X[::2], y[::2])
    >>> model.score(X[1::2], y[1::2]) > 0.9
    True
    """

    def fit(self, X, y, X_unlabelled=None):
        """Learns from rows ``X`` (n, features) of classes ``y`` (n,). ``X_unlabelled``: rows without a label, whose features
        are seen (and reconstructed) in training: the test rows, where they are known, as in the paper."""
        X, y = validate_data(self, X, y, ensure_all_finite="allow-nan", dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        return self._fit(X, codes, len(self.classes_), X_unlabelled)

    def predict_proba(self, X):
        """Probability of each of ``classes_``, shape (n, K)."""
        return softmax(self._outputs(X), axis=1)

    def predict(self, X):
        """The most probable class of each row."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]


class NPTRegressor(RegressorMixin, _NPT):
    __doc__ = f"""A Non-Parametric Transformer that predicts a number for each row of a table.

    {_NPT.__doc__.split("Parameters:", 1)[1].strip()}

    After ``fit``: ``network_``, ``encoder_``, ``context_``, ``loss_curve_``, ``validation_loss_``, ``validation_rows_``.
    """

    def fit(self, X, y, X_unlabelled=None):
        """Learns from rows ``X`` (n, features) with values ``y`` (n,); ``X_unlabelled`` as in ``NPTClassifier``."""
        X, y = validate_data(self, X, y, ensure_all_finite="allow-nan", dtype=np.float64, y_numeric=True)
        return self._fit(X, column_or_1d(y).astype(np.float64), None, X_unlabelled)

    def predict(self, X):
        """The value of each row, shape (n,)."""
        return self._outputs(X)[:, 0] * self.encoder_.deviation[-1] + self.encoder_.mean[-1]


def row_corruption_test(
    model: NPTClassifier | NPTRegressor, X, y, *, repeats: int = 5, random_state=None
) -> tuple[float, float]:
    """How much worse predictions get when all other rows make no sense (Section 4.4): (loss, loss after corruption).

    Each column of the rows that a prediction looks at, labels too, is permuted by itself, so that every column keeps its values
    and no row its own. The loss is the log loss, or the root of the mean squared error; the second is a mean over ``repeats``.
    A network that looks at no other row gives the same twice.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, allowed is 1 or more")
    if model.transductive:
        raise ValueError("model is transductive, allowed is one whose predicted rows do not see each other")
    rng = np.random.default_rng(check_random_state(random_state).randint(2**31 - 1))

    def corrupt(context: list[Tensor]) -> list[Tensor]:
        return [column[torch.from_numpy(rng.permutation(len(column)))] for column in context]

    def loss(outputs: np.ndarray) -> float:
        if isinstance(model, NPTClassifier):
            return float(log_loss(y, softmax(outputs, axis=1), labels=model.classes_))
        predicted = outputs[:, 0] * model.encoder_.deviation[-1] + model.encoder_.mean[-1]
        return float(np.sqrt(np.mean((np.asarray(y) - predicted) ** 2)))

    return loss(model._outputs(X)), float(np.mean([loss(model._outputs(X, corrupt)) for _ in range(repeats)]))


def _token(column: Tensor) -> Tensor:
    """The column with every entry masked."""
    masked = torch.zeros_like(column)
    masked[:, -1] = 1
    return masked
