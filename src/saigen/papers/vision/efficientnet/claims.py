"""The experiments: scaling one dimension against scaling all three at equal cost, and what the family weighs and takes.

At laptop scale the pictures are scenes made of scikit-learn's handwritten digits: one whole digit, of varying size and
contrast, anywhere on a canvas among fragments of others. Small digits reward resolution, clutter rewards a deep view
of the whole, variety rewards width; the canvas is rendered once and shrunk to what each network is given.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from saigen.data import Images, decode, split
from saigen.measure import macs, parameters, speed_ratio
from saigen.nn.resnet import resnet152
from saigen.papers.vision.efficientnet.model import B0_STAGES, EfficientNet, Stage, efficientnet_b1, efficientnet_b7
from saigen.papers.vision.efficientnet.optimizer import RMSpropTF
from saigen.train import EMA, accuracy, cosine, fit, fit_best, predict
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    """What a scale trains: the base network, what it is given, for how long, and the four arms."""

    canvas: int
    base_resolution: int
    stages: tuple[Stage, ...]
    stem_channels: int
    stem_stride: int
    head_channels: int
    divisor: int
    train: int
    held_out: int
    test: int
    batch: int
    epochs: int
    rates: tuple[float, ...]  # each arm takes the one that does best on the held-out pictures
    arms: dict[str, tuple[float, float, int]]
    images: str = "scenes"


SMALL_STAGES = (
    Stage(repeats=1, kernel=3, stride=1, expansion=1, channels=12),
    Stage(repeats=1, kernel=3, stride=2, expansion=4, channels=16),
    Stage(repeats=1, kernel=5, stride=2, expansion=4, channels=24),
)
# B0 with a third of its channels, and strides for pictures of 16 to 32 pixels
CIFAR_STAGES = tuple(
    stage._replace(channels=channels, stride=stride)
    for stage, channels, stride in zip(B0_STAGES, (8, 8, 16, 24, 40, 64, 104), (1, 2, 2, 1, 1, 2, 1), strict=True)
)
# (depth, width, resolution) of each arm. In a small network rounding makes the paper's factors (4, 2, 2 and 1.4, 1.2,
# 1.3) miss four times the base cost, so the scaled factor is moved until it fits, and for compound scaling all three.
SMALL_ARMS = {
    "depth": (5.0, 1.0, 24),
    "width": (1.0, 2.1, 24),
    "resolution": (1.0, 1.0, 48),
    "compound": (1.4, 1.15, 31),
}
CIFAR_ARMS = {
    "depth": (3.5, 1.0, 16),
    "width": (1.0, 2.1, 16),
    "resolution": (1.0, 1.0, 32),
    "compound": (1.2, 1.2, 20),
}
FULL_ARMS = {
    "depth": (4.0, 1.0, 224),
    "width": (1.0, 2.0, 224),
    "resolution": (1.0, 1.0, 448),
    "compound": (1.4, 1.2, 291),
}
SIZES = {
    "tiny": Size(48, 24, SMALL_STAGES, 12, 2, 64, 2, 32, 32, 32, 16, 1, (1e-2, 2e-2), SMALL_ARMS),
    "laptop": Size(48, 24, SMALL_STAGES, 12, 2, 64, 2, 20_000, 1000, 2000, 32, 1, (1e-2, 2e-2), SMALL_ARMS),
    "real": Size(32, 16, CIFAR_STAGES, 16, 1, 256, 4, 10_000, 1000, 5000, 64, 3, (5e-3, 1.5e-2), CIFAR_ARMS, "images"),
    "full": Size(0, 224, B0_STAGES, 32, 2, 1280, 8, 0, 0, 0, 4096, 350, (0.256,), FULL_ARMS, "files"),
}


def joint_scaling_beats_single(trial: Trial) -> dict[str, float]:
    """One seed: four networks of one cost, scaled from one base and trained alike; top-1 on the test pictures."""
    size = SIZES[trial.scale]
    if size.images == "files":
        return _imagenet(trial, size)
    train, held_out, test = _scenes(trial, size) if size.images == "scenes" else _own(trial, size)
    channels, classes = train.x.shape[1], len(train.classes)
    values = _costs(size, channels)
    for arm, (depth, width, resolution) in size.arms.items():
        with trial.seeded("weights"):
            start = build(size, depth, width, classes, channels)
        best = fit_best(
            start.to(memory_format=torch.channels_last),
            lambda model, x, y: F.cross_entropy(model(x), y, label_smoothing=0.1),
            (shrink(train.x, resolution), train.y),
            rates=size.rates,
            optimizer=lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01),
            held_out=(shrink(held_out.x, resolution), held_out.y),
            epochs=size.epochs,
            batch_size=size.batch,
            seed=trial.seed,
            schedule=cosine(warmup=20),
            transform=partial(_flip_and_shift, flip=size.images == "images"),
            clip=1.0,
            checkpoint=lambda rate, arm=arm: trial.checkpoint(f"{arm}_{rate}"),
            device=trial.device,
            on_step=lambda step, total, _, arm=arm: trial.progress(step, total, arm),
        )
        values[f"{arm}_rate"], values[f"{arm}_loss"] = best.rate, best.history.losses[-1]
        values[arm] = accuracy(best.model, shrink(test.x, resolution), test.y)
    return _gaps(values)


def _costs(size: Size, channels: int) -> dict[str, float]:
    base = cost(size, 1.0, 1.0, size.base_resolution, channels)
    values = {f"{arm}_macs": cost(size, *scale, channels) for arm, scale in size.arms.items()}
    for name, found in values.items():
        if not 3.8 <= found / base <= 4.2:
            raise ValueError(f"{name} is {found / base:.2f} times the base network's, allowed is 3.8 to 4.2 times")
    return values | {"base_macs": base}


def _gaps(values: dict[str, float]) -> dict[str, float]:
    return values | {f"over_{arm}": values["compound"] - values[arm] for arm in ("depth", "width", "resolution")}


def build(size: Size, depth: float, width: float, classes: int, channels: int) -> EfficientNet:
    """The scale's base network, ``depth`` times as deep and ``width`` times as wide."""
    return EfficientNet(
        width,
        depth,
        stages=size.stages,
        stem_channels=size.stem_channels,
        stem_stride=size.stem_stride,
        head_channels=size.head_channels,
        divisor=size.divisor,
        num_classes=classes,
        in_chans=channels,
        drop_rate=0.2 if size.images == "files" else 0.0,
        drop_path_rate=0.2 if size.images == "files" else 0.0,
        bn_momentum=0.01 if size.images == "files" else 0.1,
    )


def cost(size: Size, depth: float, width: float, resolution: int, channels: int) -> float:
    """Multiply-adds of an arm on one picture."""
    return float(macs(lambda: build(size, depth, width, 10, channels), (channels, resolution, resolution)))


def shrink(x: Tensor, resolution: int) -> Tensor:
    """Pictures of ``resolution`` pixels a side, by antialiased bilinear sampling."""
    if x.shape[-1] != resolution:
        x = F.interpolate(x, (resolution, resolution), mode="bilinear", antialias=True)
    return x.contiguous(memory_format=torch.channels_last)


def _flip_and_shift(generator: torch.Generator, x: Tensor, y: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
    # up to an eighth of the side each way, the same share at every resolution
    reach = x.shape[-1] // 8
    dx, dy = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    side = x.shape[-1]
    x = F.pad(x, (reach, reach, reach, reach))[..., reach + dy : reach + dy + side, reach + dx : reach + dx + side]
    if flip:
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    return x.contiguous(memory_format=torch.channels_last), y


def _own(trial: Trial, size: Size) -> tuple[Images, ...]:
    images = {part: trial.data("images", size=size.canvas, part=part) for part in ("train", "test")}
    held_out = min(size.held_out, len(images["train"]) // 10)
    counts = (min(size.train, len(images["train"]) - held_out), held_out)
    train, held_out = split(images["train"].y, counts, trial.rng("train"))
    parts = [images["train"].subset(train), images["train"].subset(held_out)]
    parts = [part.float() for part in (*parts, images["test"].sample(size.test, trial.rng("test")))]
    mean, std = parts[0].x.mean((0, 2, 3), keepdim=True), parts[0].x.std((0, 2, 3), keepdim=True)
    return tuple(Images((p.x - mean) / std, p.y, p.classes, p.name, p.fingerprint) for p in parts)


# --- laptop scale: scenes of handwritten digits --------------------------------------------------------------------


def _scenes(trial: Trial, size: Size) -> tuple[Images, ...]:
    digits = trial.data("digits")
    parts = ("train", "held out", "test")
    return tuple(
        scenes(digits.subset(indices), count, size.canvas, trial.generator(part))
        for part, indices, count in zip(
            parts,
            split(digits.y, (997, 200, 600), trial.rng("split")),
            (size.train, size.held_out, size.test),
            strict=True,
        )
    )


def scenes(digits: Images, count: int, canvas: int, generator: torch.Generator, fragments: int = 2) -> Images:
    """``count`` grey pictures (count, 1, canvas, canvas), labelled with the one whole digit in each.

    The digit is two to four fifths of the side, at a random place, with a random contrast; ``fragments`` quarters of
    other digits lie about, and there is noise.
    """
    chosen = torch.randint(len(digits), (count,), generator=generator)
    picture = _place(digits.x[chosen], canvas, generator)
    for _ in range(fragments):
        others = digits.x[torch.randint(len(digits), (count,), generator=generator)].clone()
        corner = torch.randint(4, (count,), generator=generator)
        rows, columns = torch.arange(8) // 4, torch.arange(8) // 4
        quarter = 2 * rows[:, None] + columns[None, :]
        others[quarter[None, None].expand_as(others) != corner[:, None, None, None]] = 0.0
        picture = torch.maximum(picture, _place(others, canvas, generator))
    contrast = 0.5 + 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    picture = picture * contrast + 0.1 * torch.randn(picture.shape, generator=generator)
    return Images(picture, digits.y[chosen], digits.classes, digits.name, digits.fingerprint)


def _place(x: Tensor, canvas: int, generator: torch.Generator) -> Tensor:
    n = len(x)
    scale = 0.4 + 0.4 * torch.rand(n, generator=generator)
    centre = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - scale)[:, None]
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -centre / scale[:, None]
    return F.grid_sample(x, F.affine_grid(theta, (n, 1, canvas, canvas), align_corners=False), align_corners=False)


# --- full scale: an ImageNet folder --------------------------------------------------------------------------------


class _Files:
    """Pictures of a folder ``part/CLASS/*``, read when they are asked for: a tensor to index that needs no memory."""

    def __init__(self, root: Path, side: int) -> None:
        folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
        self.files = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())]
        self.y = torch.tensor([label for _, label in self.files])
        self.classes, self.side = len(folders), side
        self.device = torch.device("cpu")
        self.pool = ThreadPoolExecutor()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        if isinstance(indices, slice):
            indices = torch.arange(len(self))[indices]
        paths = [self.files[i][0] for i in indices.tolist()]
        pictures = self.pool.map(lambda path: torch.from_numpy(decode(path, str(path), self.side).copy()), paths)
        return torch.stack(list(pictures)).permute(0, 3, 1, 2)


def _imagenet(trial: Trial, size: Size) -> dict[str, float]:
    """The official recipe (RMSProp, label smoothing, decay of the weights in the loss, weight EMA) for each arm."""
    if trial.data_path is None:
        raise ValueError("scale 'full' needs data of yours: give --data PATH, a folder with train/CLASS and val/CLASS")
    values = {}
    for arm, (depth, width, resolution) in size.arms.items():
        train = _Files(trial.data_path / "train", resolution + 32)
        val = _Files(trial.data_path / "val", resolution + 32)
        trial.used(trial.data_path.name, f"{len(train)} and {len(val)} files, {train.classes} classes")
        with trial.seeded("weights"):
            model = build(size, depth, width, train.classes, 3)
        values[f"{arm}_macs"] = float(macs(model, (3, resolution, resolution)))
        norms = {
            p for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d) for p in module.parameters()
        }
        decayed = [p for p in model.parameters() if p not in norms]
        groups = [{"params": decayed, "weight_decay": 1e-5}, {"params": [p for p in model.parameters() if p in norms]}]
        ema = EMA(model, 0.9999)
        per_epoch = len(train) // size.batch
        fit(
            model,
            lambda model, x, y: F.cross_entropy(model(x), y, label_smoothing=0.1),
            (train, train.y),
            optimizer=RMSpropTF(groups, lr=size.rates[0]),
            epochs=size.epochs,
            batch_size=size.batch,
            seed=trial.seed,
            schedule=_staircase(per_epoch),
            transform=partial(_inception_crop, resolution=resolution),
            ema=ema,
            checkpoint=trial.checkpoint(arm),
            device=trial.device,
        )
        logits = predict(partial(_evaluate, ema.model, trial.device, resolution), val)
        values[arm] = (logits.argmax(-1) == val.y).double().mean().item()
    return _gaps(values)


def _staircase(per_epoch: int) -> Callable[[int, int], float]:
    # five epochs of warm-up, then times 0.97 every 2.4 epochs
    return lambda step, total: min(1.0, step / (5 * per_epoch)) * 0.97 ** (step // max(1, round(2.4 * per_epoch)))


def _normalise(x: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x.float() / 255 - mean.to(x.device)[:, None, None]) / std.to(x.device)[:, None, None]


def _evaluate(model: EfficientNet, device: torch.device, resolution: int, x: Tensor) -> Tensor:
    edge = (x.shape[-1] - resolution) // 2
    centre = x[..., edge : edge + resolution, edge : edge + resolution].to(device)
    return model(_normalise(centre))


def _inception_crop(generator: torch.Generator, x: Tensor, y: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    # area 8-100 %, aspect 3/4-4/3, mirrored half of the time, one draw a picture
    side, crops = x.shape[-1], []
    area, aspect, top, left, mirror = torch.rand(5, len(x), generator=generator).tolist()
    for i, picture in enumerate(x):
        ratio = math.exp(math.log(3 / 4) + aspect[i] * (math.log(4 / 3) - math.log(3 / 4)))
        cut = (0.08 + 0.92 * area[i]) * side * side
        h, w = min(side, round(math.sqrt(cut / ratio))), min(side, round(math.sqrt(cut * ratio)))
        y0, x0 = int(top[i] * (side - h + 1)), int(left[i] * (side - w + 1))
        crop = picture[None, :, y0 : y0 + h, x0 : x0 + w].float()
        crop = F.interpolate(crop, (resolution, resolution), mode="bicubic", antialias=True)[0]
        crops.append(crop.flip(-1) if mirror[i] < 0.5 else crop)
    return _normalise(torch.stack(crops).clamp(0, 255)), y


# --- claims that need no training ----------------------------------------------------------------------------------


def b7_is_smaller_than_gpipe(trial: Trial) -> dict[str, float]:
    """Parameters of GPipe's AmoebaNet-B, as the paper prints them, over those of B7, counted."""
    with torch.device("meta"):
        b7 = parameters(efficientnet_b7())
    return {"parameter_ratio": 557e6 / b7, "b7_parameters": float(b7)}


def b1_is_faster_than_resnet152(trial: Trial) -> dict[str, float]:
    """Time of ResNet-152 at 224 pixels over that of B1 at 240, one picture on one core, as in Table 4."""
    side = (32, 48) if trial.scale == "tiny" else (224, 240)
    with trial.seeded("weights"):
        resnet, b1 = resnet152().eval(), efficientnet_b1().eval()
        theirs, ours = torch.rand(1, 3, side[0], side[0]), torch.rand(1, 3, side[1], side[1])

    @torch.inference_mode()
    def run(model: torch.nn.Module, x: Tensor) -> Tensor:
        return model(x)

    ratio = speed_ratio(partial(run, resnet, theirs), partial(run, b1, ours), threads=1, seconds=1.0)
    return {
        "speedup": ratio,
        "resnet152_macs": float(macs(resnet, (3, side[0], side[0]))),
        "b1_macs": float(macs(b1, (3, side[1], side[1]))),
    }
