"""Progressive learning (section 4 of EfficientNetV2): the images grow during training, and so does the regularisation.

Small images make the early epochs cheap. The paper's point is that a small image also asks for less regularisation: the
accuracy that earlier progressive resizing lost comes from regularising all sizes alike (table 5). Training is divided
into M stages, and stage i takes size and each regulariser from the line between its first and its last value,

    S_i = S_0 + (S_e - S_0) i / (M - 1),        phi_i = phi_0 + (phi_e - phi_0) i / (M - 1)        (algorithm 1)

for RandAugment's magnitude, mixup's alpha and the dropout rate. Nothing here knows of EfficientNet: any classifier of
images that takes several sizes can be trained so, from any loader.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from saigen.papers.augmentation.randaugment import RandAugment

Number = int | float
KINDS = ("paper", "release")


class ProgressiveStage(NamedTuple):
    """What holds from ``first_epoch`` for ``epochs`` epochs."""

    index: int
    first_epoch: int
    epochs: int
    size: int
    rand_augment: float
    mixup: float
    cutmix: float
    dropout: float


@dataclass(frozen=True)
class ProgressiveSchedule:
    """Algorithm 1: size of the images and strength of each regulariser, a stage of epochs at a time.

    ``size``, ``rand_augment`` (magnitude), ``mixup`` and ``cutmix`` (alpha of the Beta distribution) and ``dropout``
    (rate) are pairs: the value of the first stage and of the last. Where ``epochs`` is no multiple of ``stages``, the
    later stages are the longer ones. ``kind`` is

    - "paper": size and regularisers on the line from first to last;
    - "release": as the published code does it, size i of M is first + (last - first) (i + 1) / M, so that the first stage
      is already larger than ``size[0]``, and dropout keeps its last value throughout.

    Raises ``ValueError`` for values out of range, and for more stages than epochs.

    >>> schedule = ProgressiveSchedule(epochs=350, size=(128, 300), rand_augment=(5, 15), dropout=(0.1, 0.3))
    >>> [stage.size for stage in schedule.table()], round(schedule.at(100).rand_augment, 2)
    ([128, 185, 243, 300], 8.33)
    """

    epochs: int
    stages: int = 4
    size: tuple[int, int] = (128, 300)
    rand_augment: tuple[Number, Number] = (5.0, 15.0)
    mixup: tuple[Number, Number] = (0.0, 0.0)
    cutmix: tuple[Number, Number] = (0.0, 0.0)
    dropout: tuple[Number, Number] = (0.1, 0.3)
    kind: str = "paper"

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise ValueError(f"stages is {self.stages}, allowed is at least 1")
        if self.epochs < self.stages:
            raise ValueError(f"epochs is {self.epochs}, allowed is at least one for each of the {self.stages} stages")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, allowed are {' and '.join(map(repr, KINDS))}")
        for name, least, most in (
            ("size", 1, None), ("rand_augment", 0, None), ("mixup", 0, None), ("cutmix", 0, None), ("dropout", 0, 1),
        ):  # fmt: skip
            pair = getattr(self, name)
            if len(pair) != 2 or min(pair) < least or (most is not None and max(pair) >= most):
                below = "" if most is None else f" and below {most}"
                raise ValueError(f"{name} is {pair}, allowed are two numbers, each at least {least}{below}")

    def table(self) -> tuple[ProgressiveStage, ...]:
        """Every stage, in order (table 6 for the settings of EfficientNetV2-S, M and L)."""
        return tuple(self._stage(i) for i in range(self.stages))

    def at(self, epoch: int) -> ProgressiveStage:
        """The stage to which ``epoch`` (from 0) belongs; ``ValueError`` outside of the training."""
        if not 0 <= epoch < self.epochs:
            raise ValueError(f"epoch is {epoch}, allowed is 0 to {self.epochs - 1}")
        return next(stage for stage in reversed(self.table()) if stage.first_epoch <= epoch)

    def relative_cost(self, cost: Callable[[int], Number] = lambda size: size * size) -> float:
        """Cost of the whole training over that of training at the last size throughout.

        ``cost`` of one image of a size: multiply-adds, or seconds; by default its number of pixels.
        """
        table = self.table()
        return sum(stage.epochs * cost(stage.size) for stage in table) / (self.epochs * cost(table[-1].size))

    def _stage(self, i: int) -> ProgressiveStage:
        share = i / (self.stages - 1) if self.stages > 1 else 1.0
        first, end = (k * self.epochs // self.stages for k in (i, i + 1))

        def line(pair: tuple[Number, Number]) -> float:
            return pair[0] + (pair[1] - pair[0]) * share

        if self.kind == "release":
            size = int(self.size[0] + (self.size[1] - self.size[0]) * (i + 1) / self.stages)
            dropout = float(self.dropout[1])
        else:
            size, dropout = round(line(self.size)), line(self.dropout)
        return ProgressiveStage(
            i, first, end - first, size, line(self.rand_augment), line(self.mixup), line(self.cutmix), dropout
        )


# table 6, and the released configuration of the same networks
PAPER_SCHEDULES = {
    "s": ProgressiveSchedule(350, 4, (128, 300), (5, 15), (0, 0), (0, 0), (0.1, 0.3)),
    "m": ProgressiveSchedule(350, 4, (128, 380), (5, 20), (0, 0.2), (0, 0), (0.1, 0.4)),
    "l": ProgressiveSchedule(350, 4, (128, 380), (5, 25), (0, 0.5), (0, 0), (0.1, 0.5)),
}
RELEASE_SCHEDULES = {
    "s": ProgressiveSchedule(350, 4, (128, 300), (5, 10), (0, 0), (0, 0), (0.2, 0.2), "release"),
    "m": ProgressiveSchedule(350, 4, (128, 384), (5, 15), (0, 0.2), (0, 0.2), (0.3, 0.3), "release"),
    "l": ProgressiveSchedule(350, 4, (128, 384), (5, 20), (0, 0.5), (0, 0.5), (0.4, 0.4), "release"),
}


def release_size(variant: str, stage: int) -> int:
    """Side of the images in a stage (from 0) of the released recipe for "s", "m" or "l".

    >>> release_size("s", 0)
    171
    """
    if variant not in RELEASE_SCHEDULES:
        raise ValueError(f"variant is {variant!r}, allowed are {', '.join(RELEASE_SCHEDULES)}")
    return RELEASE_SCHEDULES[variant].table()[stage].size


def resize(x: Num[Tensor, "b c h w"], size: int) -> Num[Tensor, "b c j k"]:
    """Images of ``size`` pixels a side, float or uint8, by antialiased bilinear sampling; as they are where they fit."""
    if size < 1:
        raise ValueError(f"size is {size}, allowed is at least 1")
    if x.shape[-2:] == (size, size):
        return x
    if x.is_floating_point():
        return F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return F.interpolate(x.float(), (size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255).to(x.dtype)


def set_dropout(model: nn.Module, rate: Number) -> None:
    """Changes the dropout of ``model`` in place: its attribute ``drop_rate`` and the rate of every ``nn.Dropout`` in it.

    Parameters, optimizer state and weight averages stay what they are. Raises ``ValueError`` for a rate outside [0, 1) and
    for a model without dropout, unless the rate is 0.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}, allowed is 0 <= rate < 1")
    found = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p, found = float(rate), True
        elif isinstance(getattr(module, "drop_rate", None), Number):
            module.drop_rate, found = float(rate), True
    if not found and rate > 0:
        raise ValueError(f"model is a {type(model).__name__} without nn.Dropout or drop_rate, allowed is only rate 0")


def mixup_cutmix(
    x: Float[Tensor, "b c h w"],
    y: Float[Tensor, "b k"],
    mixup: Number = 0.0,
    cutmix: Number = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
    """Mixes each image and its soft label with its partner, the batch in reverse; alpha 0 switches a mix off.

    mixup (Zhang et al., 2018): lambda x + (1 - lambda) x', lambda from Beta(alpha, alpha), an image's own, at least 1/2.
    CutMix (Yun et al., 2019): a box of area 1 - lambda from the partner, labels weighted by what the border leaves of it.
    With both, the first half of the batch is mixed up and the second half cut, as in the published code.
    """
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if alpha < 0:
            raise ValueError(f"{name} is {alpha}, allowed is at least 0")
    if mixup > 0 and cutmix > 0 and len(x) > 1:
        half = len(x) // 2
        first = mixup_cutmix(x[:half], y[:half], mixup, 0.0, generator)
        second = mixup_cutmix(x[half:], y[half:], 0.0, cutmix, generator)
        return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
    if mixup > 0:
        own = _beta(len(x), mixup, generator).to(x)
        own = torch.maximum(own, 1 - own)
        weight = own[:, None, None, None]
        x = weight * x + (1 - weight) * x.flip(0)
    elif cutmix > 0:
        h, w = x.shape[-2:]
        side = (1 - _beta(len(x), cutmix, generator)).sqrt()
        centre = torch.rand(2, len(x), generator=generator)
        inside = [
            ((torch.arange(n) + 0.5)[None] - n * c[:, None]).abs() < side[:, None] * n / 2
            for n, c in zip((h, w), centre, strict=True)
        ]
        box = (inside[0][:, :, None] & inside[1][:, None, :])[:, None].to(x.device)
        x = torch.where(box, x.flip(0), x)
        own = 1 - box.to(x.dtype).mean((1, 2, 3))
    else:
        return x, y
    own = own[:, None].to(y)
    return x, own * y + (1 - own) * y.flip(0)


def _beta(n: int, alpha: Number, generator: torch.Generator | None) -> Tensor:
    # torch's Beta takes no generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, n)).float()


class ProgressiveLearning(nn.Module):
    """Turns the batches of any loader into those of a stage: smaller images, RandAugment, mixup and CutMix.

    ``start(epoch, model)`` enters an epoch and sets the model's dropout; called with images (b, c, h, w), float in [0, 1]
    or uint8, and labels (b,), the module then resizes, augments with two operations of RandAugment and mixes, and gives
    float images in [0, 1] of the stage's size and the labels. Where any stage mixes, ``num_classes`` is needed and the
    labels are soft in all of them, (b, num_classes); else they pass as they are. ``augment`` replaces RandAugment: any
    module on images with an attribute ``magnitude``. In eval mode batches pass untouched.

    >>> progressive = ProgressiveLearning(ProgressiveSchedule(8, 4, size=(16, 32)))
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 2))
    >>> progressive.start(0, model).size
    16
    >>> progressive(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))[0].shape
    torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self, schedule: ProgressiveSchedule, num_classes: int | None = None, augment: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.mixes = max(*schedule.mixup, *schedule.cutmix) > 0
        if self.mixes and (num_classes is None or num_classes < 1):
            raise ValueError(f"num_classes is {num_classes}, allowed is at least 1 where mixup or cutmix is used")
        if augment is not None and not hasattr(augment, "magnitude"):
            raise ValueError(f"augment is a {type(augment).__name__}, allowed are modules with an attribute magnitude")
        self.schedule = schedule
        self.num_classes = num_classes
        self.augment = RandAugment(2, op_set="official") if augment is None else augment
        self.start(0)

    def start(self, epoch: int, model: nn.Module | None = None) -> ProgressiveStage:
        """Enters the stage of ``epoch``, sets the dropout of ``model`` where one is given, and returns the stage.

        A loader that decodes images can be told ``stage.size``; what comes in another size is resized.
        """
        self.stage = self.schedule.at(epoch)
        self.augment.magnitude = float(self.stage.rand_augment)
        if model is not None:
            set_dropout(model, self.stage.dropout)
        return self.stage

    def batches(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        epoch: int,
        model: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of ``loader`` for ``epoch``: ``for x, y in progressive.batches(loader, epoch, model): …``."""
        self.start(epoch, model)
        for x, y in loader:
            yield self(x, y, generator)

    def forward(
        self, x: Num[Tensor, "b c h w"], y: Num[Tensor, "b *k"], generator: torch.Generator | None = None
    ) -> tuple[Num[Tensor, "b c j i"], Num[Tensor, "b *l"]]:
        if not self.training:
            return x, y
        x = self.augment(resize(x, self.stage.size), generator=generator)
        x = x if x.is_floating_point() else x.float() / 255
        if self.mixes:
            y = y if y.is_floating_point() else F.one_hot(y, self.num_classes).to(x.dtype)
            x, y = mixup_cutmix(x, y, self.stage.mixup, self.stage.cutmix, generator)
        return x, y
