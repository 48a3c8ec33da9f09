"""The six rules beside PyTorch's and NumPy, each inclusion as equal paths, the search and its intervals."""

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saigen.papers.training.optimizer_comparison import (
    INCLUSIONS,
    OPTIMIZERS,
    SGD,
    Adam,
    Axis,
    Momentum,
    NAdam,
    Nesterov,
    RMSProp,
    SearchSpace,
    TrialTable,
    embed,
    includes,
    plot_budgets,
    plot_ranking,
    ranking,
    search_space,
    tune,
)
from tests.papers.training.test_sam import make_batch, make_net, weights

PAIRS = [(special, general) for special in OPTIMIZERS for general in OPTIMIZERS if includes(general, special)]


def train(net, optimizer, steps=12, first=0):
    for s in range(first, first + steps):
        x, y = make_batch(s)
        optimizer.zero_grad()
        F.cross_entropy(net(x.double()), y).backward()
        optimizer.step()


# ---- the rules ----


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda p, **o: SGD(p, 0.1, **o), {}),
        (lambda p, **o: Momentum(p, 0.1, 0.8, **o), {"momentum": 0.8}),
        (lambda p, **o: Nesterov(p, 0.1, 0.8, **o), {"momentum": 0.8, "nesterov": True}),
    ],
)
def test_momentum_rules_equal_torch(ours, theirs, weight_decay):
    nets = [make_net().double(), make_net().double()]
    train(nets[0], ours(nets[0].parameters(), weight_decay=weight_decay))
    train(nets[1], torch.optim.SGD(nets[1].parameters(), lr=0.1, weight_decay=weight_decay, **theirs))
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), atol=1e-15, rtol=1e-14)


def _table(name, theta, gradients, a=0.03, gamma=0.7, rho=0.8, b1=0.7, b2=0.8, eps=0.01):
    """The rules of the paper's table, number by number."""
    theta, v, m = theta.copy(), np.full_like(theta, 1.0 if name == "RMSProp" else 0.0), np.zeros_like(theta)
    for t, g in enumerate(gradients, start=1):
        if name == "SGD":
            theta = theta - a * g
        elif name in ("Momentum", "Nesterov"):
            v = gamma * v + g
            theta = theta - a * (v if name == "Momentum" else gamma * v + g)
        elif name == "RMSProp":
            v = rho * v + (1 - rho) * g**2
            m = gamma * m + a / np.sqrt(v + eps) * g
            theta = theta - m
        else:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            b = np.sqrt(1 - b2**t) / (1 - b1**t)
            top = m if name == "Adam" else b1 * m + (1 - b1) * g
            theta = theta - a * top / (np.sqrt(v) + eps) * b
    return theta


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rules_equal_the_table_in_numpy(name):
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(3, 4)), rng.normal(size=(9, 3, 4))
    given = {"momentum": 0.7, "rho": 0.8, "beta1": 0.7, "beta2": 0.8, "eps": 0.01}
    p = nn.Parameter(torch.from_numpy(start.copy()))
    known = OPTIMIZERS[name]([p]).defaults
    optimizer = OPTIMIZERS[name]([p], lr=0.03, **{key: value for key, value in given.items() if key in known})
    for g in gradients:
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), _table(name, start, gradients), rtol=1e-12, atol=1e-13)


def test_adam_equals_torch_with_its_eps():
    """torch adds ε after the bias correction of v: at step t it has to be ε / √(1 - β₂ᵗ)."""
    nets = [make_net().double(), make_net().double()]
    ours, theirs = (
        Adam(nets[0].parameters(), 0.05, 0.8, 0.9, 1e-3),
        torch.optim.Adam(nets[1].parameters(), lr=0.05, betas=(0.8, 0.9)),
    )
    for step in range(12):
        theirs.param_groups[0]["eps"] = 1e-3 / math.sqrt(1 - 0.9 ** (step + 1))
        train(nets[0], ours, 1, step)
        train(nets[1], theirs, 1, step)
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), atol=1e-13, rtol=0)


def test_adam_without_memory_is_sign_descent():
    p = nn.Parameter(torch.zeros(3, dtype=torch.double))
    p.grad = torch.tensor([-2.0, 0.5, 1e-3], dtype=torch.double)
    Adam([p], lr=0.1, beta1=0.0, beta2=0.0, eps=0.0).step()
    torch.testing.assert_close(p.detach(), -0.1 * p.grad.sign())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumes_exactly_and_copies(name):
    make = lambda net: OPTIMIZERS[name](net.parameters(), lr=0.02)  # noqa: E731
    unbroken = make_net().double()
    train(unbroken, make(unbroken))
    net = make_net().double()
    optimizer = make(net)
    train(net, optimizer, 5)
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    train(twin, twin_optimizer, 7, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = make(net)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(net, resumed, 7, 5)
    assert torch.equal(weights(net), weights(unbroken)) and torch.equal(weights(twin), weights(unbroken))


# ---- the inclusions ----


def quadratic():
    """A strongly convex quadratic in 20 dimensions, float64."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(20, 20))
    a = torch.from_numpy(a @ a.T / 20 + 0.1 * np.eye(20))
    start = torch.from_numpy(rng.normal(size=20))
    return a, start


def path(make, steps=200, schedule=None):
    a, start = quadratic()
    w = nn.Parameter(start.clone())
    optimizer = make([w])
    found = []
    for t in range(1, steps + 1):
        w.grad = (a @ w).detach()
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = 0.01 * schedule(t)
        optimizer.step()
        found.append(w.detach().clone())
    return torch.stack(found)


HYPERPARAMETERS = {
    "SGD": {"lr": 0.01, "weight_decay": 0.05},
    "Momentum": {"lr": 0.01, "momentum": 0.9},
    "Nesterov": {"lr": 0.01, "momentum": 0.9},
    "RMSProp": {"lr": 0.01},
    "Adam": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
}


@pytest.mark.parametrize(("special", "general"), PAIRS)
@pytest.mark.parametrize("beta2", [0.0, 0.999])
def test_the_general_optimizer_takes_the_steps_of_the_special_one(special, general, beta2):
    embedding = embed(special, general, HYPERPARAMETERS[special], beta2=beta2)
    theirs = path(lambda params: OPTIMIZERS[special](params, **HYPERPARAMETERS[special]))
    torch.testing.assert_close(path(embedding.optimizer), theirs, atol=1e-15 if embedding.exact else 1e-7, rtol=0)
    assert embedding.exact == (general not in ("Adam", "NAdam") or special == general)
    assert (theirs[-1] - theirs[0]).abs().max() > 0.1


@pytest.mark.parametrize(("special", "general"), INCLUSIONS)
def test_inclusions_hold_under_a_schedule(special, general):
    schedule = lambda t: min(1.0, t / 20) * (1 - (t - 1) / 250)  # noqa: E731
    given = HYPERPARAMETERS[special]
    theirs = path(lambda params: OPTIMIZERS[special](params, **given), schedule=schedule)
    embedding = embed(special, general, given, schedule=schedule)
    torch.testing.assert_close(path(embedding.optimizer), theirs, atol=1e-14 if embedding.exact else 1e-7, rtol=0)


@pytest.mark.parametrize(("special", "general"), [("Momentum", "Adam"), ("Nesterov", "NAdam")])
def test_the_difference_falls_as_one_over_eps(special, general):
    theirs = path(lambda params: OPTIMIZERS[special](params, **HYPERPARAMETERS[special]))
    gaps = [
        (path(embed(special, general, HYPERPARAMETERS[special], eps=eps).optimizer) - theirs).abs().max().item()
        for eps in (1e2, 1e4, 1e6)
    ]
    assert gaps[0] > 1e-6
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.1) and gaps[1] / gaps[2] == pytest.approx(100, rel=0.1)


def test_what_includes_what():
    assert len(PAIRS) == 6 + 5 + 3  # themselves, directly, SGD along the chains
    assert includes("NAdam", "SGD") and includes("RMSProp", "SGD")
    assert not includes("SGD", "Momentum") and not includes("Adam", "RMSProp") and not includes("RMSProp", "Adam")
    assert not includes("Adam", "Nesterov")


# ---- the search ----


def test_samples_fill_the_space_and_a_longer_one_begins_with_the_shorter():
    space = SearchSpace({"lr": Axis(1e-4, 1.0), "share": Axis(0.0, 2.0, log=False)})
    points = space.sample(64, seed=1)
    assert points[:10] == space.sample(10, seed=1) and points[:3] != space.sample(3, seed=2)
    decades = np.histogram([math.log10(point["lr"]) for point in points], bins=4, range=(-4, 0))[0]
    halves = np.histogram([point["share"] for point in points], bins=2, range=(0, 2))[0]
    assert decades.min() >= 14 and halves.min() >= 30  # quasi-random: far more even than chance


def test_meaning_of_the_axes():
    space = SearchSpace({"lr_over_eps": Axis(1.0, 2.0)}, fixed={"eps": 0.5})
    assert space.hyperparameters({"lr_over_eps": 4.0, "one_minus_beta1": 0.25}) == {
        "eps": 0.5,
        "beta1": 0.75,
        "lr": 2.0,
    }
    root = SearchSpace({"lr_over_root_eps": Axis(1.0, 2.0), "eps": Axis(0.1, 1.0)})
    assert root.hyperparameters({"lr_over_root_eps": 4.0, "eps": 0.25}) == {"eps": 0.25, "lr": 2.0}


def test_space_around_the_best():
    space = SearchSpace({"lr": Axis(1e-4, 1.0), "eps": Axis(1e-8, 1.0)}, fixed={"beta1": 0.5})
    found = space.around([{"lr": 0.1, "eps": 0.5}, {"lr": 0.01, "eps": 0.5}])
    assert found.axes == {"lr": Axis(0.01, 0.1), "eps": Axis(1e-8, 1.0)} and found.fixed == space.fixed


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tuned", ["all", "lr"])
def test_every_point_of_the_spaces_is_allowed(name, tuned):
    space = search_space(name, tuned)
    assert len(space.axes) == (1 if tuned == "lr" or name == "SGD" else 2 if name in ("Momentum", "Nesterov") else 4)
    for point in space.sample(50, seed=0):
        OPTIMIZERS[name]([nn.Parameter(torch.ones(1))], **space.hyperparameters(point))


def test_the_space_of_adam_holds_momentum():
    """Its points come as near to Momentum at a good rate as its ε allows, so tuning can find the special case."""
    space = search_space("Adam")
    assert space.axes["eps"].high >= 100 and space.axes["lr_over_eps"].low <= 0.01
    given = embed("Momentum", "Adam", {"lr": 0.1, "momentum": 0.9}, eps=space.axes["eps"].high).at(1000)
    assert space.axes["lr_over_eps"].low < given["lr"] / given["eps"] < space.axes["lr_over_eps"].high


def bowl(make, *, offset=0.0):
    w = nn.Parameter(torch.ones(2, dtype=torch.double))
    optimizer = make([w])
    for _ in range(20):
        w.grad = (2 * w * torch.tensor([1.0, 9.0], dtype=torch.double)).detach()
        optimizer.step()
    return float((w.detach() ** 2).sum()) + offset


def test_two_stages_and_replaced_trials():
    calls = []

    def task(make):
        score = bowl(make)
        calls.append(score)
        return score if score < 1e3 else math.nan

    table = tune(task, "SGD", search_space("SGD"), trials=20, seed=0)
    assert len(table.scores) == 20 and table.diverged == len(calls) - 20 > 0
    assert table.best()["lr"] == pytest.approx(0.1, rel=0.35)  # 2 / (2 + 18) is best
    late = [point["lr"] for point in table.points[10:]]
    early = [point["lr"] for point in table.points[:10]]
    assert max(late) / min(late) < max(early) / min(early)
    again = tune(task, "SGD", search_space("SGD"), trials=20, seed=0)
    assert again == table != tune(task, "SGD", search_space("SGD"), trials=20, seed=1)


def test_a_space_where_everything_diverges_ends():
    table = tune(lambda make: math.nan, "Adam", search_space("Adam"), trials=4, seed=0)
    assert table.scores == (math.inf,) * 4 and table.diverged == 8 and table.best() == {}
    assert table.best_of(4).mean == math.inf and table.trials_to_target(1.0) == math.inf


def test_names_the_optimizer_does_not_take_go_to_the_task():
    space = SearchSpace({"lr": Axis(1e-3, 0.1), "offset": Axis(1.0, 2.0, log=False)})
    for optimizer in ("Momentum", torch.optim.Adam):
        table = tune(bowl, optimizer, space, trials=5, seed=0)
        assert all(score >= point["offset"] for score, point in zip(table.scores, table.points, strict=True))


def test_best_of_equals_the_bootstrap():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=30)
    table = TrialTable(tuple({} for _ in scores), tuple(scores), 0)
    for k in (1, 5, 30):
        drawn = np.sort(rng.choice(scores, size=(200_000, k)).min(axis=1))
        found = table.best_of(k)
        assert found.mean == pytest.approx(drawn.mean(), abs=0.01)
        assert found.low == drawn[10_000] and found.high == pytest.approx(drawn[190_000], abs=1e-12)
    assert table.best_of(1).mean == pytest.approx(scores.mean())
    half = TrialTable(({}, {}), (0.0, 1.0), 0)
    assert half.best_of(3).mean == 1 / 8


def test_trials_to_target():
    table = TrialTable(({},) * 10, tuple(float(i) for i in range(10)), 0)
    assert table.trials_to_target(0.0) == 7  # 1 - 0.9^7 = 0.52
    assert table.trials_to_target(4.0) == 1 and table.trials_to_target(9.0) == 1
    assert table.trials_to_target(-1.0) == math.inf
    assert table.trials_to_target(0.0, 0.95) == 29


def test_ranking_and_its_plots():
    tables = {
        "worse": TrialTable(({},) * 3, (0.2, 0.5, 0.9), 0),
        "better": TrialTable(({},) * 3, (0.1, 0.4, 0.8), 1),
    }
    ranks = ranking(tables)
    assert [rank.optimizer for rank in ranks] == ["better", "worse"]
    assert ranking(tables, k=1)[0].best == tables["better"].best_of(1)
    from matplotlib.figure import Figure

    axes = Figure().subplots(2)
    plot_ranking(ranks, axes[0])
    plot_budgets(tables, axes[1])
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["better", "worse"]
    dots = [line for line in axes[0].lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [rank.best.mean for rank in ranks]
    assert len(axes[1].lines) == 2
    with pytest.raises(ValueError, match="allowed are equal budgets"):
        ranking(tables | {"short": TrialTable(({},), (0.3,), 0)})


# ---- wrong arguments ----


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda p: SGD(p, lr=-1.0), "lr is -1.0"),
        (lambda p: Momentum(p, momentum=1.0), "momentum is 1.0"),
        (lambda p: Nesterov(p, weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda p: RMSProp(p, rho=1.1), "rho is 1.1"),
        (lambda p: Adam(p, beta1=-0.1), "beta1 is -0.1"),
        (lambda p: NAdam(p, beta2=1.0), "beta2 is 1.0"),
        (lambda p: Adam([{"params": p, "eps": float("nan")}]), "eps is nan"),
        (lambda p: embed("Adam", "SGD", {}), "general is 'SGD'"),
        (lambda p: embed("Adam", "AdaGrad", {}), "general is 'AdaGrad'"),
        (lambda p: embed("SGD", "Momentum", {"eps": 1.0}), "hyperparameters are ['eps']"),
        (lambda p: embed("SGD", "Adam", {}, eps=-1.0), "eps is -1.0"),
        (lambda p: Axis(2.0, 1.0), "low is 2.0"),
        (lambda p: search_space("Lion"), "optimizer is 'Lion'"),
        (lambda p: tune(bowl, "SGD", search_space("SGD"), trials=4, seed=0, keep=0.0), "keep is 0.0"),
        (lambda p: tune(bowl, "SGD", search_space("SGD"), trials=4, seed=0, stages=5), "stages is 5"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError, match="allowed") as raised:
        call([nn.Parameter(torch.ones(2))])
    assert text in str(raised.value)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        SGD(table.parameters()).step()


def test_rmsprop_equals_the_one_efficientnet_is_trained_with():
    from saigen.papers.vision.efficientnet import RMSpropTF

    nets = [make_net().double(), make_net().double()]
    train(nets[0], RMSProp(nets[0].parameters(), 0.01, 0.8, 0.9, 1e-3, weight_decay=0.1))
    train(nets[1], RMSpropTF(nets[1].parameters(), 0.01, 0.9, 1e-3, 0.1, 0.8))
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), atol=1e-14, rtol=0)
