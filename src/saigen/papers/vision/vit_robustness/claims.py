"""The study's claims, re-measured: what data does for robustness, and which parts of a Vision Transformer can go.

Both architectures are trained from scratch on few and on many images for the same number of steps; what the paper asks of
pre-training sets from 1.3 M to 300 M images is asked of one and ten thousand here.
"""

import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import fingerprint, split
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
from saigen.train import accuracy, cosine, fit
from saigen.trial import Trial

# two of each of the benchmark's four groups: noise, blur, weather, digital
TYPES = (
    *("gaussian_noise", "impulse_noise", "defocus_blur", "motion_blur"),
    *("fog", "brightness", "pixelate", "jpeg_compression"),
)
SHAPES, TEXTURES = 5, 2


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
    rates: tuple[float, ...]  # each network takes the one that does best on a fifth of its training images, held out
    severities: tuple[int, ...]


# tiny and laptop: drawn images; real: the user's, small; full: ViT-B/16 and BiT-R50x1 from scratch
SIZES = {
    "tiny": Size(16, 40, 80, 32, 4, 16, 4, 2, (1,), (32,), 8, 4, 16, (1e-3,), (3,)),
    "laptop": Size(24, 600, 6000, 500, 4, 32, 6, 4, (1, 1), (48, 96), 4, 400, 64, (1e-3, 3e-3), (3, 5)),
    "real": Size(32, 2000, 20_000, 1000, 4, 48, 6, 4, (1, 1, 1), (48, 96, 192), 4, 600, 64, (1e-3,), (1, 3, 5)),
    "full": Size(
        224,
        100_000,
        None,
        10_000,
        16,
        768,
        12,
        12,
        (3, 4, 6, 3),
        (256, 512, 1024, 2048),
        32,
        300_000,
        1024,
        (1e-3,),
        (1, 3, 5),
    ),
}


def figures(n: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 3, side, side) of one figure on a textured ground; the class is its shape and its texture together.

    Five shapes (triangle, square, disc, star, figure of eight), turned a little, of any place, size and colours, striped
    finely or coarsely; the ground has stripes of either kind, fainter.
    """

    def uniform(low: float | int, high: float | int, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    y = torch.randint(SHAPES * TEXTURES, (n,), generator=generator)
    shape, texture = y % SHAPES, y // SHAPES
    places = (torch.arange(side) - side / 2 + 0.5).expand(n, side, side)
    down, across = (axis - uniform(-0.15, 0.15, 1, 1) * side for axis in (places.mT, places))
    radius, angle = (down**2 + across**2).sqrt(), torch.atan2(down, across) + uniform(-0.35, 0.35, 1, 1)

    def polygon(corners: int) -> Tensor:
        part = 2 * torch.pi / corners
        return torch.cos(torch.tensor(part / 2)) / (angle.remainder(part) - part / 2).cos()

    outlines = (
        1.25 * polygon(3),
        1.1 * polygon(4),
        torch.ones_like(angle) * 0.9,
        0.75 + 0.3 * (5 * angle).cos(),
        0.75 + 0.35 * (2 * angle).cos(),
    )
    outline = torch.stack(outlines, 1)[torch.arange(n), shape]
    inside = (outline * uniform(0.24, 0.36, 1, 1) * side - radius + 0.5).clamp(0, 1)[:, None]

    def stripes(coarse: Tensor) -> Tensor:
        period = torch.where(coarse == 1, 6.0, 3.0).view(n, 1, 1) * uniform(0.9, 1.1, 1, 1)
        direction, phase = uniform(0, torch.pi, 1, 1), uniform(0, 2 * torch.pi, 1, 1)
        along = direction.cos() * across + direction.sin() * down
        return (0.5 + 0.5 * (2 * torch.pi * along / period + phase).cos())[:, None]

    first, second, third = uniform(0.2, 0.8, 3, 3, 1, 1).unbind(1)
    figure = first + 0.35 * (2 * stripes(texture) - 1)
    ground = second + (third - second) * 0.3 * stripes(torch.randint(2, (n,), generator=generator))
    x = inside * figure + (1 - inside) * ground
    return (x + 0.06 * torch.randn(x.shape, generator=generator)).clamp(0, 1), y


def images(trial: Trial) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Training and test images, and the number of classes; training images in random order, so that the first are any."""
    size = SIZES[trial.scale]
    if trial.scale in ("real", "full"):
        train, test = (trial.data("images", size=size.side, part=part) for part in ("train", "test"))
        many = min(size.many or len(train), len(train))
        train = train.subset(split(train.y.numpy(), (many,), trial.rng("train"))[0])
        test = test.subset(split(test.y.numpy(), (min(size.test, len(test)),), trial.rng("test"))[0])
        return train.x, train.y, test.x.float() / 255, test.y, len(train.classes)
    x, y = figures(size.many + size.test, size.side, trial.generator("figures"))
    trial.used("figures", fingerprint([x, y]))
    return x[size.test :], y[size.test :], x[: size.test], y[: size.test], SHAPES * TEXTURES


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
            )
    return Normalized(net, (0.5,) * channels, (0.5,) * channels)


def prepared(mirror: bool, generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A batch in [0, 1]; photographs are mirrored half of the time."""
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    if mirror:
        x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
    return x, y


def train(trial: Trial, kind: str, x: Tensor, y: Tensor, classes: int) -> tuple[nn.Module, float]:
    """The network, trained at the rate that did best on held-out training images, and that rate."""
    size = SIZES[trial.scale]
    held_out = len(x) // 5
    tried = []
    for rate in size.rates:
        model = build(trial, kind, x.shape[1], classes)
        fit(
            model,
            lambda model, x, y: F.cross_entropy(model(x), y),
            (x[held_out:], y[held_out:]),
            optimizer=torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05),
            steps=size.steps,
            batch_size=size.batch,
            seed=trial.seed,
            schedule=cosine(warmup=size.steps // 20),
            transform=partial(prepared, trial.scale in ("real", "full")),
            clip=1.0,
            checkpoint=trial.checkpoint(f"{kind}_{len(x)}_{rate}"),
            device=trial.device,
            on_step=lambda step, total, _: trial.progress(step, total, f"{kind}, {len(x)} images"),
        )
        known = prepared(False, torch.Generator(), x[:held_out], y[:held_out])
        tried.append((accuracy(model, *known) if len(size.rates) > 1 else 0.0, rate, model.eval()))
    _, rate, model = max(tried, key=lambda entry: entry[:2])
    return model, rate


def data_makes_vits_robust(trial: Trial) -> dict[str, float]:
    """Each architecture on few and on many images: what share of its clean accuracy survives corruption."""
    size = SIZES[trial.scale]
    x, y, test_x, test_y, classes = images(trial)
    corrupted = {
        f"{name}_{severity}": corrupt(
            test_x,
            name,
            severity,
            benchmark="imagenet" if size.side >= 64 else "cifar",
            generator=trial.generator(name),
        )
        for name in TYPES
        for severity in size.severities
    }
    values, relative = {}, {}
    for kind in ("vit", "cnn"):
        for amount, count in (("few", size.few), ("many", len(x))):
            model, rate = train(trial, kind, x[:count], y[:count], classes)
            arm = f"{kind}_{amount}"
            clean = accuracy(model, test_x, test_y)
            after = statistics.fmean(accuracy(model, images, test_y) for images in corrupted.values())
            relative[arm] = after / max(clean, 1 / classes)
            values |= {f"{arm}_clean": clean, f"{arm}_corrupted": after, f"{arm}_rate": rate}
            attack = partial(fgsm, eps=1 / 255)
            device = trial.device
            values[f"{arm}_fgsm"] = robust_accuracy(model, test_x[:200].to(device), test_y[:200].to(device), attack)
    gaps = {amount: relative[f"vit_{amount}"] - relative[f"cnn_{amount}"] for amount in ("few", "many")}
    values |= {f"{arm}_relative": value for arm, value in relative.items()}
    return values | {
        "gap_few": gaps["few"],
        "gap_many": gaps["many"],
        "gain_from_data": gaps["many"] - gaps["few"],
    }


_TRAINED: dict[tuple, nn.Module] = {}
"""The last Vision Transformer trained in this process: a pure function of its key, needed by three claims."""


def the_vit(trial: Trial) -> tuple[nn.Module, Tensor, Tensor]:
    """The Vision Transformer of many images, and the test images: the same one for all claims of a seed."""
    x, y, test_x, test_y, classes = images(trial)
    key = (trial.seed, trial.scale, str(trial.device), *sorted(trial.used_data.items()))
    if key not in _TRAINED:
        _TRAINED.clear()
        _TRAINED[key] = train(trial, "vit", x, y, classes)[0]
    return _TRAINED[key], test_x, test_y


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
