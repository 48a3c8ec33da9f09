"""The rate that held-out data choose, and what is refused."""

import pytest
import torch
from torch import nn

from saigen.train import cosine, fit, fit_best


def task(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(80, 4, generator=generator)
    return x, (x[:, 0] > 0).long()


def start():
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def cross_entropy(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def best(rates, held_out=None, **options):
    x, y = task()
    return fit_best(
        start(),
        cross_entropy,
        (x[20:], y[20:]),
        rates=rates,
        optimizer=lambda parameters, rate: torch.optim.SGD(parameters, lr=abs(rate), maximize=rate < 0),
        held_out=(x[:20], y[:20]) if held_out is None else held_out,
        epochs=3,
        batch_size=10,
        seed=0,
        schedule=cosine(),
        **options,
    )


def test_held_out_data_choose_and_the_start_is_left_alone():
    found = best((1e-6, 0.5, -0.5))
    assert found.rate == 0.5 and found.history.losses[-1] < 0.5
    assert best((-0.5, 1e-6)).rate == 1e-6


def test_a_single_rate_is_what_fit_gives():
    x, y = task()
    found = best((0.1,), held_out=(x[:0], y[:0]))
    model = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = fit(
        model, cross_entropy, (x[20:], y[20:]), optimizer=optimizer, epochs=3, batch_size=10, seed=0, schedule=cosine()
    )
    assert history.losses == found.history.losses and torch.equal(model.weight, found.model.weight)


def test_of_equal_scores_the_larger_rate_wins():
    assert best((0.2, 0.1), score=lambda model, x, y: 1.0).rate == 0.2


def test_every_rate_has_its_checkpoint(tmp_path):
    best((0.1, 0.2), checkpoint=lambda rate: tmp_path / f"{rate}", checkpoint_every=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.1", "0.2"]


def test_no_rate_and_nothing_held_out_are_refused():
    x, y = task()
    with pytest.raises(ValueError, match="rates is empty"):
        best(())
    with pytest.raises(ValueError, match="held_out is empty"):
        best((0.1, 0.2), held_out=(x[:0], y[:0]))
