"""The study's claims, re-measured: when a block structure appears, what carries it, and what it is good for.

Laptop: digits of 8x8 pixels, ten images a class where data are few. The small network is 14 layers deep and a quarter as wide
as the paper's narrowest; the wide one has eight times its channels, the deep one 110 layers. All are trained alike, for the
same number of steps. Layers are the outputs of the residual blocks and of the stem, so that networks can be compared. Real:
the user's images at 32 pixels. Full: the paper's networks for CIFAR-10, of which 6 % are few.
"""

import math
import statistics
from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from saigen.data import split
from saigen.data.subsets import sample
from saigen.papers.analysis.wide_and_deep import (
    BlockStructure,
    CifarResNetV1,
    block_structure,
    cka_matrix,
    compare_examples,
    deletable_blocks,
    delete_blocks,
    principal_components,
    regularized,
    residual_blocks,
)
from saigen.train import accuracy, cosine, fit, predict
from saigen.trial import Trial

Shape = tuple[int, float | int]
"""Depth and width multiplier."""


@dataclass(frozen=True)
class Size:
    few: int
    many: int
    test: int
    steps: int
    batch: int
    rate: float
    small: Shape
    wide: Shape
    deep: Shape
    peers: tuple[Shape, Shape]
    """A shallower and a deeper network of about the same accuracy, whose errors are compared."""
    copies: int
    """Of each of them, from different first weights."""
    cka: int
    """Images a batch of minibatch CKA."""
    passes: int
    draws: int
    """How often blocks to delete are drawn."""


SIZES = {
    "tiny": Size(40, 80, 40, 4, 20, 0.02, (8, 0.25), (8, 0.5), (14, 0.25), ((8, 0.25), (14, 0.25)), 2, 20, 1, 2),
    "laptop": Size(100, 1200, 512, 200, 50, 0.02, (14, 0.25), (14, 2), (110, 0.25), ((14, 0.375), (26, 0.5)), 4, 128, 2, 5),
    "real": Size(3000, 20_000, 1024, 2000, 128, 0.01, (14, 1), (14, 4), (110, 1), ((14, 2), (56, 1)), 3, 256, 4, 5),
    "full": Size(3000, 50_000, 10_000, 117_000, 128, 0.01, (14, 1), (38, 10), (164, 1), ((14, 2), (56, 1)), 10, 256, 10, 10),
}  # fmt: skip
L2 = 1e-4

Networks = tuple[CifarResNetV1, float]
_TRAINED: dict[tuple, Networks] = {}
"""Networks of this process and their last losses: pure functions of their keys, which several claims ask for."""


def _data(trial: Trial) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Training images, of which the first so many are the few, test images, and the number of classes."""
    size = SIZES[trial.scale]
    if trial.scale in ("real", "full"):
        known, new = (
            sample(trial.data("images", size=32, part=part), count, trial.rng(part))
            for part, count in (("train", size.many), ("test", size.test))
        )
        return known.x.float() / 255, known.y, new.x.float() / 255, new.y, len(known.classes)
    digits = trial.data("digits")
    # the few are stratified too: they are drawn first
    few, more, new = (
        digits.subset(indices)
        for indices in split(digits.y.numpy(), (size.few, size.many - size.few, size.test), trial.rng("split"))
    )
    return torch.cat([few.x, more.x]), torch.cat([few.y, more.y]), new.x, new.y, len(digits.classes)


def _augmented(generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Photographs cropped from a border of 4 reflected pixels, mirrored half of the time."""
    n, _, h, w = x.shape
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(9, (2, n), generator=generator).tolist()
    x = torch.stack([image[:, i : i + h, j : j + w] for image, i, j in zip(padded, top, left, strict=True)])
    return torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.5, x.flip(3), x), y


def _trained(trial: Trial, shape: Shape, x: Tensor, y: Tensor, classes: int, copy: int = 0) -> Networks:
    """A network of that shape on all of ``x``, from the first weights number ``copy``, in eval mode; and its last loss."""
    size, small = SIZES[trial.scale], trial.scale in ("tiny", "laptop")
    key = (shape, len(x), copy, trial.seed, trial.scale, str(trial.device), *sorted(trial.used_data.items()))
    if key in _TRAINED:
        return _TRAINED[key]
    with trial.seeded(f"weights {copy}"):
        model = CifarResNetV1(*shape, num_classes=classes, in_chans=x.shape[1])
    name = f"depth {shape[0]}, width {shape[1]}, {len(x)} images, copy {copy}"
    history = fit(
        model,
        lambda model, x, y: F.cross_entropy(model(x), y),
        (x, y),
        optimizer=torch.optim.SGD(regularized(model, L2), size.rate, momentum=0.9),
        steps=size.steps,
        batch_size=size.batch,
        # copies differ in the order of the data as well, as the paper's runs do
        seed=trial.seed + 1_000_003 * copy,
        schedule=cosine(),
        transform=None if small else _augmented,
        checkpoint=trial.checkpoint(name.replace(" ", "_")),
        device=trial.device,
        on_step=lambda step, total, _: trial.progress(step, total, name),
    )
    if trial.scale != "full":
        _settle_norms(model, x)
    while len(_TRAINED) >= (120 if small else 12):
        _TRAINED.pop(next(iter(_TRAINED)))
    _TRAINED[key] = model.eval(), statistics.fmean(history.losses[-5:])
    return _TRAINED[key]


def _settle_norms(model: nn.Module, x: Tensor) -> None:
    """Batch norms' statistics as plain means over the training images: so few steps do not fill a running mean of 0.99."""
    batches = x[:2048].split(max(2, min(128, len(x))))
    update_bn((batch for batch in batches if len(batch) > 1), model, device=next(model.parameters()).device)


def _layers(model: nn.Module) -> list[str]:
    return ["relu1", *residual_blocks(model)]


def _heat_map(trial: Trial, model: nn.Module, x: Tensor, other: nn.Module | None = None, remove: int = 0) -> Tensor:
    size = SIZES[trial.scale]
    return cka_matrix(
        model,
        x,
        other,
        layers=_layers(model),
        batch_size=size.cka,
        passes=size.passes,
        generator=trial.generator("minibatches"),
        remove=remove,
    ).matrix


def _off_diagonal(matrix: Tensor) -> float:
    """The mean over pairs of different layers."""
    count = len(matrix)
    return ((matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))).item() if count > 1 else 0.0


def _inside(block: BlockStructure, count: int) -> Tensor:
    places = torch.arange(count)
    return (places >= block.start) & (places < block.stop)


def block_structure_needs_capacity(trial: Trial) -> dict[str, float]:
    """One seed: how much of the wide, the deep and the small network is one block, on few data; of the wide on many."""
    size = SIZES[trial.scale]
    x, y, test_x, test_y, classes = _data(trial)
    arms = {
        "small": (size.small, size.few),
        "wide": (size.wide, size.few),
        "deep": (size.deep, size.few),
        # the one that has learned many images, too, in so few steps
        "wide_many": (size.wide, len(x)),
    }
    values: dict[str, float] = {}
    for arm, (shape, count) in arms.items():
        model, loss = _trained(trial, shape, x[:count], y[:count], classes)
        matrix = _heat_map(trial, model, test_x)
        block = block_structure(matrix)
        values |= {f"block_{arm}": block.fraction, f"start_{arm}": block.start, f"stop_{arm}": block.stop}
        values |= {f"likeness_{arm}": _off_diagonal(matrix), f"loss_{arm}": loss}
        values[f"accuracy_{arm}"] = accuracy(model, test_x, test_y)
    return values | {
        "wide_over_small": values["block_wide"] - values["block_small"],
        "deep_over_small": values["block_deep"] - values["block_small"],
        "few_over_many": values["block_wide"] - values["block_wide_many"],
    }


def first_component_carries_the_block(trial: Trial) -> dict[str, float]:
    """One seed, the deep network on few data: first components' shares by layer, and likeness with and without them."""
    size = SIZES[trial.scale]
    x, y, test_x, _, classes = _data(trial)
    model, loss = _trained(trial, size.deep, x[: size.few], y[: size.few], classes)
    matrix, without = (_heat_map(trial, model, test_x, remove=remove) for remove in (0, 1))
    block = block_structure(matrix)
    inside = _inside(block, len(matrix))
    profile = principal_components(model, test_x[:256], layers=_layers(model))
    likeness = (matrix.sum(1) - matrix.diagonal()) / (len(matrix) - 1)
    rank = spearmanr(profile.shares.numpy(), likeness.numpy()).statistic
    kept = {name: _off_diagonal(each[inside][:, inside]) for name, each in (("with", matrix), ("without", without))}
    return {
        "share_follows_likeness": rank if math.isfinite(rank) else 0.0,
        "likeness_lost": kept["with"] - kept["without"],
        "likeness_in_block": kept["with"],
        "likeness_in_block_without": kept["without"],
        "block": block.fraction,
        "block_without": block_structure(without).fraction,
        "share_inside": profile.shares[inside].mean().item(),
        "share_outside": profile.shares[~inside].mean().item() if (~inside).any() else 0.0,
        "largest_share": profile.shares.max().item(),
        "cosine_inside": _off_diagonal(profile.cosines[inside][:, inside]),
        "loss": loss,
    }


def block_is_unique_to_the_run(trial: Trial) -> dict[str, float]:
    """One seed: two deep networks from different first weights, layer by layer, inside and outside their blocks."""
    size = SIZES[trial.scale]
    x, y, test_x, _, classes = _data(trial)
    values: dict[str, float] = {}
    for arm, shape in (("small", size.small), ("deep", size.deep)):
        (first, loss), (second, second_loss) = (
            _trained(trial, shape, x[: size.few], y[: size.few], classes, copy) for copy in (0, 1)
        )
        agreement = _heat_map(trial, first, test_x, second).diagonal()
        values |= {f"agreement_{arm}": agreement.mean().item(), f"loss_{arm}": (loss + second_loss) / 2}
        parts: dict[bool, list[float]] = {True: [], False: []}
        for model in (first, second):
            inside = _inside(block_structure(_heat_map(trial, model, test_x)), len(agreement))
            for part, places in ((True, inside), (False, ~inside)):
                parts[part] += [agreement[places].mean().item()] if places.any() else []
        values[f"inside_{arm}"] = statistics.fmean(parts[True])
        # a network that is one block has no outside: then nothing is seen of a difference
        values[f"outside_{arm}"] = statistics.fmean(parts[False] or parts[True])
    return values | {
        "outside_over_inside": values["outside_deep"] - values["inside_deep"],
        "small_over_block": values["agreement_small"] - values["inside_deep"],
    }


def layers_in_the_block_can_go(trial: Trial) -> dict[str, float]:
    """One seed, the deep network on few data: accuracy lost with as many blocks deleted inside the block as outside it."""
    size = SIZES[trial.scale]
    x, y, test_x, test_y, classes = _data(trial)
    model, loss = _trained(trial, size.deep, x[: size.few], y[: size.few], classes)
    block, names = block_structure(_heat_map(trial, model, test_x)), _layers(model)
    full, full_loss = accuracy(model, test_x, test_y), _loss(model, test_x, test_y)
    free = deletable_blocks(model)
    groups = {
        "inside": [name for name in names[block.start : block.stop] if name in free],
        "outside": [name for name in (*names[: block.start], *names[block.stop :]) if name in free],
    }
    count, rng = min(len(group) for group in groups.values()) // 2, trial.rng("deleted")
    values = {"accuracy": full, "loss": loss, "test_loss": full_loss, "deleted": count, "block": block.fraction}
    for part, group in groups.items():
        single, several, rise = [], [], []
        for name in group:
            with delete_blocks(model, name):
                single.append(full - accuracy(model, test_x, test_y))
        for _ in range(size.draws if count else 0):
            with delete_blocks(model, [str(name) for name in rng.choice(group, count, replace=False)]):
                several.append(full - accuracy(model, test_x, test_y))
                rise.append(_loss(model, test_x, test_y) - full_loss)
        values[f"one_{part}"] = statistics.fmean(single or [0.0])
        values[f"several_{part}"] = statistics.fmean(several or [0.0])
        values[f"loss_rise_{part}"] = statistics.fmean(rise or [0.0])
    return values | {"outside_over_inside": values["several_outside"] - values["several_inside"]}


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return F.cross_entropy(predict(model, x), y).item()


def wide_and_deep_err_differently(trial: Trial) -> dict[str, float]:
    """One seed: several shallow and several deep networks of like accuracy; which test images how many of them have right."""
    size = SIZES[trial.scale]
    x, y, test_x, test_y, classes = _data(trial)
    right, values = [], {}
    for arm, shape in zip(("shallow", "deep"), size.peers, strict=True):
        trained = [_trained(trial, shape, x[: size.few], y[: size.few], classes, copy) for copy in range(size.copies)]
        right.append(torch.stack([predict(model, test_x).argmax(1) == test_y for model, _ in trained]))
        values[f"accuracy_{arm}"] = right[-1].double().mean().item()
        values[f"loss_{arm}"] = statistics.fmean(loss for _, loss in trained)
    found = compare_examples(*right)
    return values | {
        "beyond_chance": found.variance / max(found.chance, 1e-6),
        "variance": found.variance,
        "chance": found.chance,
        "accuracy_gap": values["accuracy_shallow"] - values["accuracy_deep"],
    }
