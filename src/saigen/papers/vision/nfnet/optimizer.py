"""Adaptive gradient clipping (AGC; section 4 and equation 3): each unit's gradient is held to a share of its weights.

    if  ||G_i|| > λ max(||W_i||, ε):   G_i <- λ max(||W_i||, ε) G_i / ||G_i||

for each unit i: a row of a linear layer, a filter of a convolution; a bias, a vector of gains or a scalar is one unit
as a whole. The ratio says how far one step of gradient descent would move the unit, in units of itself. It comes before
weight decay and momentum. The weight of the last linear layer is never clipped.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def unitwise_norm(x: Tensor) -> Tensor:
    """||x_i|| for each unit, shaped to be multiplied with ``x``; one number where ``x`` has at most one long dimension."""
    if sum(size > 1 for size in x.shape) <= 1:
        return torch.linalg.vector_norm(x)
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


@torch.no_grad()
def adaptive_clip_grad_(parameters: Tensor | Iterable[Tensor], clipping: float = 0.01, eps: float = 1e-3) -> None:
    """Clips the ``.grad`` of ``parameters`` in place, unit by unit; those without a gradient stay as they are.

    To be called between ``backward`` and ``step``, without the parameters of the last linear layer: ``nfnet_param_groups``
    knows them, and ``AGC`` does it all. ``clipping`` is λ, ``eps`` lets units grow that start from zero.
    Raises ``ValueError`` where one of them is not above 0, and for sparse gradients.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    >>> weight.grad = torch.tensor([[0.0, 1.0], [0.0, 0.001]])
    >>> adaptive_clip_grad_(weight, clipping=0.01)
    >>> [round(value, 6) for value in weight.grad[:, 1].tolist()]
    [0.05, 0.001]
    """
    _check(clipping, eps)
    for w in [parameters] if isinstance(parameters, Tensor) else parameters:
        g = w.grad
        if g is None:
            continue
        if g.layout != torch.strided:
            raise ValueError("a gradient is sparse, allowed are dense gradients: the norm needs all of a unit")
        limit = unitwise_norm(w).clamp_(min=eps).mul_(clipping)
        norm = unitwise_norm(g)
        # the floor under the norm, and what it does to limits below it, are the official code's
        g.mul_(torch.where(norm > limit, limit / norm.clamp(min=1e-6), 1.0).to(g.dtype))


class AGC(Optimizer):
    """Adaptive gradient clipping before the step of any optimizer.

    ``base_optimizer`` is an optimizer class, or a callable ``(params, **base_args) -> Optimizer``; further keyword
    arguments go to it. Its parameter groups are the wrapper's own; each may have its ``clipping``, λ (None: the group is
    not clipped), and ``clipping_eps``. ``step(closure)`` works with optimizers that call the closure once or more often; a
    gradient is clipped each time it was computed. Without a closure, ``step`` clips what is in ``.grad``.

    Raises ``ValueError`` for a ``clipping`` or ``clipping_eps`` not above 0, and a ``base_optimizer`` that is no optimizer.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "clipping": None}]
    >>> optimizer = AGC(groups, torch.optim.SGD, clipping=0.01, lr=0.1, momentum=0.9, nesterov=True)
    >>> model(torch.rand(3, 4)).sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        *,
        clipping: float | None = 0.01,
        clipping_eps: float = 1e-3,
        **base_args: Any,
    ) -> None:
        _check(clipping, clipping_eps)
        if not callable(base_optimizer):
            raise ValueError(f"base_optimizer is {base_optimizer!r}, allowed is an optimizer class or a callable")
        base = base_optimizer(params, **base_args)
        if not isinstance(base, Optimizer):
            raise ValueError(f"base_optimizer made {base!r}, allowed is a torch.optim.Optimizer")
        super().__init__(base.param_groups, {"clipping": clipping, "clipping_eps": clipping_eps})
        self.base_optimizer = base
        self._share_groups()

    def _share_groups(self) -> None:
        # one list for both, so that schedulers and new groups reach the base optimizer
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self.defaults = {**self.base_optimizer.defaults, **self.defaults}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to both optimizers; it may have its own ``clipping`` and ``clipping_eps``."""
        _check(param_group.get("clipping"), param_group.get("clipping_eps", 1.0))
        if not hasattr(self, "base_optimizer"):  # within torch's __init__: the base optimizer has these groups already
            super().add_param_group(param_group)
            return
        for name in ("clipping", "clipping_eps"):
            param_group.setdefault(name, self.defaults[name])
        self.base_optimizer.add_param_group(param_group)

    def clip(self) -> None:
        """Clips the gradients as they are, group by group."""
        for group in self.param_groups:
            if group["clipping"] is not None:
                adaptive_clip_grad_(group["params"], group["clipping"], group["clipping_eps"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips and lets the base optimizer step; returns what it returns."""
        if closure is None:
            self.clip()
            return self.base_optimizer.step()

        def clipped() -> Any:
            with torch.enable_grad():
                loss = closure()
            self.clip()
            return loss

        return self.base_optimizer.step(clipped)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's; ``clipping`` stands in its groups."""
        return self.base_optimizer.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base_optimizer": self.base_optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share_groups()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken."""
        self.base_optimizer.load_state_dict(state_dict)
        self._share_groups()


def nfnet_param_groups(
    model: nn.Module, weight_decay: float = 2e-5, clipping: float | None = 0.01
) -> list[dict[str, Any]]:
    """Parameter groups with the paper's exceptions, for ``AGC`` around an optimizer that knows ``weight_decay``.

    The classifier's weight (of the layer ``model.classifier_name`` names) decays and is not clipped. Gains, biases and
    skip gains, the classifier's bias among them, are clipped and do not decay. All else is clipped and decays.
    Raises ``ValueError`` where the model does not say which layer its classifier is.

    >>> from saigen.papers.vision.nfnet import NFNet, NF_RESNET
    >>> groups = nfnet_param_groups(NFNet((1,), (16,), design=NF_RESNET, num_classes=2))
    >>> [(len(group["params"]), group["weight_decay"], group["clipping"]) for group in groups]
    [(5, 2e-05, 0.01), (12, 0.0, 0.01), (1, 2e-05, None)]
    """
    name = getattr(model, "classifier_name", None)
    if name is None:
        raise ValueError(f"model is {type(model).__name__} without classifier_name, allowed is a model that has one")
    classifier = f"{name}.weight"
    weights, scales, last = [], [], []
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = key.rpartition(".")[2]
        group = (
            last if key == classifier else scales if "gain" in kind or "bias" in kind or parameter.ndim < 2 else weights
        )
        group.append(parameter)
    return [
        {"params": weights, "weight_decay": weight_decay, "clipping": clipping},
        {"params": scales, "weight_decay": 0.0, "clipping": clipping},
        {"params": last, "weight_decay": weight_decay, "clipping": None},
    ]


def _check(clipping: float | None, eps: float) -> None:
    if not (clipping is None or clipping > 0.0):
        raise ValueError(f"clipping is {clipping}, allowed is a number above 0")
    if not eps > 0.0:
        raise ValueError(f"eps is {eps}, allowed is a number above 0")
