"""Numbers as tables and pages show them."""

import math
from typing import Any

from saigen.cards.schema import Quantity


def number(value: float, unit: str = "") -> str:
    """A number with four significant digits and its unit."""
    if not math.isfinite(value):
        text = "∞" if value == math.inf else "-∞" if value == -math.inf else "not finite"
    elif abs(value) >= 1e4 and float(value).is_integer():
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return f"{text} {unit}".strip()


def reported(quantity: Quantity) -> str:
    """What the paper reports."""
    if not isinstance(quantity.reported, tuple):
        return number(quantity.reported, quantity.unit)
    joint = " > " if quantity.kind == "order" else " – "
    return joint.join(number(value) for value in quantity.reported) + (f" {quantity.unit}" if quantity.unit else "")


def measured(quantity: Quantity, judged: Any) -> str:
    """A measured mean and its 95 % interval."""
    found = judged.interval
    if found is None:
        return "-"
    if found.low == found.high:
        return number(found.mean, quantity.unit)
    if found.n == 1:
        return f"{number(found.mean, quantity.unit)} (1 seed)"
    if quantity.kind == "ratio" or quantity.binary:
        return f"{number(found.mean, quantity.unit)} [{number(found.low)}, {number(found.high)}]"
    return f"{number(found.mean)} ± {number((found.high - found.low) / 2, quantity.unit)}"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
