"""Training at several learning rates, of which held-out data choose: the same care for every arm of a comparison."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from saigen.train.loop import History, accuracy, fit


@dataclass(frozen=True)
class Best:
    """The model that was chosen, the learning rate it was trained at, and its losses."""

    model: nn.Module
    rate: float
    history: History


def fit_best(
    start: nn.Module,
    loss: Callable[..., Tensor],
    data: Sequence[Tensor],
    *,
    rates: Sequence[float],
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer],
    held_out: tuple[Tensor, Tensor],
    checkpoint: Callable[[float], Path | None] = lambda rate: None,
    score: Callable[[nn.Module, Tensor, Tensor], float] = accuracy,
    **options: Any,
) -> Best:
    """Trains a copy of ``start`` at each of ``rates`` and takes the one that scores best on ``held_out``, (x, y).

    ``optimizer(parameters, rate)`` makes the optimizer, ``checkpoint(rate)`` names the file of an arm; what else there is
    goes to ``fit``. Of equal scores the larger rate wins. With a single rate nothing is chosen and ``held_out`` may be
    empty. Raises ``ValueError`` for no rate, and for several without held-out data.
    """
    if not rates:
        raise ValueError("rates is empty, allowed is at least one learning rate")
    if len(rates) > 1 and not len(held_out[0]):
        raise ValueError(f"held_out is empty, allowed is that with one rate only, not with {len(rates)}")
    tried = []
    for rate in rates:
        model = copy.deepcopy(start)
        history = fit(
            model, loss, data, optimizer=optimizer(model.parameters(), rate), checkpoint=checkpoint(rate), **options
        )
        tried.append((score(model, *held_out) if len(rates) > 1 else 0.0, rate, Best(model, rate, history)))
    return max(tried, key=lambda entry: entry[:2])[-1]
