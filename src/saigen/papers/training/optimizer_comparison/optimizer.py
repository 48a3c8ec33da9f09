"""The six update rules of "On Empirical Comparisons of Optimizers for Deep Learning" (arXiv 1910.05446, table 1).

They are TensorFlow's rules, which differ from ``torch.optim``'s in where ε stands, what v starts from and whether the
learning rate is inside the momentum; the inclusions between optimizers are statements about just these rules. With the
gradient g at step t, and everything that is not said otherwise starting from 0:

    SGD        θ <- θ - α g
    Momentum   v <- γ v + g                               θ <- θ - α v
    Nesterov   v <- γ v + g                               θ <- θ - α (γ v + g)
    RMSProp    v <- ρ v + (1 - ρ) g²,  v_0 = 1
               m <- γ m + α g / √(v + ε)                  θ <- θ - m
    Adam       m <- β₁ m + (1 - β₁) g
               v <- β₂ v + (1 - β₂) g²                    θ <- θ - α b_t m / (√v + ε)
    NAdam      m, v as Adam's                             θ <- θ - α b_t (β₁ m + (1 - β₁) g) / (√v + ε)
               with b_t = √(1 - β₂ᵗ) / (1 - β₁ᵗ)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from saigen.nn.foreach import batches

_Slots = list[list[Tensor]]


class _FirstOrder(Optimizer):
    """A rule over lists of parameters, gradients and slots; groups, closures and states as in ``torch.optim``."""

    slots: ClassVar[dict[str, float]] = {}
    """Name of each running tensor, and what it starts from."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which may have values of its own for everything the constructor takes."""
        group = {**self.defaults, **param_group}
        for name in set(self.defaults) & {"lr", "eps", "weight_decay"}:
            if not 0.0 <= group[name] < math.inf:
                raise ValueError(f"{name} is {group[name]}, allowed is a finite number of at least 0")
        for name in set(self.defaults) & {"momentum", "beta1", "beta2"}:
            if not 0.0 <= group[name] < 1.0:
                raise ValueError(f"{name} is {group[name]}, allowed is 0 <= {name} < 1")
        if "rho" in self.defaults and not 0.0 <= group["rho"] <= 1.0:
            raise ValueError(f"rho is {group['rho']}, allowed is 0 <= rho <= 1")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure``, which computes loss and gradients anew, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            together: dict[Any, list[Tensor]] = {}
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.layout != torch.strided or p.is_complex() for p in params):
                raise ValueError("a gradient is sparse or complex, allowed are dense gradients of real parameters")
            for p in params:
                t = self._begin(p) if self.slots else 0
                together.setdefault((p.device, p.dtype, t), []).append(p)
            for (_, _, t), equals in together.items():
                for ps in batches(equals):
                    g = [p.grad for p in ps]
                    if group["weight_decay"]:
                        g = torch._foreach_add(g, ps, alpha=group["weight_decay"])
                    self.update(ps, g, [[self.state[p][name] for p in ps] for name in self.slots], t, group)
        return loss

    def _begin(self, p: Tensor) -> int:
        """Counts a parameter's step, the first of which makes its slots."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            for name, start in self.slots.items():
                state[name] = torch.full_like(p, start, memory_format=torch.preserve_format)
        state["step"] += 1
        return state["step"]

    def update(self, p: list[Tensor], g: Sequence[Tensor], slots: _Slots, t: int, group: dict[str, Any]) -> None:
        """The rule; changes ``p`` and ``slots`` in place."""
        raise NotImplementedError


_ARGUMENTS = """

    ``weight_decay`` adds λ θ to the gradient, in every rule alike: the penalty is part of the loss, so that an inclusion
    holds with it too. Raises ``ValueError`` for values out of range, sparse gradients and complex parameters.
"""


class SGD(_FirstOrder):
    __doc__ = "Stochastic gradient descent, the rule at the bottom of every inclusion." + _ARGUMENTS

    def __init__(self, params: Any, lr: float = 0.01, *, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def update(self, p: list[Tensor], g: Sequence[Tensor], slots: _Slots, t: int, group: dict[str, Any]) -> None:
        torch._foreach_add_(p, g, alpha=-group["lr"])


class Momentum(_FirstOrder):
    __doc__ = "SGD with heavy-ball momentum γ; ``torch.optim.SGD(momentum=γ)`` is the same rule." + _ARGUMENTS
    slots: ClassVar = {"v": 0.0}

    def __init__(self, params: Any, lr: float = 0.01, momentum: float = 0.9, *, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def update(self, p: list[Tensor], g: Sequence[Tensor], slots: _Slots, t: int, group: dict[str, Any]) -> None:
        (v,) = slots
        torch._foreach_mul_(v, group["momentum"])
        torch._foreach_add_(v, g)
        torch._foreach_add_(p, v, alpha=-group["lr"])


class Nesterov(Momentum):
    __doc__ = "SGD with Nesterov momentum γ; ``torch.optim.SGD(nesterov=True)`` is the same rule." + _ARGUMENTS

    def update(self, p: list[Tensor], g: Sequence[Tensor], slots: _Slots, t: int, group: dict[str, Any]) -> None:
        (v,) = slots
        torch._foreach_mul_(v, group["momentum"])
        torch._foreach_add_(v, g)
        torch._foreach_add_(p, v, alpha=-group["lr"] * group["momentum"])
        torch._foreach_add_(p, g, alpha=-group["lr"])


class RMSProp(_FirstOrder):
    __doc__ = (
        "TensorFlow's RMSProp: v starts from 1, ε is under the root, the learning rate inside the momentum."
        + _ARGUMENTS
    )
    slots: ClassVar = {"v": 1.0, "m": 0.0}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        rho: float = 0.9,
        eps: float = 1e-10,
        *,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, rho=rho, eps=eps, weight_decay=weight_decay)

    def update(self, p: list[Tensor], g: Sequence[Tensor], slots: _Slots, t: int, group: dict[str, Any]) -> None:
        v, m = slots
        torch._foreach_mul_(v, group["rho"])
        torch._foreach_addcmul_(v, g, g, 1 - group["rho"])
        root = torch._foreach_add(v, group["eps"])
        torch._foreach_sqrt_(root)
        torch._foreach_mul_(m, group["momentum"])
        torch._foreach_addcdiv_(m, g, root, group["lr"])
        torch._foreach_sub_(p, m)


class Adam(_FirstOrder):
    __doc__ = "TensorFlow's Adam: ε is added to √v before the bias correction (Kingma and Ba's ε̂)." + _ARGUMENTS
    slots: ClassVar = {"m": 0.0, "v": 0.0}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def update(self, p: list[Tensor], g: Sequence[Tensor], slots: _Slots, t: int, group: dict[str, Any]) -> None:
        m, v = slots
        beta1, beta2 = group["beta1"], group["beta2"]
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        root = torch._foreach_sqrt(v)
        torch._foreach_add_(root, group["eps"])
        size = -group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        self.descend(p, g, m, root, size, beta1)

    def descend(
        self, p: list[Tensor], g: Sequence[Tensor], m: list[Tensor], root: Sequence[Tensor], size: float, beta1: float
    ) -> None:
        """p <- p + size · m / root."""
        torch._foreach_addcdiv_(p, m, root, size)


class NAdam(Adam):
    __doc__ = "Adam with Nesterov momentum, with one constant β₁ (no schedule of it, unlike torch's)." + _ARGUMENTS

    def descend(
        self, p: list[Tensor], g: Sequence[Tensor], m: list[Tensor], root: Sequence[Tensor], size: float, beta1: float
    ) -> None:
        """p <- p + size · (β₁ m + (1 - β₁) g) / root."""
        torch._foreach_addcdiv_(p, m, root, size * beta1)
        torch._foreach_addcdiv_(p, g, root, size * (1 - beta1))


OPTIMIZERS: dict[str, type[Optimizer]] = {
    rule.__name__: rule for rule in (SGD, Momentum, Nesterov, RMSProp, Adam, NAdam)
}
"""The six by name, the special before the general."""
