"""Small instances of the six rules, the reductions and the search; the benchmarks beside ``torch.optim``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from saigen.example import Benchmark, Example
from saigen.papers.training.optimizer_comparison import (
    OPTIMIZERS,
    SGD,
    Adam,
    Axis,
    Momentum,
    RMSProp,
    SearchSpace,
    TrialTable,
    embed,
    includes,
    ranking,
    search_space,
    tune,
)

_RATES = {"SGD": 0.1, "Momentum": 0.1, "Nesterov": 0.1, "RMSProp": 0.01, "Adam": 0.01, "NAdam": 0.01}


def _parameter() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


def examples():
    for name, rule in OPTIMIZERS.items():
        yield Example(
            name=name,
            kind="optimizer",
            make=partial(rule, lr=_RATES[name], weight_decay=0.01),
            code=f"""
import torch
from saigen.papers.training.optimizer_comparison import {name}

net = torch.nn.Linear(20, 3)
optimizer = {name}(net.parameters(), lr={_RATES[name]})
x, y = torch.randn(256, 20), torch.randint(3, (256,))

for step in range(20):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
""",
            wrong=((partial(rule, _parameter(), lr=-1.0), "lr"),),
        )
    yield Example(
        name="embed",
        kind="function",
        make=lambda: lambda lr: torch.tensor(list(embed("Momentum", "Adam", {"lr": float(lr)}).at(3).values())),
        inputs=lambda generator: (torch.tensor(0.1),),
        code="""
import torch
from saigen.papers.training.optimizer_comparison import embed

net = torch.nn.Linear(20, 3).double()
momentum_inside_adam = embed("Momentum", "Adam", {"lr": 0.1, "momentum": 0.9}, eps=1e8)
optimizer = momentum_inside_adam.optimizer(net.parameters())    # an Adam that takes momentum's steps
net(torch.randn(8, 20).double()).square().mean().backward()
optimizer.step()
""",
        wrong=(
            (lambda: embed("Adam", "Momentum", {}), "general"),
            (lambda: embed("SGD", "Adam", {"momentum": 0.9}), "hyperparameters"),
            (lambda: embed("SGD", "Adam", {}, eps=0.0), "eps"),
            (lambda: includes("Adam", "AdaGrad"), "special"),
        ),
        batch=None,
    )
    yield Example(
        name="tune",
        kind="function",
        make=lambda: lambda start: torch.tensor(_search(start).scores),
        inputs=lambda generator: (torch.randn(2, generator=generator),),
        code="""
import torch
from saigen.papers.training.optimizer_comparison import OPTIMIZERS, ranking, search_space, tune

x = torch.randn(64, 5)
y = x @ torch.randn(5, 1)

def task(make_optimizer):                # any training that ends in a number, lower is better
    net = torch.nn.Linear(5, 1)
    optimizer = make_optimizer(net.parameters())
    for step in range(20):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    return torch.nn.functional.mse_loss(net(x), y).item()

tables = {name: tune(task, name, search_space(name), trials=10, seed=0) for name in OPTIMIZERS}
for rank in ranking(tables):             # plot_ranking(ranking(tables), axes) draws it
    print(rank.optimizer, rank.best.mean, rank.best.low, rank.best.high)
print(tables["Adam"].best(), tables["Adam"].diverged)
""",
        wrong=(
            (lambda: tune(lambda make: 0.0, "Lion", search_space("SGD"), trials=4, seed=0), "optimizer"),
            (lambda: tune(lambda make: 0.0, "SGD", search_space("SGD"), trials=1, seed=0), "trials"),
            (lambda: search_space("SGD", "momentum"), "tuned"),
            (lambda: Axis(0.0, 1.0), "low"),
            (lambda: SearchSpace({}), "axes"),
            (lambda: search_space("SGD").sample(0, seed=0), "n is"),
            (lambda: TrialTable(({},), (1.0,), 0).best_of(0), "k is"),
            (lambda: TrialTable(({},), (1.0,), 0).trials_to_target(1.0, 2.0), "confidence"),
            (lambda: ranking({}), "tables"),
        ),
        batch=None,
    )


def _search(start: torch.Tensor) -> TrialTable:
    def task(make: Callable) -> float:
        w = nn.Parameter(start.clone())
        optimizer = make([w])
        for _ in range(5):
            optimizer.zero_grad()
            (w * torch.tensor([1.0, 3.0])).square().sum().backward()
            optimizer.step()
        return float(w.detach().square().sum())

    return tune(task, "Momentum", search_space("Momentum"), trials=6, seed=0)


def benchmarks():
    small, large = [(64, 64)] * 40 + [(64,)] * 80, [(1024, 1024)] * 4 + [(1024,)] * 8
    pairs = {
        "Momentum": (Momentum, partial(torch.optim.SGD, lr=1e-3, momentum=0.9)),
        "SGD": (SGD, partial(torch.optim.SGD, lr=1e-3)),
        "RMSProp": (partial(RMSProp, momentum=0.9), partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9)),
        "Adam": (Adam, partial(torch.optim.Adam, lr=1e-3)),
    }
    for name, (ours, peer) in pairs.items():
        for what, shapes in (("120 small parameters", small), ("4.2 M in 12 parameters", large)):
            yield Benchmark(
                name=f"step of {name}, {what}, beside torch.optim", ours=_step(ours, shapes), peer=_step(peer, shapes)
            )


def _step(make: Callable, shapes: list[tuple[int, ...]]) -> Callable[[], Callable[[], Any]]:
    def build() -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        return make(params).step

    return build
