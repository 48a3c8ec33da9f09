"""Tuned gradient-boosted trees: the search, the count of trees, and what is refused."""

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_wine
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import log_loss

from saigen.train.boosting import DEFAULTS, SPACE, tuned_boosting
from tests.peers import need


def rng(seed=0):
    return np.random.default_rng(seed)


def search(x, y, task="classification", **options):
    options = {"budget": 3, "rng": rng(), "most_iterations": 60, "patience": 10} | options
    return tuned_boosting(x, y, task=task, **options)


def test_the_score_is_that_of_the_chosen_settings_without_the_validation_rows():
    x, y = load_wine(return_X_y=True)
    held_out = np.arange(0, len(y), 4)
    found = search(x, y, validation=held_out)
    assert found.score == max(found.scores) and len(found.scores) == 3
    inside = np.setdiff1d(np.arange(len(y)), held_out)
    generator = rng()
    seed = int(generator.integers(2**31))
    options = {name: found.settings[name] for name in DEFAULTS}
    again = HistGradientBoostingClassifier(
        **options, max_iter=found.settings["iterations"], early_stopping=False, random_state=seed
    ).fit(x[inside], y[inside])
    assert -log_loss(y[held_out], again.predict_proba(x[held_out])) == pytest.approx(found.score, rel=1e-9)
    assert found.estimator.n_iter_ == found.settings["iterations"] and found.estimator.predict_proba(x).shape == (
        178,
        3,
    )


def test_the_defaults_are_tried_first_and_draws_stay_in_the_space():
    x, y = load_diabetes(return_X_y=True)
    alone = search(x, y, "regression", budget=1)
    more = search(x, y, "regression", budget=4)
    assert alone.scores[0] == more.scores[0] and more.score >= alone.score
    assert {k: alone.settings[k] for k in DEFAULTS} == dict(DEFAULTS)
    if more.scores[0] != more.score:
        assert all(low - 1 <= more.settings[name] <= high for name, (low, high) in SPACE.items())


def test_same_seed_same_search_and_the_global_generator_is_left_alone():
    x, y = load_wine(return_X_y=True)
    before = np.random.get_state()[1].copy()
    first, second = search(x, y, rng=rng(3)), search(x, y, rng=rng(3))
    assert first.scores == second.scores and (np.random.get_state()[1] == before).all()


def test_boosting_stops_where_more_trees_no_longer_help():
    x, y = rng().normal(size=(120, 3)), rng(1).integers(0, 2, 120)  # nothing to learn
    found = search(x, y, budget=1, most_iterations=400, patience=15)
    assert found.settings["iterations"] <= 15


def test_categories_and_missing_values():
    x = np.column_stack([rng().integers(0, 6, 200), rng(1).normal(size=200)]).astype(float)
    y = np.isin(x[:, 0], (1, 4)).astype(int)
    x[::17, 1] = np.nan
    found = search(x, y, categorical=[0])
    assert (found.estimator.predict(x) == y).mean() > 0.95
    assert found.estimator.is_categorical_.tolist() == [True, False]


def test_a_score_of_ones_own_and_balanced_classes():
    x, y = load_wine(return_X_y=True)
    found = search(x, y, score=lambda y, p: float((p.argmax(1) == y).mean()), class_weight="balanced")
    assert 0 <= found.score <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "ranking"}, "task"),
        ({"library": "catboost"}, "library"),
        ({"budget": 0}, "budget"),
        ({"patience": 0}, "patience"),
        ({"validation": 1.0}, "validation"),
        ({"validation": [500]}, "validation"),
        ({"categorical": [13]}, "categorical"),
        ({"class_weight": "even"}, "class_weight"),
        ({"class_weight": "balanced", "task": "regression"}, "class_weight"),
        ({"validation": np.arange(59)}, "class 0"),
    ],
)
def test_wrong_arguments(options, said):
    with pytest.raises(ValueError, match=said):
        search(*load_wine(return_X_y=True), **options)


def test_wrong_tables():
    x, y = load_wine(return_X_y=True)
    with pytest.raises(ValueError, match="shapes"):
        search(x, y[:-1])
    with pytest.raises(ValueError, match="class indices"):
        search(x, y - 1)
    with pytest.raises(ValueError, match="class indices"):
        search(x, y.astype(float))


@pytest.mark.peers
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_xgboost(task):
    need("xgboost")
    x, y = load_wine(return_X_y=True)
    x = np.column_stack([x, y % 2])
    found = search(x, y if task == "classification" else y.astype(float), task, library="xgboost", categorical=[13])
    assert found.score > (-0.3 if task == "classification" else -0.2)
    assert found.estimator.n_estimators == found.settings["iterations"]
