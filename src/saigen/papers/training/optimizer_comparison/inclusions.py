"""Which optimizer includes which, as reductions that can be run (section 3 of arXiv 1910.05446).

A ⊆ B: for every choice of A's hyper-parameters there are B's with which B's updates come arbitrarily close to A's.

    SGD ⊆ Momentum, SGD ⊆ Nesterov      γ = 0
    Momentum ⊆ RMSProp                  ρ = 1, so that v stays 1, and ε = 0
    Momentum ⊆ Adam, Nesterov ⊆ NAdam   β₁ = γ, ε -> ∞ and α_t = ε α / ((1 - β₁) b_t)

The rest follows by going along the chain. With a learning-rate schedule RMSProp needs γ_t = γ α_t / α_{t-1}, because its
momentum holds learning rates of the past.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from saigen.papers.training.optimizer_comparison.optimizer import OPTIMIZERS

INCLUSIONS: tuple[tuple[str, str], ...] = (
    ("SGD", "Momentum"),
    ("SGD", "Nesterov"),
    ("Momentum", "RMSProp"),
    ("Momentum", "Adam"),
    ("Nesterov", "NAdam"),
)
"""(special, general): the direct inclusions."""

Hyperparameters = dict[str, float]


def includes(general: str, special: str) -> bool:
    """True where ``general`` includes ``special``, itself included.

    Raises ``ValueError`` for an unknown name.

    >>> includes("Adam", "SGD"), includes("Adam", "RMSProp")
    (True, False)
    """
    return _chain(special, general) is not None


@dataclass(frozen=True)
class Embedding:
    """How ``general`` takes the steps of ``special``: its hyper-parameters at each step t = 1, 2, …"""

    special: str
    general: str
    exact: bool
    """False where equality is a limit: the difference then falls as 1/ε."""
    at: Callable[[int], Hyperparameters]

    def optimizer(self, params: Any) -> Optimizer:
        """The general optimizer over ``params``, set anew before each of its steps."""
        optimizer = OPTIMIZERS[self.general](params, **self.at(1))
        steps = iter(range(1, 2**63))

        def set_groups(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            now = self.at(next(steps))
            for group in optimizer.param_groups:
                group.update(now)

        optimizer.register_step_pre_hook(set_groups)
        return optimizer


def embed(
    special: str,
    general: str,
    hyperparameters: Hyperparameters,
    *,
    schedule: Callable[[int], float] = lambda t: 1.0,
    eps: float = 1e8,
    beta2: float = 0.0,
) -> Embedding:
    """The hyper-parameters with which ``general`` takes the steps that ``special`` takes with ``hyperparameters``.

    ``schedule(t)`` multiplies the learning rate at step t = 1, 2, … ``eps`` is what stands for ∞ in Adam and NAdam: the
    larger, the closer, up to what rounding allows (in float32 about 1e4 times the gradients). ``beta2`` may be anything.

    Raises ``ValueError`` where ``general`` does not include ``special``, for unknown names, hyper-parameters that the
    special one does not have, and an ``eps`` that is not above 0.

    >>> embed("Momentum", "Adam", {"lr": 0.1, "momentum": 0.9}, eps=100.0).at(1)["beta1"]
    0.9
    """
    chain = _chain(special, general)
    if chain is None:
        raise ValueError(f"general is {general!r}, allowed are the optimizers that include {special}, not this one")
    if not eps > 0 or not 0.0 <= beta2 < 1.0:
        raise ValueError(f"eps is {eps} and beta2 is {beta2}, allowed is eps > 0 and 0 <= beta2 < 1")
    known = OPTIMIZERS[special]([torch.empty(0)]).defaults
    if not set(hyperparameters) <= set(known):
        raise ValueError(
            f"hyperparameters are {sorted(hyperparameters)}, allowed are those of {special}: {sorted(known)}"
        )
    start = {**known, **hyperparameters}

    def at(t: int) -> Hyperparameters:
        now = {**start, "lr": start["lr"] * schedule(t)}
        fading = schedule(t) / schedule(t - 1) if t > 1 and schedule(t - 1) else 1.0
        for to in chain[1:]:
            now = _lift(to, now, t, fading, eps, beta2)
        return now

    return Embedding(special, general, exact=not {"Adam", "NAdam"} & set(chain[1:]), at=at)


def _lift(to: str, of: Hyperparameters, t: int, fading: float, eps: float, beta2: float) -> Hyperparameters:
    """One inclusion: the hyper-parameters of ``to`` at step t from those of the optimizer below it."""
    kept = {"weight_decay": of["weight_decay"]}
    if to in ("Momentum", "Nesterov"):
        return {"lr": of["lr"], "momentum": 0.0, **kept}
    if to == "RMSProp":
        return {"lr": of["lr"], "momentum": of["momentum"] * fading, "rho": 1.0, "eps": 0.0, **kept}
    beta1 = of["momentum"]
    b = math.sqrt(1 - beta2**t) / (1 - beta1**t)
    return {"lr": eps * of["lr"] / ((1 - beta1) * b), "beta1": beta1, "beta2": beta2, "eps": eps, **kept}


def _chain(special: str, general: str) -> list[str] | None:
    """The optimizers from ``special`` up to ``general``."""
    for name, value in (("special", special), ("general", general)):
        if value not in OPTIMIZERS:
            raise ValueError(f"{name} is {value!r}, allowed are {', '.join(OPTIMIZERS)}")
    if special == general:
        return [special]
    for lower, upper in INCLUSIONS:
        if lower == special and (rest := _chain(upper, general)) is not None:
            return [special, *rest]
    return None
