"""The study's claims, re-measured: what data does for robustness, and which parts of a Vision Transformer can go.

Both architectures are trained from scratch on few and on many images for the same number of steps; what the paper asks of
pre-training sets from 1.3 M to 300 M images is asked of some hundreds and thousands here.
"""

import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import split
from saigen.data.subsets import sample
from saigen.nn.vision_transformer import VisionTransformer
from saigen.papers.vision.vit_robustness import (
    BiTResNet,
    Normalized,
    corrupt,
    fgsm,
    layer_similarity,
    lesion,
    restrict_attention,
    robust_accuracy,
)
from saigen.train import accuracy, cosine
from saigen.train.selection import fit_best
from saigen.trial import Trial

# two of each of the benchmark's four groups: noise, blur, weather, digital
TYPES = (
    *("gaussian_noise", "impulse_noise", "defocus_blur", "motion_blur"),
    *("fog", "brightness", "pixelate", "jpeg_compression"),
)


@dataclass(frozen=True)
class Size:
    side: int
    few: int
    many: int | None  # None: all there is
    test: int
    patch: int
    width: int
    depth: int
    heads: int
    depths: tuple[int, ...]  # of the ResNet, as are the widths
    widths: tuple[int, ...]
    groups: int
    steps: int
    batch: int
    rates: tuple[float, ...]  # of several, each network takes the one that does best on held-out training images
    severities: tuple[int, ...]


# tiny and laptop: digits; real: the user's images, small; full: ViT-B/16 and BiT-R50x1 from scratch
SIZES = {
    "tiny": Size(12, 40, 80, 32, 4, 16, 4, 2, (1,), (32,), 8, 4, 16, (1e-3,), (3,)),
    "laptop": Size(16, 150, 1200, 500, 4, 32, 6, 4, (1, 1), (32, 64), 4, 500, 48, (1e-3, 3e-3), (3, 5)),
    "real": Size(32, 2000, 20_000, 500, 4, 48, 6, 4, (1, 1), (32, 64), 4, 350, 64, (3e-3,), (1, 3, 5)),
    "full": Size(
        *(224, 100_000, None, 10_000, 16, 768, 12, 12, (3, 4, 6, 3), (256, 512, 1024, 2048), 32, 300_000, 1024),
        *((1e-3,), (1, 3, 5)),
    ),
}
# of a digit on its canvas: its share of the side, and how far off the middle, in halves of the side
PLACES = ((0.75, 0.95), (-0.15, 0.15), (-0.15, 0.15))


def images(trial: Trial) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Training and test images, and the number of classes; training images in random order, so that the first are any."""
    size = SIZES[trial.scale]
    if trial.scale in ("real", "full"):
        known, new = (
            sample(trial.data("images", size=size.side, part=part), count, trial.rng(part))
            for part, count in (("train", size.many), ("test", size.test))
        )
        return known.x, known.y, new.x.float() / 255, new.y, len(known.classes)
    digits = trial.data("digits")
    known, new = (digits.subset(i) for i in split(digits.y.numpy(), (size.many, size.test), trial.rng("split")))
    test_x, _ = placed(size.side, trial.generator("places"), new.x, new.y)
    return known.x, known.y, test_x, new.y, len(digits.classes)


def placed(side: int, generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Digits somewhere on a canvas of ``side`` pixels, at 0.75 to 0.95 of its size, light on grey."""
    n = len(x)
    share, across, down = (low + (high - low) * torch.rand(n, generator=generator) for low, high in PLACES)
    zero = torch.zeros(n)
    rows = ((1 / share, zero, across / share), (zero, 1 / share, down / share))
    back = torch.stack([torch.stack(row, 1) for row in rows], 1)
    return 0.25 + 0.6 * F.grid_sample(x, F.affine_grid(back, [n, 1, side, side], False), align_corners=False), y


def build(trial: Trial, kind: str, channels: int, classes: int) -> nn.Module:
    size = SIZES[trial.scale]
    with trial.seeded(f"weights {kind}"):
        if kind == "cnn":
            net = BiTResNet(
                size.depths,
                widths=size.widths,
                groups=size.groups,
                num_classes=classes,
                in_chans=channels,
                small_stem=size.side < 64,
            )
        else:
            net = VisionTransformer(
                img_size=size.side,
                patch_size=size.patch,
                in_chans=channels,
                num_classes=classes,
                embed_dim=size.width,
                depth=size.depth,
                num_heads=size.heads,
                init="jax",
            )
    return Normalized(net, (0.5,) * channels, (0.5,) * channels)


def prepared(trial: Trial, generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A training batch: digits in new places, photographs mirrored half of the time."""
    if trial.scale not in ("real", "full"):
        return placed(SIZES[trial.scale].side, generator, x, y)
    x = x.float() / 255
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(3), x), y


_TRAINED: dict[tuple, nn.Module] = {}
"""Networks trained in this process, for the last seed: pure functions of their keys, some needed by all claims."""


def trained(trial: Trial, kind: str, x: Tensor, y: Tensor, classes: int, rates: tuple[float, ...]) -> nn.Module:
    """The network after training, in eval mode; of several rates the one that does best on a fifth of the images."""
    size = SIZES[trial.scale]
    run = (trial.seed, trial.scale, str(trial.device), *sorted(trial.used_data.items()))
    if any(key[3:] != run for key in _TRAINED):
        _TRAINED.clear()
    key = (kind, len(x), rates, *run)
    if key in _TRAINED:
        return _TRAINED[key]
    held_out = len(x) // 5 if len(rates) > 1 else 0
    chosen_by = (x[:held_out], y[:held_out])
    best = fit_best(
        build(trial, kind, x.shape[1], classes),
        lambda model, x, y: F.cross_entropy(model(x), y),
        (x[held_out:], y[held_out:]),
        rates=rates,
        optimizer=lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05),
        held_out=prepared(trial, trial.generator("held out"), *chosen_by) if held_out else chosen_by,
        steps=size.steps,
        batch_size=size.batch,
        seed=trial.seed,
        schedule=cosine(warmup=size.steps // 10),
        transform=partial(prepared, trial),
        clip=1.0,
        checkpoint=lambda rate: trial.checkpoint(f"{kind}_{len(x)}_{rate}"),
        device=trial.device,
        on_step=lambda step, total, _: trial.progress(step, total, f"{kind}, {len(x)} images"),
    )
    _TRAINED[key] = best.model.eval()
    return _TRAINED[key]


def data_makes_vits_robust(trial: Trial) -> dict[str, float]:
    """Each architecture on few and on many images: what share of its clean accuracy survives corruption."""
    size = SIZES[trial.scale]
    x, y, test_x, test_y, classes = images(trial)
    benchmark = "imagenet" if size.side >= 64 else "cifar"
    corrupted = [
        corrupt(test_x, name, severity, benchmark=benchmark, generator=trial.generator(f"{name} {severity}"))
        for name in TYPES
        for severity in size.severities
    ]
    attacked = tuple(part[:200].to(trial.device) for part in (test_x, test_y))
    values, relative = {}, {}
    for kind in ("vit", "cnn"):
        for amount, count in (("few", size.few), ("many", len(x))):
            model = trained(trial, kind, x[:count], y[:count], classes, size.rates)
            arm = f"{kind}_{amount}"
            clean = accuracy(model, test_x, test_y)
            after = [accuracy(model, images, test_y) for images in corrupted]
            relative[arm] = statistics.fmean(after) / max(clean, 1 / classes)
            values |= {f"{arm}_clean": clean, f"{arm}_corrupted": statistics.fmean(after)}
            values |= {f"{arm}_relative": relative[arm]}
            values[f"{arm}_fgsm"] = robust_accuracy(model, *attacked, partial(fgsm, eps=4 / 255))
    gap_few, gap_many = (relative[f"vit_{amount}"] - relative[f"cnn_{amount}"] for amount in ("few", "many"))
    return values | {"gap_few": gap_few, "gap_many": gap_many, "gain_from_data": gap_many - gap_few}


def the_vit(trial: Trial) -> tuple[nn.Module, Tensor, Tensor]:
    """The Vision Transformer of many images, and the test images."""
    x, y, test_x, test_y, classes = images(trial)
    return trained(trial, "vit", x, y, classes, SIZES[trial.scale].rates[-1:]), test_x, test_y


def almost_any_block_can_go(trial: Trial) -> dict[str, float]:
    """One block removed at a time, whole, its attention, or its MLP: accuracy lost."""
    model, x, y = the_vit(trial)
    net, clean = model.model, accuracy(model, x, y)
    values = {"clean": clean, "chance": 1 / net.num_classes}
    for part in ("blocks", "attn", "mlp"):
        for i in range(net.depth):
            with lesion(net, **{part: i}):
                values[f"{part}_{i}_drop"] = clean - accuracy(model, x, y)
        values[f"{part}_median_drop"] = statistics.median(values[f"{part}_{i}_drop"] for i in range(net.depth))
    return values | {"single_block_drop": values["blocks_median_drop"]}


def last_blocks_need_no_neighbours(trial: Trial) -> dict[str, float]:
    """Patches that see themselves and the class token only, in the first or the last blocks; and windows everywhere."""
    model, x, y = the_vit(trial)
    net, clean = model.model, accuracy(model, x, y)
    values = {"clean": clean}
    for k in range(1, net.depth + 1):
        for end, layers in (("first", range(k)), ("last", range(net.depth - k, net.depth))):
            with restrict_attention(net, patch_to_patch=False, layers=list(layers)):
                values[f"without_{end}_{k}"] = accuracy(model, x, y)
    for distance in range(max(net.grid_size)):
        with restrict_attention(net, distance):
            values[f"window_{distance}"] = accuracy(model, x, y)
    some = max(1, net.depth // 3)
    return values | {
        "last_over_first": values[f"without_last_{some}"] - values[f"without_first_{some}"],
        "window_drop": clean - values["window_1"],
    }


def later_layers_agree(trial: Trial) -> dict[str, float]:
    """How alike neighbouring blocks are early and late, and what the later ones are worth all the same."""
    model, x, y = the_vit(trial)
    net = model.model
    values = {"clean": accuracy(model, x, y)}
    half = net.depth // 2
    shown = (x[:200] - 0.5) / 0.5
    for tokens in ("all", "cls"):
        for kind in ("cosine", "cka"):
            alike = layer_similarity(net, shown.to(trial.device), tokens=tokens, kind=kind)
            steps = alike.diagonal(1).tolist()
            values |= {f"{tokens}_{kind}_{i}_{i + 1}": value for i, value in enumerate(steps)}
            values[f"{tokens}_{kind}_early"] = statistics.fmean(steps[:half])
            values[f"{tokens}_{kind}_late"] = statistics.fmean(steps[-half:])
    with lesion(net, blocks=range(half, net.depth)):
        values["without_later_half"] = accuracy(model, x, y)
    return values | {
        "late_over_early": values["all_cosine_late"] - values["all_cosine_early"],
        "later_half_drop": values["clean"] - values["without_later_half"],
    }
