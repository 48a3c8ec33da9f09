"""The study's analyses, for any model: heat maps of CKA, principal components by layer, lesions, probes, and who errs where.

Layers are modules, by dotted name, in the order in which they run. ``"all"`` are those without children, which for the
networks of ``model`` is what Keras calls a layer; ``"blocks"`` are the residual blocks. ``"input"`` names the images.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import ttest_ind
from torch import Tensor, nn
from torch.nn import functional as F

from saigen.papers.analysis.wide_and_deep.similarity import (
    MinibatchCKA,
    PrincipalProfile,
    centred_gram,
    gram,
    principal_profile,
    unit_norm,
)

Layers = str | Sequence[str]
Number = float | int
_SHORTCUTS = ("shortcut", "downsample")


def residual_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that have a shortcut (``shortcut``, or ``downsample`` as torchvision and timm call it), by dotted name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and any(hasattr(module, attribute) for attribute in _SHORTCUTS)
    }


def _chosen(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    there = dict(model.named_modules())
    if layers == "all":
        return {name: module for name, module in there.items() if name and not any(module.children())}
    if layers == "blocks":
        found = residual_blocks(model)
        if not found:
            raise ValueError(f"layers is 'blocks', but a {type(model).__name__} has no residual blocks: name layers")
        return found
    names = [layers] if isinstance(layers, str) else list(layers)
    for name in names:
        if name != "input" and (name not in there or not name):
            raise ValueError(f"layers has {name!r}, allowed are 'all', 'blocks', 'input' and modules of the model")
    return {name: there.get(name, model) for name in names}


class ActivationRecorder:
    """Keeps what layers put out while the ``with`` block lasts: ``take()`` gives it by name, in the order of execution.

    ``keep(activation)`` says what is kept; by default a copy, since later layers may change it in place. A module that runs
    again is ``name#2``, ``name#3`` and so on. Raises ``ValueError`` for layers that are not there.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    >>> with ActivationRecorder(model) as recorder:
    ...     _ = model(torch.ones(2, 3))
    ...     print([(name, tuple(kept.shape)) for name, kept in recorder.take().items()])
    [('0', (2, 4)), ('1', (2, 4))]
    """

    def __init__(self, model: nn.Module, layers: Layers = "all", keep: Callable[[Tensor], Any] | None = None) -> None:
        self.modules = _chosen(model, layers)
        self.keep = keep or (lambda activation: activation.detach().clone())
        self._kept: dict[str, Any] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "ActivationRecorder":
        for name, module in self.modules.items():
            if name == "input":
                hook = module.register_forward_pre_hook(lambda _, inputs: self._record("input", inputs[0]))
            else:
                hook = module.register_forward_hook(lambda _, __, output, name=name: self._record(name, output))
            self._handles.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _record(self, name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple | list) else output
        if isinstance(output, Tensor):
            again = sum(known.partition("#")[0] == name for known in self._kept)
            self._kept[f"{name}#{again + 1}" if again else name] = self.keep(output)

    def take(self) -> dict[str, Any]:
        """What was kept since the last call."""
        kept, self._kept = self._kept, {}
        if not kept:
            raise ValueError("nothing was recorded: run the model within the with block before take()")
        return kept


@contextmanager
def _evaluating(*models: nn.Module, batch_statistics: bool = False) -> Iterator[None]:
    """Eval mode for a while, without gradients; with ``batch_statistics`` batch norms use those, and learn nothing."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    norms = [module for module, _ in modes if isinstance(module, nn.modules.batchnorm._BatchNorm) and batch_statistics]
    tracking = [(norm, norm.track_running_stats, norm.running_mean, norm.running_var) for norm in norms]
    try:
        for model in models:
            model.eval()
        for norm in norms:
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        with torch.no_grad():
            yield
    finally:
        for norm, tracks, mean, var in tracking:
            norm.track_running_stats, norm.running_mean, norm.running_var = tracks, mean, var
        for module, mode in modes:
            module.training = mode


def _device(model: nn.Module, x: Tensor) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), x.device)


class Similarity(NamedTuple):
    """A heat map, and which layers its rows and columns are."""

    matrix: Float[Tensor, "l k"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def cka_matrix(
    model: nn.Module,
    x: Float[Tensor, "n ..."],
    other: nn.Module | None = None,
    *,
    layers: Layers = "all",
    other_layers: Layers | None = None,
    batch_size: int = 256,
    passes: int = 10,
    generator: torch.Generator | None = None,
    normalize: bool = False,
    remove: int = 0,
    batch_statistics: bool = False,
) -> Similarity:
    """Minibatch CKA of every layer of ``model`` with every layer of itself, or of ``other`` on the same images.

    ``x`` is passed over ``passes`` times in an order that ``generator`` draws (a fresh one of seed 0 by default); a last
    batch that is not full is left out. The models are in eval mode and as they were afterwards.

    Args:
        layers, other_layers: which layers; those of ``other`` are the same by default.
        normalize: gives each example's activations norm 1 first.
        remove: how many first principal components of each batch and layer are taken out first.
        batch_statistics: batch norms normalise by the batch, as they do in training.

    Raises ``ValueError`` for batches of less than 4, fewer images than one batch, and less than one pass.

    >>> from saigen.papers.analysis.wide_and_deep import cifar_resnet_v1
    >>> found = cka_matrix(cifar_resnet_v1(8, 0.25), torch.rand(16, 3, 8, 8), layers="blocks", batch_size=8, passes=1)
    >>> found.rows, tuple(found.matrix.shape)
    (('layer1.0', 'layer2.0', 'layer3.0'), (3, 3))
    """
    if not 4 <= batch_size <= len(x):
        raise ValueError(f"batch_size is {batch_size}, allowed is 4 <= batch_size <= {len(x)}, the number of images")
    if passes < 1:
        raise ValueError(f"passes is {passes}, allowed is passes >= 1")
    if remove < 0:
        raise ValueError(f"remove is {remove}, allowed is remove >= 0")
    generator = torch.Generator().manual_seed(0) if generator is None else generator

    def keep(activation: Tensor) -> Tensor:
        return centred_gram(unit_norm(activation) if normalize else activation, remove=remove)

    models = [model] if other is None else [model, other]
    recorders = [
        ActivationRecorder(each, chosen, keep)
        for each, chosen in zip(models, (layers, layers if other_layers is None else other_layers), strict=False)
    ]
    sums, names = None, []
    with _evaluating(*models, batch_statistics=batch_statistics):
        for _ in range(passes):
            order = torch.randperm(len(x), generator=generator)
            for indices in order.split(batch_size):
                if len(indices) < batch_size:
                    continue
                kept = []
                for each, recorder in zip(models, recorders, strict=True):
                    with recorder:
                        each(x[indices].to(_device(each, x)))
                    kept.append(recorder.take())
                if sums is None:
                    names = [tuple(layer) for layer in kept]
                    sums = MinibatchCKA(len(names[0]), None if other is None else len(names[1])).to(_device(model, x))
                sums.update_grams(*(torch.stack(list(layer.values())) for layer in kept))
    return Similarity(sums.compute().cpu(), names[0], names[-1])


def principal_components(
    model: nn.Module, x: Float[Tensor, "n ..."], *, layers: Layers = "all", batch_statistics: bool = False
) -> PrincipalProfile:
    """The share of variance of each layer's first principal component over all of ``x``, and how layers share it.

    The images go through the model as one batch, of which an n x n matrix a layer is kept.
    """
    with (
        _evaluating(model, batch_statistics=batch_statistics),
        ActivationRecorder(model, layers, lambda activation: gram(activation).cpu()) as recorder,
    ):
        model(x.to(_device(model, x)))
    return principal_profile(recorder.take())


# Lesions


def deletable_blocks(model: nn.Module) -> tuple[str, ...]:
    """The residual blocks whose shortcut is the identity, so that the network works without them."""

    def identity(block: nn.Module) -> bool:
        shortcuts = [getattr(block, name) for name in _SHORTCUTS if hasattr(block, name)]
        return all(s is None or isinstance(s, nn.Identity) or s == nn.Sequential() for s in shortcuts)

    return tuple(name for name, block in residual_blocks(model).items() if identity(block))


@contextmanager
def delete_blocks(model: nn.Module, names: Sequence[str] | str) -> Iterator[nn.Module]:
    """``model`` without some residual blocks while the ``with`` block lasts; nothing is retrained, nothing of them computed.

    Raises ``ValueError`` for a name that is no residual block, and for a block with a projection, whose output has another
    shape than its input.

    >>> from saigen.papers.analysis.wide_and_deep import cifar_resnet_v1
    >>> model = cifar_resnet_v1(14, 0.25)
    >>> with delete_blocks(model, ["layer1.1", "layer3.1"]):
    ...     _ = model(torch.rand(2, 3, 8, 8))
    """
    names, allowed = [names] if isinstance(names, str) else list(names), deletable_blocks(model)
    for name in names:
        if name not in allowed:
            raise ValueError(f"names has {name!r}, allowed are the blocks without a projection: {', '.join(allowed)}")
    before = {name: model.get_submodule(name) for name in names}
    try:
        for name in names:
            model.set_submodule(name, nn.Identity())
        yield model
    finally:
        for name, block in before.items():
            model.set_submodule(name, block)


# Linear probes


def linear_probe(
    train: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    test: Float[Tensor, "m ..."],
    *,
    classes: int | None = None,
    pool: bool = False,
    l2: Number = 0.0,
    lr: Number = 0.01,
    epochs: int = 300,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " m"]:
    """What a linear classifier on a layer's activations ``train`` predicts for those of ``test``, after the last epoch.

    Trained as in the official code, from He-normal weights: SGD with momentum 0.9 at a constant rate.
    ``pool`` takes the maximum over 2x2 places first. Raises ``ValueError`` for lengths that differ and settings out of range.

    >>> x = torch.cat([torch.zeros(20, 2), torch.ones(20, 2)])
    >>> linear_probe(x, torch.arange(40) // 20, x[[0, -1]], lr=0.1, epochs=50).tolist()
    [0, 1]
    """
    if len(train) != len(y) or not len(y):
        raise ValueError(f"y has {len(y)} labels, allowed is one for each of the {len(train)} rows of train, 1 or more")
    for name, value, fine in (
        ("l2", l2, l2 >= 0),
        ("lr", lr, lr > 0),
        ("epochs", epochs, epochs >= 1),
        ("batch_size", batch_size, batch_size >= 1),
    ):
        if not fine:
            raise ValueError(f"{name} is {value}, allowed is a positive number" + (" or 0" if name == "l2" else ""))
    if pool:
        train, test = F.max_pool2d(train, 2), F.max_pool2d(test, 2)
    train, test = train.flatten(1).float(), test.flatten(1).float()
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    count = int(y.max()) + 1 if classes is None else classes
    weight = torch.randn(count, train.shape[1], generator=generator).mul_(math.sqrt(2 / train.shape[1]))
    weight, bias = weight.to(train.device).requires_grad_(), torch.zeros(count, device=train.device).requires_grad_()
    # Keras adds l2 |W|^2 to the loss, without a half
    groups = [{"params": [weight], "weight_decay": 2 * l2}, {"params": [bias]}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    with torch.enable_grad():
        for _ in range(epochs):
            for indices in torch.randperm(len(y), generator=generator).split(min(batch_size, len(y))):
                optimizer.zero_grad()
                F.cross_entropy(F.linear(train[indices], weight, bias), y[indices]).backward()
                optimizer.step()
    return F.linear(test, weight, bias).argmax(1).detach()


# Who errs where


class ClassComparison(NamedTuple):
    """Accuracy by class of two groups of models: group a less group b."""

    difference: Float[Tensor, " c"]
    p_value: Float[Tensor, " c"]
    """Of Welch's t-test over models, corrected for the number of classes by Holm's method."""
    overall: float
    """The difference in accuracy over all examples, to be near 0 where classes are to be compared."""


def compare_classes(
    right_a: Bool[Tensor, "m n"], right_b: Bool[Tensor, "k n"], y: Int[Tensor, " n"], classes: int | None = None
) -> ClassComparison:
    """Which classes models of the one architecture are better at: ``right`` says of each model which examples it has right.

    A class without examples, or with the same accuracy in all models, has difference 0 or NaN and p-value 1.
    Raises ``ValueError`` for less than 2 models in a group and other numbers of examples.
    """
    _check_right(right_a, right_b)
    if right_a.shape[1] != len(y):
        raise ValueError(f"y has {len(y)} labels, allowed is one for each of {right_a.shape[1]} examples")
    count = int(y.max()) + 1 if classes is None else classes
    members = F.one_hot(y, count).double()
    by_class = [(right.double() @ members) / members.sum(0) for right in (right_a, right_b)]
    difference = by_class[0].mean(0) - by_class[1].mean(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of groups without spread, which are dealt with below
        raw = np.asarray(ttest_ind(by_class[0].numpy(), by_class[1].numpy(), equal_var=False).pvalue)
    # no spread within either group: a difference is then certain, and none is none
    raw = np.where(np.isnan(raw), np.where(difference.abs().nan_to_num() > 1e-12, 0.0, 1.0), raw)
    order = np.argsort(raw)
    holm = np.maximum.accumulate(np.minimum(raw[order] * np.arange(count, 0, -1), 1.0))
    corrected = np.empty(count)
    corrected[order] = holm
    overall = (right_a.double().mean() - right_b.double().mean()).item()
    return ClassComparison(difference, torch.from_numpy(corrected), overall)


class ExampleComparison(NamedTuple):
    """How far the share of models that have an example right varies from example to example between two groups."""

    difference: Float[Tensor, " n"]
    variance: float
    """Of the differences over the examples, as measured."""
    chance: float
    """What models of one and the same architecture would give: the spread of a share among so few models."""


def compare_examples(right_a: Bool[Tensor, "m n"], right_b: Bool[Tensor, "k n"]) -> ExampleComparison:
    """Whether two architectures err on other examples than chance alone makes them: ``variance`` over ``chance`` above 1.

    ``variance`` less ``chance`` estimates without bias how the true shares differ, the difference in overall accuracy left
    out. Raises ``ValueError`` for less than 2 models in a group and other numbers of examples.

    >>> same = torch.tensor([[True, False, True], [True, False, True]])
    >>> compare_examples(same, ~same)[1:]
    (1.3333333333333335, 0.0)
    """
    _check_right(right_a, right_b)
    shares = [right.double().mean(0) for right in (right_a, right_b)]
    spread = [p * (1 - p) / (len(right) - 1) for p, right in zip(shares, (right_a, right_b), strict=True)]
    difference = shares[0] - shares[1]
    return ExampleComparison(difference, difference.var().item(), (spread[0] + spread[1]).mean().item())


def _check_right(right_a: Tensor, right_b: Tensor) -> None:
    for name, right in (("right_a", right_a), ("right_b", right_b)):
        if right.ndim != 2 or len(right) < 2:
            raise ValueError(
                f"{name} has shape {tuple(right.shape)}, allowed is (models, examples) of 2 or more models"
            )
    if right_a.shape[1] != right_b.shape[1]:
        raise ValueError(f"right_b has {right_b.shape[1]} examples, allowed is {right_a.shape[1]}, as right_a")


def accuracy_by_depth(
    features: Mapping[str, Tensor],
    y: Int[Tensor, " n"],
    test: Mapping[str, Tensor],
    y_test: Int[Tensor, " m"],
    **options: Any,
) -> dict[str, float]:
    """The accuracy of a linear probe on every layer; ``options`` are those of ``linear_probe``."""
    if set(features) != set(test):
        raise ValueError(f"test has layers {sorted(test)}, allowed are those of features, {sorted(features)}")
    return {
        name: (linear_probe(x, y, test[name], **options) == y_test).double().mean().item()
        for name, x in features.items()
    }
