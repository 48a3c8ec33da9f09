"""NFNet's claims, re-measured: whether variance is as predicted, what AGC is worth at large rates, and whether networks
without normalisation match those with it; the last also on the user's images, with the ways to miss it as arms."""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import Images, fingerprint, split
from saigen.data.augmentation import shift_and_flip, standardised
from saigen.data.subsets import sample
from saigen.nn.resnet import ResNet
from saigen.papers.vision.nfnet.model import NF_RESNET, NFNet, WSConv2d, signal_propagation
from saigen.papers.vision.nfnet.optimizer import AGC, nfnet_param_groups
from saigen.train import accuracy, cosine, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    # variance: NF-ResNet-50's blocks and widths, normal images of so many pixels a side
    plot_depths: tuple[int, ...]
    plot_widths: tuple[int, ...]
    plot_batch: int
    plot_side: int
    # training: the inner widths of bottlenecks, as ResNet counts them; an NF-ResNet puts out four times as many
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    train: int | None  # None: all there is
    test: int | None
    # rates of growing size at a large batch
    sweep_batch: int
    sweep_epochs: int
    sweep_rates: tuple[float, ...]
    sweep_clipping: float
    # against batch norm: each arm takes the setting that does best on a held-out fifth of its training images
    epochs: int
    batch: int
    rates: tuple[float, ...]
    clippings: tuple[float, ...]
    warmup: int
    side: int
    mistakes: bool  # also train the ways to miss the paper's numbers


# full: the 90-epoch setting of section 4.1, which asks for a machine that holds the images in memory
SIZES = {
    "tiny": Size(
        (1, 1), (32, 64), 2, 16, (1,), (4,), 64, 64, 32, 1, (0.1, 1.6), 0.04, 1, 32, (0.1,), (0.16,), 1, 12, True
    ),
    "laptop": Size(
        (3, 4, 6, 3),
        (256, 512, 1024, 2048),
        8,
        64,
        (2, 2),
        (8, 16),
        900,
        897,
        128,
        10,
        (0.4, 0.8, 1.6, 3.2),
        0.04,
        20,
        32,
        (0.2, 0.4),
        (0.16,),
        20,
        10,
        False,
    ),
    "real": Size(
        (3, 4, 6, 3),
        (256, 512, 1024, 2048),
        8,
        64,
        (1, 1, 1),
        (8, 16, 32),
        8000,
        2000,
        1024,
        8,
        (0.2, 0.8, 3.2),
        0.04,
        6,
        64,
        (0.1, 0.4),
        (0.01, 0.16),
        40,
        16,
        True,
    ),
    "full": Size(
        (3, 4, 6, 3),
        (256, 512, 1024, 2048),
        64,
        224,
        (3, 4, 6, 3),
        (64, 128, 256, 512),
        None,
        None,
        4096,
        90,
        (1.6,),
        0.01,
        90,
        1024,
        (0.4,),
        (0.01,),
        6255,
        224,
        False,
    ),
}


# --- the networks -----------------------------------------------------------------------------------------------------


def nf_resnet(size: Size, classes: int, channels: int) -> NFNet:
    design = NF_RESNET if size.side >= 64 else replace(NF_RESNET, stem="small")
    widths = [4 * width for width in size.widths]
    return NFNet(size.depths, widths, design=design, stem_width=size.widths[0], num_classes=classes, in_chans=channels)


def batch_norm_twin(size: Size, classes: int, channels: int) -> ResNet:
    """The same convolutions with batch norm; it lacks the skip gains, and has nothing else less or more."""
    return ResNet(
        "bottleneck", size.depths, size.widths, num_classes=classes, in_chans=channels, small_stem=size.side < 64
    )


def bare_twin(size: Size, classes: int, channels: int) -> ResNet:
    """Batch norm simply left out: He's initialisation, a bias in its place, and a branch that starts at zero."""

    class Bias(nn.Module):
        def __init__(self, norm: nn.BatchNorm2d) -> None:
            super().__init__()
            self.weight, self.bias = norm.weight, norm.bias

        def forward(self, x: Tensor) -> Tensor:
            return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])

    net = batch_norm_twin(size, classes, channels)
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, Bias(layer))
    return net


def without_standardisation(net: NFNet) -> NFNet:
    """A copy whose weights are used as they are drawn, N(0, 1/N): equation 1 left out, γ, α and β kept."""
    net = copy.deepcopy(net)
    for layer in net.modules():
        if isinstance(layer, WSConv2d):
            layer.standardised_weight = lambda layer=layer: layer.weight * (layer.gain * layer.input_scale)
    return net


# --- the data ---------------------------------------------------------------------------------------------------------


def placed(digits: Images, side: int, generator: torch.Generator) -> Tensor:
    """Digits anywhere on a canvas of ``side`` pixels, of varying contrast, under noise: (n, 1, side, side)."""
    n, small = len(digits), digits.x.shape[-1]
    contrast = 0.6 + 0.8 * torch.rand(n, 1, 1, 1, generator=generator)
    corner = torch.randint(side - small + 1, (2, n, 1, 1), generator=generator)
    at = torch.arange(small)
    x = 0.3 * torch.randn(n, 1, side, side, generator=generator)
    rows, columns = corner[0] + at[:, None], corner[1] + at
    x[torch.arange(n)[:, None, None], 0, rows, columns] += 2 * (contrast * digits.x - 0.3)[:, 0]
    return x


def _data(trial: Trial, size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    if trial.scale in ("real", "full"):
        train, test = (
            sample(trial.data("images", size=size.side, part=part), count, trial.rng(f"split {part}"))
            for part, count in (("train", size.train), ("test", size.test))
        )
        return train.x, train.y, test.x, test.y, len(train.classes)
    digits = trial.data("digits")
    x = placed(digits, size.side, trial.generator("canvas"))
    trial.used("digits on canvases", fingerprint((x, digits.y)))
    train, test = split(digits.y.numpy(), (size.train, size.test), trial.rng("split"))
    return x[train], digits.y[train], x[test], digits.y[test], 10


# --- training ---------------------------------------------------------------------------------------------------------


def _train(
    trial: Trial,
    name: str,
    start: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    rate: float,
    clipping: float | None,
    clip_classifier: bool = False,
    epochs: int,
    batch: int,
    warmup: int,
) -> nn.Module:
    """A trained copy of ``start``, by the paper's optimizer: SGD with Nesterov momentum, without or with AGC."""
    net = copy.deepcopy(start)
    groups = nfnet_param_groups(net, weight_decay=1e-4, clipping=clipping)
    if clip_classifier:
        groups[-1]["clipping"] = clipping
    optimizer = AGC(groups, torch.optim.SGD, lr=rate, momentum=0.9, nesterov=True)
    fit(
        net,
        lambda net, x, y: F.cross_entropy(net(x), y, label_smoothing=0.1),
        data,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch,
        seed=trial.seed,
        schedule=cosine(warmup=warmup),
        # photographs are mirrored, digits are not
        transform=partial(shift_and_flip, mirror=0.5 if data[0].dtype == torch.uint8 else 0.0),
        checkpoint=trial.checkpoint(name),
        device=trial.device,
        on_step=lambda step, total, _: trial.progress(step, total, name),
    )
    return net


def variance_is_predicted(trial: Trial) -> dict[str, float]:
    """One draw of weights: NF-ResNet-50's variance through depth, beside the plan, and what each part is worth."""
    size = SIZES[trial.scale]
    with trial.seeded("weights"):
        net = NFNet(
            size.plot_depths, size.plot_widths, design=NF_RESNET, stem_width=size.plot_widths[0] // 4, num_classes=0
        )
        plain = NFNet(
            size.plot_depths,
            size.plot_widths,
            design=NF_RESNET,
            stem_width=size.plot_widths[0] // 4,
            num_classes=0,
            alpha=1.0,
        )
    # the usual residual network at its start: He's weights, and branches added as they are
    plain.load_state_dict(net.state_dict())
    for block in (block for stage in plain.stages for block in stage):
        block.conv1.input_scale *= math.sqrt(block.variance)  # no β
        if block.downsample is not None:
            block.downsample.conv.input_scale *= math.sqrt(block.variance)
    x = torch.randn(size.plot_batch, 3, size.plot_side, size.plot_side, generator=trial.generator("x"))
    values = {}
    arms = {"nf": net, "drawn": without_standardisation(net), "plain": plain}
    for arm, model in arms.items():
        plot = signal_propagation(model.to(trial.device), x.to(trial.device))[1:]
        # each arm beside the plan of the paper, 1 + k α² within a stage
        plan = signal_propagation(net, x[:1].to(trial.device))[1:] if arm == "plain" else plot
        errors = [
            abs(math.log(signal.variance / planned.expected_variance))
            for signal, planned in zip(plot, plan, strict=True)
        ]
        values[f"{arm}_error"] = max(errors)
        values[f"{arm}_last_variance"] = plot[-1].variance
        values[f"{arm}_squared_mean"] = plot[-1].squared_mean / plot[-1].variance
    return values | {"variance_error": values["nf_error"]}


def agc_widens_stable_rates(trial: Trial) -> dict[str, float]:
    """One seed: a large batch at growing rates, without and with AGC; the largest rate that still trains well."""
    size = SIZES[trial.scale]
    train_x, train_y, test_x, test_y, classes = _data(trial, size)
    with trial.seeded("weights"):
        start = nf_resnet(size, classes, train_x.shape[1])
    values = {}
    for arm, clipping in (("nf", None), ("agc", size.sweep_clipping)):
        for rate in size.sweep_rates:
            net = _train(
                trial,
                f"{arm} {rate}",
                start,
                (train_x, train_y),
                rate=rate,
                clipping=clipping,
                epochs=size.sweep_epochs,
                batch=size.sweep_batch,
                warmup=max(1, size.sweep_epochs * (len(train_x) // size.sweep_batch) // 10),
            )
            values[f"{arm}_{rate}"] = accuracy(net, standardised(test_x), test_y)
    bar = max(values.values()) - 0.05
    for arm in ("nf", "agc"):
        values[f"{arm}_largest"] = largest_stable(
            size.sweep_rates, [values[f"{arm}_{r}"] for r in size.sweep_rates], bar
        )
    # at the largest rate, which a batch as many times larger would ask for
    values["gain_at_largest"] = values[f"agc_{size.sweep_rates[-1]}"] - values[f"nf_{size.sweep_rates[-1]}"]
    return values | {"rate_ratio": values["agc_largest"] / values["nf_largest"]}


def largest_stable(rates: tuple[float, ...], reached: list[float], bar: float) -> float:
    """The rate, between two of ``rates`` by a straight line over their logarithms, where the accuracy last leaves ``bar``."""
    above = [i for i, value in enumerate(reached) if value >= bar]
    if not above:
        return rates[0]
    last = above[-1]
    if last == len(rates) - 1:
        return rates[-1]
    share = (reached[last] - bar) / (reached[last] - reached[last + 1])
    return math.exp(math.log(rates[last]) + share * math.log(rates[last + 1] / rates[last]))


def matches_batch_norm(trial: Trial) -> dict[str, float]:
    """One seed: an NF-ResNet with AGC and its twin with batch norm, each at its best rate, and the ways to miss it."""
    size = SIZES[trial.scale]
    train_x, train_y, test_x, test_y, classes = _data(trial, size)
    channels = train_x.shape[1]
    with trial.seeded("weights"):
        nf = nf_resnet(size, classes, channels)
        starts = {
            "batch_norm": batch_norm_twin(size, classes, channels),
            "no_clipping": nf,
            **{f"clipping_{clipping}": nf for clipping in size.clippings},
        }
        if size.mistakes:
            starts["bare"] = bare_twin(size, classes, channels)
    held_out = len(train_x) // 5
    values, chosen = {}, {}
    for arm, start in starts.items():
        tried = []
        for rate in size.rates:
            clipping = float(arm.rpartition("_")[2]) if arm.startswith("clipping_") else None
            tried.append(_try(trial, f"{arm} {rate}", start, (train_x, train_y), held_out, rate, clipping, size))
        by_validation, rate, net = max(tried, key=lambda entry: entry[:2])
        chosen[arm] = (by_validation, rate)
        values[f"{arm}_rate"] = rate
        values[arm] = accuracy(net, standardised(test_x), test_y)
    best = max((f"clipping_{clipping}" for clipping in size.clippings), key=lambda arm: chosen[arm][0])
    values["nf"], values["nf_clipping"] = values[best], float(best.rpartition("_")[2])
    if size.mistakes:  # the best setting, and the mistake most often made: the classifier is clipped as well
        data, rate, clipping = (train_x, train_y), chosen[best][1], values["nf_clipping"]
        _, _, net = _try(trial, "classifier clipped", nf, data, held_out, rate, clipping, size, clip_classifier=True)
        values["classifier_clipped"] = accuracy(net, standardised(test_x), test_y)
    return values | {"accuracy_drop": values["batch_norm"] - values["nf"]}


def _try(
    trial: Trial,
    name: str,
    start: nn.Module,
    data: tuple[Tensor, Tensor],
    held_out: int,
    rate: float,
    clipping: float | None,
    size: Size,
    clip_classifier: bool = False,
) -> tuple[float, float, nn.Module]:
    x, y = data
    net = _train(
        trial,
        name,
        start,
        (x[held_out:], y[held_out:]),
        rate=rate,
        clipping=clipping,
        clip_classifier=clip_classifier,
        epochs=size.epochs,
        batch=size.batch,
        warmup=size.warmup,
    )
    return accuracy(net, standardised(x[:held_out]), y[:held_out]), rate, net
