"""The Laplace evidence: exact where the model is linear, brute force, gradients, training, selection, bad input."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from saigen.papers.bayes.marginal_likelihood import (
    LaplaceEvidence,
    linear_log_evidence,
    mackay_fixed_point,
    select,
    train,
)

I = np.arange(20)
x = np.linspace(-1, 1, 20)
X = np.stack([np.ones(20), x, x**2], 1)
Y = X @ [0.5, -1, 2] + 0.1 * np.cos(1.7 * I)


def ridge(delta, sigma):
    """The linear model at its mode."""
    w = np.linalg.solve(X.T @ X + delta * sigma**2 * np.eye(3), X.T @ Y)
    layer = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(w)[None])
    return layer, [(torch.from_numpy(X), torch.from_numpy(Y)[:, None])]


def network(likelihood="classification", norm=False):
    torch.manual_seed(0)
    middle = [nn.LayerNorm(6)] if norm else []
    model = nn.Sequential(nn.Linear(4, 6), *middle, nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    inputs = torch.randn(15, 4, dtype=torch.float64)
    labels = torch.arange(15) % 3 if likelihood == "classification" else torch.randn(15, 3, dtype=torch.float64)
    return model, inputs, labels


# Exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delta", "sigma", "evidence"), [(1, 0.1, 10.31857765), (0.1, 0.2, 1.15858234), (10, 0.05, -13.16138304)]
)
def test_linear_models_have_the_exact_evidence(delta, sigma, evidence):
    assert linear_log_evidence(X, Y, delta, sigma) == pytest.approx(evidence, abs=1e-7)
    layer, data = ridge(delta, sigma)
    for structure in ("full", "kron"):
        for batches in (data, [(data[0][0][:7], data[0][1][:7]), (data[0][0][7:], data[0][1][7:])]):
            ours = LaplaceEvidence(layer, "regression", structure=structure).fit(batches)
            assert ours.log_marginal_likelihood(delta, sigma).item() == pytest.approx(evidence, abs=1e-7)


def test_mackay_fixed_point_is_where_the_gradient_vanishes():
    delta, sigma = mackay_fixed_point(X, Y)
    assert (delta, sigma) == pytest.approx((0.55608281, 0.07569729), abs=1e-7)
    assert linear_log_evidence(X, Y, delta, sigma) == pytest.approx(11.73659756, abs=1e-7)
    layer, data = ridge(delta, sigma)
    ours = LaplaceEvidence(layer, "regression", structure="full").fit(data)
    logs = torch.tensor([delta, sigma], dtype=torch.float64).log().requires_grad_()
    ours.log_marginal_likelihood(logs[0].exp(), logs[1].exp()).backward()
    assert logs.grad.abs().max() < 1e-6
    for other in ((1.3 * delta, sigma), (delta, 1.1 * sigma), (0.8 * delta, 0.95 * sigma)):
        assert linear_log_evidence(X, Y, *other) < linear_log_evidence(X, Y, delta, sigma)


def test_mackay_without_a_weight_worth_having():
    delta, sigma = mackay_fixed_point(np.ones((20, 1)), x)
    assert delta == 1e12 and sigma == pytest.approx(x.std(), rel=1e-6)


def test_training_a_linear_model_ends_at_the_fixed_point():
    delta, sigma = mackay_fixed_point(X, Y)
    layer, data = ridge(1.0, 0.1)
    done = train(
        layer, data, "regression", structure="full", prior="scalar", epochs=400, lr=0.05, lr_min=1e-4, hyper_steps=10,
        lr_hyper=0.05,
    )  # fmt: skip
    assert done.log_marginal_likelihood == pytest.approx(11.7366, abs=1e-2)
    assert done.sigma_noise.item() == pytest.approx(sigma, rel=0.02)
    assert done.prior_precision.item() == pytest.approx(delta, rel=0.05)


def test_gradient_in_the_prior_has_its_closed_form():
    layer, data = ridge(2.0, 0.1)
    ours = LaplaceEvidence(layer, "regression", structure="full").fit(data)
    log_delta = torch.tensor(math.log(2.0), dtype=torch.float64, requires_grad=True)
    ours.log_marginal_likelihood(log_delta.exp(), 0.1).backward()
    values = np.linalg.eigvalsh(X.T @ X) / 0.01
    w = layer.weight.detach().numpy()
    assert log_delta.grad.item() == pytest.approx(
        0.5 * (3 - (2 / (values + 2)).sum()) - 0.5 * 2 * (w**2).sum(), rel=1e-9
    )


# Brute force ---------------------------------------------------------------------------------------------------------


def jacobian(model, inputs):
    names = dict(model.named_parameters())
    rows = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, inputs))(
        {name: p.detach() for name, p in names.items()}
    )
    return torch.cat([rows[name].flatten(2) for name in names], -1)


def curvature_by_hand(model, inputs, labels, likelihood, curvature):
    J, f = jacobian(model, inputs), model(inputs).detach()
    n, outputs, _ = J.shape
    total = 0
    for i in range(n):
        p = f[i].softmax(0)
        if curvature == "ef":
            residual = p - F.one_hot(labels[i], outputs) if likelihood == "classification" else f[i] - labels[i]
            middle = torch.outer(residual, residual)
        else:
            middle = (
                torch.diag(p) - torch.outer(p, p) if likelihood == "classification" else torch.eye(outputs).double()
            )
        total = total + J[i].T @ middle @ J[i]
    return total


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("curvature", ["ggn", "ef"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_equals_brute_force(likelihood, curvature, norm):
    """The determinant of the P x P matrix from Jacobians one by one; a layer norm takes the general way."""
    model, inputs, labels = network(likelihood, norm)
    H = curvature_by_hand(model, inputs, labels, likelihood, curvature)
    tensors, sizes = len(list(model.parameters())), [p.numel() for p in model.parameters()]
    delta = torch.linspace(0.3, 2, tensors, dtype=torch.float64)
    each = torch.repeat_interleave(delta, torch.tensor(sizes))
    sigma = None if likelihood == "classification" else 0.7
    factor = 1 if sigma is None else sigma ** (-2 if curvature == "ggn" else -4)
    for structure, matrix in (("full", H), ("diag", H.diag().diag())):
        ours = LaplaceEvidence(model, likelihood, structure=structure, curvature=curvature)
        ours.fit([(inputs[:4], labels[:4]), (inputs[4:], labels[4:])])
        expected = torch.logdet(factor * matrix + each.diag()) - each.log().sum()
        assert ours.log_det_ratio(delta, sigma).item() == pytest.approx(expected.item(), rel=1e-9)
        assert ours.log_det_ratio(each, sigma).item() == pytest.approx(expected.item(), rel=1e-9)
    theta = torch.cat([p.flatten() for p in model.parameters()])
    assert ours.scatter(delta).item() == pytest.approx((each * theta**2).sum().item())
    f = model(inputs)
    if likelihood == "classification":
        assert ours.log_likelihood().item() == pytest.approx(-F.cross_entropy(f, labels, reduction="sum").item())
    else:
        log_p = torch.distributions.Normal(f, 0.7).log_prob(labels).sum().item()
        assert ours.log_likelihood(0.7).item() == pytest.approx(log_p)


def test_kron_is_the_determinant_of_the_dense_kronecker_product():
    model, inputs, labels = network()
    ours = LaplaceEvidence(model, structure="kron").fit([(inputs, labels)])
    h = model[1](model[0](inputs))
    p = model(inputs).softmax(1)
    total, delta = 0.0, 0.6
    for a, layer in ((inputs, model[0]), (h, model[2])):
        # J s at the layer's output, column by column
        vectors = []
        for i in range(15):
            S = (p[i].sqrt()[:, None] * (torch.eye(3).double() - p[i])).detach()  # a row sqrt(p_c) (e_c - p)
            J = torch.eye(3).double() if layer is model[2] else model[2].weight * (h[i] > 0)
            vectors.append(S @ J)
        vectors = torch.cat(vectors).detach()
        A, G = a.detach().T @ a.detach() / 15, vectors.T @ vectors
        block = torch.kron(G, A)
        total += torch.logdet(block / delta + torch.eye(len(block)).double())
        total += torch.logdet(G / delta + torch.eye(len(G)).double())
    assert ours.log_det_ratio(delta).item() == pytest.approx(total.item(), rel=1e-9)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_gradients_by_finite_differences(structure):
    model, inputs, labels = network("regression")
    ours = LaplaceEvidence(model, "regression", structure=structure).fit([(inputs, labels)])
    for size in (1, 4) + ((51,) if structure != "kron" else ()):
        delta = torch.linspace(0.5, 2, size, dtype=torch.float64).requires_grad_()
        sigma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(ours.log_marginal_likelihood, (delta, sigma))


def test_full_ggn_has_the_rank_of_its_columns():
    model, inputs, labels = network()
    ours = LaplaceEvidence(model, structure="full").fit([(inputs[:4], labels[:4])])
    assert torch.linalg.matrix_rank(ours._matrix, rtol=1e-10) <= 4 * (3 - 1)


def test_terms():
    model, inputs, labels = network()
    dead = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        dead[0].bias.fill_(-100.0)
    for structure in ("full", "kron", "diag"):
        ours = LaplaceEvidence(model, structure=structure).fit([(inputs, labels)])
        ratios = [ours.log_det_ratio(delta).item() for delta in (0.01, 1.0, 100.0, 1e12)]
        assert ratios == sorted(ratios, reverse=True) and ratios[-1] == pytest.approx(0, abs=1e-6)
        twice = LaplaceEvidence(model, structure=structure, likelihood_scale=2).fit([(inputs, labels)])
        again = LaplaceEvidence(model, structure=structure).fit([(inputs, labels)] * 2)
        assert twice.log_marginal_likelihood(1.0).item() == pytest.approx(again.log_marginal_likelihood(1.0).item())
        value = LaplaceEvidence(dead, structure=structure).fit([(inputs, labels)]).log_marginal_likelihood(1.0)
        assert torch.isfinite(value)


def test_fit_leaves_the_model_as_it_was():
    model, inputs, labels = network()
    state, mode = copy.deepcopy(model.state_dict()), model.train().training
    LaplaceEvidence(model).fit([(inputs, labels)])
    assert model.training == mode and all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    model[0].weight.requires_grad_(False)
    assert LaplaceEvidence(model).fit([(inputs, labels)]).num_parameters == 6 + 18 + 3


# Training and selection ------------------------------------------------------------------------------------------------


def test_training_raises_the_evidence_and_keeps_its_best():
    for structure, prior in (("kron", "layerwise"), ("diag", "diagonal"), ("full", "scalar")):
        model, inputs, labels = network()
        done = train(
            model, [(inputs, labels)], structure=structure, prior=prior, epochs=30, lr=0.02, hyper_steps=10, frequency=5
        )
        assert len(done.trace) == 6 and done.log_marginal_likelihood == max(done.trace) > done.trace[0]
        again = done.evidence.log_marginal_likelihood(done.prior_precision).item()
        assert again == pytest.approx(done.log_marginal_likelihood, rel=1e-9)


def test_evidence_picks_the_degree_that_made_the_data():
    """Polynomials of degree 0 to 10 on cubic data: too simple fits badly, too rich pays for its freedom."""
    picked = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.uniform(-1, 1, 60)
        y = 1.5 * x**3 - x + 0.3 + 0.15 * rng.normal(size=60)
        designs = [np.vander(x, degree + 1, increasing=True) for degree in range(11)]
        picked.append(int(np.argmax([linear_log_evidence(D, y, *mackay_fixed_point(D, y)) for D in designs])))
    assert max(set(picked), key=picked.count) == 3 and sum(3 <= degree <= 5 for degree in picked) >= 16


def test_select_sorts_by_evidence():
    g = torch.Generator().manual_seed(0)
    inputs = torch.rand(60, 1, generator=g) * 6 - 3
    labels = torch.sin(2 * inputs) + 0.1 * torch.randn(60, 1, generator=g)
    torch.manual_seed(0)
    ranking = select(
        {"line": lambda: nn.Linear(1, 1), "net": lambda: nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))},
        [(inputs, labels)], "regression", structure="full", epochs=600, lr=0.02, frequency=50, hyper_steps=20,
    )  # fmt: skip
    assert list(ranking) == ["net", "line"]
    assert ranking["net"].sigma_noise < 0.3 < ranking["line"].sigma_noise


# Bad input ---------------------------------------------------------------------------------------------------------------


def test_wrong_arguments():
    model, inputs, labels = network()
    fitted = LaplaceEvidence(model).fit([(inputs, labels)])
    regression = LaplaceEvidence(model, "regression").fit([(inputs, torch.randn(15, 3).double())])
    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = shared[0].weight
    for call, text in (
        (lambda: LaplaceEvidence(model).log_marginal_likelihood(1.0), "no data"),
        (lambda: LaplaceEvidence(model).fit([]), "empty"),
        (lambda: LaplaceEvidence(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), "batch norm"),
        (lambda: LaplaceEvidence(nn.ReLU()), "trainable"),
        (lambda: LaplaceEvidence(shared), "shared"),
        (lambda: LaplaceEvidence(model).fit([(inputs, labels + 1)]), "classes 0 to 2"),
        (lambda: LaplaceEvidence(model).fit([(inputs, labels.double())]), "float64"),
        (lambda: LaplaceEvidence(model, "regression").fit([(inputs, labels)]), "y has shape"),
        (lambda: LaplaceEvidence(model).fit([(inputs * torch.nan, labels)]), "finite"),
        (lambda: fitted.log_marginal_likelihood(torch.ones(3)), "prior_precision has 3"),
        (lambda: fitted.log_marginal_likelihood(-1.0), "positive"),
        (lambda: fitted.log_marginal_likelihood(1.0, 0.1), "sigma_noise"),
        (lambda: regression.log_marginal_likelihood(1.0), "sigma_noise"),
        (lambda: train(model, [(inputs, labels)], epochs=3, burn_in=3), "burn_in"),
        (lambda: train(model, [(inputs, labels)], prior="diagonal"), "kron"),
        (lambda: train(model, [(inputs, labels)], prior="each"), "prior"),
        (lambda: mackay_fixed_point(X, Y[:5]), "shape"),
        (lambda: linear_log_evidence(X, Y, 0.0, 1.0), "prior_precision"),
        (lambda: select({}, [(inputs, labels)]), "candidates"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
