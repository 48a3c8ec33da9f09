"""MoCo's claims, re-measured: a slow key encoder, a large and consistent dictionary, and what batch norm gives away."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data.subsets import sample
from saigen.nn.resnet import ResNet
from saigen.papers.representation.moco.model import EndToEnd, MemoryBank, MoCo, uniform_loss
from saigen.papers.representation.moco.transform import MoCoViews
from saigen.papers.representation.simsiam import knn_accuracy, linear_probe
from saigen.train import fit, predict
from saigen.trial import Trial


@dataclass(frozen=True)
class Training:
    batch: int
    queue: int
    steps: int
    lr: float


@dataclass(frozen=True)
class Size:
    data: str
    train: int | None  # None: all there is
    test: int | None
    side: int  # of a view, in pixels
    depths: tuple[int, ...]  # no blocks: a plain stack of convolutions
    widths: tuple[int, ...]
    dim: int
    slow: float  # momentum of f_k
    fast: float
    temperature: float
    decay: float
    splits: int  # devices that batch norm stands in for
    neighbours: int
    keys: Training  # slow keys against fast ones and copies
    fast_lr: float
    copy_lr: float
    dictionary: Training  # the queue against a short one, a memory bank and the batch
    short_queue: int
    bank_lr: float
    norm: Training  # with and without shuffling BN


# tiny and laptop: embedded digits. A queue holds 16 batches, as in the paper's ablation of the momentum. Every arm has
# the rate that was best for it on seeds from 1000, in steps of three. real: the user's images, views of 16 pixels, a
# narrow ResNet with batch norm throughout, and one rate, as in the paper.
SIZES = {
    "tiny": Size(
        data="digits",
        train=200,
        test=200,
        side=8,
        depths=(),
        widths=(8, 16),
        dim=16,
        slow=0.9,
        fast=0.5,
        temperature=0.1,
        decay=1e-4,
        splits=2,
        neighbours=20,
        keys=Training(batch=16, queue=64, steps=6, lr=0.003),
        fast_lr=0.003,
        copy_lr=0.003,
        dictionary=Training(batch=8, queue=64, steps=6, lr=0.003),
        short_queue=8,
        bank_lr=0.003,
        norm=Training(batch=16, queue=64, steps=6, lr=0.01),
    ),
    "laptop": Size(
        data="digits",
        train=1000,
        test=797,
        side=8,
        depths=(),
        widths=(16, 32, 64),
        dim=32,
        slow=0.997,
        fast=0.9,
        temperature=0.1,
        decay=1e-4,
        splits=4,
        neighbours=20,
        keys=Training(batch=32, queue=512, steps=800, lr=0.003),
        fast_lr=0.0001,
        copy_lr=0.0001,
        dictionary=Training(batch=32, queue=512, steps=800, lr=0.003),
        short_queue=32,
        bank_lr=0.0001,
        norm=Training(batch=32, queue=512, steps=800, lr=0.01),
    ),
    "real": Size(
        data="images",
        train=10_000,
        test=2000,
        side=16,
        depths=(1, 1, 1),
        widths=(16, 32, 64),
        dim=64,
        slow=0.99,
        fast=0.9,
        temperature=0.1,
        decay=1e-4,
        splits=8,
        neighbours=200,
        keys=Training(batch=128, queue=2048, steps=1500, lr=0.03),
        fast_lr=0.03,
        copy_lr=0.03,
        dictionary=Training(batch=128, queue=2048, steps=1500, lr=0.03),
        short_queue=128,
        bank_lr=0.03,
        norm=Training(batch=128, queue=2048, steps=1500, lr=0.03),
    ),
}


class Stack(nn.Module):
    """Convolutions for digits, each but the first halving them; a norm that does not look at the batch, unless it is to."""

    def __init__(self, widths: tuple[int, ...], norm: Callable[[int], nn.Module], num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, width) in enumerate(zip((1, *widths), widths, strict=False)):
            layers += [nn.Conv2d(before, width, 3, 2 if number else 1, 1, bias=False), norm(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x))


class Experiment:
    """One seed: its data, its views, its start; ``run`` trains a mechanism and looks at the features."""

    def __init__(self, trial: Trial, training: Training, *, batch_norm: bool = False) -> None:
        self.trial, self.size, self.training = trial, SIZES[trial.scale], training
        size = self.size
        if size.data == "digits":
            digits = trial.data("digits")
            both = sample(digits, size.train + size.test, trial.rng("split"))
            self.train, self.test = both.subset(range(size.train)), both.subset(range(size.train, len(both)))
            self.encoder = partial(Stack, size.widths, nn.BatchNorm2d if batch_norm else partial(nn.GroupNorm, 4))
        else:
            self.train, self.test = (
                sample(trial.data("images", size=32, part=part), count, trial.rng(part))
                for part, count in (("train", size.train), ("test", size.test))
            )
            self.encoder = partial(ResNet, "basic", size.depths, size.widths, small_stem=True, zero_init=False)
        self.splits = size.splits if batch_norm or size.depths else 1

    def views(self, generator: torch.Generator, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.size.data == "digits":
            return tuple(self.plain(digit_view(x, generator)) for _ in range(2))
        return MoCoViews(self.size.side, blur=False)(x.float() / 255, generator)

    def numbered_view(self, generator: torch.Generator, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """What the memory bank is given: one view, and the number of its image."""
        return self.views(generator, x)[0], index

    def plain(self, x: Tensor) -> Tensor:
        """Images as the evaluation sees them: whole, without augmentation."""
        if self.size.data == "digits":
            return (x - 0.3) / 0.38
        x = F.interpolate(x.float() / 255, (self.size.side,) * 2, mode="area")
        return MoCoViews.normalized(x)

    def moco(self, **options: float | int | bool) -> MoCo:
        size = self.size
        given = {"queue_size": self.training.queue, "momentum": size.slow, "temperature": size.temperature} | options
        with self.trial.seeded("weights"):
            return MoCo(self.encoder, size.dim, bn_splits=self.splits, **given)

    def end_to_end(self) -> EndToEnd:
        size = self.size
        with self.trial.seeded("weights"):
            return EndToEnd(self.encoder, size.dim, size.temperature, bn_splits=self.splits)

    def memory_bank(self) -> MemoryBank:
        options = {"temperature": self.size.temperature, "bn_splits": self.splits}
        with self.trial.seeded("weights"):
            return MemoryBank(self.encoder, len(self.train), self.size.dim, self.training.queue, **options)

    def run(self, arm: str, model: nn.Module, lr: float | None = None, steps: int | None = None) -> dict[str, float]:
        """Trains ``model`` for ``steps`` (0: not at all) and returns what its features and its logits are worth."""
        trial, size = self.trial, self.size
        steps, bank = self.training.steps if steps is None else steps, isinstance(model, MemoryBank)
        loss = uniform_loss(self.training.queue)
        if steps:
            history = fit(
                model,
                lambda net, *batch: F.cross_entropy(*net(*batch)),
                (self.train.x, torch.arange(len(self.train))) if bank else (self.train.x,),
                optimizer=torch.optim.SGD(
                    [p for p in model.parameters() if p.requires_grad],
                    self.training.lr if lr is None else lr,
                    momentum=0.9,
                    weight_decay=size.decay,
                ),
                steps=steps,
                batch_size=self.training.batch,
                seed=trial.seed,
                transform=self.numbered_view if bank else self.views,
                checkpoint=trial.checkpoint(arm),
                device=trial.device,
                on_step=lambda step, total, _: trial.progress(step, total, arm),
            )
            loss = loss if history.diverged else sum(history.losses[-50:]) / len(history.losses[-50:])
        backbone, classes = model.to(trial.device).backbone(), len(self.train.classes)
        train_z, test_z = (
            torch.cat([predict(backbone, self.plain(x)) for x in part.x.split(1024)])
            for part in (self.train, self.test)
        )
        values = {f"{arm}_loss": loss, f"{arm}_linear": 1 / classes, f"{arm}_knn": 1 / classes}
        finite = bool(train_z.isfinite().all() and test_z.isfinite().all())
        if steps and isinstance(model, MoCo):
            values[f"{arm}_pretext"] = self.pretext(model) if finite else 0.0
        if finite:
            labels = self.train.y, self.test.y
            values |= {
                f"{arm}_linear": linear_probe(train_z, labels[0], test_z, labels[1]),
                f"{arm}_knn": knn_accuracy(train_z, labels[0], test_z, labels[1], k=size.neighbours),
            }
        return values

    @torch.no_grad()
    def pretext(self, model: MoCo, batches: int = 20) -> float:
        """How often the positive key wins, in training mode, on fresh views; ``model`` is left as it is."""
        model = copy.deepcopy(model).train()
        generator, right = self.trial.generator("pretext"), []
        with self.trial.seeded("pretext"):
            for _ in range(batches):
                index = torch.randperm(len(self.train), generator=generator)[: self.training.batch]
                views = self.views(generator, self.train.x[index])
                logits, labels = model(*(view.to(self.trial.device) for view in views))
                right.append((logits.argmax(1) == labels).double().mean().item())
        return sum(right) / batches


def digit_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random view of digits (n, 1, 8, 8): turned by up to 17 degrees, scaled, shifted, a 2x2 hole, noise."""
    n = len(x)
    draw = 2 * torch.rand(4, n, generator=generator) - 1
    turn, scale = 0.3 * draw[0], 1 + 0.15 * draw[1]
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale * turn.cos()
    theta[:, 1, 0] = scale * turn.sin()
    theta[:, 0, 1] = -theta[:, 1, 0]
    theta[:, :, 2] = 0.3 * draw[2:].T
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    corner = torch.randint(7, (2, n, 1), generator=generator)
    rows, columns = ((torch.arange(8) - c).clamp(0, 1) == torch.arange(8) - c for c in corner)
    x = x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def slow_keys_make_the_queue_work(trial: Trial) -> dict[str, float]:
    """One seed: the same start and queue with f_k slow, fast, and a copy of f_q, also at the rate of the slow one; untrained."""
    size = SIZES[trial.scale]
    experiment = Experiment(trial, size.keys)
    values = experiment.run("slow", experiment.moco())
    values |= experiment.run("fast", experiment.moco(momentum=size.fast), size.fast_lr)
    values |= experiment.run("copy", experiment.moco(momentum=0.0), size.copy_lr)
    values |= experiment.run("copy_same_rate", experiment.moco(momentum=0.0))
    values |= experiment.run("untrained", experiment.moco(), steps=0)
    slow = values["slow_linear"]
    return values | {
        "gap_to_copy": slow - values["copy_linear"],
        "gap_to_fast": slow - values["fast_linear"],
        "gap_to_untrained": slow - values["untrained_linear"],
    }


def a_large_consistent_dictionary_is_better(trial: Trial) -> dict[str, float]:
    """One seed: the same start with a long queue, a short one, a memory bank and, beside them, the batch itself."""
    size = SIZES[trial.scale]
    experiment = Experiment(trial, size.dictionary)
    values = experiment.run("moco", experiment.moco())
    values |= experiment.run("short", experiment.moco(queue_size=size.short_queue))
    values |= experiment.run("bank", experiment.memory_bank(), size.bank_lr)
    values |= experiment.run("end_to_end", experiment.end_to_end())
    moco = values["moco_linear"]
    return values | {"gap_to_short": moco - values["short_linear"], "gap_to_bank": moco - values["bank_linear"]}


def without_shuffling_bn_it_cheats(trial: Trial) -> dict[str, float]:
    """One seed: batch norm on several stand-in devices, keys shuffled among them or not."""
    experiment = Experiment(trial, SIZES[trial.scale].norm, batch_norm=True)
    values = {}
    for arm, shuffle in (("shuffled", True), ("plain", False)):
        values |= experiment.run(arm, experiment.moco(shuffle=shuffle))
    pretext, knn = values["plain_pretext"] - values["shuffled_pretext"], values["shuffled_knn"] - values["plain_knn"]
    return values | {
        "pretext_accuracy": values["plain_pretext"],
        "pretext_gap": pretext,
        "knn_gap": knn,
        "cheats": float(pretext > 0 and knn > 0),
    }
