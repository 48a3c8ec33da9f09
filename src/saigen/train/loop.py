"""The training loop: one for all rooms, exact to resume, the same on one process and under ``torchrun``."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saigen.files import replacing
from saigen.train.schedule import Schedule

Transform = Callable[..., tuple[Any, ...]]


class EMA:
    """An exponential moving average of a model's parameters and buffers: ``average = decay * average + (1 - decay) * now``.

    Integer buffers (BN's batch counter) are copied. ``ema.model`` is the averaged model, in eval mode.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        import copy

        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}, allowed is 0 <= decay < 1")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average one step towards ``model``."""
        for average, now in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(now.to(average), 1.0 - self.decay)
            else:
                average.copy_(now)


@dataclass
class History:
    """What a training gave: the loss of every step."""

    losses: list[float] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """True where a loss was not finite."""
        return not all(math.isfinite(loss) for loss in self.losses)


def _order(seed: int, epoch: int, n: int) -> Tensor:
    """The data order of an epoch: a pure function of (seed, epoch), so that a resumed run sees the same batches."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(_mix(seed, epoch, 0)))


def _mix(seed: int, counter: int, stream: int) -> int:
    # SplitMix64's finaliser: neighbouring (seed, counter) give unrelated generator seeds.
    z = (seed * 0x9E3779B97F4A7C15 + counter * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB + 1) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1


def fit(
    model: nn.Module,
    loss: Callable[..., Tensor],
    data: Sequence[Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int,
    seed: int,
    schedule: Schedule | None = None,
    transform: Transform | None = None,
    clip: float | None = None,
    ema: EMA | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    device: torch.device | str = "cpu",
    mixed_precision: str = "no",
    drop_last: bool = True,
    on_step: Callable[[int, int, float], None] | None = None,
) -> History:
    """Trains ``model`` on ``data``, tensors of equal length, and returns the losses.

    ``loss(model, *batch)`` gives a scalar. Every step calls ``optimizer.step(closure)``, so that optimizers which look
    twice (SAM) need nothing else. ``transform(generator, *batch)`` augments a batch with a generator that is a pure
    function of (seed, step). ``clip`` is the largest global gradient norm. ``schedule(step, total)`` multiplies the
    initial learning rate of each group. Dropout and stochastic depth draw from a stream of (seed, step) as well.
    With ``checkpoint`` the state is written there every ``checkpoint_every`` steps and a run that finds the file goes on
    from it to the bits of an unbroken run. Under ``torchrun`` every process takes its share of each batch.

    Raises ``ValueError`` for empty data, unequal lengths, or when not exactly one of ``epochs`` and ``steps`` is given.
    """
    from accelerate import Accelerator

    if not data or any(len(tensor) != len(data[0]) for tensor in data) or len(data[0]) == 0:
        raise ValueError(
            f"data has lengths {[len(tensor) for tensor in data]}, allowed are equal lengths of at least 1"
        )
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs is {epochs} and steps is {steps}, allowed is exactly one of them")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, allowed is a whole number of at least 1")
    n = len(data[0])
    batch_size = min(batch_size, n)
    per_epoch = n // batch_size if drop_last else math.ceil(n / batch_size)
    total = steps if steps is not None else epochs * per_epoch

    accelerator = Accelerator(cpu=torch.device(device).type == "cpu", mixed_precision=mixed_precision)
    if accelerator.num_processes > 1:
        device = accelerator.device
    model.to(device).train()
    if ema is not None:
        ema.model.to(device)
    wrapped = accelerator.prepare_model(model) if accelerator.num_processes > 1 or mixed_precision != "no" else model
    initial = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    history = History()
    start = _resume(checkpoint, model, optimizer, ema, history) if checkpoint is not None else 0

    outer_state = torch.get_rng_state()
    order, order_epoch = None, None
    try:
        for step in range(start, total):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                order, order_epoch = _order(seed, epoch, n), epoch
            indices = order[position * batch_size : (position + 1) * batch_size]
            batch = tuple(tensor[indices] for tensor in data)
            if transform is not None:
                batch = tuple(transform(torch.Generator().manual_seed(_mix(seed, step, 1)), *batch))
            if accelerator.num_processes > 1:
                batch = tuple(tensor[accelerator.process_index :: accelerator.num_processes] for tensor in batch)
            batch = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
            if schedule is not None:
                for group, lr in zip(optimizer.param_groups, initial, strict=True):
                    group["lr"] = lr * schedule(step, total)

            def closure() -> Tensor:
                torch.manual_seed(_mix(seed, step, 2))
                optimizer.zero_grad(set_to_none=True)
                with accelerator.autocast():
                    value = loss(wrapped, *batch)
                accelerator.backward(value)
                if clip is not None:
                    nn.utils.clip_grad_norm_(parameters, clip)
                return value.detach()

            value = float(optimizer.step(closure))
            history.losses.append(value)
            if ema is not None:
                ema.update(model)
            if on_step is not None:
                on_step(step, total, value)
            if (
                checkpoint is not None
                and accelerator.is_main_process
                and (step + 1) % checkpoint_every == 0
                and step + 1 < total
            ):
                _save(checkpoint, step + 1, model, optimizer, ema, history)
    finally:
        torch.set_rng_state(outer_state)
    if checkpoint is not None and accelerator.is_main_process:
        _save(checkpoint, total, model, optimizer, ema, history)
    model.eval()
    return history


def _save(
    path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, history: History
) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": None if ema is None else ema.model.state_dict(),
        "losses": history.losses,
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, history: History) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if ema is not None:
        ema.model.load_state_dict(state["ema"])
    history.losses = list(state["losses"])
    return int(state["step"])


@torch.no_grad()
def predict(model: Callable[[Tensor], Tensor], x: Tensor, batch_size: int = 256) -> Tensor:
    """``model``'s outputs for all of ``x`` in eval mode, on the CPU; the mode the model was in is restored."""
    training = getattr(model, "training", False)
    device = (
        next((p.device for p in model.parameters()), torch.device("cpu")) if isinstance(model, nn.Module) else x.device
    )
    if isinstance(model, nn.Module):
        model.eval()
    try:
        return torch.cat([model(x[i : i + batch_size].to(device)).cpu() for i in range(0, len(x), batch_size)])
    finally:
        if isinstance(model, nn.Module):
            model.train(training)


def accuracy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, batch_size: int = 256) -> float:
    """The share of ``x`` whose largest logit is ``y``; logits that are not finite count as wrong."""
    logits = predict(model, x, batch_size)
    right = (logits.argmax(-1) == y.cpu()) & logits.isfinite().all(-1)
    return right.double().mean().item()
