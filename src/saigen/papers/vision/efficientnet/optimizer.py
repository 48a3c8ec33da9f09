"""RMSProp as TensorFlow computes it, which EfficientNet and its relatives are trained with."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class RMSpropTF(Optimizer):
    """RMSProp with epsilon inside the root, mean squares that start at 1, and the learning rate inside the momentum.

    s <- alpha * s + (1 - alpha) * g^2;  m <- momentum * m + lr * g / sqrt(s + eps);  p <- p - m

    ``torch.optim.RMSprop`` differs in all three points and diverges at the published learning rates. ``weight_decay``
    is coupled: weight_decay * p is added to g, the gradient of weight_decay / 2 * |p|^2, as the paper's L2 term is.
    The defaults are the paper's: alpha 0.9, momentum 0.9, eps 1e-3. ``foreach`` updates all parameters of a group in
    a few fused calls; None means wherever all of them are dense. Raises ``ValueError`` for hyper-parameters out of
    range, ``RuntimeError`` for sparse gradients.

    >>> weights = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = RMSpropTF([weights], lr=0.1)
    >>> weights.sum().backward(); optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: int | float | Tensor = 0.256,
        alpha: int | float = 0.9,
        eps: int | float = 1e-3,
        weight_decay: int | float = 0.0,
        momentum: int | float = 0.9,
        *,
        foreach: bool | None = None,
    ) -> None:
        if not isinstance(lr, Tensor) and not lr >= 0:
            raise ValueError(f"lr is {lr}, allowed is at least 0")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}, allowed is 0 <= alpha <= 1")
        if not eps > 0:
            raise ValueError(f"eps is {eps}, allowed is more than 0")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}, allowed is at least 0")
        if not momentum >= 0:
            raise ValueError(f"momentum is {momentum}, allowed is at least 0")
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("foreach", None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads, squares, buffers = [], [], [], []
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("RMSpropTF does not take sparse gradients")
                state = self.state[p]
                if not state:
                    state["square_avg"] = torch.ones_like(p, memory_format=torch.preserve_format)
                    state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                params.append(p)
                grads.append(p.grad)
                squares.append(state["square_avg"])
                buffers.append(state["momentum_buffer"])
            if params:
                update = _update_one_by_one if group["foreach"] is False else _update_foreach
                update(params, grads, squares, buffers, group)
        return loss


def _update_one_by_one(
    params: list[Tensor], grads: list[Tensor], squares: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
) -> None:
    for p, g, s, m in zip(params, grads, squares, buffers, strict=True):
        if group["weight_decay"]:
            g = g.add(p, alpha=group["weight_decay"])
        s.mul_(group["alpha"]).addcmul_(g, g, value=1 - group["alpha"])
        step = g / s.add(group["eps"]).sqrt_()
        m.mul_(group["momentum"]).add_(step.mul_(group["lr"]))
        p.sub_(m)


def _update_foreach(
    params: list[Tensor], grads: list[Tensor], squares: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
) -> None:
    if group["weight_decay"]:
        grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
    torch._foreach_mul_(squares, group["alpha"])
    torch._foreach_addcmul_(squares, grads, grads, value=1 - group["alpha"])
    roots = torch._foreach_add(squares, group["eps"])
    torch._foreach_sqrt_(roots)
    steps = torch._foreach_div(grads, roots)
    torch._foreach_mul_(steps, group["lr"])
    torch._foreach_mul_(buffers, group["momentum"])
    torch._foreach_add_(buffers, steps)
    torch._foreach_sub_(params, buffers)
