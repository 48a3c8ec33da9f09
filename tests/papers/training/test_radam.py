"""RAdam: the optimizer beside PyTorch's and the official ones, the variance beside integration and simulation."""

import copy
import io
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import nn

from saigen.papers.training.radam import (
    DelayedAdam,
    RAdam,
    adaptive_rate_variance,
    adaptive_rate_variances,
    linear_warmup_length,
    longest_sma,
    rectification,
    rectified_warmup,
    simulate_adaptive_rate,
    sma_length,
    warmup_variance,
)
from tests.papers.training.test_sam import make_batch, make_net, weights

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "radam" / "steps.npz")
OFFICIAL = {"lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}


def train(net, optimizer, steps=12, first=0, double=True):
    for s in range(first, first + steps):
        x, y = make_batch(s)
        optimizer.zero_grad()
        F.cross_entropy(net(x.double() if double else x), y).backward()
        optimizer.step()


# ---- the steps ----


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}])
@pytest.mark.parametrize("beta2", [0.5, 0.9, 0.999])
def test_steps_equal_torch(foreach, decoupled, options, beta2):
    options = {"lr": 0.05, "betas": (0.8, beta2), "eps": 1e-6, "decoupled_weight_decay": decoupled, **options}
    nets = [make_net().double(), make_net().double()]
    ours = RAdam(nets[0].parameters(), foreach=foreach, **options)
    theirs = torch.optim.RAdam(nets[1].parameters(), **options)
    for step in range(12):
        train(nets[0], ours, 1, step)
        train(nets[1], theirs, 1, step)
        torch.testing.assert_close(weights(nets[0]), weights(nets[1]), atol=1e-13, rtol=1e-13)


def test_complex_parameters_equal_torch():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 2, dtype=torch.complex128, generator=generator)
    params = [nn.Parameter(start.clone()) for _ in range(3)]
    optimizers = [
        RAdam([params[0]], lr=0.1, foreach=True),
        RAdam([params[1]], lr=0.1, foreach=False),
        torch.optim.RAdam([params[2]], lr=0.1),
    ]
    for _ in range(9):
        g = torch.randn(3, 2, dtype=torch.complex128, generator=generator)
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = g.clone()
            optimizer.step()
    torch.testing.assert_close(params[0].detach(), params[2].detach(), atol=1e-13, rtol=0)
    assert torch.equal(params[0], params[1])


@pytest.mark.parametrize(("arm", "fallback"), [("skip", "skip"), ("momentum", "momentum")])
@pytest.mark.parametrize("foreach", [False, True])
def test_equals_the_official_steps(arm, fallback, foreach):
    _follow(arm, lambda p: RAdam([p], **OFFICIAL, fallback=fallback, foreach=foreach))
    path = GOLDEN[arm]
    assert np.array_equal(path[4], GOLDEN["start"]) == (arm == "skip")  # five steps without an adaptive one
    assert not np.array_equal(path[5], path[4])


@pytest.mark.parametrize(("arm", "freeze"), [("adamw", 0), ("delayed", 4)])
def test_delayed_adam_equals_the_official_steps(arm, freeze):
    _follow(arm, lambda p: DelayedAdam([p], **OFFICIAL, freeze_steps=freeze))


def _follow(arm, make):
    p = nn.Parameter(torch.from_numpy(GOLDEN["start"].copy()))
    optimizer = make(p)
    for g, expected in zip(GOLDEN["gradients"], GOLDEN[arm], strict=True):
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=2e-6, atol=2e-6)


def _walk(optimizer, p, gradients):
    path = [p.detach().clone()]
    for g in gradients:
        p.grad = torch.full_like(p, g)
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path).diff(dim=0)[:, 0]


def test_each_momentum_step_of_a_constant_gradient_is_the_gradient():
    p = nn.Parameter(torch.zeros(1, dtype=torch.double))
    steps = _walk(RAdam([p], lr=0.1), p, [3.0] * 6)
    torch.testing.assert_close(steps[:5], torch.full((5,), -0.3, dtype=torch.double))
    assert steps[5].item() == pytest.approx(-0.1 * rectification(6, 0.999), rel=1e-6)  # adaptive: the size of g is gone


def test_threshold_of_the_text_begins_one_step_earlier():
    for threshold, first in ((4.0, 5), (5.0, 6)):
        p = nn.Parameter(torch.zeros(1, dtype=torch.double))
        steps = _walk(RAdam([p], lr=0.1, threshold=threshold, fallback="skip"), p, [3.0] * 7)
        assert (steps[: first - 1] == 0).all() and (steps[first - 1 :] < 0).all()


def test_beta2_of_a_half_is_momentum_for_ever():
    p, q = (nn.Parameter(torch.zeros(1, dtype=torch.double)) for _ in range(2))
    gradients = np.random.default_rng(0).normal(size=40).tolist()
    plain = _walk(torch.optim.SGD([q], lr=0.1, momentum=0.9, dampening=0.0), q, gradients)
    scale = torch.tensor([0.1 / (1 - 0.9**t) for t in range(1, 41)], dtype=torch.double)
    torch.testing.assert_close(_walk(RAdam([p], lr=0.1, betas=(0.9, 0.5)), p, gradients), plain * scale)


def test_late_steps_are_adamw():
    params = [nn.Parameter(torch.ones(4, dtype=torch.double)) for _ in range(2)]
    ours = RAdam([params[0]], lr=1e-2, betas=(0.9, 0.9), eps=0.0, weight_decay=0.1)
    theirs = torch.optim.AdamW([params[1]], lr=1e-2, betas=(0.9, 0.9), eps=0.0, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        g = torch.randn(4, dtype=torch.double, generator=generator)
        before = [p.detach().clone() for p in params]
        for p, optimizer in zip(params, (ours, theirs), strict=True):
            p.grad = g.clone()
            optimizer.step()
        if step == 399:
            moved = [p.detach() - b * (1 - 1e-3) for p, b in zip(params, before, strict=True)]
            torch.testing.assert_close(moved[0], moved[1], rtol=1e-9, atol=0)


def test_rectification_is_a_warmup_of_adam():
    params = [nn.Parameter(torch.ones(4, dtype=torch.double)) for _ in range(2)]
    ours = RAdam([params[0]], lr=1e-2, eps=0.0, weight_decay=0.0, fallback="skip")
    adam = torch.optim.AdamW([params[1]], lr=1e-2, eps=0.0, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda epoch: rectified_warmup(epoch + 1, 0.999))
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        g = torch.randn(4, dtype=torch.double, generator=generator)
        for p, optimizer in zip(params, (ours, adam), strict=True):
            p.grad = g.clone()
            optimizer.step()
        schedule.step()
        torch.testing.assert_close(params[0], params[1], rtol=1e-12, atol=0)


def test_parameters_count_their_own_steps():
    early, late = (nn.Parameter(torch.zeros(1, dtype=torch.double)) for _ in range(2))
    optimizer = RAdam([early, late], lr=0.1, fallback="skip")
    for step in range(8):
        early.grad = torch.ones_like(early)
        late.grad = torch.ones_like(late) if step >= 4 else None
        optimizer.step()
    assert early.item() < 0 and late.item() == 0
    assert optimizer.state[early]["step"] == 8 and optimizer.state[late]["step"] == 4


def test_groups_have_their_own_values():
    nets = [make_net().double(), make_net().double()]
    groups = lambda net: [  # noqa: E731
        {"params": net[0].parameters(), "lr": 0.2, "betas": (0.5, 0.9)},
        {"params": net[3].parameters(), "weight_decay": 0.3},
    ]
    train(nets[0], RAdam(groups(nets[0]), lr=0.01))
    train(nets[1], torch.optim.RAdam(groups(nets[1]), lr=0.01, decoupled_weight_decay=True))
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), atol=1e-13, rtol=0)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "fallback": "skip"}])
def test_capturable_equals_plain(options):
    nets = [make_net().double(), make_net().double()]
    plain = RAdam(nets[0].parameters(), lr=0.05, **options)
    capturable = RAdam(nets[1].parameters(), lr=torch.tensor(0.05, dtype=torch.double), capturable=True, **options)
    train(nets[0], plain)
    train(nets[1], capturable)
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), atol=1e-12, rtol=0)
    assert isinstance(capturable.state[nets[1][0].weight]["step"], torch.Tensor)


def test_closure_is_called_once_with_gradients_and_its_loss_returned():
    net, calls = make_net(), []
    optimizer = RAdam(net.parameters(), lr=0.1)
    x, y = make_batch()

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0 and calls == [True]


def test_delayed_adam_only_estimates_at_first():
    net, twin = make_net().double(), make_net().double()
    start = weights(net)
    optimizer = DelayedAdam(net.parameters(), lr=0.01, freeze_steps=3)
    train(net, optimizer, 3)
    assert torch.equal(weights(net), start)
    state = optimizer.state[net[0].weight]
    assert state["step"] == 3 and (state["exp_avg"] == 0).all() and (state["exp_avg_sq"] > 0).all()
    train(net, optimizer, 1, 3)
    assert not torch.equal(weights(net), start)
    # without frozen steps and ε it is PyTorch's AdamW
    train(twin, DelayedAdam(twin.parameters(), lr=0.01, eps=0.0, weight_decay=0.1, freeze_steps=0))
    reference = make_net().double()
    train(reference, torch.optim.AdamW(reference.parameters(), lr=0.01, eps=0.0, weight_decay=0.1))
    torch.testing.assert_close(weights(twin), weights(reference), atol=1e-12, rtol=0)


# ---- states ----


@pytest.mark.parametrize("capturable", [False, True])
def test_state_dict_goes_to_a_file_and_back(capturable):
    def make(net):
        return RAdam(net.parameters(), lr=0.1, capturable=capturable)

    unbroken = make_net().double()
    train(unbroken, make(unbroken))
    net = make_net().double()
    optimizer = make(net)
    train(net, optimizer, 7)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = make(net)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(net, resumed, 5, 7)
    assert torch.equal(weights(net), weights(unbroken))


@pytest.mark.parametrize("ours_first", [True, False])
def test_states_are_exchanged_with_torch(ours_first):
    options = {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True}
    kinds = (RAdam, torch.optim.RAdam) if ours_first else (torch.optim.RAdam, RAdam)
    net, reference = make_net().double(), make_net().double()
    first = kinds[0](net.parameters(), **options)
    train(net, first, 7)
    second = kinds[1](net.parameters(), **options)
    second.load_state_dict(first.state_dict())
    train(net, second, 5, 7)
    train(reference, torch.optim.RAdam(reference.parameters(), **options))
    torch.testing.assert_close(weights(net), weights(reference), atol=1e-13, rtol=0)


@pytest.mark.parametrize("make", [RAdam, lambda p: DelayedAdam(p, freeze_steps=2)])
def test_deepcopy(make):
    net = make_net().double()
    optimizer = make(net.parameters())
    train(net, optimizer, 3)
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    train(net, optimizer, 4, 3)
    train(twin, twin_optimizer, 4, 3)
    assert torch.equal(weights(net), weights(twin))


# ---- wrong arguments ----


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -0.1}, "lr is -0.1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"betas": (1.0, 0.9)}, "betas is (1.0, 0.9)"),
        ({"betas": (0.9,)}, "betas is (0.9,)"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"threshold": 3.9}, "threshold is 3.9"),
        ({"fallback": "sgd"}, "fallback is 'sgd'"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises(ValueError, match="allowed") as raised:
        RAdam(make_net().parameters(), **options)
    assert text in str(raised.value)
    with pytest.raises(ValueError, match="allowed"):
        RAdam([{"params": make_net().parameters(), **options}])


def test_sparse_gradients_are_refused_before_anything_moves():
    table, layer = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1)
    optimizer = RAdam([*layer.parameters(), *table.parameters()], lr=0.1)
    before = layer.weight.detach().clone()
    layer(table(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert torch.equal(layer.weight, before) and not optimizer.state


# ---- the variance ----


@pytest.mark.parametrize(
    ("beta2", "step", "rho", "r"),
    [
        (0.999, 1, 1.0, 0.0),
        (0.999, 4, 3.997499, 0.0),
        (0.999, 5, 4.995998, 0.017312),
        (0.999, 7, 6.991996, 0.032739),
        (0.999, 100, None, 0.215335),
        (0.999, 10_000, None, 0.999773),
        (0.99, 6, None, 0.081679),
        (0.9, 6, 5.389565, 0.255177),
        (0.9999, 1000, None, 0.221098),
    ],
)
def test_numbers_of_the_paper(beta2, step, rho, r):
    if rho is not None:
        assert sma_length(step, beta2) == pytest.approx(rho, abs=5e-7)
    assert rectification(step, beta2) == pytest.approx(r, abs=5e-7)


@pytest.mark.parametrize("rho", [2.5, 3.0, 5.0, 10.0, 50.0, 500.0])
def test_exact_variance_equals_numerical_integration(rho):
    """ψ² = 1 / (χ²/ρ): both moments of √(ρ/χ²), integrated."""
    moments = [
        integrate.quad(
            lambda u, k=k: (rho / math.exp(u)) ** (k / 2) * stats.chi2.pdf(math.exp(u), rho) * math.exp(u),
            -60,
            12,
            limit=500,
            points=[math.log(rho)],
        )[0]
        for k in (1, 2)
    ]
    assert adaptive_rate_variance(rho) == pytest.approx(moments[1] - moments[0] ** 2, rel=1e-5)


def test_variance_approaches_its_approximation_and_falls():
    exact = [adaptive_rate_variance(rho) for rho in (5.0, 6.0, 20.0, 100.0, 1999.0, 1e5)]
    first = [adaptive_rate_variance(rho, 1.0, "first") for rho in (5.0, 6.0, 20.0, 100.0, 1999.0, 1e5)]
    assert all(a > b for a, b in pairwise(exact))
    ratios = [a / b for a, b in zip(first, exact, strict=True)]
    assert all(a > b for a, b in pairwise(ratios)) and ratios[-1] == pytest.approx(1, abs=1e-3)
    assert exact[0] / adaptive_rate_variance(500.0) == pytest.approx(250, abs=0.5)
    assert adaptive_rate_variance(7.0, 3.0) == pytest.approx(adaptive_rate_variance(7.0) / 9)
    assert adaptive_rate_variance(2.0) == adaptive_rate_variance(4.0, 1.0, "first") == math.inf


def test_rectified_first_order_variance_is_constant():
    for beta2 in (0.9, 0.999):
        variances = adaptive_rate_variances(3000, beta2, rectified=True, order="first")
        adaptive = variances[5:]
        final = adaptive_rate_variance(longest_sma(beta2), 1.0, "first")
        torch.testing.assert_close(adaptive, torch.full_like(adaptive, final), rtol=1e-9, atol=0)
        assert (variances[:4] == 0).all()


def test_simulation_agrees_with_the_formula():
    psi = simulate_adaptive_rate(300, 0.999, trajectories=20_000, generator=torch.Generator().manual_seed(0))
    exact = adaptive_rate_variances(300, 0.999)
    for t in (10, 100, 300):
        assert psi[:, t - 1].var().item() == pytest.approx(exact[t - 1].item(), rel=0.1)
    # at the first step v has seen one gradient: ψ = 1 / |g|, whatever β₂
    g = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(psi[:, 0], 1 / g.abs())


def test_warmup_reduces_the_variance():
    assert warmup_variance(10, 0.999, 100) == pytest.approx(0.01 * warmup_variance(10, 0.999, 0))
    assert warmup_variance(100, 0.999, 100) == warmup_variance(100, 0.999, 0)
    assert [linear_warmup_length(beta2) for beta2 in (0.9, 0.99, 0.999)] == [20, 200, 2000]
    # the exchange: at the end of that warm-up the factor of RAdam is nearly there as well
    assert 0.8 < rectified_warmup(2000, 0.999) < 0.9
    assert rectified_warmup(5, 0.999) == 0 < rectified_warmup(5, 0.999, threshold=4.0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: sma_length(0, 0.9), "step is 0"),
        (lambda: sma_length(1, 1.0), "beta2 is 1.0"),
        (lambda: longest_sma(1.5), "beta2 is 1.5"),
        (lambda: rectified_warmup(0, 0.9), "step is 0"),
        (lambda: adaptive_rate_variance(0.0), "rho is 0.0"),
        (lambda: adaptive_rate_variance(5.0, -1.0), "sigma is -1.0"),
        (lambda: adaptive_rate_variance(5.0, 1.0, "third"), "order is 'third'"),
        (lambda: warmup_variance(5, 0.9, -1), "warmup is -1"),
        (lambda: simulate_adaptive_rate(5, 0.9, trajectories=0, generator=torch.Generator()), "trajectories is 0"),
    ],
)
def test_wrong_arguments_of_the_formulas(call, text):
    with pytest.raises(ValueError, match="allowed") as raised:
        call()
    assert text in str(raised.value)
