"""Octave convolution's claims, re-measured: what it costs, whether accuracy holds, and what the clock says."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import fingerprint, split
from saigen.data.augmentation import crop_and_flip, shift_and_flip, standardised
from saigen.data.subsets import sample
from saigen.measure import latency, macs, parameters, speed_ratio
from saigen.nn.resnet import ResNet, resnet50
from saigen.papers.vision.octave_convolution.layer import OctaveConv2d, OctResNet, oct_resnet50
from saigen.train import accuracy, cosine
from saigen.train.selection import fit_best
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    train: int | None  # None: all there is
    test: int | None
    epochs: int
    batch: int
    rates: tuple[
        float, ...
    ]  # of several, each arm takes the one that does best on a held-out part of its training images
    warmup: int
    side: int


# tiny and laptop: few digits and drawn gratings; real and full: the user's images, full with the official recipe
# (README: rate 0.4, five epochs of warm-up, cosine), which asks for a machine that holds the images in memory.
SIZES = {
    "tiny": Size((1, 1), (8, 8), 64, 64, 1, 32, (0.1, 0.3), 2, 16),
    "laptop": Size((1, 1, 1), (8, 16, 32), 600, 1000, 10, 32, (0.1, 0.3), 10, 16),
    "real": Size((1, 1, 1), (16, 32, 64), 10_000, 2000, 8, 64, (0.1, 0.3), 20, 32),
    "full": Size((3, 4, 6, 3), (64, 128, 256, 512), None, None, 110, 1024, (0.4,), 6250, 224),
}
ALPHA = 0.25
# inner widths of the usual network times this have about the multiply-adds of alpha = 0.25
THIN = 0.875


def gratings(n: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 1, side, side) of one fine grating under noise: the class is which of ten directions it has.

    Waves of two and a half to four pixels: just what a map of half the resolution cannot hold.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    y = torch.randint(10, (n,), generator=generator)
    angle = (y + 0.5 * (uniform(n) - 0.5)) * (math.pi / 10)
    wave, phase = 2 * math.pi / (2.5 + 1.5 * uniform(n)), 2 * math.pi * uniform(n)
    grid = torch.arange(side, dtype=torch.float32)
    along = angle.cos()[:, None, None] * grid + angle.sin()[:, None, None] * grid[:, None]
    x = 0.5 + 0.25 * (wave[:, None, None] * along + phase[:, None, None]).cos()
    return (x + 0.3 * torch.randn(x.shape, generator=generator))[:, None], y


def octave_twin(net: ResNet, **options: object) -> OctResNet:
    """The octave network whose convolutions are the tiles of those of ``net``."""
    twin = OctResNet(**options)
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d) and name != "conv1":
            place = twin.get_submodule(name)
            place.conv = OctaveConv2d.from_conv(conv, place.conv.alpha_in, place.conv.alpha_out)
    twin.conv1.load_state_dict(net.conv1.state_dict())
    twin.fc.load_state_dict(net.fc.state_dict())
    return twin


def _compare(trial: Trial, task: str, data: tuple[Tensor, ...], classes: int) -> dict[str, float]:
    """The test accuracy of a ResNet, of its octave twin, and of a thinner ResNet that costs as much as the twin."""
    size, (train_x, train_y, test_x, test_y) = SIZES[trial.scale], data
    small, in_chans = size.side < 64, train_x.shape[1]
    shared = {"num_classes": classes, "in_chans": in_chans, "small_stem": small}
    with trial.seeded(f"weights {task}"):
        usual = ResNet("bottleneck", size.depths, size.widths, zero_init=False, **shared)
        thin = [max(1, round(THIN * width)) for width in size.widths]
        octave = octave_twin(usual, depths=size.depths, widths=size.widths, alpha=ALPHA, **shared)
        arms = {
            "octave": octave,
            "resnet": usual,
            "thin": ResNet("bottleneck", size.depths, thin, zero_init=False, **shared),
        }
    held_out = len(train_x) // 4 if len(size.rates) > 1 else 0
    values = {}
    for arm, start in arms.items():
        best = fit_best(
            start,
            lambda net, x, y: F.cross_entropy(net(x), y),
            (train_x[held_out:], train_y[held_out:]),
            rates=size.rates,
            optimizer=lambda parameters, rate: torch.optim.SGD(
                parameters, lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4
            ),
            held_out=(standardised(train_x[:held_out]), train_y[:held_out]),
            epochs=size.epochs,
            batch_size=size.batch,
            seed=trial.seed,
            schedule=cosine(warmup=size.warmup),
            transform=None if train_x.dtype != torch.uint8 else shift_and_flip if small else crop_and_flip,
            checkpoint=lambda rate, arm=arm: trial.checkpoint(f"{task}_{arm}_{rate}"),
            device=trial.device,
            on_step=lambda step, total, _, arm=arm: trial.progress(step, total, f"{task}, {arm}"),
        )
        values[f"{task}_{arm}_rate"], values[f"{task}_{arm}_loss"] = best.rate, best.history.losses[-1]
        values[f"{task}_{arm}"] = accuracy(best.model, standardised(test_x), test_y)
        values[f"{task}_{arm}_macs"] = float(macs(best.model, (in_chans, size.side, size.side)))
    values[f"{task}_drop"] = values[f"{task}_resnet"] - values[f"{task}_octave"]
    values[f"{task}_thin_drop"] = values[f"{task}_resnet"] - values[f"{task}_thin"]
    return values


def same_parameters_less_work(trial: Trial) -> dict[str, float]:
    """Oct-ResNet-50 beside ResNet-50, counted; at ``tiny`` as elsewhere, since counting needs no data."""
    with torch.device("meta"):
        nets = {"0": resnet50()} | {
            str(alpha).replace(".", ""): oct_resnet50(alpha=alpha) for alpha in (0.125, 0.25, 0.5, 0.75)
        }
    values = {f"macs_{name}": macs(net, (3, 224, 224)) / 1e9 for name, net in nets.items()}
    counts = {parameters(net) for net in nets.values()}
    return values | {"parameter_ratio": max(counts) / min(counts), "parameters": float(max(counts))}


def accuracy_holds_with_less_work(trial: Trial) -> dict[str, float]:
    """One seed: ResNet, its octave twin from the same weights and a thin ResNet, on one or two kinds of images."""
    size = SIZES[trial.scale]
    if trial.scale in ("real", "full"):
        train, test = (
            sample(trial.data("images", size=size.side, part=part), count, trial.rng(f"split {part}"))
            for part, count in (("train", size.train), ("test", size.test))
        )
        values = _compare(trial, "images", (train.x, train.y, test.x, test.y), len(train.classes))
        return values | {"accuracy_drop": values["images_drop"]}
    digits = trial.data("digits")
    train, test = (digits.subset(part) for part in split(digits.y.numpy(), (size.train, size.test), trial.rng("split")))
    large = [F.interpolate(part.x, (size.side,) * 2, mode="bilinear") for part in (train, test)]
    values = _compare(trial, "digits", (large[0], train.y, large[1], test.y), 10)
    drawn = gratings(size.train + size.test, size.side, trial.generator("gratings"))
    trial.used("gratings", fingerprint(drawn))
    first, rest = (tuple(t[part] for t in drawn) for part in (slice(size.train), slice(size.train, None)))
    values |= _compare(trial, "gratings", (*first, *rest), 10)
    return values | {"accuracy_drop": (values["digits_drop"] + values["gratings_drop"]) / 2}


def faster_on_a_cpu(trial: Trial) -> dict[str, float]:
    """One image through ResNet-50 and through Oct-ResNet-50, in pairs on this machine."""
    tiny = trial.scale == "tiny"
    side = 32 if tiny else 224
    x = torch.rand(1, 3, side, side, generator=trial.generator("x")).to(trial.device)
    with trial.seeded("weights"):
        usual = resnet50().eval().to(trial.device)
        nets = {alpha: oct_resnet50(alpha=alpha).eval().to(trial.device) for alpha in (0.25, 0.5)}
    run = {alpha: torch.no_grad()(lambda net=net: net(x)) for alpha, net in {0: usual, **nets}.items()}
    if tiny:  # too short to judge, and not on a quiet machine
        speed = {alpha: latency(run[0], min_run_time=0.02) / latency(run[alpha], min_run_time=0.02) for alpha in nets}
    else:
        speed = {alpha: speed_ratio(run[0], run[alpha]) for alpha in nets}
    return {"speedup": speed[0.5], "speedup_025": speed[0.25]}
