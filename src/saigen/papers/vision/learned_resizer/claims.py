"""The learned resizer's claims, re-measured: whether it beats fixed ones at the same input size of the classifier, and
whether that is more than its extra capacity."""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import fingerprint
from saigen.data.augmentation import standardised
from saigen.data.subsets import sample
from saigen.measure import macs, parameters
from saigen.papers.vision.learned_resizer.layer import LearnedResizer, ResizedClassifier
from saigen.train import accuracy, cosine, predict
from saigen.train.selection import fit_best
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    large: int  # the side of the images
    small: int  # the side of what the classifier sees
    width: int
    channels: tuple[int, ...]
    train: int
    test: int
    epochs: int
    batch: int
    rates: tuple[float, ...]  # of several, each arm takes the one that does best on a held-out fifth
    warmup: int = 20


SIZES = {
    "tiny": Size(24, 8, 4, (8, 8), 64, 64, 1, 32, (3e-3,), 1),
    "laptop": Size(48, 16, 8, (16, 32, 32), 1000, 1000, 6, 32, (3e-3,)),
    "real": Size(32, 16, 8, (16, 32, 64), 8000, 2000, 8, 64, (1e-3, 3e-3)),
}


def stripes(n: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 1, side, side) of 8 classes: 4 directions and 2 wave lengths of fine stripes, in a soft window.

    Shrunk to a third, the waves are near or beyond what the small image can hold. A coarse shape without meaning,
    contrast, phase and noise vary.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)[..., None, None]

    y = torch.randint(8, (n,), generator=generator)
    angle = (y % 4)[:, None, None] * (math.pi / 4) + 0.2 * (uniform(n) - 0.5)
    wave = torch.where(y < 4, 3.2, 4.6)[:, None, None] + 0.4 * (uniform(n) - 0.5)
    grid = torch.arange(side, dtype=torch.float32)
    along = angle.cos() * grid + angle.sin() * grid[:, None]
    centre = side * (0.3 + 0.4 * torch.rand(2, n, generator=generator))
    far = (grid - centre[0][:, None, None]) ** 2 + (grid[:, None] - centre[1][:, None, None]) ** 2
    window = torch.exp(-far / (2 * (0.22 * side) ** 2))
    contrast = 0.4 + 0.6 * uniform(n)
    x = contrast * window * (2 * math.pi * (along / wave + uniform(n))).cos()
    turn, length = 2 * math.pi * uniform(n), side * (0.5 + uniform(n))
    shape = (2 * math.pi * (turn.cos() * grid + turn.sin() * grid[:, None]) / length + 2 * math.pi * uniform(n)).cos()
    x = x + 0.7 * shape + 0.3 * torch.randn(n, side, side, generator=generator)
    return x[:, None], y


class Fixed(nn.Module):
    """Plain resizing."""

    def __init__(self, size: int, antialias: bool) -> None:
        super().__init__()
        self.size, self.antialias = size, antialias

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, (self.size,) * 2, mode="bilinear", align_corners=False, antialias=self.antialias)


def classifier(channels: tuple[int, ...], in_chans: int, classes: int) -> nn.Sequential:
    """3x3 convolutions with batch norm, halving the resolution between them, and the mean."""
    layers: list[nn.Module] = []
    for i, width in enumerate(channels):
        layers += [nn.Conv2d(in_chans, width, 3, 1 if i == 0 else 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        in_chans = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_chans, classes))


def _data(trial: Trial, size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    if trial.scale == "real":
        train, test = (
            sample(trial.data("images", size=size.large, part=part), count, trial.rng(f"split {part}"))
            for part, count in (("train", size.train), ("test", size.test))
        )
        return standardised(train.x), train.y, standardised(test.x), test.y, len(train.classes)
    x, y = stripes(size.train + size.test, size.large, trial.generator("stripes"))
    trial.used("stripes", fingerprint((x, y)))
    return x[: size.train], y[: size.train], x[size.train :], y[size.train :], 8


def learned_beats_fixed(trial: Trial) -> dict[str, float]:
    """One seed: the same classifier behind four resizers, the learned one's network after a fixed one among them."""
    size = SIZES[trial.scale]
    train_x, train_y, test_x, test_y, classes = _data(trial, size)
    channels = train_x.shape[1]
    with trial.seeded("classifier"):
        backbone = classifier(size.channels, channels, classes)
    with trial.seeded("resizer"):
        learned = LearnedResizer(size.small, channels, width=size.width)
    after = copy.deepcopy(learned)  # as many parameters, but what the fixed resizing lost is lost
    resizers = {
        "bilinear": Fixed(size.small, antialias=False),
        "antialiased": Fixed(size.small, antialias=True),
        "capacity": nn.Sequential(Fixed(size.small, antialias=False), after),
        "learned": learned,
    }
    held_out = len(train_x) // 5 if len(size.rates) > 1 else 0
    values = {}
    for arm, resizer in resizers.items():
        best = fit_best(
            ResizedClassifier(resizer, copy.deepcopy(backbone)),
            lambda model, x, y: F.cross_entropy(model(x), y),
            (train_x[held_out:], train_y[held_out:]),
            rates=size.rates,
            optimizer=lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01),
            held_out=(train_x[:held_out], train_y[:held_out]),
            epochs=size.epochs,
            batch_size=size.batch,
            seed=trial.seed,
            schedule=cosine(warmup=size.warmup),
            transform=flip if trial.scale == "real" else None,
            checkpoint=lambda rate, arm=arm: trial.checkpoint(f"{arm}_{rate}"),
            device=trial.device,
            on_step=lambda step, total, _, arm=arm: trial.progress(step, total, arm),
        )
        model, values[f"{arm}_rate"], values[f"{arm}_loss"] = best.model, best.rate, best.history.losses[-1]
        values[arm] = accuracy(model, test_x, test_y)
        values[f"{arm}_parameters"] = float(parameters(model))
        values[f"{arm}_macs"] = float(macs(model, tuple(train_x.shape[1:])))
    # how far the classifier's image is from the plain one: looks are not the aim
    plain, seen = Fixed(size.small, False)(test_x), predict(model.resizer, test_x)
    values["psnr"] = 10 * math.log10(float((plain.max() - plain.min()) ** 2 / (seen - plain).square().mean()))
    values["gain_over_bilinear"] = values["learned"] - values["bilinear"]
    values["gain"] = values["learned"] - max(values[arm] for arm in ("bilinear", "antialiased", "capacity"))
    return values


def flip(generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x), y


def costs_little(trial: Trial) -> dict[str, float]:
    """Multiply-adds of the default resizer from 448 to 224 pixels and its parameters, counted."""
    with torch.device("meta"):
        resizer = LearnedResizer(224)
    return {"gigamacs": macs(resizer, (3, 448, 448)) / 1e9, "parameters": float(parameters(resizer))}
