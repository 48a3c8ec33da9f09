"""AdvProp's claim, re-measured: clean and corrupted images, against plain and traditional adversarial training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import Images, split
from saigen.data.augmentation import shift_and_flip
from saigen.data.subsets import sample
from saigen.nn.resnet import ResNet
from saigen.papers.vision.advprop.model import AdvProp, Attack, convert_auxiliary_bn, use_branch
from saigen.train import accuracy, cosine, fit
from saigen.trial import Trial

ARMS = ("plain", "joint", "advprop")


@dataclass(frozen=True)
class Size:
    train: int | None  # None: all there is
    test: int | None
    side: int
    block: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    epochs: int  # of the adversarial arms; "plain" has twice as many, and sees as many images
    batch: int
    rates: dict[str, float]  # an arm's own, the best of a grid on pilot seeds
    eps: dict[str, float | int]  # strength of the attack, likewise
    steps: int | None  # None: the paper's rule
    step: float | None  # of the attack, a share of eps; None: one level
    data: str = "digits"


SIZES = {
    "tiny": Size(
        64, 32, 16, "basic", (1,), (8,), 1, 32, dict.fromkeys(ARMS, 3e-3), {"joint": 16, "advprop": 16}, 2, 0.6
    ),
    "laptop": Size(
        300, 1497, 8, "basic", (1, 1), (16, 32), 60, 50,
        {"plain": 5e-3, "joint": 1e-2, "advprop": 1e-2}, {"joint": 12, "advprop": 32}, 2, 0.6,
    ),
    "real": Size(
        5000, 1500, 32, "basic", (1, 1, 1), (8, 16, 32), 6, 64,
        dict.fromkeys(ARMS, 3e-3), {"joint": 1, "advprop": 1}, None, None, "images",
    ),
    "full": Size(
        None, None, 224, "bottleneck", (3, 4, 6, 3), (64, 128, 256, 512), 105, 256,
        dict.fromkeys(ARMS, 1e-3), {"joint": 1, "advprop": 1}, None, None, "images",
    ),
}  # fmt: skip


def adversarial_images_help(trial: Trial) -> dict[str, float]:
    """One seed: plain training, adversarial training with shared and with separate batch norms, from one start."""
    size = SIZES[trial.scale]
    train, test = _digits(trial, size) if size.data == "digits" else _own(trial, size)
    corrupted = corruptions(test.x, trial.generator("corruptions"))
    values = {}
    for done, arm in enumerate(ARMS):
        trial.progress(done, len(ARMS), arm)
        with trial.seeded("weights"):
            model = ResNet(
                size.block,
                size.depths,
                size.widths,
                num_classes=len(train.classes),
                in_chans=train.x.shape[1],
                small_stem=size.side < 64,
            )
        loss, epochs = _plain, 2 * size.epochs
        if arm != "plain":
            convert_auxiliary_bn(model)
            eps = size.eps[arm]
            attack = Attack(eps, size.steps, 1 if size.step is None else size.step * eps)
            loss, epochs = AdvProp(attack, separate=arm == "advprop", mean=True), size.epochs
        fit(
            model,
            loss,
            (train.x, train.y),
            optimizer=torch.optim.AdamW(model.parameters(), lr=size.rates[arm], weight_decay=0.05),
            epochs=epochs,
            batch_size=size.batch,
            seed=trial.seed,
            schedule=cosine(warmup=20),
            transform=partial(shift_and_flip, mirror=0.0 if size.data == "digits" else 0.5),
            checkpoint=trial.checkpoint(arm),
            device=trial.device,
        )
        values[arm] = accuracy(model, test.x, test.y)
        each = [accuracy(model, x, test.y) for x in corrupted]
        values[f"{arm}_corrupted"] = sum(each) / len(each)
    with use_branch(model, 1):
        values["advprop_auxiliary"] = accuracy(model, test.x, test.y)
    values["statistics_apart"] = apart(model)
    return values | {
        "over_plain": values["advprop"] - values["plain"],
        "over_plain_corrupted": values["advprop_corrupted"] - values["plain_corrupted"],
        "over_joint": values["advprop"] - values["joint"],
    }


def _plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def apart(model: nn.Module) -> float:
    """How far main and auxiliary running means lie apart, in running standard deviations, a mean over all channels."""
    far = [
        ((norm.aux_bn[0].running_mean - norm.running_mean) / (norm.running_var + norm.eps).sqrt()).abs()
        for norm in model.modules()
        if hasattr(norm, "aux_bn")
    ]
    return torch.cat(far).mean().item()


def corruptions(x: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Six corruptions of images in [0, 1], each in three severities, in the manner of ImageNet-C."""
    n, _, h, w = x.shape
    made: list[Tensor] = []

    def add(change: Callable[[float], Tensor], severities: tuple[float, ...]) -> None:
        made.extend(change(severity).clamp(0, 1) for severity in severities)

    def blur(sigma: float) -> Tensor:
        taps = torch.arange(-3, 4)
        kernel = torch.exp(-0.5 * (taps / sigma) ** 2)
        kernel = (kernel / kernel.sum()).repeat(x.shape[1], 1)[:, None]
        padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
        along = F.conv2d(padded, kernel[..., None], groups=x.shape[1])
        return F.conv2d(along, kernel[:, :, None], groups=x.shape[1])

    def occlude(share: float) -> Tensor:
        side = round(share * h)
        corner = (torch.rand(2, n, generator=generator) * (h - side + 1)).long()
        rows, columns = (torch.arange(length) - c[:, None] for length, c in zip((h, w), corner, strict=True))
        inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None]
        return x.masked_fill(inside[:, None], 0.5)

    def salt_and_pepper(share: float) -> Tensor:
        drawn = torch.rand(n, 1, h, w, generator=generator)
        return torch.where(drawn < share / 2, 0.0, torch.where(drawn > 1 - share / 2, 1.0, x))

    mean = x.mean((1, 2, 3), keepdim=True)
    add(lambda std: x + std * torch.randn(x.shape, generator=generator), (0.1, 0.2, 0.3))
    add(blur, (h / 20, h / 12, h / 8))
    add(lambda factor: mean + factor * (x - mean), (0.5, 0.3, 0.2))
    add(occlude, (0.2, 0.3, 0.4))
    add(lambda share: x.roll((math.ceil(share * h), -math.ceil(share * w)), (2, 3)), (0.1, 0.2, 0.3))
    add(salt_and_pepper, (0.05, 0.1, 0.2))
    return made


def _digits(trial: Trial, size: Size) -> list[Images]:
    digits = trial.data("digits")
    parts = split(digits.y.numpy(), (size.train, size.test), trial.rng("split"))
    large = [digits.subset(part) for part in parts]
    return [
        Images(
            F.interpolate(part.x, (size.side,) * 2, mode="bilinear"), part.y, part.classes, part.name, part.fingerprint
        )
        for part in large
    ]


def _own(trial: Trial, size: Size) -> list[Images]:
    return [
        sample(trial.data("images", size=size.side, part=part), count, trial.rng(part)).float()
        for part, count in (("train", size.train), ("test", size.test))
    ]
