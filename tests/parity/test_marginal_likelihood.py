"""The same evidence as laplace-torch 0.3 on the same network: value, and gradients by prior precision and noise."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from saigen.papers.bayes.marginal_likelihood import LaplaceEvidence, train
from tests.peers import need_module

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


def problem(likelihood, network, n=24):
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    if network == "mlp":
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3))
        x = torch.randn(n, 5, generator=g)
    else:
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(45, 3),
        )
        x = torch.randn(n, 2, 8, 8, generator=g)
    y = torch.randint(3, (n,), generator=g) if likelihood == "classification" else torch.randn(n, 3, generator=g)
    return model.double(), x.double(), y if likelihood == "classification" else y.double()


def peer_of(model, likelihood, structure, backend, x, y, batch):
    laplace, curvature = need_module("laplace"), need_module("laplace.curvature")
    peer = laplace.Laplace(
        copy.deepcopy(model), likelihood, subset_of_weights="all", hessian_structure=structure,
        backend=getattr(curvature, backend),
    )  # fmt: skip
    peer.fit(DataLoader(TensorDataset(x, y), batch_size=batch))
    return peer


@pytest.mark.parametrize("batch", [24, 10])
@pytest.mark.parametrize(
    ("structure", "backend"), [("full", "CurvlinopsGGN"), ("kron", "CurvlinopsGGN"), ("diag", "BackPackGGN")]
)
@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_same_evidence_and_gradients(likelihood, network, structure, backend, batch):
    model, x, y = problem(likelihood, network)
    tensors = len(list(model.parameters()))
    peer = peer_of(model, likelihood, structure, backend, x, y, batch)
    ours = LaplaceEvidence(model, likelihood, structure=structure)
    ours.fit(DataLoader(TensorDataset(x, y), batch_size=batch))
    for delta in (torch.tensor([0.7]), torch.linspace(0.2, 3, tensors)):
        numbers = []
        for evidence in (ours, peer):
            prior = delta.double().requires_grad_()
            sigma = torch.tensor([0.6], dtype=torch.float64, requires_grad=True) if likelihood == "regression" else None
            value = evidence.log_marginal_likelihood(prior, sigma)
            value.backward()
            numbers.append([value.reshape(1), prior.grad])
            if sigma is not None:
                if evidence is peer and structure == "kron":
                    # The peer scales Kronecker factors by math.pow, which drops the determinant's gradient in sigma.
                    again = sigma.detach().requires_grad_()
                    sigma.grad -= torch.autograd.grad(0.5 * ours.log_det_ratio(delta, again), again)[0]
                numbers[-1].append(sigma.grad)
        for a, b in zip(*numbers, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("structure", "backend"), [("full", "CurvlinopsEF"), ("kron", "CurvlinopsEF"), ("diag", "BackPackEF")]
)
def test_same_empirical_fisher(structure, backend):
    model, x, y = problem("classification", "mlp")
    peer = peer_of(model, "classification", structure, backend, x, y, 10)
    ours = LaplaceEvidence(model, structure=structure, curvature="ef").fit(
        DataLoader(TensorDataset(x, y), batch_size=10)
    )
    value = peer.log_marginal_likelihood(torch.tensor([0.7], dtype=torch.float64))
    assert ours.log_marginal_likelihood(0.7).item() == pytest.approx(value.item(), rel=1e-8)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_same_training(likelihood):
    """The same weights, prior precision, noise and evidence as marglik_training after several epochs."""
    structure = "kron" if likelihood == "classification" else "full"  # see above: kron learns another sigma there
    laplace = need_module("laplace")
    model, x, y = problem(likelihood, "mlp")
    if likelihood == "regression":
        # With several outputs the peer's loss is a mean over them and its prior's part is not; with one they agree.
        model, y = model.append(nn.Linear(3, 1).double()), y[:, :1]
    loader = [(x, y)]
    options = {
        "n_epochs": 6,
        "n_hypersteps": 5,
        "lr_hyp": 0.1,
        "marglik_frequency": 2,
        "optimizer_kwargs": {"lr": 0.01},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer, _, margliks, _ = laplace.marglik_training(
            copy.deepcopy(model), DataLoader(TensorDataset(x, y), batch_size=24), likelihood, structure,
            backend=need_module("laplace.curvature").CurvlinopsGGN, **options,
        )  # fmt: skip
    ours = train(model, loader, likelihood, structure=structure, epochs=6, hyper_steps=5, frequency=2, lr=0.01)
    for a, b in zip(ours.model.parameters(), peer.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    # The peer keeps the prior before the last of its steps.
    assert len(ours.trace) == 3 and len(margliks) == 15
    assert all(step <= -margliks[5 * i + 4] + 1 for i, step in enumerate(ours.trace))
    value = peer.log_marginal_likelihood(peer.prior_precision).item()
    assert ours.log_marginal_likelihood == pytest.approx(value, abs=0.5)
    theirs = ours.evidence.log_marginal_likelihood(
        peer.prior_precision, peer.sigma_noise if likelihood == "regression" else None
    )
    assert theirs.item() == pytest.approx(value, rel=1e-8)
