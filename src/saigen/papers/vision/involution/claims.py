"""Involution's claims, re-measured: what it costs, whether accuracy holds, and what the lean operator is worth."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import fingerprint, split
from saigen.data.augmentation import crop_and_flip, shift_and_flip, standardised
from saigen.measure import latency, macs, parameters, peak_memory, speed_ratio
from saigen.nn.resnet import resnet50
from saigen.papers.vision.involution.layer import Involution2d, RedNet, involution2d, rednet50, sum_of_shifts
from saigen.train import accuracy, cosine, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    kernel_size: int
    group_channels: int  # in proportion to the widths, so that a layer has as many groups as the paper's
    train: int | None  # None: all there is
    test: int | None
    epochs: int
    batch: int
    rates: tuple[
        float, ...
    ]  # of several, each arm takes the one that does best on a held-out fifth of its training images
    warmup: int
    side: int


# tiny and laptop: digits and drawn textures; real and full: the user's images, full with the paper's recipe
# (section 4.1: 130 epochs, batch 2048, rate 0.8), which asks for a machine that holds the images in memory.
SIZES = {
    "tiny": Size((1,), (16,), 3, 4, 64, 64, 1, 32, (0.1, 0.3), 2, 16),
    "laptop": Size((1, 1), (16, 32), 5, 4, 1000, 797, 12, 64, (0.1, 0.3), 20, 16),
    "real": Size((1, 1, 1), (16, 32, 64), 7, 4, 10_000, 2000, 8, 64, (0.1, 0.3), 20, 16),
    "full": Size((3, 4, 6, 3), (64, 128, 256, 512), 7, 16, None, None, 130, 2048, (0.8,), 3130, 224),
}


def textures(n: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 1, side, side) of four gratings, one a quadrant, and a dot: the class is the grating's direction there.

    Which filter is right depends on the place, and only the content (the dot) tells the place.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    half = side // 2
    direction = torch.randint(4, (n, 4), generator=generator)
    angle = direction * (math.pi / 4) + 0.2 * (uniform(n, 4) - 0.5)
    wave, phase = 2 * math.pi / (3.5 + uniform(n, 4)), 2 * math.pi * uniform(n, 4)
    grid = torch.arange(half, dtype=torch.float32)
    along = angle.cos()[..., None, None] * grid + angle.sin()[..., None, None] * grid[:, None]
    tiles = 0.5 + 0.25 * (wave[..., None, None] * along + phase[..., None, None]).cos()
    x = tiles.view(n, 2, 2, half, half).transpose(2, 3).reshape(n, 1, side, side)
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    place = torch.randint(side, (n, 2), generator=generator)
    x[torch.arange(n), 0, place[:, 0], place[:, 1]] = 2.0
    quadrant = 2 * (place[:, 0] >= half).long() + (place[:, 1] >= half).long()
    return x, direction[torch.arange(n), quadrant]


def swap(net: RedNet, build: Callable[[Involution2d], nn.Module]) -> RedNet:
    """A copy of ``net`` with another layer in the place of each involution; all else keeps its start."""
    net = copy.deepcopy(net)
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Involution2d):
                conv = build(layer)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                setattr(parent, name, conv)
    return net


def convolution(layer: Involution2d) -> nn.Conv2d:
    """ResNet's 3x3 convolution."""
    return nn.Conv2d(layer.channels, layer.channels, 3, layer.stride, 1, bias=False)


def depthwise(layer: Involution2d) -> nn.Conv2d:
    """As large a window and as cheap, but one kernel for all places."""
    c, k = layer.channels, layer.kernel_size
    return nn.Conv2d(c, c, k, layer.stride, k // 2, groups=c, bias=False)


def _compare(trial: Trial, task: str, data: tuple[Tensor, ...], classes: int) -> dict[str, float]:
    """The test accuracy of RedNet, of the same net with convolutions, and with depthwise convolutions."""
    size, (train_x, train_y, test_x, test_y) = SIZES[trial.scale], data
    small = size.side < 64
    with trial.seeded(f"weights {task}"):
        rednet = RedNet(
            size.depths,
            size.widths,
            kernel_size=size.kernel_size,
            group_channels=size.group_channels,
            num_classes=classes,
            in_chans=train_x.shape[1],
            stem_width=max(32, size.widths[0]),
            small_stem=small,
        )
        arms = {"rednet": rednet, "resnet": swap(rednet, convolution), "depthwise": swap(rednet, depthwise)}
    held_out = len(train_x) // 5 if len(size.rates) > 1 else 0
    values = {}
    for arm, start in arms.items():
        tried = []
        for rate in size.rates:
            net = copy.deepcopy(start)
            optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
            fit(
                net,
                lambda net, x, y: F.cross_entropy(net(x), y, label_smoothing=0.1),
                (train_x[held_out:], train_y[held_out:]),
                optimizer=optimizer,
                epochs=size.epochs,
                batch_size=size.batch,
                seed=trial.seed,
                schedule=cosine(warmup=size.warmup),
                transform=None if train_x.dtype != torch.uint8 else shift_and_flip if small else crop_and_flip,
                checkpoint=trial.checkpoint(f"{task}_{arm}_{rate}"),
                device=trial.device,
                on_step=lambda step, total, _, arm=arm: trial.progress(step, total, f"{task}, {arm}"),
            )
            chosen_by = accuracy(net, standardised(train_x[:held_out]), train_y[:held_out]) if held_out else 1.0
            tried.append((chosen_by, rate, net))
        _, rate, net = max(tried, key=lambda entry: entry[:2])
        values[f"{task}_{arm}_rate"] = rate
        values[f"{task}_{arm}"] = accuracy(net, standardised(test_x), test_y)
        values[f"{task}_{arm}_parameters"] = float(parameters(net))
    values[f"{task}_drop"] = values[f"{task}_resnet"] - values[f"{task}_rednet"]
    return values


def costs_less_than_convolution(trial: Trial) -> dict[str, float]:
    """RedNet-50 beside ResNet-50, counted; at ``tiny`` as elsewhere, since counting needs no data."""
    with torch.device("meta"):
        red, res = rednet50(), resnet50()
    counts = {"rednet": macs(red, (3, 224, 224)), "resnet": macs(res, (3, 224, 224))}
    return {
        "parameters": parameters(red) / 1e6,
        "parameter_ratio": parameters(red) / parameters(res),
        "mac_ratio": counts["rednet"] / counts["resnet"],
        "rednet_macs": float(counts["rednet"]),
        "resnet_macs": float(counts["resnet"]),
    }


def accuracy_holds_with_less(trial: Trial) -> dict[str, float]:
    """One seed: RedNet, ResNet and a depthwise control from one start, on one or two kinds of images."""
    size = SIZES[trial.scale]
    if trial.scale in ("real", "full"):
        parts = [trial.data("images", size=size.side, part=part) for part in ("train", "test")]
        counts = [min(n or len(part), len(part)) for n, part in zip((size.train, size.test), parts, strict=True)]
        train, test = (
            part.subset(split(part.y.numpy(), (n,), trial.rng(f"split {i}"))[0])
            for i, (part, n) in enumerate(zip(parts, counts, strict=True))
        )
        values = _compare(trial, "images", (train.x, train.y, test.x, test.y), len(train.classes))
        return values | {"accuracy_drop": values["images_drop"]}
    digits = trial.data("digits")
    train, test = (digits.subset(part) for part in split(digits.y.numpy(), (size.train, size.test), trial.rng("split")))
    large = [F.interpolate(part.x, (size.side,) * 2, mode="bilinear") for part in (train, test)]
    values = _compare(trial, "digits", (large[0], train.y, large[1], test.y), 10)
    count = size.train + size.train // 2
    drawn = textures(count + count // 2, size.side, trial.generator("textures"))
    trial.used("textures", fingerprint(drawn))
    first, rest = (tuple(t[part] for t in drawn) for part in (slice(count), slice(count, None)))
    values |= _compare(trial, "textures", (*first, *rest), 4)
    return values | {"accuracy_drop": (values["digits_drop"] + values["textures_drop"]) / 2}


def lean_operator_is_faster(trial: Trial) -> dict[str, float]:
    """The operator of RedNet-50's first stage, by shifted sums and by unfolded patches, in pairs on this machine."""
    batch, side = (1, 14) if trial.scale == "tiny" else (8, 56)
    x = torch.randn(batch, 64, side, side, generator=trial.generator("x")).to(trial.device)
    kernel = torch.randn(batch, 4, 49, side, side, generator=trial.generator("kernel")).to(trial.device)

    def forward(backend: str) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: involution2d(x, kernel, backend=backend))

    def both_ways(backend: str) -> Callable[[], None]:
        a, b = x.clone().requires_grad_(), kernel.clone().requires_grad_()
        return lambda: involution2d(a, b, backend=backend).sum().backward()

    if trial.scale == "tiny":  # too short to judge, and not on a quiet machine
        usual, lean = (latency(forward(backend), min_run_time=0.02) for backend in ("unfold", "offsets"))
        return {"speedup": usual / lean} | peaks(x, kernel)
    return {
        "speedup": speed_ratio(forward("unfold"), forward("offsets")),
        "training_speedup": speed_ratio(both_ways("unfold"), both_ways("offsets")),
    } | peaks(x, kernel)


def peaks(x: Tensor, kernel: Tensor) -> dict[str, float]:
    """Peak bytes of the tensors that a forward pass of either form makes, over the bytes of ``x``."""
    size = math.isqrt(kernel.shape[2])
    with torch.no_grad():
        # the body of the operator, since nobody sees inside the operator itself
        lean = peak_memory(lambda: sum_of_shifts(x, kernel, 1, size // 2, 1))
        usual = peak_memory(lambda: involution2d(x, kernel, backend="unfold"))
    of_x = x.numel() * x.element_size()
    return {"offsets_memory": lean / of_x, "unfold_memory": usual / of_x, "memory_saved": usual / lean}
