"""Sharpness-Aware Minimization: the optimizer of "When Vision Transformers Outperform ResNets …" (arXiv 2106.01548).

SAM (Foret et al., arXiv 2010.01412) minimises the worst loss in a ball around the weights,

    min_w  max_{||ε||₂ <= ρ}  L(w + ε),

and solves the inner problem to first order. With ε held constant, one step is two passes:

    g     = ∇L(w)                     the first pass, on the batch B
    ε     = ρ g / ||g||₂              one norm over all parameters
    g_SAM = ∇L(w + ε)                 the second pass, on the same batch
    w    <- base optimizer(w, g_SAM)  any: the paper's are AdamW and SGD with Nesterov momentum

ASAM (Kwon et al., arXiv 2102.11600) measures the ball in units of the weights: ε = ρ T²g / ||T g||₂ with T = |w|.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


class SAM(Optimizer):
    """SAM around any optimizer; drop-in wherever a training loop calls ``optimizer.step(closure)``.

    ``step(closure)`` calls ``closure`` twice; it zeroes the gradients, computes the loss of the batch, calls
    ``backward`` and returns the loss. Parameter groups, ``state_dict`` and learning-rate schedulers work as on any
    optimizer: the groups are the base optimizer's own.

    - ``base_optimizer``: an optimizer class, or a callable ``(params, **base_args) -> Optimizer``. All further keyword
      arguments (``lr``, ``weight_decay``, …) go to it. Groups with ``maximize=True`` look for the lowest loss instead.
    - ``rho``: the radius of the ball, in units of the weights; the paper takes 0.02 (ResNet) to 0.6 (Mixer-B/16).
      May be set per group, under one norm. Where it is 0 everywhere, the step is the base optimizer's, at its cost.
    - ``adaptive``: ASAM. It wants a ``rho`` about ten times larger.
    - ``perturb_eps``: added to the norm, against division by zero; the official code has none.
    - ``l2``: the penalty l2/2 ||w||², part of the loss in *both* passes, as the official code has it for its SGD models.
      (The base optimizer's own ``weight_decay`` acts only on the update, which is what AdamW means.) May be per group.
    - ``max_grad_norm``: clips the global norm of g_SAM, and of nothing else. Global-norm clipping within the closure
      also leaves ε as it is; clipping by value there would bend it.
    - ``model``: when given, its buffers (batch norm's running statistics and counter) keep what the first pass made of
      them. Where it is a ``DistributedDataParallel``, the first pass is not synchronised: each process perturbs by
      its own share of the batch and only g_SAM is averaged, as in the official code, which calls it m-sharpness.
      ``sync_perturbation=True`` synchronises both passes.
    - ``scaler``: a ``torch.amp.GradScaler``, where the closure calls ``scaler.scale(loss).backward()``. Call
      ``scaler.update()`` after the step, as usual, but neither ``scaler.step`` nor ``scaler.unscale_``.

    Both passes see the same random numbers, so that dropout drops the same units, and the step leaves torch's
    generators where one pass leaves them. The weights are put back from a copy before the update, bit for bit, also
    when the closure raises.

    Raises ``ValueError`` for a negative ``rho``, ``l2`` or ``perturb_eps``, a ``base_optimizer`` that is no optimizer,
    complex parameters, sparse gradients, and ``step`` without a closure.

    >>> net = torch.nn.Linear(4, 1)
    >>> optimizer = SAM(net.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-3, weight_decay=0.3)
    >>> x, y = torch.rand(8, 4), torch.rand(8, 1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(net(x), y)
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        perturb_eps: float = 1e-12,
        l2: float = 0.0,
        max_grad_norm: float | None = None,
        model: nn.Module | None = None,
        sync_perturbation: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        **base_args: Any,
    ) -> None:
        _check_radii({"rho": rho, "l2": l2, "perturb_eps": perturb_eps})
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}, allowed is a number above 0, or None")
        if not callable(base_optimizer):
            raise ValueError(f"base_optimizer is {base_optimizer!r}, allowed is an optimizer class or a callable")
        base = base_optimizer(params, **base_args)
        if not isinstance(base, Optimizer):
            raise ValueError(f"base_optimizer made {base!r}, allowed is a torch.optim.Optimizer")
        super().__init__(base.param_groups, {"rho": rho, "adaptive": adaptive, "l2": l2})
        self.base_optimizer = base
        self.param_groups = base.param_groups  # one list for both: schedulers and new groups reach the base optimizer
        self.defaults = {**base.defaults, **self.defaults}
        self.perturb_eps = perturb_eps
        self.max_grad_norm = max_grad_norm
        self.model = model
        self.sync_perturbation = sync_perturbation
        self.scaler = scaler
        self.in_second_pass = False  # a closure may look: "log only in the first pass"
        self._room: dict[Tensor, Tensor] = {}  # where the copies of the weights go, kept from step to step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to both optimizers; it may have its own ``rho``, ``adaptive`` and ``l2``."""
        params = param_group["params"]
        param_group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
        _check_radii(param_group)
        for number, p in enumerate(params):
            p = p[1] if isinstance(p, tuple) else p
            if isinstance(p, Tensor) and p.is_complex():
                raise ValueError(f"parameter {number} of a group is {p.dtype}, allowed are real parameters")
        if not hasattr(self, "base_optimizer"):  # within torch's __init__: the base optimizer has these groups already
            super().add_param_group(param_group)
            return
        for name in ("rho", "adaptive", "l2"):
            param_group.setdefault(name, self.defaults[name])
        self.base_optimizer.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both passes and the base optimizer's update; returns the loss of the first pass, L(w).

        Without a closure it finishes what ``first_step`` began, for loops that run the two passes themselves.
        """
        if closure is None:
            if not self.perturbed:
                raise ValueError("closure is None, allowed is a function that zeroes, computes and returns the loss")
            self.second_step()
            return None
        closure = torch.enable_grad()(closure)
        perturbs = any(group["rho"] > 0 for group in self.param_groups)
        if not perturbs:
            loss = closure()
        else:
            randomness = _random_states(self.param_groups)
            with self._unsynchronised():
                loss = closure()
            self.first_step(zero_grad=True)
            _restore_random_states(randomness)
            self.in_second_pass = True
            try:
                with keep_buffers(self.model) if self.model is not None else nullcontext():
                    closure()
            except BaseException:
                self._restore()
                raise
            finally:
                self.in_second_pass = False
        self.second_step()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Goes from w to w + ε, given the gradients at w (equation 2 of the SAM paper); keeps a copy of w.

        Raises ``RuntimeError`` when the weights are perturbed already.
        """
        if self.perturbed:
            raise RuntimeError("the weights are perturbed already: second_step comes before the next first_step")
        loss_scale = self._loss_scale()
        climbs, lengths = [], []
        for group in self.param_groups:
            p = [p for p in group["params"] if p.grad is not None]
            if not p:
                continue
            g = [p.grad for p in p]
            if any(g.layout != torch.strided for g in g):
                raise ValueError("a gradient is sparse, allowed are dense gradients: the norm needs all of it")
            if group["l2"]:
                g = torch._foreach_add(g, torch._foreach_mul(p, group["l2"] * loss_scale))
            if group["adaptive"]:
                t = torch._foreach_abs(p)
                tg = torch._foreach_mul(t, g)
                lengths += _norms(tg)
                g = torch._foreach_mul(t, tg)
            else:
                lengths += _norms(g)
            climbs.append((group, p, g))
        if lengths:
            # ε does not depend on the scale of the loss, so under a GradScaler nothing needs to be unscaled here
            norm = torch.linalg.vector_norm(torch.stack([length.to(lengths[0].device) for length in lengths]))
            norm = norm + self.perturb_eps * loss_scale
            for group, p, g in climbs:
                if group["rho"] > 0:
                    self._save(p)
                    _add_scaled(p, g, (-group["rho"] if group.get("maximize") else group["rho"]) / norm)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Puts w back and lets the base optimizer step with the gradients at w + ε."""
        if self.scaler is not None:
            self.scaler.unscale_(self.base_optimizer)
        for group in self.param_groups:
            p = [p for p in group["params"] if p.grad is not None]
            if group["l2"] and p:
                torch._foreach_add_([p.grad for p in p], torch._foreach_mul(p, group["l2"]))
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self.max_grad_norm)
        self._restore()
        if self.scaler is not None:
            self.scaler.step(self.base_optimizer)
        else:
            self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @property
    def perturbed(self) -> bool:
        """True between ``first_step`` and ``second_step``, while the parameters hold w + ε."""
        return bool(self.state)

    def _save(self, params: list[Tensor]) -> None:
        copies = []
        for p in params:
            room = self._room.get(p)
            if room is None or room.shape != p.shape or room.dtype != p.dtype or room.device != p.device:
                room = self._room[p] = torch.empty_like(p)
            self.state[p]["w"] = room
            copies.append(room)
        torch._foreach_copy_(copies, params)

    @torch.no_grad()
    def _restore(self) -> None:
        if self.state:
            # copied, not subtracted: (w + ε) - ε is not w in floating point
            torch._foreach_copy_(list(self.state), [saved["w"] for saved in self.state.values()])
            self.state.clear()

    def _loss_scale(self) -> Tensor | float:
        if self.scaler is None or not self.scaler.is_enabled():
            return 1.0
        device = self.param_groups[0]["params"][0].device
        return self.scaler.scale(torch.ones((), device=device))

    def _unsynchronised(self) -> Any:
        if isinstance(self.model, DistributedDataParallel) and not self.sync_perturbation:
            return self.model.no_sync()
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state under ``"base_optimizer"``; between the two steps also the unperturbed weights."""
        return {**super().state_dict(), "base_optimizer": self.base_optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on exactly where ``state_dict`` was taken; raises ``ValueError`` where it is not SAM's."""
        if "base_optimizer" not in state_dict:
            raise ValueError(f"state_dict has the keys {list(state_dict)}, allowed is one that SAM.state_dict gave")
        self.base_optimizer.load_state_dict(state_dict["base_optimizer"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "base_optimizer"})

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "base_optimizer",
            "perturb_eps",
            "max_grad_norm",
            "model",
            "sync_perturbation",
            "scaler",
            "in_second_pass",
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.param_groups = self.base_optimizer.param_groups
        self._room = {}


@contextmanager
def keep_buffers(model: nn.Module) -> Iterator[None]:
    """Within the block ``model``'s buffers may change; afterwards they are what they were before.

    SAM's second pass runs in it, so that batch norm's running statistics see each batch once, at w and not at w + ε.
    For loops that call ``first_step`` and ``second_step`` themselves.

    >>> norm = torch.nn.BatchNorm1d(3)
    >>> with keep_buffers(norm):
    ...     _ = norm(torch.rand(4, 3))
    >>> norm.running_mean.tolist(), norm.num_batches_tracked.item()
    ([0.0, 0.0, 0.0], 0)
    """
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                setattr(module, name, buffer.copy_(value))


def _check_radii(values: dict[str, Any]) -> None:
    for name in ("rho", "l2", "perturb_eps"):
        if name in values and not 0.0 <= values[name] < float("inf"):
            raise ValueError(f"{name} is {values[name]}, allowed is a finite number of at least 0")


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    # the squares of half-precision numbers leave their range
    half = tensors[0].dtype in (torch.float16, torch.bfloat16)
    return list(torch._foreach_norm(tensors, dtype=torch.float32) if half else torch._foreach_norm(tensors))


def _add_scaled(params: Sequence[Tensor], directions: Sequence[Tensor], scale: Tensor) -> None:
    for device in {p.device for p in params}:
        here = [i for i, p in enumerate(params) if p.device == device]
        p, d, factor = [params[i] for i in here], [directions[i] for i in here], scale.to(device)
        if device.type == "cpu":
            # one pass over the memory and no temporary; on a GPU two fused kernels beat a kernel for each tensor
            torch._foreach_addcmul_(p, d, [factor] * len(p))
        else:
            torch._foreach_add_(p, torch._foreach_mul(d, factor))


def _random_states(param_groups: list[dict[str, Any]]) -> dict[torch.device, Tensor]:
    devices = {p.device for group in param_groups for p in group["params"]} - {torch.device("cpu")}
    states = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}
    return {torch.device("cpu"): torch.get_rng_state(), **states}


def _restore_random_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
