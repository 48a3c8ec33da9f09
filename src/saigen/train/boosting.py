"""Gradient-boosted trees, tuned: the baseline of every paper on tables.

The space is searched at random, scikit-learn's defaults first. How many trees there are is not searched but found: boosting
goes on until the validation score has stood still, and the best count is kept. The winner is then fitted on all rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.utils.class_weight import compute_sample_weight

Score = Callable[[np.ndarray, np.ndarray], float]
TASKS = ("classification", "regression")
LIBRARIES = ("scikit-learn", "xgboost")
SPACE: Mapping[str, tuple[float, float]] = {
    "learning_rate": (0.01, 0.3),
    "max_leaf_nodes": (3, 64),
    "min_samples_leaf": (1, 60),
    "l2_regularization": (1e-4, 10.0),
    "max_features": (0.4, 1.0),
}
"""Each is drawn uniformly in its logarithm between these bounds; leaves and samples are whole numbers."""
DEFAULTS: Mapping[str, float] = {
    "learning_rate": 0.1,
    "max_leaf_nodes": 31,
    "min_samples_leaf": 20,
    "l2_regularization": 0.0,
    "max_features": 1.0,
}
"""scikit-learn's, tried first: the tuned model is on the validation rows never worse than the untuned."""


@dataclass(frozen=True)
class Boosted:
    """The best of the search, fitted anew on all rows."""

    estimator: Any
    """With ``predict``, and ``predict_proba`` where the task is classification."""
    score: float
    """On the validation rows, of the model fitted without them; higher is better."""
    settings: Mapping[str, float]
    """What was chosen, the number of ``iterations`` among it."""
    scores: tuple[float, ...]
    """Of every candidate, in the order they were tried."""


def tuned_boosting(
    x: Float[np.ndarray, "n d"],
    y: np.ndarray,
    *,
    task: Literal["classification", "regression"],
    categorical: Sequence[int] = (),
    validation: float | Sequence[int] | np.ndarray = 0.2,
    budget: int = 20,
    rng: np.random.Generator,
    library: Literal["scikit-learn", "xgboost"] = "scikit-learn",
    score: Score | None = None,
    class_weight: Literal["balanced"] | None = None,
    most_iterations: int = 1000,
    patience: int = 50,
) -> Boosted:
    """Searches ``SPACE`` at random for gradient-boosted trees, and fits the best again on all rows.

    Args:
        x: the table, numbers of categories in the ``categorical`` columns, NaN where a value is missing.
        y: class indices 0 to K - 1, or values.
        validation: the share of rows (of each class) that chooses, or the rows themselves.
        budget: candidates tried, the defaults among them.
        rng: draws the candidates, the validation rows and the columns of each split.
        library: scikit-learn's histogram boosting, or XGBoost (extra ``trees``).
        score: ``score(y, predicted)`` of probabilities (n, K) or values, higher is better; by default minus the log loss, or
            minus the mean squared error.
        class_weight: ``"balanced"`` weighs each class as much as every other.
        most_iterations, patience: boosting stops after so many rounds, or when the score has not risen for so long.

    Raises ``ValueError`` for arguments outside what is said, and for a class that has no row left to learn from.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y)
    classes = _checked(x, y, task, library, class_weight, categorical, budget, most_iterations, patience)
    held_out = _validation_rows(y, validation, task, rng)
    inside = np.setdiff1d(np.arange(len(y)), held_out)
    if task == "classification" and (empty := np.setdiff1d(np.arange(classes), y[inside])).size:
        raise ValueError(
            f"y has no row of class {empty[0]} outside validation, needed is one of each of {classes} classes"
        )
    judge = score or (_minus_log_loss if task == "classification" else _minus_squared_error)
    boost = {"scikit-learn": _histogram, "xgboost": _xgboost}[library]
    seed = int(rng.integers(2**31))

    def fitted(settings: Mapping[str, float], rows: np.ndarray, **options: Any) -> tuple[Any, float, int]:
        weight = compute_sample_weight("balanced", y[rows]) if class_weight else None
        return boost(x, y, rows, settings, task, list(categorical), weight, seed, judge, **options)

    tried = []
    for number in range(budget):
        settings = dict(DEFAULTS) if number == 0 else _draw(rng)
        _, best, iterations = fitted(settings, inside, held_out=held_out, most=most_iterations, patience=patience)
        tried.append((best, settings | {"iterations": iterations}))
    scores = tuple(best for best, _ in tried)
    chosen = int(np.argmax(scores))
    best, settings = tried[chosen]
    estimator, _, _ = fitted(settings, np.arange(len(y)), held_out=None, most=settings["iterations"], patience=0)
    return Boosted(estimator, best, settings, scores)


def _checked(x, y, task, library, class_weight, categorical, budget, most_iterations, patience) -> int:
    for name, value, allowed in (("task", task, TASKS), ("library", library, LIBRARIES)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, allowed are {' and '.join(allowed)}")
    if class_weight not in (None, "balanced") or (class_weight and task == "regression"):
        raise ValueError(f"class_weight is {class_weight!r}, allowed is None, and 'balanced' in classification")
    for name, value in (("budget", budget), ("most_iterations", most_iterations), ("patience", patience)):
        if value < 1:
            raise ValueError(f"{name} is {value}, allowed is 1 or more")
    if x.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(f"x and y have shapes {x.shape} and {y.shape}, needed are (n, d) and (n,) with n of 2 or more")
    if any(not 0 <= column < x.shape[1] for column in categorical):
        raise ValueError(f"categorical is {list(categorical)}, allowed are columns 0 to {x.shape[1] - 1}")
    if task == "regression":
        return 0
    if y.dtype.kind not in "iu" or y.min() < 0:
        raise ValueError(f"y has the smallest value {y.min()} of {y.dtype}, allowed are class indices from 0")
    return int(y.max()) + 1


def _validation_rows(y: np.ndarray, validation: Any, task: str, rng: np.random.Generator) -> np.ndarray:
    rows = np.arange(len(y))
    if np.ndim(validation) == 0:
        if not 0 < validation < 1:
            raise ValueError(f"validation is {validation}, allowed is a share between 0 and 1, or rows")
        stratify = y if task == "classification" and np.bincount(y).min() > 1 else None
        return train_test_split(rows, test_size=validation, stratify=stratify, random_state=int(rng.integers(2**31)))[1]
    held_out = np.unique(np.asarray(validation))
    if held_out.dtype.kind not in "iu" or not 0 < len(held_out) < len(y) or not np.isin(held_out, rows).all():
        raise ValueError(f"validation has {len(held_out)} rows, allowed are 1 to {len(y) - 1} of 0 to {len(y) - 1}")
    return held_out


def _draw(rng: np.random.Generator) -> dict[str, float]:
    drawn = {name: float(np.exp(rng.uniform(*np.log(bounds)))) for name, bounds in SPACE.items()}
    return drawn | {name: round(drawn[name]) for name in ("max_leaf_nodes", "min_samples_leaf")}


def _minus_log_loss(y: np.ndarray, probabilities: np.ndarray) -> float:
    return -float(log_loss(y, probabilities, labels=np.arange(probabilities.shape[1])))


def _minus_squared_error(y: np.ndarray, predicted: np.ndarray) -> float:
    return -float(np.mean((y - predicted) ** 2))


def _histogram(x, y, rows, settings, task, categorical, weight, seed, judge, *, held_out, most, patience):
    """(estimator, best score, iterations); boosting goes on in strides from where it stood."""
    make = HistGradientBoostingClassifier if task == "classification" else HistGradientBoostingRegressor
    options = {name: settings[name] for name in DEFAULTS}
    model = make(
        **options, categorical_features=categorical or None, early_stopping=False, warm_start=True, random_state=seed
    )
    stride = most if held_out is None else min(patience, most)
    scores: list[float] = []
    while len(scores) < most and (not scores or len(scores) - int(np.argmax(scores)) <= patience):
        model.set_params(max_iter=min(len(scores) + stride, most)).fit(x[rows], y[rows], sample_weight=weight)
        if held_out is None:
            return model.set_params(warm_start=False), np.nan, most
        stages = model.staged_predict_proba if task == "classification" else model.staged_predict
        scores = [judge(y[held_out], predicted) for predicted in stages(x[held_out])]
    best = int(np.argmax(scores))
    return model, scores[best], best + 1


def _xgboost(x, y, rows, settings, task, categorical, weight, seed, judge, *, held_out, most, patience):
    try:
        from xgboost import XGBClassifier, XGBRegressor
    except ImportError as problem:
        raise ValueError("library is 'xgboost', which is not installed: pip install 'saigen[trees]'") from problem
    options = {
        "learning_rate": settings["learning_rate"],
        "max_leaves": settings["max_leaf_nodes"],
        "max_depth": 0,  # leaves bound a tree, not levels, as in scikit-learn
        "grow_policy": "lossguide",
        "tree_method": "hist",
        # XGBoost counts curvature, at most a quarter a sample of two classes, where scikit-learn counts samples.
        "min_child_weight": settings["min_samples_leaf"] * (0.25 if task == "classification" else 1.0),
        "reg_lambda": settings["l2_regularization"],
        "colsample_bynode": settings["max_features"],
    }
    if categorical:
        kinds = ["c" if column in categorical else "q" for column in range(x.shape[1])]
        options |= {"enable_categorical": True, "feature_types": kinds}

    def metric(true: np.ndarray, predicted: np.ndarray) -> float:
        both = task == "classification" and predicted.ndim == 1
        return -judge(true, np.column_stack([1 - predicted, predicted]) if both else predicted)

    make = XGBClassifier if task == "classification" else XGBRegressor
    if held_out is None:
        model = make(**options, n_estimators=most, random_state=seed, n_jobs=1)
        return model.fit(x[rows], y[rows], sample_weight=weight), np.nan, most
    stopping = {"early_stopping_rounds": patience, "eval_metric": metric}
    model = make(**options, **stopping, n_estimators=most, random_state=seed, n_jobs=1)
    model.fit(x[rows], y[rows], sample_weight=weight, eval_set=[(x[held_out], y[held_out])], verbose=False)
    return model, -float(model.best_score), model.best_iteration + 1
