"""EfficientNetV2's claims, re-measured: progressive learning's accuracy and time, and what fusing early blocks is worth."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import fingerprint
from saigen.data.scenes import render_scenes
from saigen.data.subsets import sample
from saigen.measure import macs, parameters, speed_ratio
from saigen.nn.efficientnet_blocks import EfficientNetBase, Stage
from saigen.papers.augmentation.randaugment import RandAugment
from saigen.papers.vision.efficientnet import RMSpropTF
from saigen.papers.vision.efficientnet_v2.model import STAGES, EfficientNetV2, fused, plain, tf_efficientnetv2_b0
from saigen.papers.vision.efficientnet_v2.transform import (
    PAPER_SCHEDULES,
    ProgressiveLearning,
    ProgressiveSchedule,
    resize,
)
from saigen.train import accuracy, cosine, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    train: int | None  # None: all there is
    test: int | None
    stages: tuple[Stage, ...]
    stem: int
    head: int
    batch: int
    rates: dict[str, float]  # an arm's own learning rate, the best of a grid on pilot seeds
    schedule: ProgressiveSchedule
    data: str = "scenes"
    recipe: str = "small"


SMALL = (fused(1, 1, 1, 8), fused(1, 2, 4, 16), plain(2, 2, 4, 32))
SMALL_SCHEDULE = ProgressiveSchedule(16, 4, (24, 48), (2, 8), (0, 0.2), (0, 0), (0.0, 0.2))
CIFAR = (fused(1, 1, 1, 16), fused(1, 2, 4, 24), plain(2, 2, 4, 48))
ARMS = ("fixed", "short", "progressive")
SIZES = {
    "tiny": Size(64, 32, SMALL, 8, 64, 32, dict.fromkeys(ARMS, 1e-2), replace(SMALL_SCHEDULE, epochs=4)),
    "laptop": Size(1500, 1500, SMALL, 8, 64, 64, {"fixed": 3e-2, "short": 3e-2, "progressive": 1e-2}, SMALL_SCHEDULE),
    "real": Size(
        8000, 4000, CIFAR, 16, 128, 64, dict.fromkeys(ARMS, 5e-3),
        ProgressiveSchedule(8, 4, (16, 32), (2, 8), (0, 0.2), (0, 0), (0.0, 0.2)), "images",
    ),
    "full": Size(
        None, None, STAGES["s"], 24, 1280, 4096, dict.fromkeys(ARMS, 0.256), PAPER_SCHEDULES["s"], "images", "paper",
    ),
}  # fmt: skip


def progressive_learning_keeps_accuracy(trial: Trial) -> dict[str, float]:
    """One seed: training at the last size throughout, progressively, and at the last size for the same multiply-adds."""
    values = _train(trial, ARMS)
    return values | {
        "accuracy_drop": values["fixed"] - values["progressive"],
        "short_drop": values["fixed"] - values["short"],
    }


def schedule_of(arm: str, schedule: ProgressiveSchedule, cost: Callable[[int], float]) -> ProgressiveSchedule:
    """What an arm trains by; ``cost`` is that of one image of a size."""
    last = {"rand_augment": (schedule.rand_augment[1],) * 2, "mixup": (schedule.mixup[1],) * 2}
    last |= {"cutmix": (schedule.cutmix[1],) * 2, "dropout": (schedule.dropout[1],) * 2}
    if arm == "progressive":
        return schedule
    fixed = replace(schedule, size=(schedule.size[1],) * 2, stages=1, **last)
    if arm == "short":
        return replace(fixed, epochs=max(1, round(schedule.epochs * schedule.relative_cost(cost))))
    return fixed


def build(size: Size, classes: int, channels: int) -> EfficientNetV2:
    """The scale's network."""
    small = size.schedule.size[1] < 64
    return EfficientNetV2(
        stages=size.stages,
        stem_channels=size.stem,
        stem_stride=1 if size.data == "images" and small else 2,
        head_channels=size.head,
        num_classes=classes,
        in_chans=channels,
        drop_rate=0.0,  # the schedule sets it
        drop_path_rate=0.0 if small else 0.2,
    )


def _train(trial: Trial, arms: tuple[str, ...]) -> dict[str, float]:
    """Test accuracy of each arm at the last size, and the multiply-adds of its forward passes, beside those of "fixed"."""
    size = SIZES[trial.scale]
    (train_x, train_y), (test_x, test_y), classes = _scenes(trial, size) if size.data == "scenes" else _own(trial, size)
    channels, last = train_x.shape[1], size.schedule.size[1]

    def cost(side: int) -> float:
        return float(macs(lambda: build(size, classes, channels), (channels, side, side)))

    values = {}
    for done, arm in enumerate(arms):
        trial.progress(done, len(arms), arm)
        schedule = schedule_of(arm, size.schedule, cost)
        with trial.seeded("weights"):
            model = build(size, classes, channels)
        if size.recipe == "paper":
            optimizer = RMSpropTF(model.parameters(), lr=size.rates[arm], weight_decay=1e-5)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=size.rates[arm], weight_decay=0.05)
        # translations in shares of the side, since the side changes
        augment = RandAugment(2, schedule="increasing", translate=0.3, relative=True)
        progressive = ProgressiveLearning(schedule, classes, augment)
        per_epoch = len(train_x) // size.batch
        anneal, total = cosine(warmup=min(20, per_epoch)), schedule.epochs * per_epoch
        for stage in schedule.table():
            progressive.start(stage.first_epoch, model)
            before = stage.first_epoch * per_epoch
            fit(
                model,
                lambda model, x, y: F.cross_entropy(model(x - 0.5), y, label_smoothing=0.1),
                (train_x, train_y),
                optimizer=optimizer,
                epochs=stage.epochs,
                batch_size=size.batch,
                # an order of its own for each stage; the first is the same in all arms
                seed=trial.seed + 1_000_003 * stage.first_epoch,
                schedule=lambda step, _, before=before: anneal(before + step, total),
                transform=partial(_augment, progressive),
                clip=1.0,
                checkpoint=trial.checkpoint(f"{arm}_{stage.index}"),
                device=trial.device,
            )
        values[arm] = accuracy(lambda x: model(resize(x, last) - 0.5), test_x, test_y)
        values[f"{arm}_cost"] = schedule.relative_cost(cost) * schedule.epochs / size.schedule.epochs
    return values


def _augment(progressive: ProgressiveLearning, generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return progressive(torch.where(mirrored[:, None, None, None], x.flip(-1), x), y, generator)


def _scenes(trial: Trial, size: Size) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    # one small shape on a textured ground; which shape it is shows only where there are pixels enough
    drawn = []
    for part, count in (("train", size.train), ("test", size.test)):
        x, labels = render_scenes(
            trial.rng(part), count, size.schedule.size[1], objects=1, radius=(4.0, 7.0), clutter=0.7, noise=0.05
        )
        x, y = torch.from_numpy(x), torch.from_numpy(labels.reshape(count, -1).max(1)).long() - 1
        seen = y >= 0  # a shape may lie all but outside
        drawn.append((x[seen], y[seen]))
    trial.used("scenes", fingerprint([tensor for part in drawn for tensor in part]))
    return *drawn, 3


def _own(trial: Trial, size: Size) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    parts = []
    for part, count in (("train", size.train), ("test", size.test)):
        images = trial.data("images", size=size.schedule.size[1], part=part)
        images = sample(images, count, trial.rng(part)).float()
        parts.append((images.x, images.y))
    return *parts, len(images.classes)


# --- on the clock ----------------------------------------------------------------------------------------------------


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One training step without the optimizer: forward and backward."""
    y = torch.zeros(len(x), dtype=torch.long)

    def call() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return call


def progressive_learning_is_faster(trial: Trial) -> dict[str, float]:
    """Steps of V2-B0 at the four sizes of V2-S's schedule, against as many at the last size; no data needed."""
    schedule = PAPER_SCHEDULES["s"]
    sides = [stage.size for stage in schedule.table()]
    if trial.scale == "tiny":
        sides = [side // 4 for side in sides]
    with trial.seeded("weights"):
        model = tf_efficientnetv2_b0(drop_rate=0.0, drop_path_rate=0.0).train()
    images = {side: torch.rand(2, 3, side, side, generator=trial.generator("images")) for side in sides}

    def run(sides: list[int]) -> Callable[[], None]:
        steps = [step(model, images[side]) for side in sides]
        return lambda: [call() for call in steps]

    ratio = speed_ratio(run(sides[-1:] * len(sides)), run(sides), seconds=0.1 if trial.scale == "tiny" else 1.0)
    cost = schedule.relative_cost(lambda side: macs(model, (3, side, side)))
    return {"speedup": ratio, "relative_macs": cost}


# Table 3's base network is EfficientNet-B4; fusing brings 3x3 kernels, squeeze-and-excitation stays
B4_STAGES = (
    Stage(2, 3, 1, 1, 24), Stage(4, 3, 2, 6, 32), Stage(4, 5, 2, 6, 56), Stage(6, 3, 2, 6, 112),
    Stage(6, 5, 1, 6, 160), Stage(8, 5, 2, 6, 272), Stage(2, 3, 1, 6, 448),
)  # fmt: skip


def fusing_early_blocks_is_faster(trial: Trial) -> dict[str, float]:
    """EfficientNet-B4 with Fused-MBConv in stages 1-3 beside the plain one: counted, and on the clock."""
    stages = tuple(
        stage._replace(fused=i < 3, kernel=3 if i < 3 else stage.kernel) for i, stage in enumerate(B4_STAGES)
    )
    with trial.seeded("weights"):
        plain_b4, fused_b4 = (
            EfficientNetBase(s, stem_channels=48, head_channels=1792, drop_rate=0.0, drop_path_rate=0.0)
            for s in (B4_STAGES, stages)
        )
    at = (3, 380, 380)
    counts = {"plain_macs": float(macs(plain_b4, at)), "fused_macs": float(macs(fused_b4, at))}
    side, seconds = (32, 0.1) if trial.scale == "tiny" else (224, 1.0)
    x = torch.rand(2, 3, side, side, generator=trial.generator("images"))
    return {
        "speedup": speed_ratio(step(plain_b4.train(), x), step(fused_b4.train(), x), seconds=seconds),
        "fused_parameters": parameters(fused_b4) / 1e6,
        "mac_ratio": counts["fused_macs"] / counts["plain_macs"],
    } | counts
