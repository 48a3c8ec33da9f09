"""AugReg's claim, re-measured: with compute to match, augmentation and regularisation are worth several times the data."""

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saigen.data import split
from saigen.data.subsets import sample
from saigen.papers.vision.augreg.model import AugRegViT
from saigen.papers.vision.augreg.recipe import AugReg, data_multiplier, kernel_groups, sigmoid_xent
from saigen.train import accuracy, cosine, fit
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    sizes: tuple[
        float | int, ...
    ]  # how many images plain training gets, the first also AugReg; shares of all if at most 1
    held_out: int  # chooses AugReg's setting and the length of plain training
    test: int | None  # None: all there is
    steps: int  # of AugReg; plain training takes a half or a sixth of them, whichever does better on held-out images
    batch: int
    rate: float
    settings: tuple[tuple[str, float], ...]  # augmentation, and dropout with stochastic depth
    net: dict[str, Any] = field(default_factory=dict)
    side: int = 0  # of the user's images


DIGITS = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 2}
CIFAR = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
S16 = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
SIZES = {
    "tiny": Size((50, 100), 50, 100, 12, 32, 4e-3, (("medium1", 0.0),), DIGITS | {"depth": 1}),
    "laptop": Size((100, 300, 1000), 200, 597, 1600, 32, 4e-3, (("light2", 0.0), ("medium1", 0.1)), DIGITS),
    "real": Size((1000, 3000, 10_000), 1000, 4000, 1200, 50, 2e-3, (("light2", 0.0), ("medium1", 0.1)), CIFAR, 32),
    # 1.28 M images for 300 epochs in batches of 4,096 are 93,750 steps; a tenth of the images gets as many
    "full": Size(
        (0.1, 0.2, 0.5, 1.0),
        10_000,
        None,
        93_750,
        4096,
        1e-3,
        (("light1", 0.0), ("medium1", 0.1), ("medium2", 0.0), ("strong2", 0.1)),
        S16,
        224,
    ),
}


@dataclass(frozen=True)
class Task:
    x: Tensor
    y: Tensor
    classes: int
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def pixels(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


def make_task(trial: Trial, size: Size) -> Task:
    """Digits enlarged to 16 pixels at ``tiny`` and ``laptop``, else the user's images; nested training sets."""
    if not size.side:
        digits = trial.data("digits")
        most = int(size.sizes[-1])
        parts = split(digits.y.numpy(), (most, size.held_out, size.test), trial.rng("split"))
        x = F.interpolate(digits.x, size=(16, 16), mode="bilinear")
        train, held_out, test = ((x[part], digits.y[part]) for part in parts)
        return Task(*train, 10, held_out, test)
    train, test = (trial.data("images", size=size.side, part=part) for part in ("train", "test"))
    most = int(size.sizes[-1]) if size.sizes[-1] > 1 else len(train) - size.held_out
    most = min(most, len(train) - size.held_out)
    chosen, held_out = (
        train.subset(part) for part in split(train.y.numpy(), (most, size.held_out), trial.rng("split"))
    )
    test = sample(test, size.test, trial.rng("test"))
    return Task(chosen.x, chosen.y, len(train.classes), (pixels(held_out.x), held_out.y), (pixels(test.x), test.y))


def augmentation_is_worth_data(trial: Trial) -> dict[str, float]:
    """One seed: the curve of plain training over data set sizes, and where AugReg on the smallest stands on it."""
    size = SIZES[trial.scale]
    task = make_task(trial, size)
    counts = [round(n * len(task.y)) if n <= 1 else min(int(n), len(task.y)) for n in size.sizes]
    with trial.seeded("weights"):
        start = AugRegViT(num_classes=task.classes, head_bias=-2.2, **size.net)
    arms = 2 * len(counts) + len(size.settings)
    done = itertools.count(1)
    values: dict[str, float] = {}

    def train(name: str, n: int, steps: int, setting: str = "none", regularisation: float = 0.0) -> AugRegViT:
        with trial.seeded("weights"):
            model = AugRegViT(
                num_classes=task.classes, drop_rate=regularisation, drop_path_rate=regularisation, **size.net
            )
        model.load_state_dict(copy.deepcopy(start.state_dict()))
        augment = AugReg(setting, task.classes, img_size=task.x.shape[-1])

        def transform(generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x, y = augment(pixels(x), y, generator=generator)
            if size.side:  # every arm gets flips, as the paper's plain one does
                x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
            return 2 * x - 1, y

        fit(
            model,
            lambda model, x, y: sigmoid_xent(model(x), y),
            (task.x[:n], task.y[:n]),
            optimizer=torch.optim.AdamW(kernel_groups(model, lr=size.rate, weight_decay=0.1)),
            steps=steps,
            batch_size=min(size.batch, n),
            seed=trial.seed,
            schedule=cosine(warmup=max(1, steps // 10)),
            transform=transform,
            clip=1.0,
            checkpoint=trial.checkpoint(name),
            device=trial.device,
        )
        trial.progress(next(done), arms, name)
        return model

    def score(model: AugRegViT, part: tuple[Tensor, Tensor]) -> float:
        return accuracy(model, 2 * part[0] - 1, part[1])

    plain = []
    for n in counts:
        lengths = [train(f"plain {n}, {steps} steps", n, steps) for steps in (size.steps // 6, size.steps // 2)]
        short, long = ((score(model, task.held_out), score(model, task.test)) for model in lengths)
        plain.append(max(short, long, key=lambda entry: entry[0])[1])
        values |= {f"plain_{n}": plain[-1], f"plain_{n}_short": short[1], f"plain_{n}_long": long[1]}
    tried = []
    for setting, regularisation in size.settings:
        model = train(f"{setting} {regularisation}", counts[0], size.steps, setting, regularisation)
        tried.append((score(model, task.held_out), score(model, task.test), setting))
        values[f"augreg_{setting}"] = tried[-1][1]
    values["augreg"] = max(tried, key=lambda entry: entry[0])[1]
    values["multiplier"] = data_multiplier(counts, plain, values["augreg"])
    values["gain"] = values["augreg"] - plain[0]
    return values
