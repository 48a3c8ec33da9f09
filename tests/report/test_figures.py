"""What a figure shows is what was measured."""

import pytest

from saigen.cards.schema import Quantity
from saigen.claims.verdict import Interval, Judged, Verdict
from saigen.report.figures import MOST, anchors, place

GAP = Quantity(kind="gap", en="gain", ja="向上", reported=0.1)


def _drawn(*values):
    mean = sum(values) / len(values)
    judged = Judged("gain", Verdict.REPRODUCED, values, Interval(mean, min(values), max(values), len(values)), 0.05)
    (axes,) = anchors([("gain", GAP, judged)]).axes
    return axes


def test_nothing_is_0_and_what_the_paper_reports_1():
    assert [place(GAP, value) for value in (0.0, 0.05, 0.1)] == [0, 0.5, 1]
    speed = Quantity(kind="ratio", en="speed", ja="速さ", reported=4.0)
    assert place(speed, 2.0) == pytest.approx(0.5) and place(speed, -1.0) == float("-inf")


@pytest.mark.parametrize(
    ("values", "marker"), [((0.08, 0.12), "D"), ((0.9, 1.1), ">"), ((-0.9, -1.1), "<"), ((float("nan"),) * 2, "<")]
)
def test_a_mean_that_lies_further_off_is_an_arrow(values, marker):
    axes = _drawn(*values)
    (mean,) = [line for line in axes.lines if line.get_marker() in ("D", "<", ">")]
    assert mean.get_marker() == marker
    assert axes.get_xlim()[0] < mean.get_xdata()[0] < axes.get_xlim()[1] <= MOST + 0.1
