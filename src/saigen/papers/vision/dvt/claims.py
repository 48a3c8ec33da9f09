"""DVT's claim, re-measured: the accuracy of the finest static transformer at a fraction of its mean cost."""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saigen.data import split
from saigen.data.augmentation import crop_and_flip, shift_and_flip, standardised
from saigen.data.subsets import sample
from saigen.measure import latency, macs, speed_ratio
from saigen.papers.vision.dvt.model import (
    DEIT_SPLITS,
    DynamicTransformerCascade,
    budget_curve,
    calibrate_thresholds,
    cascade_loss,
    confidence,
    exit_fractions,
    first_confident_exit,
)
from saigen.train import cosine, fit, predict
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    train: int | None  # None: all there is
    held_out: int  # for the learning rate, the thresholds and the point to work at
    test: int | None
    epochs: int
    batch: int
    rates: tuple[float, ...]  # of several, each arm and each static net takes the one best on held-out images
    net: dict[str, Any] = field(default_factory=dict)
    renders: int = 1  # pictures drawn of each digit for held-out and test images
    weight_decay: float = 0.05
    xavier: bool = False  # a start at which so small a net learns at once
    side: int = 0  # of the user's images


SCENES = {
    "img_size": 24,
    "in_chans": 1,
    "splits": ((12, 12), (8, 8), (4, 4)),  # 4, 9 and 36 tokens, about in proportion to the 4x4, 7x7, 14x14 of table 1
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
    "context_dim": 8,
    "reuse_hidden": 24,
    "mlp_ratio": 2.0,
}
SMALL = {
    "img_size": 32,
    "splits": ((16, 16), (8, 8), (4, 4)),
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "context_dim": 8,
    "reuse_hidden": 24,
    "mlp_ratio": 2.0,
}
SIZES = {
    "tiny": Size(200, 100, 100, 1, 50, (6e-3,), SCENES | {"depth": 1}, xavier=True),
    "laptop": Size(900, 300, 597, 36, 64, (6e-3,), SCENES, renders=3, xavier=True),
    "real": Size(5000, 1000, 2000, 6, 50, (2e-3,), SMALL, xavier=True, side=32),
    "full": Size(None, 50_000, None, 310, 512, (5e-4,), {"splits": DEIT_SPLITS, "drop_path_rate": 0.1}, side=224),
}
SETTINGS = [p / 20 for p in range(1, 60)]  # the paper's grid of exit parameters


class Task(NamedTuple):
    """Training images with their augmentation, and prepared images to choose by and to test on."""

    x: Tensor
    y: Tensor
    transform: Callable[[torch.Generator, Tensor, Tensor], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    difficulty: Tensor | None
    """How hard each test image is; None where nobody knows."""


SIDES, SHARES = (24, 16, 8), (0.5, 0.3, 0.2)  # most images are easy, few are hard


def draw_scenes(generator: torch.Generator, digits: Tensor) -> tuple[Tensor, Tensor]:
    """Each 8x8 digit (n, 1, 8, 8) in a picture of 24x24, and how hard that is (0, 1, 2).

    Easy: the digit fills the picture. Harder: it is 16 pixels large, then 8, somewhere amid strong noise, which coarse
    patches mix with it and fine ones do not. Places are multiples of 4 pixels.
    """
    n, side = len(digits), SIDES[0]
    x = 0.6 * torch.randn(n, 1, side, side, generator=generator)
    kind = torch.multinomial(torch.tensor(SHARES), n, replacement=True, generator=generator)
    place = torch.rand(n, 2, generator=generator)
    grain = 0.1 * torch.randn(n, 1, side, side, generator=generator)
    for k, s in enumerate(SIDES):
        of_kind = (kind == k).nonzero().flatten()
        if len(of_kind) == 0:
            continue
        digit = F.interpolate(digits[of_kind].float(), size=(s, s), mode="bilinear") + grain[of_kind, :, :s, :s]
        # the smallest keep off the border
        margin = 4 if s == 8 else 0
        corner = margin + 4 * (place[of_kind] * ((side - s - 2 * margin) // 4 + 1)).long()
        rows, columns = corner[:, :1] + torch.arange(s), corner[:, 1:] + torch.arange(s)
        x[of_kind[:, None, None], 0, rows[:, :, None], columns[:, None, :]] = digit[:, 0]
    return (x - 0.1) / 0.35, kind


def make_task(trial: Trial, size: Size) -> Task:
    """The digits as pictures of many sizes at ``tiny`` and ``laptop``, else the user's images."""
    if not size.side:
        digits = trial.data("digits")
        train, held_out, test = (
            digits.subset(part)
            for part in split(digits.y.numpy(), (size.train, size.held_out, size.test), trial.rng("split"))
        )

        def render(part: Any, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
            x, y = part.x.repeat(size.renders, 1, 1, 1), part.y.repeat(size.renders)
            pictures, kind = draw_scenes(trial.generator(purpose), x)
            return pictures, y, kind

        x, y, _ = render(held_out, "held out")
        test_x, test_y, kind = render(test, "test")
        return Task(
            train.x,
            train.y,
            lambda generator, x, y: (draw_scenes(generator, x)[0], y),
            (x, y),
            (test_x, test_y),
            kind,
        )

    images, test = (trial.data("images", size=size.side, part=part) for part in ("train", "test"))
    count = min(size.train or len(images), len(images) - size.held_out)
    train, held_out = (
        images.subset(part) for part in split(images.y.numpy(), (count, size.held_out), trial.rng("split"))
    )
    test = sample(test, size.test, trial.rng("test"))
    augment = shift_and_flip if size.side < 64 else crop_and_flip
    chosen = standardised(held_out.x), held_out.y
    return Task(train.x, train.y, augment, chosen, (standardised(test.x), test.y), None)


def _spearman(a: Tensor, b: Tensor) -> float:
    """The rank correlation, ties sharing their mean rank; 0 where one does not vary."""
    from scipy.stats import spearmanr

    if len(a.unique()) < 2 or len(b.unique()) < 2:
        return 0.0
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def equal_accuracy_at_lower_cost(trial: Trial) -> dict[str, float]:
    """One seed: the cascade, the cascade without reuse, and each of its transformers as a static net of its own.

    Without reuse the stages share nothing, neither weights nor gradients nor (with AdamW, which looks at each weight
    alone) a step: one training of that arm is the training of three static nets, and each takes its own best rate.
    """
    size = SIZES[trial.scale]
    task = make_task(trial, size)
    classes = int(task.y.max()) + 1
    with trial.seeded("weights"):
        reusing = DynamicTransformerCascade(num_classes=classes, **size.net)
    with trial.seeded("weights"):
        separate = DynamicTransformerCascade(num_classes=classes, **size.net, feature_reuse=False, relation_reuse=False)
    for model in (reusing, separate) if size.xavier else ():
        with trial.seeded("start"):
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    torch.nn.init.xavier_uniform_(module.weight)
    costs = {
        name: [
            float(macs(_up_to(model, exit + 1), (reusing.in_chans, reusing.img_size, reusing.img_size)))
            for exit in range(len(model.stages))
        ]
        for name, model in (("dvt", reusing), ("separate", separate))
    }
    alone = [b - a for a, b in zip([0.0, *costs["separate"]], costs["separate"], strict=False)]

    tried: dict[str, list[tuple[DynamicTransformerCascade, Tensor, Tensor]]] = {"dvt": [], "separate": []}
    trainings = 2 * len(size.rates)
    for arm, start in (("dvt", reusing), ("separate", separate)):
        for rate in size.rates:
            model = copy.deepcopy(start)
            steps = size.epochs * (len(task.y) // size.batch)
            fit(
                model,
                lambda model, x, y: cascade_loss(model(x), y),
                (task.x, task.y),
                optimizer=torch.optim.AdamW(
                    [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=size.weight_decay
                ),
                epochs=size.epochs,
                batch_size=size.batch,
                seed=trial.seed,
                schedule=cosine(warmup=max(1, steps // 15)),
                transform=task.transform,
                checkpoint=trial.checkpoint(f"{arm}_{rate}"),
                device=trial.device,
            )
            model.eval()
            exits = _Exits(model)
            tried[arm].append(
                (model, *(predict(exits, part[0]).transpose(0, 1) for part in (task.held_out, task.test)))
            )
            trial.progress(sum(map(len, tried.values())), trainings, f"{arm}, rate {rate}")

    values: dict[str, float] = {}
    held_out_y, test_y = task.held_out[1], task.test[1]

    def right(logits: Tensor, y: Tensor) -> float:
        return float((logits.argmax(-1) == y).double().mean())

    # static nets: each by its own best rate
    static = []
    for exit in range(len(alone)):
        model, held_out, test = max(tried["separate"], key=lambda entry: right(entry[1][exit], held_out_y))
        static.append((model, right(held_out[exit], held_out_y), right(test[exit], test_y)))
        values |= {f"static_{exit + 1}_accuracy": static[-1][2], f"static_{exit + 1}_macs": alone[exit]}

    # cascades: the rate by the last exit; the point to work at is the cheapest that on held-out images is better than the
    # static net by a standard error, since the best of many points looks better there than it is
    needed = static[-1][1] + (static[-1][1] * (1 - static[-1][1]) / len(held_out_y)) ** 0.5
    for arm, entries in tried.items():
        model, held_out, test = max(entries, key=lambda entry: right(entry[1][-1], held_out_y))
        settings = [calibrate_thresholds(confidence(held_out), exit_fractions(p, len(alone))) for p in SETTINGS] + [
            (math.inf,) * (len(alone) - 1)
        ]
        spent, accuracies = budget_curve(list(held_out), held_out_y, costs[arm], settings)
        enough = (accuracies >= needed).nonzero().flatten().tolist()
        chosen = min(enough, key=lambda i: float(spent[i])) if enough else int(accuracies.argmax())
        thresholds = settings[chosen]
        cost, accuracy = (float(v) for v in budget_curve(list(test), test_y, costs[arm], [thresholds]))
        taken = first_confident_exit(confidence(test), thresholds)
        values |= {f"{arm}_macs": cost, f"{arm}_accuracy": accuracy, f"{arm}_held_out_reached": float(bool(enough))}
        values |= {f"{arm}_exit_{e + 1}_accuracy": right(test[e], test_y) for e in range(len(alone))}
        values |= {f"{arm}_exit_{e + 1}_share": float((taken == e).double().mean()) for e in range(len(alone))}
        values |= {f"{arm}_exit_{e + 1}_macs": costs[arm][e] for e in range(len(alone))}
        if task.difficulty is not None:
            values[f"{arm}_exit_by_difficulty"] = _spearman(taken, task.difficulty)
        if arm == "dvt":
            values["mac_ratio"] = alone[-1] / cost
            values["accuracy_drop"] = static[-1][2] - accuracy
            values["speedup"] = _speedup(trial, static[-1][0], model, thresholds, task.test[0])
    values["reuse_gain"] = values["dvt_exit_3_accuracy"] - values["separate_exit_3_accuracy"]
    return values


class _Exits(torch.nn.Module):
    """All exits of a cascade as one tensor (b, exits, classes)."""

    def __init__(self, model: DynamicTransformerCascade) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.model.forward_exits(x), dim=1)


def _up_to(model: DynamicTransformerCascade, exits: int) -> torch.nn.Module:
    """The cascade as it runs for an image that leaves at exit number ``exits``, from 1."""
    shorter = copy.deepcopy(model)
    for stage in model.stages[exits:]:
        delattr(shorter, next(name for name, module in model.named_children() if module is stage))
    return _Exits(shorter)


def _speedup(
    trial: Trial, finest: DynamicTransformerCascade, cascade: DynamicTransformerCascade, thresholds: Any, x: Tensor
) -> float:
    """Time of the static finest transformer over that of the cascade, early exit and all, on the same test images."""
    x = x[: 20 if trial.scale == "tiny" else 256].to(trial.device)
    static = finest.stages[-1].to(trial.device).eval()
    cascade = cascade.to(trial.device).eval()

    @torch.inference_mode()
    def usual() -> Tensor:
        return static(x).logits

    @torch.inference_mode()
    def ours() -> Tensor:
        return cascade.predict(x, thresholds)[0]

    if trial.scale == "tiny":  # too short to judge, and not on a quiet machine
        return latency(usual, min_run_time=0.02) / latency(ours, min_run_time=0.02)
    return speed_ratio(usual, ours, threads=os.cpu_count())
