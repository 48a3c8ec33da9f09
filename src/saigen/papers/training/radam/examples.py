"""Small instances of the optimizers and of the variance formulas; the benchmarks beside PyTorch and pytorch_optimizer."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from saigen.example import Benchmark, Example, Part, Recipe
from saigen.papers.training.radam import (
    DelayedAdam,
    RAdam,
    adaptive_rate_variance,
    adaptive_rate_variances,
    linear_warmup_length,
    rectification,
    simulate_adaptive_rate,
    sma_length,
    warmup_variance,
)


def _parameter() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


def examples():
    yield Example(
        name="RAdam",
        kind="optimizer",
        make=lambda params: RAdam(params, lr=1e-2, betas=(0.9, 0.7), weight_decay=0.1),
        code="""
import torch
from saigen.papers.training.radam import RAdam

net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
optimizer = RAdam(net.parameters(), lr=1e-3, weight_decay=1e-4)      # no warm-up
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=100)
x, y = torch.randn(256, 20), torch.randint(3, (256,))

for step in range(100):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    schedule.step()
""",
        wrong=(
            (lambda: RAdam(_parameter(), lr=-1.0), "lr"),
            (lambda: RAdam(_parameter(), betas=(0.9, 1.0)), "betas"),
            (lambda: RAdam(_parameter(), eps=float("nan")), "eps"),
            (lambda: RAdam(_parameter(), weight_decay=-0.1), "weight_decay"),
            (lambda: RAdam(_parameter(), threshold=3.0), "threshold"),
            (lambda: RAdam(_parameter(), fallback="sgd"), "fallback"),
        ),
    )
    yield Example(
        name="DelayedAdam",
        kind="optimizer",
        make=lambda params: DelayedAdam(params, lr=1e-2, weight_decay=0.1, freeze_steps=2),
        code="""
import torch
from saigen.papers.training.radam import DelayedAdam

net = torch.nn.Linear(20, 3)
optimizer = DelayedAdam(net.parameters(), lr=1e-3, freeze_steps=50)   # 50 steps that only estimate v, then Adam
x, y = torch.randn(256, 20), torch.randint(3, (256,))

for step in range(100):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
""",
        wrong=(
            (lambda: DelayedAdam(_parameter(), freeze_steps=-1), "freeze_steps"),
            (lambda: DelayedAdam(_parameter(), lr=float("inf")), "lr"),
        ),
    )
    yield Example(
        name="adaptive_rate_variances",
        kind="function",
        make=lambda: lambda beta2: adaptive_rate_variances(20, float(beta2), rectified=True),
        inputs=lambda generator: (torch.tensor(0.99),),
        code="""
from saigen.papers.training.radam import adaptive_rate_variances, linear_warmup_length, rectification, sma_length

adam = adaptive_rate_variances(1000, 0.999)                     # Var[psi_t]: infinite for t <= 2, then falling
radam = adaptive_rate_variances(1000, 0.999, rectified=True)    # Var[r_t psi_t]: the same at every adaptive step
rho, r = sma_length(100, 0.999), rectification(100, 0.999)      # 95.9 samples, a fifth of the step
steps = linear_warmup_length(0.999)                             # 2000: a linear warm-up in its place
""",
        wrong=(
            (lambda: sma_length(0, 0.999), "step"),
            (lambda: rectification(1, 1.0), "beta2"),
            (lambda: linear_warmup_length(-0.1), "beta2"),
            (lambda: adaptive_rate_variance(-1.0), "rho"),
            (lambda: adaptive_rate_variance(5.0, sigma=0.0), "sigma"),
            (lambda: adaptive_rate_variance(5.0, order="second"), "order"),
            (lambda: warmup_variance(5, 0.999, warmup=-1), "warmup"),
        ),
        batch=None,
    )
    yield Example(
        name="simulate_adaptive_rate",
        kind="function",
        make=lambda: lambda generator: simulate_adaptive_rate(20, 0.99, trajectories=10, generator=generator),
        inputs=lambda generator: (generator,),
        code="""
import torch
from saigen.papers.training.radam import simulate_adaptive_rate

psi = simulate_adaptive_rate(1000, 0.999, trajectories=4000, generator=torch.Generator().manual_seed(0))
variance = psi.var(dim=0)
""",
        wrong=(
            (lambda: simulate_adaptive_rate(0, 0.9, trajectories=1, generator=torch.Generator()), "step"),
            (lambda: simulate_adaptive_rate(5, 0.9, trajectories=0, generator=torch.Generator()), "trajectories"),
        ),
        batch=None,
    )


def parts() -> Iterator[Part]:
    yield Part("RAdam", "method", _rectified)


def _rectified(recipe: Recipe) -> Recipe:
    return replace(
        recipe, optimizer=lambda model, rate: RAdam(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    )


SHAPES = {
    "120 parameters of 64 x 64 and smaller": [(64, 64)] * 40 + [(64,)] * 80,
    "ResNet-20": [(16, 16, 3, 3)] * 7 + [(32, 32, 3, 3)] * 6 + [(64, 64, 3, 3)] * 6 + [(64,)] * 40,
    "Transformer of 12.6 M": [(1024, 1024)] * 12 + [(1024,)] * 24,
}


def benchmarks():
    for name, shapes in SHAPES.items():
        for peer in ("torch.optim", "pytorch_optimizer"):
            yield Benchmark(name=f"step, {name}, beside {peer}", ours=_step("ours", shapes), peer=_step(peer, shapes))


def _step(whose: str, shapes: list[tuple[int, ...]]) -> Callable[[], Callable[[], Any]]:
    """One adaptive step with decoupled weight decay; the same parameters and gradients."""

    def build() -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        if whose == "ours":
            optimizer: torch.optim.Optimizer = RAdam(params, weight_decay=0.01)
        elif whose == "torch.optim":
            optimizer = torch.optim.RAdam(params, weight_decay=0.01, decoupled_weight_decay=True)
        else:
            from pytorch_optimizer import RAdam as PeerRAdam

            optimizer = PeerRAdam(params, weight_decay=0.01, degenerated_to_sgd=True)
        for _ in range(6):  # past the momentum steps
            optimizer.step()
        return optimizer.step

    return build
