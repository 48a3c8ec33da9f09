"""Training: resumed is unbroken, bit for bit; the same seed is the same run."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from saigen.train import EMA, accuracy, constant, cosine, fit, polynomial, predict, steps

N = 96


def problem():
    torch.manual_seed(0)
    x = torch.randn(N, 6)
    y = (x[:, 0] > 0).long()
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
    return net, x, y


def loss(model, x, y):
    return F.cross_entropy(model(x), y)


def jitter(generator, x, y):
    return x + 0.1 * torch.randn(x.shape, generator=generator), y


def train(net, x, y, *, stop_after=None, path=None, ema=None):
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)

    def interrupt(step, total, value):
        if stop_after is not None and step == stop_after:
            raise KeyboardInterrupt

    return fit(
        net, loss, (x, y), optimizer=optimizer, epochs=4, batch_size=16, seed=5, schedule=cosine(3), transform=jitter,
        clip=1.0, checkpoint=path, checkpoint_every=5, ema=ema, on_step=interrupt,
    )  # fmt: skip


@pytest.mark.parametrize("stop_after", [4, 7, 13])
def test_a_resumed_run_is_an_unbroken_run(tmp_path, stop_after):
    net, x, y = problem()
    ema = EMA(net, 0.9)
    history = train(net, x, y, ema=ema)
    again, _, _ = problem()
    again_ema = EMA(again, 0.9)
    with pytest.raises(KeyboardInterrupt):
        train(again, x, y, stop_after=stop_after, path=tmp_path / "c.pt", ema=again_ema)
    resumed, _, _ = problem()
    resumed_ema = EMA(resumed, 0.9)
    resumed_history = train(resumed, x, y, path=tmp_path / "c.pt", ema=resumed_ema)
    assert resumed_history.losses == history.losses
    for a, b in ((net, resumed), (ema.model, resumed_ema.model)):
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_global_generator_is_left_as_it_was():
    net, x, y = problem()
    before = torch.get_rng_state()
    train(net, x, y)
    assert torch.equal(before, torch.get_rng_state())


def test_it_learns():
    net, x, y = problem()
    history = train(net, x, y)
    assert history.losses[-1] < history.losses[0] and not history.diverged
    assert accuracy(net, x, y) > 0.8


def test_predict_restores_the_mode():
    net, x, _ = problem()
    net.train()
    predict(net, x)
    assert net.training


def test_schedules():
    assert cosine(10)(0, 100) == pytest.approx(0.1)
    assert cosine(10)(10, 100) == pytest.approx(1.0)
    assert cosine()(50, 100) == pytest.approx(0.5)
    assert cosine(final=0.1)(100, 100) == pytest.approx(0.1)
    assert constant(4)(1, 9) == pytest.approx(0.5)
    assert polynomial(1.0)(25, 100) == pytest.approx(0.75)
    assert steps((0.5, 0.75))(80, 100) == pytest.approx(0.01)


def test_ema_is_the_formula():
    net, *_ = problem()
    ema = EMA(net, 0.9)
    start = net[0].weight.clone()
    with torch.no_grad():
        net[0].weight.add_(1.0)
    ema.update(net)
    torch.testing.assert_close(ema.model[0].weight, start + 0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": None}, "exactly one"),
        ({"batch_size": 0}, "batch_size"),
        ({"data": ()}, "data"),
        ({"data": (torch.zeros(3, 6), torch.zeros(2))}, "lengths"),
    ],
)
def test_wrong_arguments(change, said):
    net, x, y = problem()
    arguments = {"data": (x, y), "epochs": 1, "batch_size": 8} | change
    data = arguments.pop("data")
    with pytest.raises(ValueError, match=said):
        fit(net, loss, data, optimizer=torch.optim.SGD(net.parameters(), 0.1), seed=0, **arguments)


def test_a_diverged_run_says_so():
    net, x, y = problem()
    history = fit(
        net,
        lambda m, a, b: loss(m, a, b) * math.inf,
        (x, y),
        optimizer=torch.optim.SGD(net.parameters(), 0.1),
        steps=2,
        batch_size=8,
        seed=0,
    )
    assert history.diverged
