"""Channel equilibrium's claims, re-measured: fewer inhibited channels, and accuracy against batch norm and SE."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import fingerprint, split
from saigen.data.augmentation import shift_and_flip, standardised
from saigen.data.subsets import sample
from saigen.measure import parameters
from saigen.papers.vision.channel_equilibrium.layer import ChannelEquilibrium2d, inhibited_channel_ratio
from saigen.train import accuracy, cosine
from saigen.train.selection import fit_best
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    widths: tuple[int, ...]  # of each pair of convolutions; the resolution halves between pairs
    group: int  # d
    train: int | None  # None: all there is
    test: int | None
    batch: int
    noise: float
    side: int
    epochs: int
    rates: tuple[
        float, ...
    ]  # of several, each arm takes the one that does best on a held-out fifth of its training images
    decay: float
    long_epochs: int  # the claim on inhibited channels asks what strong decay does in time, at one rate for both arms
    long_rate: float
    long_decay: float


# tiny and laptop: noisy digits; real and full: the user's images, full with the authors' rates and decay
SIZES = {
    "tiny": Size((8,), 8, 64, 64, 32, 0.3, 8, 1, (0.1,), 5e-3, 2, 0.1, 0.03),
    "laptop": Size((16, 32), 16, 500, 1200, 50, 0.4, 16, 30, (0.05, 0.2), 5e-3, 60, 0.1, 0.03),
    "real": Size((16, 32, 64), 16, 5000, 2000, 50, 0.0, 16, 10, (0.05, 0.2), 5e-4, 25, 0.1, 5e-3),
    "full": Size((64, 128, 256, 512), 16, None, None, 256, 0.0, 224, 100, (0.1,), 1e-4, 100, 0.1, 1e-4),
}


class SqueezeExcitation(nn.Module):
    """The baseline that also weighs channels, with as many parameters as the gates of channel equilibrium."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


def plain_net(size: Size, in_chans: int, classes: int) -> nn.Sequential:
    """Convolution - batch norm - ReLU in pairs, as in VGG: nothing carries an inhibited channel past its ReLU."""
    layers: list[nn.Module] = []
    for stage, width in enumerate(size.widths):
        for _ in range(2):
            conv = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            in_chans = width
        layers.append(nn.MaxPool2d(2) if stage + 1 < len(size.widths) else nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(in_chans, classes))


def with_block(net: nn.Sequential, arm: str, group: int) -> nn.Sequential:
    """A copy of ``net`` with a block of the arm after every batch norm; all else keeps its start."""
    layers: list[nn.Module] = []
    for layer in copy.deepcopy(net):
        layers.append(layer)
        if isinstance(layer, nn.BatchNorm2d) and arm != "bn":
            channels = layer.num_features
            branches = arm if arm in ("bd", "ir") else "both"
            layers.append(
                SqueezeExcitation(channels) if arm == "se" else ChannelEquilibrium2d(channels, group, branches=branches)
            )
    return nn.Sequential(*layers)


def images(trial: Trial) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """The images of a trial, normalised or as bytes: training, test and the number of classes."""
    size = SIZES[trial.scale]
    if trial.scale in ("real", "full"):
        train, test = (
            sample(trial.data("images", size=size.side, part=part), count, trial.rng(f"split {part}"))
            for part, count in (("train", size.train), ("test", size.test))
        )
        return train.x, train.y, test.x, test.y, len(train.classes)
    digits = trial.data("digits")
    parts = [digits.subset(part) for part in split(digits.y.numpy(), (size.train, size.test), trial.rng("split"))]
    generator, noisy = trial.generator("noise"), []
    for part in parts:
        x = F.interpolate(part.x, (size.side,) * 2, mode="bilinear")
        noisy.append(2 * x - 0.6 + 2 * size.noise * torch.randn(x.shape, generator=generator))
    trial.used("noisy digits", fingerprint(noisy))
    return noisy[0], parts[0].y, noisy[1], parts[1].y, 10


def train(
    trial: Trial, arms: tuple[str, ...], rates: tuple[float, ...], decay: float, epochs: int
) -> tuple[dict[str, nn.Module], dict[str, float], Tensor]:
    """Each arm's net at the best of its rates, its test accuracy, and the test images."""
    size = SIZES[trial.scale]
    train_x, train_y, test_x, test_y, classes = images(trial)
    with trial.seeded("weights"):
        plain = plain_net(size, train_x.shape[1], classes)
        starts = {arm: with_block(plain, arm, size.group) for arm in arms}
    held_out = len(train_x) // 5 if len(rates) > 1 else 0
    nets, values = {}, {}
    for arm, start in starts.items():
        best = fit_best(
            start,
            lambda net, x, y: F.cross_entropy(net(x), y, label_smoothing=0.1),
            (train_x[held_out:], train_y[held_out:]),
            rates=rates,
            optimizer=lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay),
            held_out=(standardised(train_x[:held_out]), train_y[:held_out]),
            epochs=epochs,
            batch_size=size.batch,
            seed=trial.seed,
            schedule=cosine(warmup=20),
            transform=shift_and_flip if train_x.dtype == torch.uint8 else None,
            checkpoint=lambda rate, arm=arm: trial.checkpoint(f"{arm}_{rate}_{epochs}"),
            device=trial.device,
            on_step=lambda step, total, _, arm=arm: trial.progress(step, total, arm),
        )
        nets[arm], values[f"{arm}_loss"] = best.model, best.history.losses[-1]
        values[f"{arm}_accuracy"] = accuracy(nets[arm], standardised(test_x), test_y)
        values[f"{arm}_rate"], values[f"{arm}_parameters"] = best.rate, float(parameters(nets[arm]))
    return nets, values, test_x


def wakes_inhibited_channels(trial: Trial) -> dict[str, float]:
    """One seed: the share of inhibited channels after training with batch norm alone and with channel equilibrium."""
    size = SIZES[trial.scale]
    nets, values, test_x = train(trial, ("bn", "ce"), (size.long_rate,), size.long_decay, size.long_epochs)
    for arm, net in nets.items():
        batches = [standardised(test_x[i : i + 200]).to(trial.device) for i in range(0, len(test_x), 200)]
        for threshold in (0.01, 0.03, 0.1):
            shares = inhibited_channel_ratio(net, batches, threshold)
            values[f"{arm}_inhibited_{threshold}"] = sum(shares.values()) / len(shares)
    before, after = (values[f"{arm}_inhibited_0.01"] for arm in ("bn", "ce"))
    return values | {"prevented": (before - after) / max(before, after) if before or after else 0.0}


def gains_accuracy(trial: Trial) -> dict[str, float]:
    """One seed: test accuracy with batch norm alone, squeeze-and-excitation and channel equilibrium."""
    size = SIZES[trial.scale]
    _, values, _ = train(trial, ("bn", "se", "ce"), size.rates, size.decay, size.epochs)
    return values | {
        "accuracy_gain": values["ce_accuracy"] - values["bn_accuracy"],
        "gain_over_se": values["ce_accuracy"] - values["se_accuracy"],
    }
