"""From measurements and card to a verdict. Verdicts are computed here and nowhere typed in or stored.

Every quantity has two anchors: what the paper reports, and what would be seen if the idea added nothing. The bar is
halfway between them (ratios in logarithms). A scale that is fair only in direction puts the bar at the card's ``least``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from saigen.cards.schema import Claim, Quantity

# SciPy takes half a second to import, and the front door must not: it is imported where it computes.
if TYPE_CHECKING:
    import numpy as np

SEEDS = 5
"""The first look is at seeds 0 to 4."""
MOST_SEEDS = 20
"""The second and last look is at 0 to N-1, with N at most this."""
CONFIDENCE = 0.95
POWER = 0.80


class Verdict(StrEnum):
    """What the measurements say of a quantity or a claim."""

    REPRODUCED = "reproduced"
    DIRECTION_ONLY = "direction only"
    NOT_REPRODUCED = "not reproduced"
    INCONCLUSIVE = "inconclusive"
    NOT_COMPARABLE = "not comparable"
    NOT_RUN = "not run"


_WEAKEST_FIRST = (Verdict.NOT_REPRODUCED, Verdict.INCONCLUSIVE, Verdict.DIRECTION_ONLY, Verdict.REPRODUCED)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds (of a ratio, the geometric mean) and its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Judged:
    """A quantity, measured and judged: the values a seed, their interval, the bar, the verdict."""

    name: str
    verdict: Verdict
    values: tuple[float, ...]
    interval: Interval | None
    bar: float | None


def interval(values: Sequence[float], *, logarithmic: bool = False, binary: bool = False) -> Interval:
    """The mean and its 95 % interval over seeds: Student's t (of logarithms for ratios), Clopper-Pearson for 0/1 outcomes.

    No spread at all gives a point; a single value says nothing of its spread, so its interval has no ends.
    """
    import numpy as np
    from scipy import stats

    x = np.asarray(values, dtype=float)
    if binary:
        if not set(x) <= {0.0, 1.0}:
            raise ValueError(f"binary values are {sorted(set(x))}, allowed are 0 and 1")
        share = stats.binomtest(int(x.sum()), len(x)).proportion_ci(CONFIDENCE, method="exact")
        return Interval(float(x.mean()), float(share.low), float(share.high), len(x))
    if logarithmic:
        with np.errstate(divide="ignore", invalid="ignore"):
            x = np.log(x)
    if len(x) == 1:
        mean, low, high = x[0], -math.inf, math.inf
    elif not np.isfinite(x).all():
        # Seen after diverged seeds took their worst value: the mean is that value, whatever the others are.
        mean = low = high = x[~np.isfinite(x)][0]
    else:
        mean, spread = x.mean(), x.std(ddof=1)
        half = 0.0 if _no_spread(x) else stats.t.ppf(0.5 + CONFIDENCE / 2, len(x) - 1) * spread / math.sqrt(len(x))
        low, high = mean - half, mean + half
    if logarithmic:
        mean, low, high = (float(np.exp(v)) for v in (mean, low, high))
    return Interval(float(mean), float(low), float(high), len(x))


def _no_spread(x: "np.ndarray") -> bool:
    # Equal numbers may have a standard deviation of rounding error.
    return bool(x.max() - x.min() <= 1e-12 * max(1.0, float(abs(x).max())))


def bar(quantity: Quantity, fairness: str) -> float:
    """What a quantity must be past: halfway between nothing and reported, or ``least`` where only direction is fair."""
    if fairness == "direction" and quantity.least is not None:
        return quantity.least
    if quantity.kind == "ratio":
        return math.sqrt(quantity.neutral * quantity.anchor)
    return (quantity.neutral + quantity.anchor) / 2


def printed_tolerance(value: float) -> float:
    """Half a unit of the last digit that ``value`` is printed with: 0.31 gives 0.005."""
    text = repr(float(value))
    mantissa, _, exponent = text.partition("e")
    decimals = mantissa.partition(".")[2]
    decimals = "" if decimals == "0" else decimals
    return 0.5 * 10.0 ** (int(exponent or 0) - len(decimals))


def judge_quantity(
    name: str, quantity: Quantity, measurements: Sequence[Mapping[str, float]], fairness: str, scale: str = "full"
) -> Judged:
    """Judges one quantity from the values of every seed, at a scale of the given fairness (``size``, ``direction``).

    A ``value`` is compared only on the paper's own data: at ``full``, or at a ``real`` that the card calls fair in size.
    """
    if quantity.kind == "order":
        return _judge_order(name, quantity, measurements, fairness)
    values = tuple(float(values[name]) for values in measurements)
    if fairness == "none" or not values:
        return Judged(name, Verdict.NOT_RUN, values, None, None)
    if quantity.kind == "exact":
        right = all(_printed_equal(quantity, value) for value in values)
        return Judged(name, Verdict.REPRODUCED if right else Verdict.NOT_REPRODUCED, values, _plain(values), None)
    if quantity.kind == "value":
        return _judge_value(name, quantity, values, fairness if scale in ("real", "full") else "direction")
    return _judge_effect(name, quantity, values, fairness)


def _plain(values: tuple[float, ...]) -> Interval:
    if len(values) > 1:
        return interval(values)
    return Interval(values[0], values[0], values[0], 1)


def _printed_equal(quantity: Quantity, value: float) -> bool:
    if isinstance(quantity.reported, tuple):
        low, high = quantity.reported
    else:
        low = high = quantity.reported
    slack_low = printed_tolerance(low) if quantity.tolerance is None else quantity.tolerance
    slack_high = printed_tolerance(high) if quantity.tolerance is None else quantity.tolerance
    return low - slack_low <= value <= high + slack_high


def _judge_value(name: str, quantity: Quantity, values: tuple[float, ...], fairness: str) -> Judged:
    found = _plain(values)
    if fairness != "size":
        return Judged(name, Verdict.NOT_COMPARABLE, values, found, None)
    reported = quantity.reported if isinstance(quantity.reported, tuple) else (quantity.reported, quantity.reported)
    slack = quantity.tolerance if quantity.tolerance is not None else printed_tolerance(reported[0])
    inside = found.low <= reported[1] + slack and found.high >= reported[0] - slack
    return Judged(name, Verdict.REPRODUCED if inside else Verdict.NOT_REPRODUCED, values, found, None)


def _judge_effect(name: str, quantity: Quantity, values: tuple[float, ...], fairness: str) -> Judged:
    up = quantity.anchor > quantity.neutral
    # A diverged seed counts as the worst value, never dropped.
    worst = (0.0 if quantity.kind == "ratio" else -math.inf) if up else math.inf
    counted = tuple(value if math.isfinite(value) else worst for value in values)
    found = interval(counted, logarithmic=quantity.kind == "ratio", binary=quantity.binary)
    mark = bar(quantity, fairness)
    return Judged(name, _place(found, mark, quantity.neutral, up, fairness), values, found, mark)


def _place(found: Interval, mark: float, nothing: float, up: bool, fairness: str) -> Verdict:
    if found.n < SEEDS:
        return Verdict.INCONCLUSIVE
    all_past_bar = found.low > mark if up else found.high < mark
    all_past_nothing = found.low > nothing if up else found.high < nothing
    some_past_bar = found.high > mark if up else found.low < mark
    if all_past_bar:
        return Verdict.REPRODUCED if fairness == "size" else Verdict.DIRECTION_ONLY
    if all_past_nothing and fairness == "size":
        return Verdict.DIRECTION_ONLY
    return Verdict.INCONCLUSIVE if some_past_bar else Verdict.NOT_REPRODUCED


def _judge_order(name: str, quantity: Quantity, measurements: Sequence[Mapping[str, float]], fairness: str) -> Judged:
    if fairness == "none" or not measurements:
        return Judged(name, Verdict.NOT_RUN, (), None, None)
    reported = quantity.reported
    judged = []
    for position, (better, worse) in enumerate(zip(quantity.of, quantity.of[1:], strict=False)):
        gaps = tuple(float(values[better]) - float(values[worse]) for values in measurements)
        adjacent = Quantity(
            kind="gap",
            en=quantity.en,
            ja=quantity.ja,
            least=quantity.least,
            reported=reported[position] - reported[position + 1],
        )
        judged.append(_judge_effect(name, adjacent, gaps, fairness))
    return min(judged, key=lambda result: (_WEAKEST_FIRST.index(result.verdict), result.interval.mean))


def weakest(verdicts: Sequence[Verdict]) -> Verdict:
    """A claim's verdict: that of its weakest judged quantity."""
    judged = [verdict for verdict in verdicts if verdict in _WEAKEST_FIRST]
    if judged:
        return min(judged, key=_WEAKEST_FIRST.index)
    return Verdict.NOT_COMPARABLE if Verdict.NOT_COMPARABLE in verdicts else Verdict.NOT_RUN


def judge_claim(claim: Claim, measurements: Sequence[Mapping[str, float]], scale: str) -> tuple[Verdict, list[Judged]]:
    """Judges a claim from the values of seeds 0 to n-1 at one scale; ``KeyError`` where a quantity was not returned."""
    fairness = claim.fairness(scale)
    judged = [
        judge_quantity(name, quantity, measurements, fairness, scale) for name, quantity in claim.quantities.items()
    ]
    return weakest([result.verdict for result in judged]), judged


def seeds_needed(claim: Claim, measurements: Sequence[Mapping[str, float]], scale: str) -> int:
    """The N of the second look: enough seeds to see the paper's effect with 80 % power at the spread of the first five.

    The spread of five seeds is itself uncertain, so its upper 80 % limit is used; N is between 5 and 20.
    """
    import numpy as np

    fairness = claim.fairness(scale)
    spreads: list[tuple[float, float]] = []
    for name, quantity in claim.quantities.items():
        if quantity.kind in ("exact", "value") or quantity.binary:
            continue
        if quantity.kind == "order":
            for i, (better, worse) in enumerate(zip(quantity.of, quantity.of[1:], strict=False)):
                effect = quantity.reported[i] - quantity.reported[i + 1]
                mark = quantity.least if fairness == "direction" else effect / 2
                spreads.append((abs(effect - mark), _spread([m[better] - m[worse] for m in measurements])))
        elif quantity.kind == "ratio":
            distance = abs(math.log(quantity.anchor) - math.log(bar(quantity, fairness)))
            with np.errstate(divide="ignore", invalid="ignore"):
                spreads.append((distance, _spread(np.log([m[name] for m in measurements]))))
        else:
            spreads.append((abs(quantity.anchor - bar(quantity, fairness)), _spread([m[name] for m in measurements])))
    share = POWER ** (1 / max(1, len(spreads)))
    for n in range(SEEDS, MOST_SEEDS):
        if all(_power(distance, spread, n) >= share for distance, spread in spreads):
            return n
    return MOST_SEEDS


def _spread(values: Sequence[float]) -> float:
    import numpy as np
    from scipy import stats

    x = np.asarray(values, dtype=float)
    if not np.isfinite(x).all():
        return math.inf
    df = len(x) - 1
    return float(x.std(ddof=1) * math.sqrt(df / stats.chi2.ppf(1 - POWER, df)))


def _power(distance: float, spread: float, n: int) -> float:
    """The chance that the whole interval of ``n`` seeds is past the bar, for a mean ``distance`` beyond it."""
    if spread == 0:
        return 1.0 if distance > 0 else 0.0
    if not math.isfinite(spread):
        return 0.0
    from scipy import stats

    critical = stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)
    return float(stats.nct.sf(critical, n - 1, distance * math.sqrt(n) / spread))
