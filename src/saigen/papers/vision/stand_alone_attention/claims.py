"""Stand-alone attention's claims, re-measured: what it costs, whether accuracy holds, and what makes it work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import fingerprint, split
from saigen.data.augmentation import shift_and_flip, standardised
from saigen.data.subsets import sample
from saigen.measure import macs, parameters
from saigen.nn.resnet import resnet50
from saigen.papers.vision.stand_alone_attention.layer import SASAResNet, sasa_resnet50
from saigen.train import accuracy, cosine
from saigen.train.selection import fit_best
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    heads: int
    kernel_size: int
    train: int | None  # None: all there is
    test: int | None
    epochs: int
    batch: int
    rates: tuple[
        float, ...
    ]  # of several, each arm takes the one that does best on a held-out fifth of its training images
    side: int


# tiny and laptop: digits and drawn marks; real and full: the user's images
SIZES = {
    "tiny": Size((1,), (8,), 2, 3, 64, 64, 1, 32, (2e-3,), 16),
    "laptop": Size((1, 1), (16, 32), 2, 7, 640, 797, 10, 32, (4e-3, 8e-3), 16),
    "real": Size((1, 1), (16, 32), 2, 7, 3000, 2000, 8, 50, (4e-3, 1.2e-2), 16),
    "full": Size((3, 4, 6, 3), (64, 128, 256, 512), 8, 7, None, None, 130, 4096, (2e-3,), 224),
}


def relations(n: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 1, side, side) of a plus and a cross: the class is the direction, of eight, from the one to the other.

    They lie 4 to 6 pixels apart, anywhere, on noise: each mark can be told by its own few pixels, the class cannot.
    """
    marks = torch.zeros(2, 3, 3)
    marks[0, 1], marks[0, :, 1] = 1, 1
    marks[1] = torch.eye(3).maximum(torch.eye(3).flip(0))
    y = torch.randint(8, (n,), generator=generator)
    distance = 4 + 2 * torch.rand(n, generator=generator)
    angle = y * (math.pi / 4)
    shift = torch.stack([distance * angle.sin(), distance * angle.cos()], 1).round().long()
    free = side - 3 - shift.abs()
    first = (torch.rand(n, 2, generator=generator) * (free + 1)).long() - shift.clamp(max=0)
    x = 0.25 * torch.randn(n, 1, side, side, generator=generator)
    window = torch.arange(3)
    for mark, place in zip(marks, (first, first + shift), strict=True):
        rows, columns = place[:, 0, None] + window, place[:, 1, None] + window
        x[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]] += mark
    return x, y


def build(size: Size, in_chans: int, classes: int, stages: Sequence[int], **options: object) -> SASAResNet:
    """A net with attention in ``stages``; on small images nothing is pooled after the stem's 7x7 of stride 2."""
    net = SASAResNet(
        size.depths,
        size.widths,
        attention_stages=stages,
        num_heads=size.heads,
        num_classes=classes,
        in_chans=in_chans,
        zero_init=False,
        **{"kernel_size": size.kernel_size, **options},
    )
    if size.side < 64:
        net.maxpool = nn.Identity()
    return net


Data = tuple[Tensor, Tensor, Tensor, Tensor, int]


def drawn(trial: Trial) -> Data:
    """The drawn relations: training and test images, the number of classes."""
    size = SIZES[trial.scale]
    train, test = 2 * size.train, 2 * size.test  # as many as one likes, since they are drawn
    x, y = relations(train + test, size.side, trial.generator("relations"))
    trial.used("relations", fingerprint([x, y]))
    return x[:train], y[:train], x[train:], y[train:], 8


def photographs(trial: Trial) -> Data:
    """The user's images."""
    size = SIZES[trial.scale]
    train, test = (
        sample(trial.data("images", size=size.side, part=part), count, trial.rng(f"split {part}"))
        for part, count in (("train", size.train), ("test", size.test))
    )
    return train.x, train.y, test.x, test.y, len(train.classes)


def noisy_digits(trial: Trial) -> Data:
    """scikit-learn's digits, enlarged, under noise that leaves errors to be made."""
    size, digits = SIZES[trial.scale], trial.data("digits")
    parts = [digits.subset(part) for part in split(digits.y.numpy(), (size.train, size.test), trial.rng("split"))]
    generator = trial.generator("noise")
    large = [F.interpolate(part.x, (size.side,) * 2, mode="bilinear") for part in parts]
    train, test = (2 * x - 0.6 + 0.5 * torch.randn(x.shape, generator=generator) for x in large)
    trial.used("noisy digits", fingerprint([train, test]))
    return train, parts[0].y, test, parts[1].y, 10


def compare(trial: Trial, task: str, data: Data, arms: dict[str, dict[str, object]]) -> dict[str, float]:
    """The test accuracy of each arm, at the best of its rates."""
    size, (train_x, train_y, test_x, test_y, classes) = SIZES[trial.scale], data
    held_out = len(train_x) // 5 if len(size.rates) > 1 else 0
    values = {}
    for arm, options in arms.items():
        with trial.seeded(f"weights {task}"):
            start = build(size, train_x.shape[1], classes, **options)
        best = fit_best(
            start,
            lambda net, x, y: F.cross_entropy(net(x), y, label_smoothing=0.1),
            (train_x[held_out:], train_y[held_out:]),
            rates=size.rates,
            optimizer=lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05),
            held_out=(standardised(train_x[:held_out]), train_y[:held_out]),
            epochs=size.epochs,
            batch_size=size.batch,
            seed=trial.seed,
            schedule=cosine(warmup=20),
            transform=shift_and_flip if train_x.dtype == torch.uint8 else None,
            checkpoint=lambda rate, arm=arm: trial.checkpoint(f"{task}_{arm}_{rate}"),
            device=trial.device,
            on_step=lambda step, total, _, arm=arm: trial.progress(step, total, f"{task}, {arm}"),
        )
        values[f"{task}_{arm}_rate"], values[f"{task}_{arm}_loss"] = best.rate, best.history.losses[-1]
        values[f"{task}_{arm}"] = accuracy(best.model, standardised(test_x), test_y)
        values[f"{task}_{arm}_parameters"] = float(parameters(best.model))
    return values


def everywhere(size: Size) -> tuple[int, ...]:
    return tuple(range(1, len(size.depths) + 1))


def costs_less_than_convolution(trial: Trial) -> dict[str, float]:
    """Full attention in ResNet-50's place, counted; at ``tiny`` as elsewhere, since counting needs no data."""
    with torch.device("meta"):
        attention, convolution = sasa_resnet50(conv_stem=False, backend="windows"), resnet50()
    counts = {"attention": macs(attention, (3, 224, 224)), "resnet": macs(convolution, (3, 224, 224))}
    return {
        "parameters": parameters(attention) / 1e6,
        "parameter_ratio": parameters(attention) / parameters(convolution),
        "mac_ratio": counts["attention"] / counts["resnet"],
        "attention_macs": float(counts["attention"]),
        "resnet_macs": float(counts["resnet"]),
    }


def accuracy_holds_with_less(trial: Trial) -> dict[str, float]:
    """One seed: the same ResNet with attention and with 3x3 convolutions, on one or two kinds of images."""
    size = SIZES[trial.scale]
    arms = {"conv": {"stages": ()}, "attention": {"stages": everywhere(size)}}
    if trial.scale in ("real", "full"):
        values = compare(trial, "images", photographs(trial), arms)
        return values | {"accuracy_drop": values["images_conv"] - values["images_attention"]}
    values = compare(trial, "digits", noisy_digits(trial), arms) | compare(trial, "relations", drawn(trial), arms)
    drops = [values[f"{task}_conv"] - values[f"{task}_attention"] for task in ("digits", "relations")]
    return values | {"accuracy_drop": sum(drops) / 2}


def relative_positions_and_wide_windows_help(trial: Trial) -> dict[str, float]:
    """One seed: attention with relative positions, without, and with a 3x3 window."""
    stages = everywhere(SIZES[trial.scale])
    arms = {
        "relative": {"stages": stages},
        "none": {"stages": stages, "position": "none"},
        "narrow": {"stages": stages, "kernel_size": 3},
    }
    values = compare(trial, "relations", drawn(trial), arms)
    return values | {
        "position_gain": values["relations_relative"] - values["relations_none"],
        "width_gain": values["relations_relative"] - values["relations_narrow"],
    }
