"""Rectified Adam: the optimizer of "On the Variance of the Adaptive Learning Rate and Beyond" (arXiv 1908.03265).

Adam divides by the root of v_t, a running mean of squared gradients. In the first steps that mean has seen so few of
them that the adaptive learning rate ψ = √((1 - β₂ᵗ) / v_t) has no finite variance. RAdam (algorithm 2) asks how many
samples the running mean is worth, and scales the step so that its variance is from the start what it will be at the end:

    ρ_∞ = 2 / (1 - β₂) - 1                               the most it is ever worth
    ρ_t = ρ_∞ - 2 t β₂ᵗ / (1 - β₂ᵗ)                      what it is worth after t steps
    r_t = √((ρ_t - 4)(ρ_t - 2) ρ_∞ / ((ρ_∞ - 4)(ρ_∞ - 2) ρ_t))

    m_t = β₁ m_{t-1} + (1 - β₁) g,   v_t = β₂ v_{t-1} + (1 - β₂) g²,   m̂_t = m_t / (1 - β₁ᵗ)
    where ρ_t is above the threshold:   θ <- θ - α_t r_t m̂_t √(1 - β₂ᵗ) / (√v_t + ε)
    before that, momentum alone:        θ <- θ - α_t m̂_t
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from saigen.nn.foreach import batches
from saigen.papers.training.radam.variance import rectification, sma_length

_Batch = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]  # parameters, gradients, m, v


class _RectifiableAdam(Optimizer):
    """What the two optimizers share: the running means, and a step of a given size down one of two directions."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which may have values of its own for everything the constructor takes."""
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not 0.0 <= float(group[name]) < math.inf:
                raise ValueError(f"{name} is {group[name]}, allowed is a finite number of at least 0")
        betas = group["betas"]
        if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
            raise ValueError(f"betas is {betas}, allowed are two numbers, both 0 <= beta < 1")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():  # a state of torch.optim.RAdam has no threshold and no fallback
                group.setdefault(name, value)
            for p in group["params"]:
                if "step" in self.state.get(p, {}):
                    step = self.state[p]["step"]
                    on_device = group.get("capturable", False)
                    self.state[p]["step"] = _counter(float(step), p.device) if on_device else int(step)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure``, which computes loss and gradients anew, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for batch, t in self._batches(group):
                self._update(batch, t, group)
        return loss

    def _batches(self, group: dict[str, Any]) -> Iterator[tuple[_Batch, int | Tensor]]:
        """Parameters that can be updated together, with the number of the step, this one included."""
        on_device = group.get("capturable", False)
        together: dict[Any, list[Tensor]] = {}
        params = [p for p in group["params"] if p.grad is not None]
        if any(p.grad.layout != torch.strided for p in params):
            raise ValueError("a gradient is sparse, allowed are dense gradients: both averages decay everywhere")
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = _counter(0.0, p.device) if on_device else 0
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["step"] += 1
            # where the counters must not be read, nobody knows which are equal: each parameter goes by itself
            age = id(p) if on_device else state["step"]
            together.setdefault((p.device, p.dtype, age), []).append(p)
        for (_, dtype, age), equals in together.items():
            for ps in batches(equals, group["foreach"]):
                states = [self.state[p] for p in ps]
                batch = ps, [p.grad for p in ps], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
                if dtype.is_complex:
                    batch = tuple([torch.view_as_real(tensor) for tensor in part] for part in batch)
                yield batch, states[0]["step"] if on_device else age

    def _update(self, batch: _Batch, t: int | Tensor, group: dict[str, Any]) -> None:
        p, g, m, v = batch
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        if group["maximize"]:
            g = torch._foreach_neg(g)
        if decay and not group.get("decoupled_weight_decay", True):
            g = torch._foreach_add(g, p, alpha=decay)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        if self._only_estimates(t, group):
            return
        torch._foreach_lerp_(m, g, 1 - beta1)
        if isinstance(t, Tensor):
            self._descend_on_device(batch, t, group)
        else:
            self._descend(batch, t, group)

    def _descend(self, batch: _Batch, t: int, group: dict[str, Any]) -> None:
        p, _, m, v = batch
        (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), group["weight_decay"]
        r, momentum = self._factors(t, group)
        if not r and not momentum:
            return
        if decay and group.get("decoupled_weight_decay", True):
            torch._foreach_mul_(p, 1 - lr * decay)
        size = lr / (1 - beta1**t)
        if r:
            denominator = torch._foreach_sqrt(v)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_addcdiv_(p, m, denominator, -size * r * math.sqrt(1 - beta2**t))
        else:
            torch._foreach_add_(p, m, alpha=-size)

    def _only_estimates(self, t: int | Tensor, group: dict[str, Any]) -> bool:
        """True where the step moves neither m nor the parameters."""
        return False

    def _factors(self, t: int, group: dict[str, Any]) -> tuple[float, bool]:
        """The factor of the adaptive step, and whether, that being 0, there is a momentum step in its place."""
        raise NotImplementedError

    def _descend_on_device(self, batch: _Batch, t: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


class RAdam(_RectifiableAdam):
    """Adam whose adaptive step is rectified; drop-in for ``torch.optim.AdamW``, and no warm-up is needed.

    - ``lr``, ``betas``, ``eps``: as Adam's. ``eps`` is added to √v before the bias correction, as in the paper. With
      β₂ <= 0.6 the variance never becomes finite and every step is a momentum step.
    - ``weight_decay``: decoupled, θ <- θ - α_t λ θ, as in all of the paper's experiments;
      ``decoupled_weight_decay=False`` adds λ θ to the gradient instead, which is ``torch.optim.RAdam``'s default.
    - ``threshold``: the step is adaptive where ρ_t > threshold. The paper's text says 4, where the variance begins to
      exist; the official code and PyTorch say 5, because ρ_t is itself an approximation. For 0.9 <= β₂ < 1 the first
      adaptive step is the fifth (4) or the sixth (5).
    - ``fallback``: ``"momentum"`` is the paper's algorithm. ``"skip"`` leaves the parameters alone, weight decay
      included, until the step is adaptive; it is the default of the official code since its first release as a package,
      because the momentum steps take the raw gradient and a learning rate that was meant for Adam.
    - ``foreach``: all parameters in a few calls instead of a few calls for each. None: where they are on a GPU, and on
      a CPU where they are small, so that calls are what the step costs.
    - ``capturable``: the step counters stay on the parameters' device and nothing waits for them, as CUDA graphs need;
      ``lr`` may then be a tensor there.

    Each parameter counts its own steps, so one that gets gradients late has its own ρ_t. The state has the names and
    shapes of ``torch.optim.RAdam``, whose ``state_dict`` can be loaded.

    Raises ``ValueError`` for values out of range and for sparse gradients.

    >>> net = torch.nn.Linear(4, 1)
    >>> optimizer = RAdam(net.parameters(), lr=1e-3, weight_decay=1e-4)
    >>> net(torch.rand(8, 4)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = True,
        threshold: float = 5.0,
        fallback: Literal["momentum", "skip"] = "momentum",
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "threshold": threshold,
            "fallback": fallback,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not group["threshold"] >= 4.0:
            raise ValueError(
                f"threshold is {group['threshold']}, allowed is at least 4, where the variance begins to exist"
            )
        if group["fallback"] not in ("momentum", "skip"):
            raise ValueError(f"fallback is {group['fallback']!r}, allowed is 'momentum' or 'skip'")

    def _factors(self, t: int, group: dict[str, Any]) -> tuple[float, bool]:
        beta2 = group["betas"][1]
        if sma_length(t, beta2) > group["threshold"]:
            return rectification(t, beta2), False
        return 0.0, group["fallback"] == "momentum"

    def _descend_on_device(self, batch: _Batch, t: Tensor, group: dict[str, Any]) -> None:
        """The same step without a branch on t: both of its forms, of which one has the factor 0."""
        p, _, m, v = batch
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        t = t.double()
        longest, corrected = 2 / (1 - beta2) - 1, 1 - beta2**t
        rho = longest - 2 * t * (1 - corrected) / corrected
        adaptive = rho > group["threshold"]
        square = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
        r = torch.where(adaptive, square, 0.0).sqrt()
        momentum = torch.where(adaptive, 0.0, float(group["fallback"] == "momentum"))
        if decay and group["decoupled_weight_decay"]:
            torch._foreach_mul_(p, (1 - lr * decay * (r + momentum > 0)).to(p[0].dtype))
        size = lr / (1 - beta1**t)
        scale = torch._foreach_sqrt(v)
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_reciprocal_(scale)
        torch._foreach_mul_(scale, (size * r * corrected.sqrt()).to(p[0].dtype))
        torch._foreach_add_(scale, (size * momentum).to(p[0].dtype))
        torch._foreach_addcmul_(p, m, scale, value=-1.0)


class DelayedAdam(_RectifiableAdam):
    """The paper's Adam, and its Adam-2k: for ``freeze_steps`` steps only v is estimated, then Adam begins (section 3.1).

    It shows where the trouble comes from: with more samples for v before the first step, plain Adam needs no warm-up.
    As in the official code the frozen steps count in both bias corrections, and m, which has not seen them, starts from
    zero. ``freeze_steps=0`` is the paper's baseline, AdamW with ``eps`` added before the bias correction; with
    ``eps=1e-4`` its Adam-eps. Weight decay is decoupled.

    Raises ``ValueError`` for a negative ``freeze_steps`` and whatever RAdam refuses.

    >>> net = torch.nn.Linear(4, 1)
    >>> optimizer = DelayedAdam(net.parameters(), lr=1e-3, freeze_steps=2000)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_steps: int = 2000,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "freeze_steps": freeze_steps,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not group["freeze_steps"] >= 0:
            raise ValueError(f"freeze_steps is {group['freeze_steps']}, allowed is a whole number of at least 0")

    def _only_estimates(self, t: int | Tensor, group: dict[str, Any]) -> bool:
        return t <= group["freeze_steps"]

    def _factors(self, t: int, group: dict[str, Any]) -> tuple[float, bool]:
        return 1.0, False


def _counter(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)
