"""Six optimizers on one task, tuned with equal budgets: all hyper-parameters, or the learning rate alone.

Laptop: a perceptron with one hidden layer on digits. Real: a small residual network on images; full: the paper's ResNet-32.
Trials of a seed share split, start and order of the batches; the learning rate falls linearly for everyone. The best
trial by held-out loss is trained again from other starts, and counts by its test loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import Tensor, nn

from saigen.data import split
from saigen.data.augmentation import shift_and_flip, standardised
from saigen.nn.resnet import ResNet
from saigen.papers.training.optimizer_comparison import INCLUSIONS, OPTIMIZERS, TrialTable, search_space, tune
from saigen.train import fit, polynomial, predict
from saigen.trial import Trial


@dataclass(frozen=True)
class Size:
    train: int
    held_out: int
    steps: int
    batch: int
    trials: int
    """For each optimizer and each way to tune it, in two stages."""
    retrained: int
    """How often the winner is trained again, from a start and an order of its own."""
    width: int
    depth: int = 0
    """Residual blocks a stage; 0: a perceptron."""


SIZES = {
    "tiny": Size(60, 40, 4, 20, 4, 1, 8),
    "laptop": Size(600, 400, 100, 50, 40, 3, 32),
    "real": Size(10_000, 5000, 2000, 128, 60, 3, 8, depth=1),
    "full": Size(45_000, 5000, 50_000, 256, 100, 3, 16, depth=5),
}


def tuning_decides_the_ranking(trial: Trial) -> dict[str, float]:
    """Test losses of all six, tuned in everything and in the learning rate alone, and what follows for the inclusions.

    For each direct inclusion the loss of the general optimizer minus the special one's, fully tuned; and the largest of
    these with the learning rate alone, minus the largest fully tuned. Beside them the rank correlation of the two orders,
    what the best trial is worth on held-out data, and how many trials reach SGD's best.
    """
    task = _Task(trial)
    values: dict[str, float] = {}
    losses: dict[str, dict[str, float]] = {"lr": {}, "all": {}}
    tables: dict[str, TrialTable] = {}
    for name in OPTIMIZERS:
        tables[name], losses["all"][name] = task.tuned(name, "all")
        # SGD has nothing else to tune
        losses["lr"][name] = losses["all"][name] if name == "SGD" else task.tuned(name, "lr")[1]
        best = tables[name].best_of(len(tables[name].scores))
        values |= {f"{name}_held_out": best.mean, f"{name}_held_out_high": best.high}
        values |= {f"{name}_diverged": float(tables[name].diverged)}
        # where no trial reached it, one more than there were
        to_sgd = tables[name].trials_to_target(min(tables["SGD"].scores))
        values[f"{name}_trials_to_sgd"] = min(to_sgd, len(tables[name].scores) + 1.0)
    for tuned, found in losses.items():
        excess = [found[general] - found[special] for special, general in INCLUSIONS]
        values |= {f"{name}_loss_{tuned}": loss for name, loss in found.items()}
        values[f"worst_excess_{tuned}"] = max(excess)
        values[f"broken_inclusions_{tuned}"] = float(sum(value > 0 for value in excess))
    tau = kendalltau(list(losses["lr"].values()), list(losses["all"].values())).statistic
    values["order_correlation"] = 0.0 if math.isnan(tau) else float(tau)
    values["excess_saved"] = values["worst_excess_lr"] - values["worst_excess_all"]
    for special, general in INCLUSIONS:
        values[f"{general.lower()}_over_{special.lower()}"] = losses["all"][general] - losses["all"][special]
    return values


class _Task:
    """The task of one seed: it trains and gives a loss on held-out data."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.size = trial, SIZES[trial.scale]
        self.images = trial.scale in ("real", "full")
        size = self.size
        if self.images:
            both = trial.data("images", size=32, part="train")
            counts = (min(size.train, len(both) - size.held_out), size.held_out)
            train, held_out = (both.subset(part) for part in split(both.y, counts, trial.rng("split")))
            test = trial.data("images", size=32, part="test")
        else:
            both = trial.data("digits")
            counts = (size.train, size.held_out, len(both) - size.train - size.held_out)
            train, held_out, test = (both.subset(part) for part in split(both.y, counts, trial.rng("split")))
        self.classes = len(both.classes)
        self.train = train.x, train.y
        self.held_out, self.test = (
            (standardised(part.x) if self.images else part.x, part.y) for part in (held_out, test)
        )
        self.done = 0

    def tuned(self, name: str, tuned: str) -> tuple[TrialTable, float]:
        """The trials of one optimizer, and the test loss of the best, trained again."""
        seed = int(self.trial.rng(f"search {name}").integers(2**31))
        table = tune(self, name, search_space(name, tuned), trials=self.size.trials, seed=seed)
        # a winner that fails from another start counts as knowing nothing
        worst = math.log(self.classes)
        losses = [self._loss(table.best(), name, start, self.test) for start in range(1, self.size.retrained + 1)]
        return table, sum(min(loss, worst) if math.isfinite(loss) else worst for loss in losses) / len(losses)

    def __call__(self, make: Callable) -> float:
        self.done += 1
        self.trial.progress(self.done, 0, "trials")
        return self._train(make, 0, self.held_out)

    def _loss(self, point: dict[str, float], name: str, start: int, data: tuple[Tensor, Tensor]) -> float:
        return self._train(lambda params: OPTIMIZERS[name](params, **point), start, data) if point else math.nan

    def _train(self, make: Callable, start: int, data: tuple[Tensor, Tensor]) -> float:
        size, trial = self.size, self.trial
        with trial.seeded(f"weights {start}"):
            if size.depth:
                widths = (size.width, 2 * size.width, 4 * size.width)
                model: nn.Module = ResNet("basic", (size.depth,) * 3, widths, num_classes=self.classes, small_stem=True)
            else:
                layers = nn.Flatten(), nn.Linear(64, size.width), nn.ReLU(), nn.Linear(size.width, self.classes)
                model = nn.Sequential(*layers)
        fit(
            model.to(trial.device),
            lambda model, x, y: F.cross_entropy(model(x), y),
            self.train,
            optimizer=make(model.parameters()),
            steps=size.steps,
            batch_size=size.batch,
            seed=trial.seed + 1000 * start,
            schedule=polynomial(),
            transform=shift_and_flip if self.images else None,
            device=trial.device,
        )
        x, y = data
        with torch.no_grad():
            return float(F.cross_entropy(predict(model, x, 1024), y))
