"""Small instances of the Laplace evidence, and the same work side by side with laplace-torch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from saigen.example import Benchmark, Example
from saigen.papers.bayes.marginal_likelihood import (
    LaplaceEvidence,
    linear_log_evidence,
    mackay_fixed_point,
    select,
    train,
)


def _network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def _data(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(12, 3, generator=generator), torch.arange(12) % 2


def _evidence(structure: str, curvature: str) -> Callable[[Tensor, Tensor], Tensor]:
    def measure(x: Tensor, y: Tensor) -> Tensor:
        evidence = LaplaceEvidence(_network(), structure=structure, curvature=curvature)
        return evidence.fit([(x, y)]).log_marginal_likelihood(1.0)

    return measure


def examples() -> Iterator[Example]:
    """The evidence in its structures, training that learns its prior, and the exact evidence of a linear model."""
    batch = _data(torch.Generator().manual_seed(0))
    for structure, curvature in (("kron", "ggn"), ("full", "ggn"), ("diag", "ef")):
        yield Example(
            name=f"evidence_{structure}_{curvature}",
            kind="function",
            make=lambda structure=structure, curvature=curvature: _evidence(structure, curvature),
            inputs=_data,
            code=f"""import torch
from torch import nn
from saigen.papers.bayes.marginal_likelihood import LaplaceEvidence

model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))          # trained, in earnest
loader = [(torch.randn(12, 3), torch.arange(12) % 2)]                        # or a DataLoader
evidence = LaplaceEvidence(model, "classification", structure="{structure}", curvature="{curvature}").fit(loader)
delta = torch.ones(4, requires_grad=True)                                    # a prior precision for each tensor
evidence.log_marginal_likelihood(delta).backward()
print(evidence.log_marginal_likelihood(1.0), delta.grad)""",
            wrong=(
                (lambda: LaplaceEvidence(_network(), "counts"), "likelihood"),
                (lambda: LaplaceEvidence(_network(), structure="block"), "structure"),
                (lambda: LaplaceEvidence(_network(), curvature="hessian"), "curvature"),
                (lambda: LaplaceEvidence(_network(), likelihood_scale=0.0), "likelihood_scale"),
                (lambda: LaplaceEvidence(_network()).log_likelihood(), "no data"),
                (lambda: LaplaceEvidence(nn.Sequential(nn.BatchNorm1d(3))), "batch norm"),
                (lambda: LaplaceEvidence(_network()).fit([(batch[0], batch[1] + 1)]), "classes 0 to 1"),
            ),
            batch=None,
        )
    yield Example(
        name="train",
        kind="function",
        make=lambda: lambda x, y: torch.tensor(train(_network(), [(x, y)], epochs=4, hyper_steps=3).trace),
        inputs=_data,
        code="""import torch
from torch import nn
from saigen.papers.bayes.marginal_likelihood import select

x = torch.linspace(-3, 3, 80)[:, None]
y = torch.sin(2 * x) + 0.1 * torch.randn(80, 1)
ranking = select(
    {
        "line": lambda: nn.Linear(1, 1),
        "narrow": lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)),
        "wide": lambda: nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1)),
    },
    [(x, y)], "regression", epochs=100, lr=0.02, frequency=10, hyper_steps=20,
)
for name, trained in ranking.items():
    print(name, trained.log_marginal_likelihood, float(trained.sigma_noise))""",
        wrong=(
            (lambda: train(_network(), [batch], prior="each"), "prior"),
            (lambda: train(_network(), [batch], prior="diagonal"), "kron"),
            (lambda: train(_network(), [batch], epochs=0), "epochs"),
            (lambda: train(_network(), [batch], epochs=2, burn_in=2), "burn_in"),
            (lambda: train(_network(), []), "empty"),
            (lambda: select({}, [batch]), "candidates"),
        ),
        batch=None,
    )
    yield Example(
        name="linear_log_evidence",
        kind="function",
        make=lambda: lambda X: torch.tensor(linear_log_evidence(X.numpy(), X.numpy()[:, 0], 1.0, 0.5)),
        inputs=lambda generator: (torch.randn(9, 3, generator=generator),),
        code="""import numpy as np
from saigen.papers.bayes.marginal_likelihood import linear_log_evidence, mackay_fixed_point

x = np.linspace(-1, 1, 40)
y = 1.5 * x**3 - x + 0.15 * np.sin(50 * x)
for degree in range(7):
    X = np.vander(x, degree + 1)
    print(degree, linear_log_evidence(X, y, *mackay_fixed_point(X, y)))      # highest where the data come from""",
        wrong=(
            (lambda: linear_log_evidence([[1.0]], [1.0], 0.0, 1.0), "prior_precision"),
            (lambda: linear_log_evidence([[1.0]], [1.0, 2.0], 1.0, 1.0), "shape"),
            (lambda: mackay_fixed_point([1.0], [1.0]), "shape"),
        ),
        batch=None,
    )


def _problem(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "mlp":
            model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
            x = torch.randn(256, 64)
        elif name == "small mlp":
            model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 3))
            x = torch.randn(256, 8)
        else:
            model = nn.Sequential(
                nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Tanh(),
                nn.Flatten(), nn.Linear(512, 10),
            )  # fmt: skip
            x = torch.randn(256, 1, 16, 16)
        return model, [(x[:128], torch.arange(128) % 3), (x[128:], torch.arange(128) % 3)]


def _peer(model: nn.Module, structure: str, data: list[tuple[Tensor, Tensor]]) -> tuple[Any, Any]:
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=128)
    backend = {}
    if structure == "diag":
        from laplace.curvature import BackPackGGN

        backend = {"backend": BackPackGGN}
    return Laplace(model, "classification", subset_of_weights="all", hessian_structure=structure, **backend), loader


def _fit(name: str, structure: str, peer: bool) -> Callable[[], Callable[[], Any]]:
    def build() -> Callable[[], Any]:
        model, data = _problem(name)
        if peer:
            laplace, loader = _peer(model, structure, data)
            return lambda: laplace.fit(loader)
        evidence = LaplaceEvidence(model, structure=structure)
        return lambda: evidence.fit(data)

    return build


def _step(name: str, structure: str, peer: bool) -> Callable[[], Callable[[], Any]]:
    """Value and gradient in the prior precision, curvature given: what a step on the prior takes."""

    def build() -> Callable[[], Any]:
        model, data = _problem(name)
        delta = torch.ones(len(list(model.parameters())), requires_grad=True)
        if peer:
            evidence, loader = _peer(model, structure, data)
            evidence.fit(loader)
        else:
            evidence = LaplaceEvidence(model, structure=structure).fit(data)

        def step() -> None:
            delta.grad = None
            evidence.log_marginal_likelihood(delta).backward()

        return step

    return build


def benchmarks():
    """laplace-torch with its default backend (BackPACK for the diagonal, where the default goes through Jacobians)."""
    for name, structure in (("mlp", "kron"), ("cnn", "kron"), ("small mlp", "full"), ("small mlp", "diag")):
        yield Benchmark(
            name=f"fit {structure}, {name}, 256 samples",
            ours=_fit(name, structure, False),
            peer=_fit(name, structure, True),
        )
        yield Benchmark(
            name=f"evidence and its gradient, {structure}, {name}",
            ours=_step(name, structure, False),
            peer=_step(name, structure, True),
        )
