"""What the experiment of optimizer_comparison is made of: one task for all, winners trained again, what follows from them."""

import dataclasses
import math

import numpy as np
import pytest

from saigen.papers.training.optimizer_comparison import INCLUSIONS, OPTIMIZERS, claims
from saigen.trial import Trial
from tests.papers.training.test_radam_claims import images  # noqa: F401


def test_a_trial_is_a_pure_function_of_its_hyperparameters():
    task = claims._Task(Trial(seed=1000, scale="tiny"))
    make = lambda params: OPTIMIZERS["SGD"](params, lr=0.1)  # noqa: E731
    assert task(make) == task(make)
    starts = {task._loss({"lr": 0.1}, "SGD", start, task.test) for start in range(3)}
    assert len(starts) == 3  # the winner is trained again from other starts


def test_a_winner_that_fails_knows_nothing():
    task = claims._Task(Trial(seed=1000, scale="tiny"))
    table, loss = task.tuned("SGD", "lr")
    assert len(table.scores) == claims.SIZES["tiny"].trials and 0 < loss <= math.log(10)
    assert math.isnan(task._loss({}, "SGD", 1, task.test))


@pytest.fixture
def losses():
    return {
        "all": dict(zip(OPTIMIZERS, (0.5, 0.4, 0.3, 0.45, 0.35, 0.3), strict=True)),
        "lr": dict(zip(OPTIMIZERS, (0.5, 0.4, 0.3, 0.6, 0.45, 0.25), strict=True)),
    }


def test_what_follows_from_the_losses(monkeypatch, losses):
    from saigen.papers.training.optimizer_comparison import TrialTable

    table = TrialTable(({"lr": 0.1},) * 2, (0.5, 0.6), 0)
    monkeypatch.setattr(claims._Task, "tuned", lambda self, name, tuned: (table, losses[tuned][name]))
    values = claims.tuning_decides_the_ranking(Trial(seed=1000, scale="tiny"))
    for special, general in INCLUSIONS:
        expected = losses["all"][general] - losses["all"][special]
        assert values[f"{general.lower()}_over_{special.lower()}"] == pytest.approx(expected)
    assert values["worst_excess_all"] == pytest.approx(0.05) and values["worst_excess_lr"] == pytest.approx(0.2)
    assert values["excess_saved"] == pytest.approx(0.15)
    assert values["broken_inclusions_all"] == 1 and values["broken_inclusions_lr"] == 2


def test_runs_with_images(images, monkeypatch):  # noqa: F811
    small = {"train": 16, "held_out": 8, "steps": 1, "batch": 8, "trials": 2, "retrained": 1, "width": 4}
    monkeypatch.setitem(claims.SIZES, "real", dataclasses.replace(claims.SIZES["real"], **small))
    values = claims.tuning_decides_the_ranking(Trial(seed=1000, scale="real", data_path=images))
    assert np.isfinite([values["excess_saved"], values["adam_over_momentum"]]).all()
