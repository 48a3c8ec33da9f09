"""What NPT is trained by: LAMB (You et al., 2020) inside Lookahead, at a rate that is flat and then falls."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from saigen.nn.foreach import batches
from saigen.nn.lookahead import Lookahead


class Lamb(Optimizer):
    """LAMB without bias correction: Adam's direction, of each tensor scaled to the length of its weights.

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2;   u = m / (sqrt(v) + eps) + weight_decay w
    w <- w - lr (min(|w|, clamp) / |u|) u                   the ratio is 1 where either norm is 0

    >>> w = nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> w.grad = torch.ones(2)
    >>> _ = Lamb([w], lr=0.1).step()
    >>> w.norm().item() < 5
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clamp: float = 10.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("clamp", clamp)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}, allowed is 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {betas}, allowed are two numbers of at least 0 and below 1")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clamp": clamp}
        )  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure gave."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for part in batches(params):
                self._step(part, group)
        return loss

    def _step(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        grads, (b1, b2) = [p.grad for p in params], group["betas"]
        m, v = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, 1 - b2)
        u = torch._foreach_sqrt(v)
        torch._foreach_add_(u, group["eps"])
        u = torch._foreach_div(m, u)
        if group["weight_decay"]:
            torch._foreach_add_(u, params, alpha=group["weight_decay"])
        # No .item(): the ratios stay where the weights are.
        w, length = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(u))
        ratios = torch.where((w > 0) & (length > 0), w.clamp(max=group["clamp"]) / length, torch.ones_like(w))
        for p, direction, ratio in zip(params, u, ratios.unbind(), strict=True):
            p.addcmul_(direction, ratio, value=-group["lr"])


def flat_then_cosine(flat: float = 0.7) -> Callable[[int, int], float]:
    """A factor of the learning rate at (step, steps): 1 for the share ``flat`` of training, then half a cosine to 0.

    >>> [round(flat_then_cosine(0.5)(step, 8), 3) for step in (0, 4, 6, 8)]
    [1.0, 1.0, 0.5, 0.0]
    """
    if not 0 <= flat <= 1:
        raise ValueError(f"flat is {flat}, allowed are 0 to 1")

    def factor(step: int, steps: int) -> float:
        done = (step / steps - flat) / (1 - flat) if flat < 1 else 0.0
        return 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))

    return factor


def lookahead_lamb(params: Iterable[nn.Parameter], lr: float = 1e-3, *, k: int = 6, alpha: float = 0.5) -> Lookahead:
    """The paper's optimizer: every ``k`` steps of LAMB the slow weights go ``alpha`` of the way."""
    return Lookahead(Lamb(params, lr), k=k, alpha=alpha)
