"""The soft nearest neighbor loss: golden values, closed forms, gradients, the temperature, the tools."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from saigen.papers.losses.soft_nearest_neighbor import (
    DeepNeighbors,
    EntanglementRegularizer,
    LayerTap,
    SoftNearestNeighborLoss,
    entangled_cnn,
    hidden_features,
    hidden_neighbor_credibility,
    inverse_temperature_step,
    layer_entanglement,
    optimal_temperature,
    pairwise_distance,
    real_fake_entanglement,
    soft_nearest_neighbor_loss,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "soft_nearest_neighbor"
X = torch.tensor([[0, 0], [1, 0], [0, 2], [3, 3]], dtype=torch.float64)
Y = torch.tensor([0, 0, 1, 1])


def batch(n=12, d=4, classes=3, seed=0):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(n) % classes


def brute_force(x, y, temperature, metric="euclidean", eps=0.0):
    """The formula as it stands, number by number."""
    x, y, losses = np.asarray(x, np.float64), np.asarray(y), []
    for i in range(len(x)):

        def fit(j, i=i):
            if metric == "cosine":
                return math.exp(-(1 - x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])) / temperature)
            return math.exp(-sum((x[i] - x[j]) ** 2) / temperature)

        same = sum(fit(j) for j in range(len(x)) if j != i and y[j] == y[i])
        every = sum(fit(j) for j in range(len(x)) if j != i)
        if eps:
            losses.append(-math.log(eps + same / (eps + every)))
        elif same:
            losses.append(-math.log(same / every))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("temperature", "exact", "official"),
    [(0.5, 3.033055, 4.883059), (1, 1.607681, 1.654010), (10, 0.903624, 0.903605), (100, 1.069818, 1.069792)],
)
def test_golden_values(temperature, exact, official):
    assert soft_nearest_neighbor_loss(X, Y, temperature).item() == pytest.approx(exact, abs=5e-7)
    assert soft_nearest_neighbor_loss(X, Y, temperature, eps=1e-5).item() == pytest.approx(official, abs=5e-7)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equals_brute_force(metric, eps):
    for seed in range(5):
        x, y = batch(seed=seed)
        y[0] = 7  # a label of its own
        for temperature in (0.3, 1.0, 20.0):
            ours = soft_nearest_neighbor_loss(x, y, temperature, metric=metric, eps=eps).item()
            assert ours == pytest.approx(brute_force(x, y, temperature, metric, eps), rel=1e-10)


def test_equals_nca_of_pytorch_metric_learning():
    """Its numbers, frozen; tests/golden/soft_nearest_neighbor/make_nca.py made them."""
    x = torch.sin(torch.arange(60, dtype=torch.float64).square()).view(12, 5) * 2
    golden = json.loads((GOLDEN / "nca.json").read_text(encoding="utf-8"))
    for temperature, value in golden.items():
        ours = soft_nearest_neighbor_loss(x, torch.arange(12) % 3, float(temperature)).item()
        assert ours == pytest.approx(value, rel=1e-9)


def test_closed_forms():
    assert soft_nearest_neighbor_loss(X, Y, 1e9).item() == pytest.approx(math.log(3), abs=1e-6)
    x, y = batch(12, classes=3)
    assert soft_nearest_neighbor_loss(x, y, 1e9).item() == pytest.approx(math.log(11 / 3), abs=1e-6)
    assert soft_nearest_neighbor_loss(x, torch.zeros_like(y), 1.0).item() == 0
    apart = torch.cat([torch.randn(5, 2), torch.randn(5, 2) + 100])
    label = torch.arange(10) // 5
    assert soft_nearest_neighbor_loss(apart, label, 1e-3).item() == pytest.approx(0, abs=1e-6)


def test_invariances():
    x, y = batch()
    value = soft_nearest_neighbor_loss(x, y, 2.0)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    order = torch.randperm(12)
    assert torch.allclose(soft_nearest_neighbor_loss(x @ rotation + 5, y, 2.0), value)
    assert torch.allclose(soft_nearest_neighbor_loss(3 * x, y, 18.0), value)
    assert torch.allclose(soft_nearest_neighbor_loss(x[order], y[order], 2.0), value)
    assert torch.allclose(soft_nearest_neighbor_loss(x.view(12, 2, 2), y, 2.0), value)


def test_far_and_near_points_stay_finite():
    """exp(-d / T) is 0 in float32 for all of these; the logarithm of their sums is not."""
    x, y = batch()
    far = (1e3 * x).float().requires_grad_()
    loss = soft_nearest_neighbor_loss(far, y, 0.01)
    loss.backward()
    assert loss.isfinite() and far.grad.isfinite().all() and loss > 0
    shifted = soft_nearest_neighbor_loss((x + 1e3).float(), y, 1.0)
    assert shifted.item() == pytest.approx(soft_nearest_neighbor_loss(x, y, 1.0).item(), rel=1e-3)
    twins = torch.zeros(6, 3, requires_grad=True)
    soft_nearest_neighbor_loss(twins, torch.arange(6) % 2).backward()
    assert twins.grad.isfinite().all()


def test_bfloat16_and_autocast():
    x, y = batch(64, 32)
    full = soft_nearest_neighbor_loss(x.float(), y, 20.0)
    assert soft_nearest_neighbor_loss(x.bfloat16(), y, 20.0).item() == pytest.approx(full.item(), rel=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(soft_nearest_neighbor_loss(x.float(), y, 20.0), full)


def test_samples_without_a_positive():
    x, y = batch(7, classes=3)
    y = torch.tensor([0, 0, 1, 1, 2, 0, 1])
    each = soft_nearest_neighbor_loss(x, y, 1.0, reduction="none")
    assert each[4] == 0 and (each[[0, 1, 2, 3, 5, 6]] > 0).all()
    assert torch.allclose(soft_nearest_neighbor_loss(x, y, 1.0), each.sum() / 6)
    official = soft_nearest_neighbor_loss(x, y, 1.0, eps=1e-5, reduction="none")
    assert official[4].item() == pytest.approx(-math.log(1e-5)) == pytest.approx(11.513, abs=5e-4)
    for labels, rows in (
        (torch.arange(7), x),
        (torch.zeros(1, dtype=torch.long), x[:1]),
        (torch.zeros(0, dtype=torch.long), x[:0]),
    ):
        rows = rows.clone().requires_grad_()
        loss = soft_nearest_neighbor_loss(rows, labels, 1.0)
        loss.backward()
        assert loss == 0 and (rows.grad == 0).all()


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_gradients(metric, eps):
    x, y = batch(8)
    y[0] = 5
    temperature = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, t: soft_nearest_neighbor_loss(a, y, t, metric=metric, eps=eps), (x.requires_grad_(), temperature)
    )


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_temperature_step_is_the_official_one(eps):
    x, y = batch()
    inverse = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    soft_nearest_neighbor_loss(x, y, 10.0 / inverse, eps=eps).backward()
    expected = inverse.detach() - 0.1 * inverse.grad
    stepped = inverse_temperature_step(x.requires_grad_(), y, inverse, initial=10.0, eps=eps)
    assert torch.allclose(stepped, expected, rtol=1e-10) and not stepped.requires_grad
    far = torch.tensor([[0.0], [100.0], [1.0], [101.0]])
    assert inverse_temperature_step(
        far, torch.tensor([0, 0, 1, 1]), torch.tensor(1.0), initial=1.0
    ).item() == pytest.approx(1e-4)


def test_least_over_temperature():
    for seed in range(4):
        x, y = batch(seed=seed)
        x = x * 10.0 ** (seed - 2)
        least, temperature = optimal_temperature(x, y)
        assert torch.allclose(soft_nearest_neighbor_loss(x, y, temperature), least)
        scale = pairwise_distance(x).median()
        assert all(
            least <= soft_nearest_neighbor_loss(x, y, scale * 10**power) + 1e-12
            for power in np.linspace(-3.9, 3.9, 400)
        )
        assert torch.allclose(optimal_temperature(7 * x, y)[0], least, atol=1e-9)
    least, temperature = optimal_temperature(X, Y)
    slope = inverse_temperature_step(X, Y, torch.ones(()), initial=temperature.item(), lr=1.0) - 1
    assert abs(slope.item()) < 1e-5


@pytest.mark.parametrize("optimize", ["none", "step", "exact"])
def test_module(optimize):
    x, y = batch()
    module = SoftNearestNeighborLoss(5.0, optimize=optimize)
    values = [module(x.requires_grad_(), y).item() for _ in range(60)]
    assert (module.inverse.item() != 1) == (optimize == "step")
    if optimize == "step":
        assert values[-1] < values[0] and values[-1] >= optimal_temperature(x, y)[0].item() - 1e-9
        before = module.eval().inverse.clone()
        module(x, y)
        assert torch.equal(module.inverse, before)
    elif optimize == "exact":
        assert values[0] == pytest.approx(optimal_temperature(x, y)[0].item())
        # The envelope theorem: the gradient of the least loss is the gradient at the best temperature.
        assert torch.autograd.gradcheck(lambda a: module(a, y), (x,), eps=1e-5, atol=1e-5)
    else:
        assert values[0] == pytest.approx(soft_nearest_neighbor_loss(x, y, 5.0).item())


def test_regularizer_is_the_sum_over_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = batch()
    x = x.float()
    regularizer = EntanglementRegularizer(model, ["1", "3"], factor=-0.5, temperature=3.0, optimize="none")
    logits = model(x)
    term = regularizer(y)
    first, second = model[:2](x), model[:4](x)
    expected = -0.5 * (soft_nearest_neighbor_loss(first, y, 3.0) + soft_nearest_neighbor_loss(second, y, 3.0))
    assert torch.allclose(term, expected)
    (F.cross_entropy(logits, y) + term).backward()
    assert model[0].weight.grad.abs().sum() > 0
    regularizer.tap.features.clear()  # the slices above ran the same layers
    with pytest.raises(ValueError, match="run the model forward"):
        regularizer(y)
    regularizer.close()
    assert not model[1]._forward_hooks
    assert not list(regularizer.parameters()) and len(regularizer.state_dict()) == 2


def test_entangling_raises_the_loss_and_separating_lowers_it():
    x, y = batch(60, 6, seed=2)
    ends = {}
    for factor in (-1.0, 0.0, 1.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        regularizer = EntanglementRegularizer(model, ["1"], factor, optimize="exact")
        optimizer = torch.optim.Adam(model.parameters(), 0.03)
        for _ in range(15):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + regularizer(y)).backward()
            optimizer.step()
        regularizer.close()
        ends[factor] = layer_entanglement(model, ["1"], [(x, y)])[0].loss
    assert ends[1.0] < ends[0.0] < ends[-1.0]


def test_layer_analysis():
    model, (x, y) = nn.Sequential(nn.Identity(), nn.Flatten()), batch(20)
    rows = layer_entanglement(model, ["0", "1"], [(x[:10], y[:10]), (x[10:], y[10:])])
    least = [optimal_temperature(x[part], y[part])[0].item() for part in (slice(10), slice(10, 20))]
    assert [row.layer for row in rows] == ["0", "1"] and rows[0].loss == pytest.approx(sum(least) / 2)
    assert rows[0].loss <= rows[0].loss_at_median
    with pytest.raises(ValueError, match="batches is empty"):
        layer_entanglement(model, ["0"], [])
    with pytest.raises(ValueError, match="did you mean"):
        LayerTap(entangled_cnn(), ["conv11"])


def test_hidden_features_leave_the_model_as_it_was():
    model = entangled_cnn(width=2).train()
    features = hidden_features(model, ["conv1", "conv3"], torch.rand(5, 1, 28, 28), batch_size=2)
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "conv1": (5, 2 * 14 * 14),
        "conv3": (5, 4),
    }
    assert model.training and not model.conv1._forward_hooks


def test_neighbor_credibility():
    train, labels = torch.tensor([[0.0], [1], [2], [10], [11], [12]]), torch.tensor([0, 0, 1, 1, 1, 1])
    share = hidden_neighbor_credibility(
        train, labels, torch.tensor([[0.5], [11.0], [0.5]]), torch.tensor([0, 1, 1]), k=3
    )
    assert torch.allclose(share, torch.tensor([2 / 3, 1, 1 / 3]))
    neighbors = DeepNeighbors({"a": train, "b": train}, labels, k=3)
    nonconformity = neighbors.nonconformity(
        {"a": torch.tensor([[0.5]]), "b": torch.tensor([[11.0]])}, torch.tensor([0])
    )
    assert nonconformity.item() == pytest.approx(1 + 3)
    with pytest.raises(ValueError, match="not calibrated"):
        neighbors.credibility({"a": train, "b": train}, labels)
    neighbors.calibrate({"a": train, "b": train}, labels)
    ranks = neighbors.credibility({"a": train, "b": train}, labels)
    conform = neighbors.nonconformity({"a": train, "b": train}, labels)
    assert torch.allclose(ranks, (conform[None] >= conform[:, None] - 1e-6).float().mean(1))
    cosine = hidden_neighbor_credibility(
        torch.eye(3), torch.arange(3), 5 * torch.eye(3), torch.arange(3), k=1, metric="cosine"
    )
    assert cosine.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="k is 7"):
        hidden_neighbor_credibility(train, labels, train, labels, k=7)


def test_real_and_generated():
    generator = torch.Generator().manual_seed(0)
    real, good, bad = (torch.randn(200, 3, generator=generator) for _ in range(3))
    bad = bad * 0.3 + 2
    assert real_fake_entanglement(real, good).item() == pytest.approx(math.log(2), abs=0.03)
    assert real_fake_entanglement(real, bad) < 0.5
    bad.requires_grad_()
    (-real_fake_entanglement(real, bad, 10.0)).backward()
    # A step along the bonus brings the generated points nearer to the real ones.
    assert (bad - 0.1 * bad.grad / bad.grad.norm()).mean(0).norm() < bad.mean(0).norm()


def test_network():
    model = entangled_cnn()
    assert sum(p.numel() for p in model.parameters()) == 710_218
    counts = [
        sum(p.numel() for p in part.parameters()) for part in (model.conv1, model.conv2, model.conv3, model.classifier)
    ]
    assert counts == [4_160, 295_040, 409_728, 1_290]
    features = hidden_features(model, ["conv1", "conv2", "conv3"], torch.rand(2, 1, 28, 28))
    assert [value.shape[1] for value in features.values()] == [14 * 14 * 64, 5 * 5 * 128, 128]
    assert entangled_cnn(in_chans=3, image_size=32, num_classes=7)(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    model.reset_classifier(4)
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 4)
    assert set(model.convert_state_dict({f"module.{k}": v for k, v in model.state_dict().items()})) == set(
        model.state_dict()
    )


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"metric": "manhattan"}, "metric"),
        ({"eps": -1.0}, "eps"),
        ({"reduction": "max"}, "reduction"),
    ],
)
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"{name} is"):
        soft_nearest_neighbor_loss(X, Y, **arguments)
    with pytest.raises(ValueError, match="3 labels"):
        soft_nearest_neighbor_loss(X, Y[:3])
    with pytest.raises(ValueError, match="factor is nan"):
        EntanglementRegularizer(entangled_cnn(), ["conv1"], math.nan)
