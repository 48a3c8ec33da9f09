"""Dynamic convolution's claims, re-measured: what it costs, what it gains, and what the annealing is worth."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import fingerprint, split
from saigen.data.augmentation import crop_and_flip, shift_and_flip, standardised
from saigen.data.subsets import sample
from saigen.measure import macs, parameters
from saigen.nn.mobilenet_v2 import STAGES, MobileNetV2
from saigen.papers.vision.dynamic_convolution.layer import (
    DyMobileNetV2,
    TemperatureSchedule,
    attentions,
    dy_mobilenetv2_100,
    set_temperature,
)
from saigen.train import accuracy, cosine, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    stages: tuple[tuple[int, int, int, int], ...]
    width: float
    stem: int
    head: int
    wide_head: int  # of the static network that is given the dynamic one's multiply-adds
    train: int | None  # None: all there is
    test: int | None
    epochs: int
    batch: int
    rates: tuple[
        float, ...
    ]  # of several, each arm takes the one that does best on a held-out part of its training images
    warmup: int
    annealed: float  # share of the training over which the temperature falls
    side: int


# tiny and laptop: digits turned, inverted and under noise, and nets of eight channels; real and full: the user's
# images, full with the paper's recipe (SGD, rate 0.05, 300 epochs, ten of annealing; batch not given, 256 here).
NARROW = ((3, 8, 1, 1), (3, 8, 1, 2), (3, 8, 1, 1))
SIZES = {
    "tiny": Size(NARROW[:1], 1.0, 8, 16, 24, 64, 64, 1, 32, (3e-3, 1e-2), 1, 1 / 3, 12),
    "laptop": Size(NARROW, 1.0, 8, 32, 60, 1000, 797, 24, 64, (1e-2, 3e-2), 20, 1 / 3, 12),
    "real": Size(
        ((1, 8, 1, 1), (3, 8, 2, 2), (3, 16, 2, 2)), 1.0, 8, 64, 88, 6000, 2000, 6, 64, (3e-3, 1e-2), 20, 1 / 3, 32
    ),
    "full": Size(STAGES, 0.5, 32, 1280, 1304, None, None, 300, 256, (0.05,), 0, 1 / 30, 224),
}


def disturbed(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Digits at ``side`` pixels, turned by up to 12 degrees, scaled, every other one inverted, under noise."""
    n = len(x)
    angle, scale = torch.rand(2, n, generator=generator)
    angle, scale = (2 * angle - 1) * math.radians(12), 0.9 + 0.2 * scale
    cos, sin, zero = angle.cos() * scale, angle.sin() * scale, torch.zeros(n)
    turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(turn, [n, 1, side, side], align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    inverted = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    return torch.where(inverted, 1 - x, x) + 0.1 * torch.randn(x.shape, generator=generator)


def _data(trial: Trial) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Training and test images and labels, and the number of classes."""
    size = SIZES[trial.scale]
    if trial.scale in ("real", "full"):
        train, test = (
            sample(trial.data("images", size=size.side, part=part), count, trial.rng(f"split {part}"))
            for part, count in (("train", size.train), ("test", size.test))
        )
        return train.x, train.y, test.x, test.y, len(train.classes)
    digits = trial.data("digits")
    train, test = (digits.subset(part) for part in split(digits.y.numpy(), (size.train, size.test), trial.rng("split")))
    x, test_x = (disturbed(part.x, size.side, trial.generator(f"disturb {i}")) for i, part in enumerate((train, test)))
    trial.used("disturbed digits", fingerprint((x, train.y, test_x, test.y)))
    return x, train.y, test_x, test.y, 10


def _measure(trial: Trial, arms: dict[str, Callable[..., nn.Module]], annealed: tuple[str, ...]) -> dict[str, float]:
    """Every arm trained, tuned on a held-out part of the training images, and tested."""
    size, (train_x, train_y, test_x, test_y, classes) = SIZES[trial.scale], _data(trial)
    in_chans, small = train_x.shape[1], size.side < 64
    options = {"num_classes": classes, "in_chans": in_chans, "stages": size.stages, "stem_channels": size.stem}
    options |= {"stem_stride": 1 if small else 2, "drop_rate": 0.0}
    held_out = len(train_x) // 5 if len(size.rates) > 1 else 0
    values = {}
    for arm, build in arms.items():
        tried = []
        with trial.seeded("weights"):
            start = build(size.width, **({"head_channels": size.head} | options))
        for rate in size.rates:
            net = copy.deepcopy(start)
            if trial.scale == "full":
                optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=4e-5)
            else:
                optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
            falling = TemperatureSchedule(net, 30, 1, epochs=size.annealed) if arm in annealed else None

            def on_step(step: int, total: int, _: float, arm: str = arm, falling: TemperatureSchedule | None = falling):
                trial.progress(step, total, arm)
                if falling is not None:
                    falling.step((step + 1) / total)

            fit(
                net,
                lambda net, x, y: F.cross_entropy(net(x), y),
                (train_x[held_out:], train_y[held_out:]),
                optimizer=optimizer,
                epochs=size.epochs,
                batch_size=size.batch,
                seed=trial.seed,
                schedule=cosine(warmup=size.warmup),
                transform=None if train_x.dtype != torch.uint8 else shift_and_flip if small else crop_and_flip,
                checkpoint=trial.checkpoint(f"{arm}_{rate}"),
                device=trial.device,
                on_step=on_step,
            )
            chosen_by = accuracy(net, standardised(train_x[:held_out]), train_y[:held_out]) if held_out else 1.0
            tried.append((chosen_by, rate, net))
        _, rate, net = max(tried, key=lambda entry: entry[:2])
        values[f"{arm}_rate"] = rate
        values[arm] = accuracy(net, standardised(test_x), test_y)
        values[f"{arm}_macs"] = float(macs(net, (in_chans, size.side, size.side)))
        if attentions(net):
            values[f"{arm}_entropy"] = entropy(net, standardised(test_x[:256]))
    return values


@torch.no_grad()
def entropy(net: nn.Module, x: Tensor) -> float:
    """The mean entropy of the attentions over the images, of log K: 1 is uniform, 0 one kernel alone."""
    found: list[Tensor] = []

    def note(module: nn.Module, _: object, pi: Tensor) -> None:
        found.append(-(pi * pi.clamp_min(1e-12).log()).sum(1).mean() / math.log(pi.shape[1]))

    hooks = [attention.register_forward_hook(note) for attention in attentions(net)]
    net.eval()(x.to(next(net.parameters()).device))
    for hook in hooks:
        hook.remove()
    return torch.stack(found).mean().item()


def capacity_at_almost_no_work(trial: Trial) -> dict[str, float]:
    """DY-MobileNetV2 beside MobileNetV2, counted; at ``tiny`` as elsewhere, since counting needs no data."""
    with torch.device("meta"):
        dynamic, static = dy_mobilenetv2_100(), MobileNetV2()
    counts = {"dynamic": macs(dynamic, (3, 224, 224)), "static": macs(static, (3, 224, 224))}
    return {
        "parameters": parameters(dynamic) / 1e6,
        "parameter_ratio": parameters(dynamic) / parameters(static),
        "mac_ratio": counts["dynamic"] / counts["static"],
        "dynamic_macs": float(counts["dynamic"]),
        "static_macs": float(counts["static"]),
    }


def more_accurate_than_static(trial: Trial) -> dict[str, float]:
    """One seed: a narrow MobileNetV2, one with a wider head for the dynamic one's multiply-adds, and a dynamic one."""
    wide_head = SIZES[trial.scale].wide_head
    arms = {
        "static": MobileNetV2,
        "wide": lambda width, **options: MobileNetV2(width, **(options | {"head_channels": wide_head})),
        "dynamic": DyMobileNetV2,
    }
    values = _measure(trial, arms, annealed=("dynamic",))
    best = max(values["static"], values["wide"])
    return values | {"accuracy_gain": values["dynamic"] - values["static"], "gain_over_both": values["dynamic"] - best}


def annealing_is_needed(trial: Trial) -> dict[str, float]:
    """One seed: a dynamic MobileNetV2 whose temperature falls from 30 to 1, and its twin at 1 throughout."""

    def at_one(width: float, **options: object) -> nn.Module:
        net = DyMobileNetV2(width, **options)
        set_temperature(net, 1)
        return net

    values = _measure(trial, {"annealed": DyMobileNetV2, "at_one": at_one}, annealed=("annealed",))
    return values | {"annealing_gain": values["annealed"] - values["at_one"]}
