"""The search for a cocktail: which regularisers, and how much of each, for one table (section 3.2 of the paper).

A cocktail is drawn by Optuna's tree-structured Parzen estimator, over the whole conditional space at once, trained on
part of the rows and judged on the others. Every cosine cycle ends with a usable network, so that its end is where a
trial can be stopped: Hyperband decides which ones go on. Both together are what is known as BOHB.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state

from saigen.papers.tabular.regularization_cocktails.estimator import CocktailClassifier, cycle_ends
from saigen.papers.tabular.regularization_cocktails.space import SPACE, TRIALS, Cocktail, Parameter, configure

SAMPLERS = ("tpe", "random")
PRUNERS = ("hyperband", None)
Score = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Tried:
    """One trial: what was tried, its last score, and how many epochs it was given."""

    cocktail: Cocktail
    score: float
    epochs: int
    complete: bool


@dataclass(frozen=True)
class CocktailSearch:
    """What a search found: the best ``cocktail``, its validation ``score``, all ``trials``, and the ``classifier`` with
    that cocktail, fitted on all rows unless ``refit`` was False."""

    cocktail: Cocktail
    score: float
    trials: tuple[Tried, ...]
    classifier: CocktailClassifier

    @property
    def epochs(self) -> int:
        """Epochs trained in all trials together: what the search has cost."""
        return sum(trial.epochs for trial in self.trials)


def balanced_accuracy(y: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean over the classes of the share that is found: the paper's objective and measure."""
    # scikit-learn's score takes a hundred times as long, and boosting asks for it after every tree, XGBoost with floats.
    y = np.asarray(y, dtype=np.int64)
    counts = np.bincount(y)
    found = np.bincount(y, weights=probabilities.argmax(1) == y)
    return float((found[counts > 0] / counts[counts > 0]).mean())


def balanced_accuracy_then_log_loss(y: np.ndarray, probabilities: np.ndarray) -> float:
    """Balanced accuracy less a thousandth of the log loss, which decides between candidates that are equal on few rows."""
    own = np.take_along_axis(probabilities, np.asarray(y, dtype=np.int64)[:, None], 1)
    loss = -np.log(np.clip(own, 1e-7, 1)).mean()
    return balanced_accuracy(y, probabilities) - 1e-3 * float(loss)


def search_cocktail(
    X: Any,
    y: Any,
    *,
    classifier: CocktailClassifier | None = None,
    trials: int | None = TRIALS,
    seconds: float | int | None = None,
    space: tuple[Parameter, ...] = SPACE,
    validation: float | Any = 0.25,
    score: Score = balanced_accuracy,
    sampler: str = "tpe",
    pruner: str | None = "hyperband",
    refit: bool = True,
    random_state: Any = None,
) -> CocktailSearch:
    """Searches the cocktail for a table, and fits it again on all rows.

    Args:
        X, y: the table (n, d) and its labels (n,).
        classifier: the network and its training; the paper's by default.
        trials, seconds: the budget; whichever ends first (None: no bound). 840 trials are the paper's.
        space: ``SPACE``, or ``single(ingredient)``, or any part of it.
        validation: the share of rows (of each class) that judges, 0.25 in the paper, or the numbers of the rows.
        score: ``score(y, probabilities)`` of class indices, higher is better.
        sampler: ``"tpe"`` or ``"random"``.
        pruner: ``"hyperband"`` or None, which trains each trial to its end, as the paper does.
        refit: whether the best cocktail is trained again on all rows, as the paper does.
        random_state: everything random.

    The plain network (or the ingredient with its default numbers) is tried first, so that on the validation rows the
    choice is never worse. Raises ``ImportError`` without Optuna, and ``ValueError`` for what is outside the above.

    >>> from sklearn.datasets import load_iris
    >>> small = CocktailClassifier(width=16, epochs=7, learning_rate=0.01)
    >>> found = search_cocktail(*load_iris(return_X_y=True), classifier=small, trials=3, random_state=0)
    >>> len(found.trials), found.classifier.predict([[5.0, 3.0, 1.0, 0.2]]).tolist()
    (3, [0])
    """
    _check(trials, seconds, sampler, pruner)
    X, y = np.asarray(X, dtype=np.float64), np.asarray(y)
    classifier = CocktailClassifier() if classifier is None else clone(classifier)
    draw = check_random_state(random_state)
    held_out = _validation_rows(y, validation, draw)
    inside = np.setdiff1d(np.arange(len(y)), held_out)
    classes, labels = np.unique(y, return_inverse=True)
    if missing := sorted(set(classes) - set(y[inside])):
        raise ValueError(f"y has no row of class {missing[0]} outside validation, needed is one of each class")
    seed = int(draw.randint(2**31))
    classifier.set_params(random_state=seed)
    study, optuna = _study(sampler, pruner, seed, cycle_ends(classifier.epochs, classifier.cycles))
    tried: list[Tried] = []

    def objective(trial: Any) -> float:
        cocktail = configure(lambda parameter: _suggest(trial, parameter), space)
        last, epochs = -math.inf, 0

        def at_cycle_end(epoch: int, probabilities: np.ndarray) -> None:
            nonlocal last, epochs
            value = score(labels[held_out], probabilities) if np.isfinite(probabilities).all() else -math.inf
            last, epochs = value, epoch
            trial.report(value, epoch)
            if epoch < classifier.epochs and trial.should_prune():
                raise optuna.TrialPruned

        try:
            clone(classifier).set_params(cocktail=cocktail)._fit(X[inside], y[inside], at_cycle_end, X[held_out])
        finally:
            tried.append(Tried(cocktail, last, epochs, epochs == classifier.epochs))
        return last

    study.enqueue_trial(_defaults(space))
    study.optimize(objective, n_trials=trials, timeout=seconds)
    best = max((trial for trial in tried if trial.complete), key=lambda trial: trial.score)
    classifier.set_params(cocktail=best.cocktail)
    if refit:
        classifier.fit(X, y)
    return CocktailSearch(best.cocktail, best.score, tuple(tried), classifier)


def _study(sampler: str, pruner: str | None, seed: int, ends: tuple[int, ...]) -> tuple[Any, Any]:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("the search for a cocktail needs the extra search: pip install 'saigen[search]'") from error
    import warnings

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # grouping by what is conditional is marked experimental
        draws = {
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True),
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        }[sampler]()
    stops = optuna.pruners.NopPruner()
    if pruner == "hyperband" and len(ends) > 1:
        stops = optuna.pruners.HyperbandPruner(min_resource=ends[0], max_resource=ends[-1], reduction_factor=3)
    # Hyperband draws the bracket of a trial from the name of the study.
    study = optuna.create_study(direction="maximize", sampler=draws, pruner=stops, study_name=f"cocktail-{seed}")
    return study, optuna


def _suggest(trial: Any, parameter: Parameter) -> Any:
    if parameter.options:
        return trial.suggest_categorical(parameter.name, parameter.options)
    if isinstance(parameter.low, int):
        return trial.suggest_int(parameter.name, parameter.low, parameter.high)
    return trial.suggest_float(parameter.name, parameter.low, parameter.high)


def _defaults(space: tuple[Parameter, ...]) -> dict[str, Any]:
    """What the first trial is: everything off that can be, and the default of every number."""
    plain = Cocktail()
    return {parameter.name: getattr(plain, parameter.name) for parameter in space if len(parameter.options) != 1}


def _validation_rows(y: np.ndarray, validation: Any, draw: np.random.RandomState) -> np.ndarray:
    rows = np.arange(len(y))
    if np.ndim(validation) == 0:
        if not 0 < validation < 1:
            raise ValueError(f"validation is {validation}, allowed is a share between 0 and 1, or numbers of rows")
        stratify = y if np.unique(y, return_counts=True)[1].min() > 1 else None
        return np.sort(train_test_split(rows, test_size=validation, stratify=stratify, random_state=draw)[1])
    held_out = np.unique(np.asarray(validation))
    if held_out.dtype.kind not in "iu" or not 0 < len(held_out) < len(y) or not np.isin(held_out, rows).all():
        raise ValueError(f"validation holds {len(held_out)} rows, allowed are 1 to {len(y) - 1} of 0 to {len(y) - 1}")
    return held_out


def _check(trials: int | None, seconds: float | int | None, sampler: str, pruner: str | None) -> None:
    if trials is None and seconds is None:
        raise ValueError("trials is None and seconds is None, allowed is a budget in one of them")
    if trials is not None and trials < 1:
        raise ValueError(f"trials is {trials}, allowed is 1 or more, or None with a budget of seconds")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds is {seconds}, allowed is a number above 0, or None")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}, allowed are {', '.join(SAMPLERS)}")
    if pruner not in PRUNERS:
        raise ValueError(f"pruner is {pruner!r}, allowed are {', '.join(map(repr, PRUNERS))}")
