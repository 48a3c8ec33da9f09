"""The judge: its rules one by one, and its two guards by simulation."""

import math

import numpy as np
import pytest

from saigen.cards.schema import Claim, Quantity
from saigen.claims.verdict import (
    Verdict,
    bar,
    interval,
    judge_claim,
    judge_quantity,
    printed_tolerance,
    seeds_needed,
    weakest,
)

LABELS = {"en": "a", "ja": "あ"}


def quantity(**fields) -> Quantity:
    return Quantity(**(LABELS | fields))


def claim(fair="size", **quantities) -> Claim:
    return Claim(id="a_claim", en="a", ja="あ", where="§1", fair={"laptop": fair}, why="because", quantities=quantities)


def judged(q: Quantity, values, fairness="size"):
    return judge_quantity("q", q, [{"q": value} for value in values], fairness)


def test_interval_is_students():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.high - found.mean == pytest.approx(2.7764451 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)


def test_interval_of_ratios_is_in_logarithms():
    found = interval([2.0, 8.0], logarithmic=True)
    assert found.mean == pytest.approx(4.0)
    assert found.low * found.high == pytest.approx(16.0)


def test_no_spread_is_a_point_and_one_seed_says_nothing():
    assert interval([0.1 + 0.2, 0.3, 0.3]).low == pytest.approx(0.3)
    assert (interval([0.5]).low, interval([0.5]).high) == (-math.inf, math.inf)


def test_binary_outcomes_use_clopper_pearson():
    found = interval([1, 1, 1, 1, 1], binary=True)
    assert found.low == pytest.approx(0.025 ** (1 / 5), rel=1e-6)
    assert found.high == 1.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "gap", "reported": 0.05}, 0.025),
        ({"kind": "ratio", "reported": 4.0}, 2.0),
        ({"kind": "ratio", "reported": 0.25}, 0.5),
        ({"kind": "bound", "reported": 0.005, "nothing": 0.025}, 0.015),
        ({"kind": "gap", "reported": [0.02, 0.06]}, 0.01),
    ],
)
def test_the_bar_is_halfway(fields, expected):
    assert bar(quantity(**fields), "size") == pytest.approx(expected)


def test_the_bar_is_least_where_only_direction_is_fair():
    assert bar(quantity(kind="gap", reported=0.05, least=0.01), "direction") == 0.01


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.05, 0.051, 0.049, 0.05, 0.052], Verdict.REPRODUCED),
        ([0.010, 0.012, 0.011, 0.012, 0.010], Verdict.DIRECTION_ONLY),
        ([0.02, 0.06, 0.03, 0.01, 0.05], Verdict.DIRECTION_ONLY),
        ([0.05, -0.05, 0.04, -0.03, 0.06], Verdict.INCONCLUSIVE),
        ([0.0, 0.001, -0.002, 0.001, 0.0], Verdict.NOT_REPRODUCED),
        ([-0.05, -0.051, -0.049, -0.05, -0.052], Verdict.NOT_REPRODUCED),
        ([0.05, 0.05, 0.05, 0.05, 0.05], Verdict.REPRODUCED),
        ([0.05, 0.05, 0.05, 0.05, math.nan], Verdict.NOT_REPRODUCED),
        ([0.05, 0.05], Verdict.INCONCLUSIVE),
    ],
)
def test_verdicts_of_a_gap(values, expected):
    assert judged(quantity(kind="gap", reported=0.05), values).verdict == expected


def test_direction_is_the_best_a_direction_scale_gives():
    q = quantity(kind="gap", reported=0.05, least=0.01)
    assert judged(q, [0.05, 0.051, 0.049, 0.05, 0.052], "direction").verdict == Verdict.DIRECTION_ONLY
    assert judged(q, [0.002, 0.003, 0.002, 0.003, 0.002], "direction").verdict == Verdict.NOT_REPRODUCED
    assert judged(q, [0.002, 0.03, 0.002, 0.003, 0.002], "direction").verdict == Verdict.INCONCLUSIVE


def test_effects_downwards_are_the_mirror_image():
    up, down = quantity(kind="ratio", reported=2.0), quantity(kind="ratio", reported=0.5)
    for values in ([2.0, 2.1, 1.9, 2.0, 2.2], [1.1, 1.2, 1.15, 1.1, 1.2], [0.9, 1.0, 1.1, 1.0, 1.0]):
        assert judged(up, values).verdict == judged(down, [1 / v for v in values]).verdict


def test_exact_has_the_printed_digits():
    assert printed_tolerance(0.31) == pytest.approx(0.005)
    assert printed_tolerance(5.0) == pytest.approx(0.5)
    assert printed_tolerance(1e-3) == pytest.approx(0.0005)
    assert judged(quantity(kind="exact", reported=8.4), [8.44]).verdict == Verdict.REPRODUCED
    assert judged(quantity(kind="exact", reported=8.4), [8.46]).verdict == Verdict.NOT_REPRODUCED
    assert judged(quantity(kind="exact", reported=[0.31, 0.37]), [0.352]).verdict == Verdict.REPRODUCED


def test_a_value_is_judged_only_at_the_papers_scale():
    q = quantity(kind="value", reported=0.843, tolerance=0.002)
    assert judged(q, [0.5], "direction").verdict == Verdict.NOT_COMPARABLE
    assert judged(q, [0.842, 0.844, 0.843], "size").verdict == Verdict.REPRODUCED
    assert judged(q, [0.80, 0.801, 0.799], "size").verdict == Verdict.NOT_REPRODUCED


def test_an_order_is_as_good_as_its_weakest_gap():
    q = quantity(kind="order", reported=[0.9, 0.8, 0.7], of=["a", "b", "c"], least=0.01)
    rows = [{"a": 0.9 + e, "b": 0.8, "c": 0.7} for e in (0, 0.001, 0.002, 0.001, 0)]
    assert judge_quantity("q", q, rows, "size").verdict == Verdict.REPRODUCED
    for row in rows:
        row["c"] = 0.8
    assert judge_quantity("q", q, rows, "size").verdict == Verdict.NOT_REPRODUCED


def test_a_claim_takes_its_weakest_quantity():
    assert weakest([Verdict.REPRODUCED, Verdict.INCONCLUSIVE, Verdict.NOT_COMPARABLE]) == Verdict.INCONCLUSIVE
    assert weakest([Verdict.NOT_COMPARABLE]) == Verdict.NOT_COMPARABLE
    assert weakest([]) == Verdict.NOT_RUN


def test_tiny_is_never_judged():
    c = claim(g=quantity(kind="gap", reported=1.0))
    assert judge_claim(c, [{"g": 1.0}] * 5, "tiny")[0] == Verdict.NOT_RUN


# --- the guards -----------------------------------------------------------------------------------------------------

RUNS = 400
TWO = {"g": quantity(kind="gap", reported=1.0), "r": quantity(kind="ratio", reported=2.0)}


def looks(effects: dict[str, float], spread: float, rng: np.random.Generator) -> Verdict:
    """A whole protocol: seeds 0-4, then at most one more look at the N announced from their spread."""
    c = claim(**TWO)
    noise = rng.normal(size=(20, 2)) * spread
    rows = [
        {"g": effects["g"] + noise[i, 0], "r": math.exp(math.log(effects["r"]) + noise[i, 1] * math.log(2.0))}
        for i in range(20)
    ]
    verdict, _ = judge_claim(c, rows[:5], "laptop")
    if verdict == Verdict.REPRODUCED:
        return verdict
    return judge_claim(c, rows[: seeds_needed(c, rows[:5], "laptop")], "laptop")[0]


def share_reproduced(effects: dict[str, float], spread: float) -> float:
    rng = np.random.default_rng(7)
    return sum(looks(effects, spread, rng) == Verdict.REPRODUCED for _ in range(RUNS)) / RUNS


@pytest.mark.parametrize("spread", [0.05, 0.3, 0.6])
@pytest.mark.parametrize(
    "effects",
    [{"g": 0.0, "r": 1.0}, {"g": 0.5, "r": 2.0}, {"g": 1.0, "r": math.sqrt(2.0)}],
    ids=["nothing", "half gap", "half ratio"],
)
def test_guard_nothing_and_halfway_are_seldom_called_reproduced(effects, spread):
    # 5 % and three standard errors of this many runs.
    assert share_reproduced(effects, spread) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / RUNS)


@pytest.mark.parametrize("spread", [0.05, 0.2, 0.4])
def test_guard_the_papers_effect_is_called_reproduced(spread):
    assert share_reproduced({"g": 1.0, "r": 2.0}, spread) >= 0.80 - 3 * math.sqrt(0.8 * 0.2 / RUNS)


def test_guard_catches_a_judge_without_intervals(monkeypatch):
    """The guard itself: a judge that looks at means alone calls 'halfway' reproduced far too often."""
    from saigen.claims import verdict as judging

    def point(values, **how):
        mean = float(np.mean(values))
        return judging.Interval(mean, mean, mean, len(values))

    monkeypatch.setattr(judging, "interval", point)
    assert share_reproduced({"g": 0.5, "r": 2.0}, 0.3) > 0.2
