"""Learning-rate schedules: functions of the step that multiply every group's initial learning rate."""

import math
from collections.abc import Callable

Schedule = Callable[[int, int], float]


def constant(warmup: int = 0) -> Schedule:
    """Linear warm-up over ``warmup`` steps, then 1."""
    return lambda step, total: min(1.0, (step + 1) / warmup) if warmup else 1.0


def cosine(warmup: int = 0, final: float = 0.0) -> Schedule:
    """Linear warm-up over ``warmup`` steps, then half a cosine from 1 down to ``final``."""

    def factor(step: int, total: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total - warmup)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor


def polynomial(power: float = 1.0, warmup: int = 0, warmup_start: float = 0.0) -> Schedule:
    """Linear warm-up from ``warmup_start`` over ``warmup`` steps, multiplied by ``(1 - step / total) ** power``."""

    def factor(step: int, total: int) -> float:
        ramp = warmup_start + (1.0 - warmup_start) * step / warmup if step < warmup else 1.0
        return ramp * (1.0 - min(step, total) / total) ** power

    return factor


def steps(milestones: tuple[float, ...], gamma: float = 0.1, warmup: int = 0) -> Schedule:
    """Multiplied by ``gamma`` at each of ``milestones``, given as shares of the whole training in (0, 1)."""

    def factor(step: int, total: int) -> float:
        ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return ramp * gamma ** sum(step >= milestone * total for milestone in milestones)

    return factor
