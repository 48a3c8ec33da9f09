"""The tuning protocol of arXiv 1910.05446 (section 4): spaces, quasi-random search, and how good the best of k trials is.

For each optimizer and task: the same number of trials, drawn quasi-randomly from a search space on logarithmic axes; a
trial that diverges is put aside and another drawn; first in a wide space, then in the part of it where the best trials
were. The best trial by validation counts. How sure that is, is read off the trials themselves, by resampling them.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import qmc
from torch.optim import Optimizer

from saigen.papers.training.optimizer_comparison.optimizer import OPTIMIZERS

Point = dict[str, float]
Task = Callable[..., float]
"""``task(make_optimizer, **others)``: trains with ``make_optimizer(params)`` and returns a validation loss or error."""


@dataclass(frozen=True)
class Axis:
    """One dimension of a search space, from ``low`` to ``high``; ``log``: uniform in the logarithm.

    Raises ``ValueError`` for an empty or infinite range, and a logarithmic one that does not begin above 0.
    """

    low: float
    high: float
    log: bool = True

    def __post_init__(self) -> None:
        if not (-math.inf < self.low < self.high < math.inf) or (self.log and not self.low > 0):
            raise ValueError(
                f"low is {self.low} and high is {self.high}, allowed is low < high, with log low > 0 as well"
            )

    def at(self, u: float) -> float:
        """The value at ``u`` in [0, 1]."""
        if self.log:
            return math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        return self.low + u * (self.high - self.low)


@dataclass(frozen=True)
class SearchSpace:
    """Axes by name, and values that are not searched (``fixed``). ``hyperparameters`` turns a point into arguments:

    - ``one_minus_x``: x = 1 - value, so that momentum near 1 is searched evenly;
    - ``lr_over_eps`` and ``lr_over_root_eps``: the learning rate in units of ε or √ε. Where ε is large the size of a
      step is α / ε (Adam) or α / √ε (RMSProp), so that these are the axes which do not depend on one another;
    - anything else stands for itself. Names that no optimizer has go to the task, a share of label smoothing say.

    >>> space = SearchSpace({"lr_over_eps": Axis(1e-3, 10.0), "eps": Axis(1e-8, 1.0), "one_minus_beta1": Axis(0.01, 1.0)})
    >>> sorted(space.hyperparameters(space.sample(1, seed=0)[0]))
    ['beta1', 'eps', 'lr']
    """

    axes: Mapping[str, Axis]
    fixed: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.axes:
            raise ValueError("axes is empty, allowed is at least one axis")

    def sample(self, n: int, seed: int) -> list[Point]:
        """The first ``n`` points of a scrambled Halton sequence; a longer sample begins with the shorter one."""
        if n < 1:
            raise ValueError(f"n is {n}, allowed is a whole number of at least 1")
        unit = qmc.Halton(len(self.axes), scramble=True, rng=np.random.default_rng(seed)).random(n)
        return [{name: axis.at(u) for (name, axis), u in zip(self.axes.items(), row, strict=True)} for row in unit]

    def hyperparameters(self, point: Mapping[str, float]) -> Point:
        """What ``point`` means: the arguments of the optimizer, and of the task."""
        found = {**self.fixed, **point}
        for name in list(found):
            if name.startswith("one_minus_"):
                found[name.removeprefix("one_minus_")] = 1.0 - found.pop(name)
        if "lr_over_eps" in found:
            found["lr"] = found.pop("lr_over_eps") * found["eps"]
        if "lr_over_root_eps" in found:
            found["lr"] = found.pop("lr_over_root_eps") * math.sqrt(found["eps"])
        return found

    def around(self, points: Sequence[Mapping[str, float]]) -> "SearchSpace":
        """The smallest space with the same axes that holds ``points``; an axis they do not spread over stays as it was."""
        axes = {}
        for name, axis in self.axes.items():
            values = [point[name] for point in points]
            low, high = min(values, default=axis.low), max(values, default=axis.high)
            axes[name] = Axis(low, high, axis.log) if low < high else axis
        return SearchSpace(axes, self.fixed)


def search_space(optimizer: str, tuned: str = "all") -> SearchSpace:
    """A wide space for one of the six: ``"all"`` hyper-parameters, or the learning rate alone (``"lr"``).

    ``"lr"`` leaves the others at their customary values, γ = 0.9, β = (0.9, 0.999), ε = 1e-8, as benchmarks do that find
    adaptive methods worse. With ``"all"`` the space of a general optimizer holds what makes it the special one: large ε
    with the learning rate in its unit, and ρ up to 0.9999, where RMSProp's v hardly leaves its 1.

    Raises ``ValueError`` for an unknown optimizer or another ``tuned``.
    """
    if optimizer not in OPTIMIZERS or tuned not in ("all", "lr"):
        raise ValueError(
            f"optimizer is {optimizer!r} and tuned is {tuned!r}, allowed are {', '.join(OPTIMIZERS)} with 'all' or 'lr'"
        )
    rate, momentum, eps = Axis(1e-3, 10.0), Axis(1e-2, 1.0), Axis(1e-8, 1e2)
    if optimizer == "SGD":
        return SearchSpace({"lr": rate})
    if optimizer in ("Momentum", "Nesterov"):
        return SearchSpace({"lr": rate} | ({"one_minus_momentum": momentum} if tuned == "all" else {}))
    if tuned == "lr":
        customary = {"momentum": 0.9, "rho": 0.9} if optimizer == "RMSProp" else {"beta1": 0.9, "beta2": 0.999}
        return SearchSpace({"lr": Axis(1e-5, 1e-1)}, fixed={**customary, "eps": 1e-8})
    if optimizer == "RMSProp":
        decays = {"one_minus_momentum": momentum, "one_minus_rho": Axis(1e-4, 1.0)}
        return SearchSpace({"lr_over_root_eps": Axis(1e-3, 1e2), "eps": Axis(1e-10, 10.0), **decays})
    decays = {"one_minus_beta1": momentum, "one_minus_beta2": Axis(1e-4, 1.0)}
    return SearchSpace({"lr_over_eps": Axis(1e-2, 1e4), "eps": eps, **decays})


@dataclass(frozen=True)
class BestOf:
    """What the best of k trials is worth: its mean, and where it lies in 90 % of the cases."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class TrialTable:
    """The trials that were counted, in their order, and how many diverged and were replaced."""

    points: tuple[Point, ...]
    """What each trial was given: the arguments of the optimizer and of the task."""
    scores: tuple[float, ...]
    """Validation loss or error of each, lower is better; finite, but where everything diverged infinite."""
    diverged: int

    def best(self) -> Point:
        """The hyper-parameters of the best trial."""
        return self.points[int(np.argmin(self.scores))]

    def best_of(self, k: int) -> BestOf:
        """The best of ``k`` trials drawn with replacement from the table: mean, 5th and 95th percentile.

        It is the bootstrap of the paper with infinitely many resamples, in closed form: the i-th best of n scores is
        the best of k with probability ((n - i + 1)/n)^k - ((n - i)/n)^k. Raises ``ValueError`` for k below 1.
        """
        if k < 1:
            raise ValueError(f"k is {k}, allowed is a whole number of at least 1")
        scores, weights = np.sort(self.scores), _best_of_weights(len(self.scores), k)
        reached = np.cumsum(weights)
        ends = [scores[min(int(np.searchsorted(reached, share)), len(scores) - 1)] for share in (0.05, 0.95)]
        used = weights > 0
        return BestOf(float(scores[used] @ weights[used]), float(ends[0]), float(ends[1]))

    def trials_to_target(self, target: float, confidence: float = 0.5) -> float:
        """How many trials reach ``target`` or better with probability ``confidence``; infinite where none did.

        Raises ``ValueError`` for a confidence outside (0, 1).
        """
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence is {confidence}, allowed is 0 < confidence < 1")
        share = float(np.mean(np.asarray(self.scores) <= target))
        if share in (0.0, 1.0):
            return 1.0 if share else math.inf
        return float(max(1, math.ceil(math.log(1 - confidence) / math.log(1 - share) - 1e-12)))


def _best_of_weights(n: int, k: int) -> Float[NDArray[np.float64], " n"]:
    left = np.arange(n, -1, -1) / n
    return left[:-1] ** k - left[1:] ** k


def tune(
    task: Task,
    optimizer: type[Optimizer] | str,
    space: SearchSpace,
    *,
    trials: int,
    seed: int,
    stages: int = 2,
    keep: float = 0.1,
    on_trial: Callable[[int, int, float], None] | None = None,
) -> TrialTable:
    """Searches ``space`` with ``trials`` trials that do not diverge, in ``stages`` equal parts.

    Each stage after the first is drawn from the box that the best ``keep`` of all trials so far (at least three) span.
    ``optimizer`` is one of the six by name, or any optimizer class; the hyper-parameters it does not take go to ``task``
    by name. A trial diverges where its score is not finite; at most three times ``trials`` are drawn, and where that does
    not suffice the table is filled with infinite scores, so that every optimizer has spent the same budget.

    Raises ``ValueError`` for fewer trials than stages, ``keep`` outside (0, 1], and an unknown name.

    >>> def task(make):
    ...     import torch
    ...     w = torch.nn.Parameter(torch.ones(2))
    ...     optimizer = make([w])
    ...     for _ in range(10):
    ...         optimizer.zero_grad()
    ...         (w * torch.tensor([1.0, 3.0])).square().sum().backward()
    ...         optimizer.step()
    ...     return float(w.detach().square().sum())
    >>> table = tune(task, "Momentum", search_space("Momentum"), trials=20, seed=0)
    >>> len(table.scores), sorted(table.best())
    (20, ['lr', 'momentum'])
    """
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {optimizer!r}, allowed are {', '.join(OPTIMIZERS)}, or a class")
        optimizer = OPTIMIZERS[optimizer]
    if stages < 1 or trials < stages or not 0.0 < keep <= 1.0:
        raise ValueError(
            f"trials is {trials}, stages is {stages} and keep is {keep}, allowed is 1 <= stages <= trials and 0 < keep <= 1"
        )
    rng = np.random.default_rng(seed)
    drawn: list[Point] = []
    given: list[Point] = []
    scores: list[float] = []
    diverged, wanted = 0, [trials * (stage + 1) // stages for stage in range(stages)]
    for goal in wanted:
        if scores:
            best = np.argsort(scores)[: max(3, round(keep * len(scores)))]
            space = space.around([drawn[i] for i in best])
        for point in space.sample(3 * trials, int(rng.integers(2**31))):
            if len(scores) >= goal or diverged >= 2 * trials:
                break
            arguments = space.hyperparameters(point)
            score = float(_run(task, optimizer, arguments))
            if not math.isfinite(score):
                diverged += 1
                continue
            drawn.append(point)
            given.append(arguments)
            scores.append(score)
            if on_trial is not None:
                on_trial(len(scores), trials, score)
    missing = trials - len(scores)
    return TrialTable((*given, *[{}] * missing), (*scores, *[math.inf] * missing), diverged)


def _run(task: Task, optimizer: type[Optimizer], arguments: Mapping[str, float]) -> float:
    """One trial; what the optimizer's constructor does not name belongs to the task."""
    names = inspect.signature(optimizer).parameters
    own = {name: value for name, value in arguments.items() if name in names}
    return task(partial(optimizer, **own), **{name: value for name, value in arguments.items() if name not in names})


@dataclass(frozen=True)
class Rank:
    """A line of the ranking: an optimizer, and what the best of its trials is worth."""

    optimizer: str
    best: BestOf


def ranking(tables: Mapping[str, TrialTable], k: int | None = None) -> list[Rank]:
    """The optimizers from best to worst by the mean of their best of ``k`` trials (None: as many as they all have).

    Raises ``ValueError`` where there is no table, or budgets differ and no ``k`` is given.
    """
    budgets = {len(table.scores) for table in tables.values()}
    if not tables or (k is None and len(budgets) > 1):
        raise ValueError(f"tables have {sorted(budgets)} trials and k is {k}, allowed are equal budgets, or a k")
    chosen = k if k is not None else budgets.pop()
    return sorted(
        (Rank(name, table.best_of(chosen)) for name, table in tables.items()), key=lambda rank: rank.best.mean
    )


def plot_ranking(ranks: Sequence[Rank], axes: Any) -> None:
    """The ranking with its intervals, the best on top, on the Matplotlib ``axes`` given (``plt.subplots()[1]``)."""
    for position, rank in enumerate(ranks):
        axes.plot([rank.best.low, rank.best.high], [position, position], color="C0", linewidth=2)
        axes.plot(rank.best.mean, position, "o", color="C0")
    axes.set_yticks(range(len(ranks)), [rank.optimizer for rank in ranks])
    axes.invert_yaxis()
    axes.set_xlabel("validation")


def plot_budgets(tables: Mapping[str, TrialTable], axes: Any) -> None:
    """What the best of k trials is worth for every k up to the budget: one band for each optimizer."""
    for name, table in tables.items():
        ks = np.arange(1, len(table.scores) + 1)
        found = [table.best_of(int(k)) for k in ks]
        axes.plot(ks, [best.mean for best in found], label=name)
        axes.fill_between(ks, [best.low for best in found], [best.high for best in found], alpha=0.15)
    axes.set_xscale("log")
    axes.set_xlabel("k")
    axes.legend()
