"""SimSiam's claims, re-measured: what keeps a Siamese network from collapsing, and what it learns without negatives."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import split
from saigen.nn.resnet import ResNet
from saigen.papers.representation.simsiam.model import (
    SimSiam,
    TwoViews,
    collapse_std,
    knn_accuracy,
    linear_probe,
    simsiam_loss,
)
from saigen.train import cosine, fit, predict
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    data: str
    train: int | None  # None: all there is
    test: int | None
    side: int  # of a view, in pixels
    depths: tuple[int, ...]  # no blocks: a plain stack of convolutions
    widths: tuple[int, ...]
    dim: int
    pred_dim: int
    steps: int
    batch: int
    lr: float  # at a batch of 256
    decay: float
    simclr_lr: float
    simclr_temperature: float
    neighbours: int


# tiny and laptop: embedded digits. Their learning rate is far above the paper's, so that what takes it a hundred epochs
# of ImageNet shows within some hundred steps. real: the user's images, views of 16 pixels, a narrow ResNet.
# full: appendix D of the paper, CIFAR-10 (800 epochs of 97 steps).
SIZES = {
    "tiny": Size("digits", 300, 200, 8, (), (8, 16, 16), 32, 8, 6, 64, 1.0, 5e-4, 1.0, 0.2, 20),
    "laptop": Size("digits", 1000, 797, 8, (), (16, 32, 64), 128, 32, 700, 128, 0.6, 5e-4, 0.3, 0.2, 20),
    "real": Size("images", 10_000, 2000, 16, (1, 1, 1), (16, 32, 64), 256, 64, 500, 256, 0.5, 5e-4, 0.5, 0.2, 200),
    "full": Size(
        "images", None, None, 32, (2, 2, 2, 2), (64, 128, 256, 512), 2048, 512, 77_600, 512, 0.03, 5e-4, 0.06, 0.2, 200
    ),
}


class Experiment:
    """One seed: its split, its views, its start; ``run`` trains an arm from that start and looks at it."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.size = trial, SIZES[trial.scale]
        size = self.size
        if size.data == "digits":
            digits = trial.data("digits")
            train, test = split(digits.y.numpy(), (size.train, size.test), trial.rng("split"))
            self.train, self.test = digits.subset(train), digits.subset(test)
        else:
            parts = [trial.data("images", size=32, part=part) for part in ("train", "test")]
            counts = [min(n or len(part), len(part)) for n, part in zip((size.train, size.test), parts, strict=True)]
            self.train, self.test = (
                part.subset(split(part.y.numpy(), (n,), trial.rng(f"split {i}"))[0])
                for i, (part, n) in enumerate(zip(parts, counts, strict=True))
            )
        with trial.seeded("weights"):
            self.start = SimSiam(
                self._encoder(), feature_dim=self.features, dim=size.dim, pred_dim=size.pred_dim, proj_layers=2
            )

    def _encoder(self) -> nn.Module:
        size = self.size
        if size.depths:
            backbone = ResNet("basic", size.depths, size.widths, num_classes=0, small_stem=True)
            self.features = backbone.num_features
            return backbone
        layers: list[nn.Module] = []
        for number, (before, width) in enumerate(zip((1, *size.widths), size.widths, strict=False)):
            stride = 1 if number == 0 else 2
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.features = size.widths[-1]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def views(self, generator: torch.Generator, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.size.data == "digits":
            return digit_view(x, generator), digit_view(x, generator)
        x1, x2 = TwoViews(self.size.side, blur=False)(x.float() / 255, generator=generator)
        return (x1 - 0.5) / 0.25, (x2 - 0.5) / 0.25

    def plain(self, x: Tensor) -> Tensor:
        """Images as the evaluation sees them: whole, without augmentation."""
        if self.size.data == "digits":
            return x
        return (F.interpolate(x.float() / 255, (self.size.side,) * 2, mode="area") - 0.5) / 0.25

    def run(self, arm: str, loss: Callable[..., Tensor] | None, prepare: Callable[[SimSiam], None] | None = None):
        """Trains ``arm`` (unless ``loss`` is None) and returns its spread, k-NN and linear accuracy."""
        trial, size, model = self.trial, self.size, copy.deepcopy(self.start)
        if prepare is not None:
            prepare(model)
        if loss is not None:
            lr = size.simclr_lr if arm == "simclr" else size.lr
            optimizer = torch.optim.SGD(
                model.param_groups(lr, size.batch, fix_pred_lr=False), momentum=0.9, weight_decay=size.decay
            )
            fit(
                model,
                loss,
                (self.train.x,),
                optimizer=optimizer,
                steps=size.steps,
                batch_size=size.batch,
                seed=trial.seed,
                schedule=cosine(),
                transform=self.views,
                checkpoint=trial.checkpoint(arm),
                device=trial.device,
                on_step=lambda step, total, _: trial.progress(step, total, arm),
            )
        model.to(trial.device)
        train_z, test_z = (
            torch.cat([predict(model.backbone, self.plain(x)) for x in part.x.split(1024)])
            for part in (self.train, self.test)
        )
        with torch.no_grad():
            # as the training sees it: views, and batch norm by batch statistics
            x1, _ = self.views(trial.generator("spread"), self.train.x[: 4 * size.batch])
            spread = collapse_std(model.train().encode(x1.to(trial.device))).item() * math.sqrt(size.dim)
        labels = self.train.y, self.test.y
        return {
            f"{arm}_spread": spread,
            f"{arm}_knn": knn_accuracy(train_z, labels[0], test_z, labels[1], k=size.neighbours),
            f"{arm}_linear": linear_probe(train_z, labels[0], test_z, labels[1]),
        }


def digit_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random view of digits (n, 1, 8, 8): rotated, scaled, shifted, a 3x3 hole, noise."""
    n = len(x)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    angle, scale, shift = 0.3 * uniform(n), 1 + 0.2 * uniform(n), 0.35 * uniform(n, 2)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    place = torch.arange(8) - torch.randint(-2, 8, (n, 2, 1), generator=generator)
    inside = (place >= 0) & (place < 3)
    hole = inside[:, 0, :, None] & inside[:, 1, None, :]
    return x.masked_fill(hole[:, None], 0) + 0.1 * torch.randn(x.shape, generator=generator)


def full(model: SimSiam, x1: Tensor, x2: Tensor) -> Tensor:
    return simsiam_loss(*model(x1, x2))


def without_stop_gradient(model: SimSiam, x1: Tensor, x2: Tensor) -> Tensor:
    z1, z2 = model.encode(x1), model.encode(x2)
    p1, p2 = model.predictor(z1), model.predictor(z2)
    return -0.5 * (F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)).mean()


def without_predictor(model: SimSiam) -> None:
    model.predictor = nn.Identity()


def fixed_predictor(model: SimSiam) -> None:
    model.predictor.requires_grad_(False)


def simclr(temperature: float) -> Callable[..., Tensor]:
    """SimCLR's loss (NT-Xent): every other image of the batch is a negative."""

    def loss(model: SimSiam, x1: Tensor, x2: Tensor) -> Tensor:
        z = F.normalize(torch.cat([model.encode(x1), model.encode(x2)]), dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(x1)))

    return loss


def stop_gradient_prevents_collapse(trial: Trial) -> dict[str, float]:
    """One seed: the same start trained with and without the stop-gradient."""
    experiment = Experiment(trial)
    values = experiment.run("full", full) | experiment.run("no_stop_gradient", without_stop_gradient)
    return values | {
        "spread_gap": values["full_spread"] - values["no_stop_gradient_spread"],
        "linear_gap": values["full_linear"] - values["no_stop_gradient_linear"],
    }


def predictor_is_needed(trial: Trial) -> dict[str, float]:
    """One seed: the same start with the predictor, without it, and with it fixed at its random start."""
    experiment = Experiment(trial)
    values = experiment.run("full", full)
    values |= experiment.run("no_predictor", full, without_predictor)
    values |= experiment.run("fixed_predictor", full, fixed_predictor)
    return values | {
        "gap_to_none": values["full_linear"] - values["no_predictor_linear"],
        "gap_to_fixed": values["full_linear"] - values["fixed_predictor_linear"],
    }


def learns_without_negatives(trial: Trial) -> dict[str, float]:
    """One seed: SimSiam, SimCLR with its negatives, and the encoder left untrained."""
    experiment = Experiment(trial)
    values = experiment.run("full", full) | experiment.run("untrained", None)
    values |= experiment.run("simclr", simclr(experiment.size.simclr_temperature))
    return values | {
        "linear_accuracy": values["full_linear"],
        "gain_over_untrained": values["full_linear"] - values["untrained_linear"],
        "drop_from_simclr": values["simclr_linear"] - values["full_linear"],
    }
