"""The experiments: the variance itself, and training without warm-up over a range of learning rates.

Laptop: a Transformer with layer norm after each sum, the kind that needs warm-up, reads the rows of digits. β₂ is 0.98, as
in the first Transformer: with 0.999 rectification would last 2000 steps, longer than this training. Real and full: the
paper's ResNet-20. All arms of a seed share split, start, order of the batches, schedule and weight decay.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saigen.data import split
from saigen.data.augmentation import shift_and_flip, standardised
from saigen.nn.resnet import ResNet
from saigen.papers.training.radam import (
    DelayedAdam,
    RAdam,
    adaptive_rate_variances,
    linear_warmup_length,
    simulate_adaptive_rate,
)
from saigen.train import History, accuracy, fit, polynomial, steps
from saigen.train.schedule import Schedule
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    """One scale. ``rates``: the largest at which Adam with warm-up trains in pilots on other seeds, and its parts."""

    rates: tuple[float, ...]
    warmups: tuple[int, ...]
    """Lengths of linear warm-up, of which the held-out data choose at each rate."""
    steps: int
    batch: int
    beta2: float
    train: int
    held_out: int
    depth: int = 6
    width: int = 32
    trajectories: int = 4000
    variance_steps: int = 1000
    milestones: tuple[float, ...] = ()
    """Shares of the training after which the rate falls to a tenth; none: it falls linearly."""


SIZES = {
    "tiny": Size((1e-2,), (2,), 6, 16, 0.98, 60, 40, depth=2, width=8, trajectories=50, variance_steps=40),
    "laptop": Size((2.5e-3, 7e-3, 2e-2), (20, 100), 300, 32, 0.98, 1000, 297),
    "real": Size((3e-3, 1e-2, 3e-2, 1e-1), (100, 500), 4000, 128, 0.999, 20_000, 2000, depth=3, width=16,
                 milestones=(81 / 164, 122 / 164)),
    "full": Size((3e-3, 1e-2, 3e-2, 1e-1), (100, 200, 500, 1000), 57_564, 128, 0.999, 45_000, 5000, depth=3, width=16,
                 milestones=(81 / 164, 122 / 164)),
}  # fmt: skip
WEIGHT_DECAY = 1e-4


def rectification_keeps_the_variance_constant(trial: Trial) -> dict[str, float]:
    """Var[ψ] and Var[r ψ] of simulated trajectories, from the first adaptive step to the thousandth, β₂ = 0.999.

    The early variance is that at the step with ρ = 5 over that with ρ = 500, where the paper takes its figure.
    """
    size, beta2, first = SIZES[trial.scale], 0.999, 6
    psi = simulate_adaptive_rate(
        size.variance_steps, beta2, trajectories=size.trajectories, generator=trial.generator("gradients")
    )
    variance = psi.var(dim=0)
    exact = adaptive_rate_variances(size.variance_steps, beta2)
    shrink = adaptive_rate_variances(size.variance_steps, beta2, rectified=True) / exact  # r_t²
    rectified = (shrink * variance)[first - 1 :]
    late = min(550, size.variance_steps)  # ρ_550 = 499.8
    values = {
        "adam_early_over_late": float(variance[4] / variance[late - 1]),
        "rectified_highest_over_lowest": float(rectified.max() / rectified.min()),
        "adam_highest_over_lowest": float(variance[first - 1 :].max() / variance[first - 1 :].min()),
    }
    for t in (6, 10, 100, 1000):
        if t <= size.variance_steps:
            values[f"adam_variance_{t}"] = float(variance[t - 1])
            values[f"formula_over_simulation_{t}"] = float(exact[t - 1] / variance[t - 1])
            values[f"rectified_variance_{t}"] = float(rectified[t - first])
    return values


def rectified_adam_needs_no_warmup(trial: Trial) -> dict[str, float]:
    """Test accuracy of RAdam minus Adam's, both without warm-up: its mean over the rates, and how much less it varies."""
    size, sets = SIZES[trial.scale], _sets(trial)
    values = {}
    for arm in ("adam", "radam"):
        found = [accuracy(_train(trial, sets, arm, rate)[0], *sets.test) for rate in size.rates]
        values |= {f"{arm}_at_{rate:g}": value for rate, value in zip(size.rates, found, strict=True)}
        values[f"{arm}_mean"], values[f"{arm}_range"] = sum(found) / len(found), max(found) - min(found)
    values["accuracy_gain"] = values["radam_mean"] - values["adam_mean"]
    values["range_saved"] = values["adam_range"] - values["radam_range"]
    return values


def rectified_adam_equals_tuned_warmup(trial: Trial) -> dict[str, float]:
    """Accuracy that RAdam loses against Adam with warm-up, a length chosen for each rate; the mean over the rates."""
    size, sets = SIZES[trial.scale], _sets(trial)
    values, lost = {}, []
    for rate in size.rates:
        radam = accuracy(_train(trial, sets, "radam", rate)[0], *sets.test)
        tried = [(_train(trial, sets, "adam", rate, warmup=warmup)[0], warmup) for warmup in size.warmups]
        best, warmup = max(tried, key=lambda entry: (accuracy(entry[0], *sets.held_out), -entry[1]))
        warmed = accuracy(best, *sets.test)
        values |= {f"radam_at_{rate:g}": radam, f"warmup_at_{rate:g}": warmed, f"length_at_{rate:g}": float(warmup)}
        lost.append(warmed - radam)
    return values | {"accuracy_lost": sum(lost) / len(lost)}


def adam_needs_more_samples_not_warmup(trial: Trial) -> dict[str, float]:
    """Training loss at the end, without warm-up: Adam minus Adam that first only estimates v, and minus a larger ε.

    At the middle rate, where Adam with warm-up does best in pilots on other seeds.
    """
    size, sets = SIZES[trial.scale], _sets(trial)
    freeze = min(linear_warmup_length(size.beta2), size.steps)  # the paper's 2000 steps at 0.999 are 100 at 0.98
    last, rate = max(1, size.steps // 10), sorted(size.rates)[len(size.rates) // 2]
    values = {}
    for arm, options in (("adam", {}), ("delayed", {"freeze_steps": freeze}), ("large_eps", {"eps": 1e-4})):
        model, history = _train(trial, sets, "adam", rate, **options)
        losses = [loss if math.isfinite(loss) else math.inf for loss in history.losses[-last:]]
        values[f"{arm}_loss"] = sum(losses) / len(losses)
        values[f"{arm}_accuracy"] = accuracy(model, *sets.test)
    values["saved_by_more_samples"] = values["adam_loss"] - values["delayed_loss"]
    values["saved_by_large_eps"] = values["adam_loss"] - values["large_eps_loss"]
    return values


class RowTransformer(nn.Module):
    """Classifies images (b, 1, 8, 8) by their eight rows as tokens; layer norm after each sum, as in the original."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=False)
                for _ in range(depth)
            )
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x.squeeze(1)) + self.position).mean(dim=1))


@dataclass(frozen=True)
class Sets:
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


def _sets(trial: Trial) -> Sets:
    size = SIZES[trial.scale]
    if trial.scale in ("tiny", "laptop"):
        digits = trial.data("digits")
        counts = (size.train, size.held_out, len(digits) - size.train - size.held_out)
        parts = [digits.subset(part) for part in split(digits.y, counts, trial.rng("split"))]
        scaled = [(2 * part.x - 1, part.y) for part in parts]
        return Sets(*scaled, len(digits.classes))
    both = trial.data("images", size=32, part="train")
    counts = (min(size.train, len(both) - size.held_out), size.held_out)
    train, held_out = (both.subset(part) for part in split(both.y, counts, trial.rng("split")))
    test = trial.data("images", size=32, part="test")
    return Sets(
        (train.x, train.y), (standardised(held_out.x), held_out.y), (standardised(test.x), test.y), len(both.classes)
    )


def _train(
    trial: Trial, sets: Sets, arm: str, rate: float, *, warmup: int = 0, freeze_steps: int = 0, eps: float = 1e-8
) -> tuple[nn.Module, History]:
    size = SIZES[trial.scale]
    rows = trial.scale in ("tiny", "laptop")
    with trial.seeded("weights"):
        if rows:
            model: nn.Module = RowTransformer(size.depth, size.width, sets.classes)
        else:
            widths = (size.width, 2 * size.width, 4 * size.width)
            model = ResNet(
                "basic", (size.depth,) * 3, widths, num_classes=sets.classes, small_stem=True, zero_init=False
            )
    common = {"lr": rate, "betas": (0.9, size.beta2), "eps": eps, "weight_decay": WEIGHT_DECAY}
    optimizer: Callable = RAdam if arm == "radam" else partial(DelayedAdam, freeze_steps=freeze_steps)
    schedule: Schedule = steps(size.milestones, 0.1, warmup) if size.milestones else polynomial(1.0, warmup)
    name = f"{arm} at {rate:g}, warm-up {warmup}, frozen {freeze_steps}, eps {eps:g}"
    history = fit(
        model.to(trial.device),
        lambda model, x, y: F.cross_entropy(model(x), y),
        sets.train,
        optimizer=optimizer(model.parameters(), **common),
        steps=size.steps + freeze_steps,
        batch_size=size.batch,
        seed=trial.seed,
        schedule=lambda step, total: schedule(max(0, step - freeze_steps), total - freeze_steps),
        transform=None if rows else shift_and_flip,
        checkpoint=trial.checkpoint(name.replace(" ", "_")),
        device=trial.device,
        on_step=lambda step, total, loss: trial.progress(step + 1, total, name),
    )
    return model, history
