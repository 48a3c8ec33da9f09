"""RandAugment: N operations drawn uniformly, all at one magnitude M (Cubuk, Zoph, Shlens, Le, 2020, arXiv 1909.13719).

The paper's search space is two whole numbers: N, how many operations an image passes through, and M, how strong they
are, on a scale of 0 to 10 that may be exceeded. It is small enough for a grid search on the task itself, which matters,
for the best strength grows with the model and with the data (section 4), and a search on a small proxy task misses it.

    for each image, N times:  op ~ Uniform(K operations), with replacement;  image <- op(image, M)
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from saigen.nn.image_operations import (
    ARITHMETICS,
    GEOMETRIC,
    OPERATIONS,
    Fill,
    affine,
    apply_operation,
    from_levels,
    geometry_matrix,
    to_levels,
)  # fmt: skip
from saigen.nn.image_range import check_unit_range

SCHEDULES = ("official", "increasing", "torchvision")

MAGNITUDE_MODES = ("constant", "random", "linear", "random_increasing")


@dataclass(frozen=True)
class OperationSet:
    """One of the published lists of operations, with the settings that go with it."""

    names: tuple[str, ...]
    schedule: str = "official"
    max_level: float | int = 10.0
    translate: float | int = 100.0
    """Translation at the maximal level: pixels, or a share of the image's side where ``relative``."""
    relative: bool = False
    probability: float | int = 1.0
    fill: float = 128.0


# Section 3: K = 14.
_PAPER = (
    "Identity", "AutoContrast", "Equalize", "Rotate", "Solarize", "Color", "Posterize", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
# The official code has no Identity, but Invert, Cutout and SolarizeAdd: K = 16.
_OFFICIAL = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
)  # fmt: skip
OPERATION_SETS = {
    "paper": OperationSet(_PAPER),
    "official": OperationSet(_OFFICIAL),
    "torchvision": OperationSet(_PAPER, "torchvision", max_level=30.0, translate=150 / 331, relative=True, fill=0.0),
    "timm": OperationSet(tuple(n for n in _OFFICIAL if n != "Cutout"), translate=0.45, relative=True, probability=0.5),
}


def rand_augment_operations(op_set: str = "paper") -> tuple[str, ...]:
    """The names of the operations in ``"paper"`` (14), ``"official"`` (16), ``"torchvision"`` (14) or ``"timm"`` (15)."""
    if op_set not in OPERATION_SETS:
        raise ValueError(f"op_set is {op_set!r}, allowed are {', '.join(OPERATION_SETS)} and a sequence of operations")
    return OPERATION_SETS[op_set].names


def level_to_argument(
    name: str,
    level: float | int,
    *,
    sign: int = 1,
    schedule: str = "official",
    max_level: float | int = 10.0,
    translate: float | int = 100.0,
    cutout: float | int = 40.0,
) -> float | int:
    """What the operation ``name`` is given at ``level``: degrees, shear, pixels, bits, a threshold, a factor.

    ``sign`` is the direction, drawn with equal odds, of what has one. In the ``"official"`` schedule Posterize and
    Solarize weaken as the level grows and the four blends are idle at half of ``max_level``; ``"increasing"`` (timm's
    ``inc1``) and ``"torchvision"`` start at no change and grow. Operations without an argument give 0.

    >>> level_to_argument("Rotate", 9), level_to_argument("Posterize", 9), round(level_to_argument("Color", 9), 2)
    (27.0, 3, 1.72)
    """
    if name not in OPERATIONS:
        raise ValueError(f"name is {name!r}, allowed are {', '.join(OPERATIONS)}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}, allowed are {', '.join(SCHEDULES)}")
    share = level / max_level
    match name:
        case "Rotate":
            return sign * share * 30.0
        case "ShearX" | "ShearY":
            return sign * share * 0.3
        case "TranslateX" | "TranslateY":
            return sign * share * translate
        case "Cutout":
            return int(share * cutout)
        case "SolarizeAdd":
            return int(share * 110)
        case "Posterize":
            # The official code does not bound the bits: level 28 asks for 11 of 8.
            bits = {"official": int(share * 4), "increasing": 4 - int(share * 4), "torchvision": round(8 - share * 4)}
            return min(8, max(0, bits[schedule]))
        case "Solarize":
            kept = min(256, int(share * 256))
            return {"official": kept, "increasing": 256 - kept, "torchvision": max(0.0, 255.0 * (1 - share))}[schedule]
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return share * 1.8 + 0.1 if schedule == "official" else max(0.1, 1.0 + sign * share * 0.9)
    return 0


class Policy(NamedTuple):
    """What was drawn for a batch of b images: N operations each (-1 where none is applied), their levels and signs."""

    operations: Int[Tensor, "n b"]
    levels: Float[Tensor, "n b"]
    signs: Int[Tensor, "n b"]


class RandAugment(nn.Module):
    """RandAugment on images ``(..., c, h, w)``, float in [0, 1] or uint8; every image of a batch draws its own operations.

    N is ``num_ops`` and M is ``magnitude``, on the scale on which ``max_level`` is the tables' end; both may be exceeded.
    ``op_set`` names a published list (``"paper"``, ``"official"``, ``"torchvision"``, ``"timm"``), which brings its own
    ``schedule``, ``max_level``, ``translate`` (pixels, or a share of the side), ``probability`` of each drawn operation
    and ``fill`` level; all of them can be overridden, and ``op_set`` may be a sequence of operations. ``arithmetic`` is
    Pillow's or that of the official TensorFlow code. ``magnitude_mode`` is one of the paper's four: ``"constant"`` M,
    ``"random"`` in [0, M], ``"linear"`` from 0 to M over the training, ``"random_increasing"`` in [0, M progress];
    ``magnitude_std`` is timm's normal noise about it, clipped to [0, max_level]. ``weights`` (N, K) replaces the uniform
    choice. The operations act on 8-bit levels, so a float result is a multiple of 1/255.

    In eval mode images pass untouched, as through ``nn.Dropout``. Section 3 and figure 2.

    >>> images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> RandAugment(2, 9)(images, generator=torch.Generator().manual_seed(1)).shape
    torch.Size([8, 3, 32, 32])
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: float | int = 9.0,
        *,
        op_set: str | Sequence[str] = "paper",
        schedule: str | None = None,
        max_level: float | int | None = None,
        magnitude_mode: str = "constant",
        magnitude_std: float | int = 0.0,
        translate: float | int | None = None,
        relative: bool | None = None,
        cutout: float | int = 40.0,
        probability: float | int | None = None,
        fill: Fill | None = None,
        arithmetic: str = "pillow",
        weights: Float[Tensor, "n k"] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(op_set, str):
            rand_augment_operations(op_set)
            published = OPERATION_SETS[op_set]
        else:
            published = OperationSet(tuple(op_set))
            unknown = [name for name in published.names if name not in OPERATIONS]
            if unknown or not published.names:
                raise ValueError(f"op_set is {tuple(op_set)}, allowed are one or more of {', '.join(OPERATIONS)}")
        given = {"schedule": schedule, "max_level": max_level, "translate": translate, "relative": relative}
        given |= {"probability": probability, "fill": fill}
        chosen = {name: getattr(published, name) if value is None else value for name, value in given.items()}
        if isinstance(num_ops, bool) or not isinstance(num_ops, int) or num_ops < 0:
            raise ValueError(f"num_ops is {num_ops}, allowed is a whole number >= 0")
        if not 0.0 <= magnitude < math.inf:
            raise ValueError(f"magnitude is {magnitude}, allowed is magnitude >= 0")
        if not chosen["max_level"] > 0:
            raise ValueError(f"max_level is {max_level}, allowed is max_level > 0")
        if chosen["schedule"] not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}, allowed are {', '.join(SCHEDULES)}")
        if magnitude_mode not in MAGNITUDE_MODES:
            raise ValueError(f"magnitude_mode is {magnitude_mode!r}, allowed are {', '.join(MAGNITUDE_MODES)}")
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic is {arithmetic!r}, allowed are {', '.join(ARITHMETICS)}")
        if not 0.0 <= chosen["probability"] <= 1.0:
            raise ValueError(f"probability is {probability}, allowed is 0 <= probability <= 1")
        for name, value in {"translate": chosen["translate"], "cutout": cutout, "magnitude_std": magnitude_std}.items():
            if not value >= 0:
                raise ValueError(f"{name} is {value}, allowed is {name} >= 0")
        shape = (num_ops, len(published.names))
        if weights is not None and tuple(weights.shape) != shape:
            raise ValueError(
                f"weights has shape {tuple(weights.shape)}, allowed is {shape}: one row an operation drawn"
            )
        self.operations = published.names
        self.num_ops, self.magnitude, self.magnitude_mode = num_ops, float(magnitude), magnitude_mode
        self.magnitude_std, self.cutout, self.arithmetic = magnitude_std, cutout, arithmetic
        self.schedule, self.max_level, self.probability = chosen["schedule"], chosen["max_level"], chosen["probability"]
        self.translate, self.relative, self.fill = chosen["translate"], chosen["relative"], chosen["fill"]
        self.register_buffer("weights", weights)

    def forward(
        self, x: Num[Tensor, "*n c h w"], *, progress: float | int = 1.0, generator: torch.Generator | None = None
    ) -> Num[Tensor, "*n c h w"]:
        """Augments each image. ``progress`` is the share of the training done, in [0, 1]; ``generator`` is on the CPU."""
        if not self.training or self.num_ops == 0 or x.numel() == 0:
            return x
        check_unit_range(x)
        return self.apply_policy(
            x, self.draw(math.prod(x.shape[:-3]), progress=progress, generator=generator), generator
        )

    def draw(self, batch: int, *, progress: float | int = 1.0, generator: torch.Generator | None = None) -> Policy:
        """Draws what will be applied to ``batch`` images."""
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress is {progress}, allowed is 0 <= progress <= 1")
        shape = (self.num_ops, batch)
        if self.weights is None:
            operations = torch.randint(len(self.operations), shape, generator=generator)
        else:
            operations = torch.multinomial(
                self.weights.detach().cpu().float(), batch, replacement=True, generator=generator
            )
        signs = 2 * torch.randint(2, shape, generator=generator) - 1
        bound = self.magnitude * (progress if self.magnitude_mode in ("linear", "random_increasing") else 1.0)
        levels = torch.full(shape, bound, dtype=torch.float64)
        if self.magnitude_mode in ("random", "random_increasing"):
            levels *= torch.rand(shape, generator=generator)
        if self.magnitude_std > 0:
            levels = (levels + self.magnitude_std * torch.randn(shape, generator=generator)).clamp(0.0, self.max_level)
        if self.probability < 1.0:
            operations = operations.masked_fill(torch.rand(shape, generator=generator) >= self.probability, -1)
        return Policy(operations, levels, signs)

    def apply_policy(
        self, x: Num[Tensor, "*n c h w"], policy: Policy, generator: torch.Generator | None = None
    ) -> Num[Tensor, "*n c h w"]:
        """Applies what was drawn; ``generator`` places Cutout. Each operation runs once, on the images that drew it."""
        images = to_levels(x).reshape(-1, *x.shape[-3:])
        h, w = x.shape[-2:]
        place = list(range(len(images)))  # which of the given images now stands where
        for layer in zip(*(part.tolist() for part in policy), strict=True):
            operations, levels, signs = ([values[i] for i in place] for values in layer)
            drawn: dict[str, list[tuple[int, float]]] = {}
            for row, (number, level, sign) in enumerate(zip(operations, levels, signs, strict=True)):
                name = self.operations[number] if number >= 0 else "Identity"
                drawn.setdefault(name, []).append((row, self.argument(name, level, sign, (h, w))))
            # The images are sorted by operation, so that every run sees a slice, and put back in order at the end.
            # Geometry is one resampling, whatever the kind.
            names = sorted(drawn, key=lambda name: (name in GEOMETRIC, name))
            order = [row for name in names for row, _ in drawn[name]]
            place = [place[row] for row in order]
            images = images.index_select(0, torch.tensor(order, device=x.device))
            results, start = [], 0
            for name in (name for name in names if name not in GEOMETRIC):
                values = torch.tensor([value for _, value in drawn[name]], dtype=torch.float64)
                part = images[start : start + len(values)]
                results.append(
                    apply_operation(name, part, values, fill=self.fill, arithmetic=self.arithmetic, generator=generator)
                )
                start += len(values)
            if start < len(images):
                moves = [
                    geometry_matrix(name, value, h, w, self.arithmetic)
                    for name in names
                    if name in GEOMETRIC
                    for _, value in drawn[name]
                ]
                matrix = torch.tensor(moves, dtype=torch.float64)
                results.append(affine(images[start:], matrix, fill=self.fill, arithmetic=self.arithmetic))
            images = torch.cat(results)
        back = sorted(range(len(place)), key=place.__getitem__)
        return from_levels(images.index_select(0, torch.tensor(back, device=x.device)), x.dtype).reshape(x.shape)

    def argument(self, name: str, level: float | int, sign: int = 1, size: Sequence[int] = (224, 224)) -> float | int:
        """What ``name`` is given at ``level`` on images of ``size`` (height, width)."""
        translate = self.translate
        if self.relative and name in ("TranslateX", "TranslateY"):
            translate *= size[1] if name == "TranslateX" else size[0]
        value = level_to_argument(
            name,
            level,
            sign=sign,
            schedule=self.schedule,
            max_level=self.max_level,
            translate=translate,
            cutout=self.cutout,
        )
        # torchvision moves by whole pixels, towards zero.
        return int(value) if self.schedule == "torchvision" and name in ("TranslateX", "TranslateY") else value

    def arguments(self, size: Sequence[int] = (224, 224)) -> dict[str, float | int]:
        """What every operation is given at this M on images of ``size``; look here before trusting a magnitude."""
        return {name: self.argument(name, self.magnitude, 1, size) for name in self.operations}

    def extra_repr(self) -> str:
        return (
            f"num_ops={self.num_ops}, magnitude={self.magnitude:g}/{self.max_level:g}, {len(self.operations)} operations, "
            f"schedule={self.schedule}, magnitude_mode={self.magnitude_mode}, arithmetic={self.arithmetic}"
        )


class TrainableRandAugment(nn.Module):
    """Learned selection: weights alpha_ij of operation i as the j-th of N, by gradient (section 4.7).

    The choice is relaxed to its expectation, image <- sum_i softmax(alpha_j)_i op_i(image, M), differentiable in alpha;
    through the 8-bit operations the gradient passes straight. With a model that was trained without augmentation held
    fixed, minimising its loss on augmented validation images is the paper's first-order density matching.
    ``sampler()`` gives the RandAugment that draws by the learned weights.

    >>> trainable = TrainableRandAugment(RandAugment(2, 9))
    >>> trainable.alpha.numel(), trainable(torch.rand(2, 3, 8, 8)).shape
    (28, torch.Size([2, 3, 8, 8]))
    """

    def __init__(self, augment: RandAugment) -> None:
        super().__init__()
        if augment.num_ops == 0:
            raise ValueError("num_ops is 0, allowed is num_ops >= 1: there is nothing to learn")
        self.augment = augment
        self.alpha = nn.Parameter(torch.zeros(augment.num_ops, len(augment.operations)))

    def forward(
        self, x: Float[Tensor, "*n c h w"], *, progress: float | int = 1.0, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*n c h w"]:
        """The expected augmented images; identity in eval mode."""
        if not self.training:
            return x
        shape = x.shape
        x = x.reshape(-1, *shape[-3:])
        policy = self.augment.draw(len(x), progress=progress, generator=generator)
        for weights, levels, signs in zip(self.alpha.softmax(-1), policy.levels, policy.signs, strict=True):
            mixture = torch.zeros_like(x)
            for number, weight in enumerate(weights):
                one = Policy(torch.full_like(policy.operations[:1], number), levels[None], signs[None])
                mixture = mixture + weight * self.augment.apply_policy(x.detach(), one, generator)
            x = mixture + (x - x.detach())
        return x.reshape(shape)

    def sampler(self) -> RandAugment:
        """A copy of the RandAugment that draws operation i as the j-th with probability softmax(alpha_j)_i."""
        import copy

        sampler = copy.deepcopy(self.augment)
        sampler.register_buffer("weights", self.alpha.detach().softmax(-1))
        return sampler


@dataclass(frozen=True)
class GridResult:
    """The validation score of every (N, M) of a grid."""

    scores: dict[tuple[int, float | int], float]

    @property
    def best(self) -> tuple[int, float | int]:
        """The (N, M) with the highest score; of equals the weakest, scores that are not numbers never."""
        return min(self.scores, key=lambda nm: (-self.scores[nm] if not math.isnan(self.scores[nm]) else math.inf, nm))


def search_rand_augment(
    train_fn: Callable[[RandAugment], float],
    num_ops: Sequence[int] = (1, 2, 3),
    magnitudes: Sequence[float | int] = (2, 5, 9, 14),
    *,
    make: Callable[[int, float | int], RandAugment] = RandAugment,
) -> GridResult:
    """The paper's search: every (N, M) once, on the task itself.

    ``train_fn`` trains with the augmentation it is given and returns a score on validation data, higher being better.
    ``make(N, M)`` builds it, ``functools.partial(RandAugment, op_set="official")`` for example. N = 0 may be in the grid.

    >>> search_rand_augment(lambda augment: -abs(augment.magnitude - 5), num_ops=(1, 2), magnitudes=(2, 5, 9)).best
    (1, 5)
    """
    if not num_ops or not magnitudes:
        raise ValueError(f"num_ops is {num_ops} and magnitudes is {magnitudes}, allowed are one or more values of each")
    return GridResult({(n, m): float(train_fn(make(n, m))) for n in sorted(num_ops) for m in sorted(magnitudes)})


def probability_drawn(num_ops: int, kinds: int) -> float:
    """How probable it is that a given one of K ``kinds`` is drawn at least once in N: 1 - (1 - 1/K)^N."""
    if kinds < 1 or num_ops < 0:
        raise ValueError(f"num_ops is {num_ops} and kinds is {kinds}, allowed are num_ops >= 0 and kinds >= 1")
    return 1.0 - (1.0 - 1.0 / kinds) ** num_ops


def number_of_policies(num_ops: int, kinds: int) -> int:
    """K^N, the ordered policies that N draws of K ``kinds`` can give (section 3)."""
    return operator.pow(kinds, num_ops)
