"""Lookahead (Zhang et al., 2019, arXiv 1907.08610): every k steps of an optimizer, a step of slow weights towards it.

theta <- k steps of the inner optimizer from phi        the fast weights
phi   <- phi + alpha (theta - phi);   theta <- phi      the slow weights, one step for k
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Lookahead(Optimizer):
    """Lookahead around ``optimizer``; drop-in wherever a training loop steps an optimizer.

    The parameter groups are the inner optimizer's own, so that schedulers and new groups reach it, and its momentum
    goes on over the slow step. ``state_dict`` holds both, with the count of steps, so that resuming is exact between
    slow steps too. ``k`` is the number of inner steps for one of the slow weights, ``alpha`` the length of that.

    Raises ``ValueError`` for an ``optimizer`` that is none, ``k`` below 1, ``alpha`` outside (0, 1], and a state that
    is not Lookahead's.

    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = Lookahead(torch.optim.SGD([w], lr=1.0), k=2, alpha=0.5)
    >>> for _ in range(2):
    ...     w.grad = -torch.ones(1)
    ...     _ = optimizer.step()
    >>> w.item()
    1.0
    """

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer is {optimizer!r}, allowed is a torch.optim.Optimizer")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k is {k!r}, allowed is a whole number of steps, at least 1")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha!r}, allowed is 0 < alpha <= 1")
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups  # one list for both
        self.defaults = optimizer.defaults
        self.k, self.alpha, self.steps = k, alpha, 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to both; its slow weights start from what they are at the next step."""
        if hasattr(self, "optimizer"):
            self.optimizer.add_param_group(param_group)
        else:  # within torch's __init__: the inner optimizer has these groups already
            super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer and, after every k-th, one of the slow weights; returns what the closure gave."""
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            if "slow" not in self.state[p]:
                self.state[p]["slow"] = p.detach().clone()
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            slow = [self.state[p]["slow"] for p in params]
            torch._foreach_lerp_(slow, params, self.alpha)
            torch._foreach_copy_(params, slow)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The slow weights and the count of steps, and the inner optimizer's state under ``"optimizer"``."""
        return {**super().state_dict(), "steps": self.steps, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on exactly where ``state_dict`` was taken; raises ``ValueError`` where it is not Lookahead's."""
        if "optimizer" not in state_dict or "steps" not in state_dict:
            raise ValueError(
                f"state_dict has the keys {list(state_dict)}, allowed is one that Lookahead.state_dict gave"
            )
        self.optimizer.load_state_dict(state_dict["optimizer"])
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.steps = state_dict["steps"]

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in ("optimizer", "k", "alpha", "steps")},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.param_groups = self.optimizer.param_groups
