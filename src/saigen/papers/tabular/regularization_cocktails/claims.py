"""Do searched cocktails beat the plain network, single regularisers, and tuned boosted trees; and where do trees win?

Every table is split into training, validation and test rows (60, 20, 20 %, each class alike). All arms choose on the
validation rows by the same score and with the same number of candidates, are fitted again on training and validation
rows, and are measured once on the test rows by balanced accuracy.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from saigen.data import split
from saigen.data.tables import Table, clusters_table, embedded_table, read_tables, threshold_table
from saigen.papers.tabular.regularization_cocktails import (
    INGREDIENTS,
    CocktailClassifier,
    balanced_accuracy,
    balanced_accuracy_then_log_loss,
    search_cocktail,
    single,
)
from saigen.train.boosting import tuned_boosting
from saigen.trial import Trial

EMBEDDED = ("breast_cancer", "wine", "digits")
LEAST_OF_A_CLASS = 5
"""Rows a class must have in a draw to be in all three parts; rows of rarer ones are left out."""

DIVERGED = -1.0
"""What is noted for a validation score of networks that gave no probabilities."""
MOST_TREES, PATIENCE = 200, 25
"""Rounds of boosting at most, and without gain on the validation rows until it stops."""

IMBALANCED = 2.0
"""From this ratio of the largest class to the smallest, trees weigh the classes alike, as the networks always do; with
nearly equal classes it changes nothing, and scikit-learn's boosting takes ten times as long with weights."""


@dataclass(frozen=True)
class Size:
    width: int
    epochs: int
    batch: int
    rate: float
    trials: int
    rows: int | None
    """At most so many rows of a table, a fresh draw for each seed."""


SIZES = {
    "tiny": Size(width=8, epochs=7, batch=32, rate=1e-3, trials=2, rows=60),
    "laptop": Size(width=64, epochs=28, batch=32, rate=3e-3, trials=13, rows=500),
    # eight tables of a user in a quarter of an hour a seed, on one core
    "real": Size(width=128, epochs=28, batch=32, rate=3e-3, trials=13, rows=600),
    "full": Size(width=512, epochs=105, batch=128, rate=1e-3, trials=840, rows=None),
}
"""At laptop scale a table has a few hundred rows and an epoch a dozen steps: the rate is higher, so that the plain network
learns its training rows."""


@dataclass(frozen=True)
class Parts:
    """A table's rows for choosing, of which ``validation`` judge, and its rows for the test."""

    name: str
    x: np.ndarray
    y: np.ndarray
    validation: np.ndarray
    categorical: tuple[int, ...]
    test_x: np.ndarray
    test_y: np.ndarray


def cocktail_beats_single_regularizers(trial: Trial) -> dict[str, float]:
    """One seed: on each table the cocktail, the plain network, and the best of the thirteen alone.

    The thirteen share a budget of the cocktail's size, first with their default numbers; which of them stands for a table
    is chosen as the cocktail is, on the validation rows.
    """
    values: dict[str, float] = {}
    tables = [_parts(trial, table) for table in _tables(trial)]
    for parts in _watched(trial, tables):
        _cocktail(trial, parts, values)
        _plain(trial, parts, values)
        _best_single(trial, parts, values)
    return {
        "over_plain": _mean(values, tables, "cocktail") - _mean(values, tables, "plain"),
        "over_best_single": _mean(values, tables, "cocktail") - _mean(values, tables, "best_single"),
        **values,
    }


def cocktail_beats_boosted_trees(trial: Trial) -> dict[str, float]:
    """One seed: on each table the cocktail and boosted trees that had as many candidates."""
    values: dict[str, float] = {}
    tables = [_parts(trial, table) for table in _tables(trial)]
    for parts in _watched(trial, tables):
        _cocktail(trial, parts, values)
        _trees(trial, parts, values)
    wins = [np.sign(values[f"cocktail_{parts.name}"] - values[f"trees_{parts.name}"]) for parts in tables]
    return {
        "over_trees": _mean(values, tables, "cocktail") - _mean(values, tables, "trees"),
        "wins_less_losses": float(np.sum(wins)),
        **values,
    }


def trees_beat_networks(trial: Trial) -> dict[str, float]:
    """One seed: trees and the plain network on each table, and trees and the cocktail where truth goes by thresholds."""
    values: dict[str, float] = {}
    size = SIZES[trial.scale]
    drawn = threshold_table(trial.rng("thresholds"), rows=min(800, size.rows or 800))
    turned = threshold_table(trial.rng("thresholds"), rows=min(800, size.rows or 800), rotated=True)
    tables = [_parts(trial, table) for table in _tables(trial)]
    special = [_parts(trial, table) for table in (drawn, turned)]
    for parts in _watched(trial, tables + special):
        _trees(trial, parts, values)
        if parts in special:
            _cocktail(trial, parts, values)
        else:
            _plain(trial, parts, values)
    return {
        "over_plain": _mean(values, tables, "trees") - _mean(values, tables, "plain"),
        "over_cocktail_on_thresholds": values["trees_thresholds"] - values["cocktail_thresholds"],
        "over_cocktail_on_rotated_thresholds": values["trees_rotated_thresholds"]
        - values["cocktail_rotated_thresholds"],
        **values,
    }


# The arms


def _cocktail(trial: Trial, parts: Parts, values: dict[str, float]) -> None:
    search = _search(trial, parts, "cocktail", trials=SIZES[trial.scale].trials)
    values[f"cocktail_{parts.name}"] = _test(search.classifier.predict_proba, parts)
    values[f"validation_cocktail_{parts.name}"] = max(search.score, DIVERGED)
    values[f"ingredients_{parts.name}"] = float(len(search.cocktail.ingredients))


def _plain(trial: Trial, parts: Parts, values: dict[str, float]) -> None:
    plain = _classifier(trial, parts, "plain").fit(parts.x, parts.y)
    values[f"plain_{parts.name}"] = _test(plain.predict_proba, parts)
    values[f"loss_plain_{parts.name}"] = plain.loss_curve_[-1]


def _best_single(trial: Trial, parts: Parts, values: dict[str, float]) -> None:
    found = {}
    for name in INGREDIENTS:
        space = single(name)
        numbers = any(len(parameter.options) != 1 for parameter in space)
        trials = max(1, SIZES[trial.scale].trials // len(INGREDIENTS)) if numbers else 1
        found[name] = _search(trial, parts, name, space=space, trials=trials, pruner=None, refit=False)
        values[f"validation_{name}_{parts.name}"] = max(found[name].score, DIVERGED)
    best = max(found.values(), key=lambda search: search.score)
    values[f"best_single_{parts.name}"] = _test(best.classifier.fit(parts.x, parts.y).predict_proba, parts)


def _trees(trial: Trial, parts: Parts, values: dict[str, float]) -> None:
    """scikit-learn's boosting; on a user's tables also XGBoost, where it is installed, and the better on validation."""
    libraries = ["scikit-learn"]
    if trial.scale in ("real", "full") and importlib.util.find_spec("xgboost") is not None:
        libraries.append("xgboost")
    counts, best = np.bincount(parts.y), -np.inf
    for library in libraries:
        found = tuned_boosting(
            parts.x,
            parts.y,
            task="classification",
            categorical=parts.categorical,
            validation=parts.validation,
            budget=SIZES[trial.scale].trials,
            rng=trial.rng(f"trees {parts.name}"),
            library=library,
            score=balanced_accuracy_then_log_loss,
            class_weight="balanced" if counts.max() >= IMBALANCED * counts.min() else None,
            most_iterations=MOST_TREES,
            patience=PATIENCE,
        )
        measured = _test(found.estimator.predict_proba, parts)
        values[f"{library.replace('-', '_')}_{parts.name}"] = measured
        if found.score > best:
            best = found.score
            values[f"trees_{parts.name}"], values[f"validation_trees_{parts.name}"] = measured, best


def _search(trial: Trial, parts: Parts, purpose: str, **options: Any):
    return search_cocktail(
        parts.x,
        parts.y,
        classifier=_classifier(trial, parts, purpose),
        validation=parts.validation,
        score=balanced_accuracy_then_log_loss,
        random_state=int(trial.rng(f"search {purpose} {parts.name}").integers(2**31)),
        **options,
    )


def _classifier(trial: Trial, parts: Parts, purpose: str) -> CocktailClassifier:
    size = SIZES[trial.scale]
    return CocktailClassifier(
        width=size.width,
        epochs=size.epochs,
        batch_size=size.batch,
        learning_rate=size.rate,
        categorical_features=parts.categorical or None,
        device=trial.device,
        random_state=int(trial.rng(f"weights {purpose} {parts.name}").integers(2**31)),
    )


def _test(predict_proba: Callable[[np.ndarray], np.ndarray], parts: Parts) -> float:
    return balanced_accuracy(parts.test_y, predict_proba(parts.test_x))


def _mean(values: dict[str, float], tables: list[Parts], arm: str) -> float:
    return float(np.mean([values[f"{arm}_{parts.name}"] for parts in tables]))


# The tables


def _tables(trial: Trial) -> list[Table]:
    """scikit-learn's with classes and drawn clusters, or the user's."""
    if trial.scale in ("tiny", "laptop"):
        clusters = clusters_table(trial.rng("clusters"), rows=min(600, SIZES[trial.scale].rows or 600))
        return [*(embedded_table(name) for name in EMBEDDED), clusters]
    if trial.data_path is None:
        raise ValueError(f"scale {trial.scale!r} needs tables of yours, CSV or Parquet: give --data PATH")
    tables = [table for table in read_tables(trial.data_path) if table.classes is not None]
    if not tables:
        raise ValueError(f"{trial.data_path} has no table whose target are classes")
    return tables


def _parts(trial: Trial, table: Table) -> Parts:
    """A draw of the table's rows in its three parts, the test rows last; classes are numbered anew."""
    trial.used(table.name, table.fingerprint)
    counts, most = np.bincount(table.y), SIZES[trial.scale].rows or len(table)
    drawn = counts * min(1.0, most / len(table))
    table = table.take(np.flatnonzero(drawn[table.y] >= LEAST_OF_A_CLASS))
    n = min(len(table), most)
    part = n // 5
    rows = split(table.y, (n - 2 * part, part, part), trial.rng(f"split {table.name}"))
    inside, test = np.concatenate(rows[:2]), rows[2]
    _, y = np.unique(table.y, return_inverse=True)
    validation = np.arange(len(rows[0]), len(inside))
    return Parts(table.name, table.x[inside], y[inside], validation, table.categorical, table.x[test], y[test])


def _watched(trial: Trial, tables: list[Parts]):
    for number, parts in enumerate(tables):
        trial.progress(number, len(tables), parts.name)
        yield parts
