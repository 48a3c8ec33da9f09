"""Figures, with Latin letters and digits only: words stand in the text around them.

A quantity is drawn on the line from *nothing* (0, what would be seen if the idea added nothing) to *reported* (1), so
that quantities of different units share one axis and the bar lies halfway.
"""

import io
import math
import re
from collections.abc import Iterable, Sequence

import matplotlib
from matplotlib.figure import Figure

from saigen.cards.schema import Card, Quantity
from saigen.claims.verdict import Judged
from saigen.runner import ClaimResult

COLOURS = {
    "reproduced": "#1a7f4b",
    "direction only": "#0b7285",
    "not reproduced": "#c0362c",
    "inconclusive": "#b7791f",
    "not comparable": "#6b7280",
    "not run": "#6b7280",
}
LEAST, MOST = -1.5, 3.0  # how far off is drawn, in units of what is reported
DRAWABLE = ("gap", "ratio", "bound", "trend", "order")
_FONT = {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "saigen"}


def place(quantity: Quantity, value: float) -> float:
    """Where ``value`` lies between nothing (0) and reported (1); ratios in logarithms."""
    nothing, reported = quantity.neutral, quantity.anchor
    if quantity.kind == "ratio":
        if value <= 0:
            return -math.inf
        return (math.log(value) - math.log(nothing)) / (math.log(reported) - math.log(nothing))
    return (value - nothing) / (reported - nothing)


Row = tuple[str, Quantity, Judged]
"""A label, a quantity, and what was measured of it."""


def rows(card: Card, results: Iterable[ClaimResult], *, name_scale: bool = True) -> list[Row]:
    """What ``anchors`` draws of ``results``: the measured quantities that have two anchors to be drawn between."""
    drawn = []
    for result in results:
        quantities = card.find_claim(result.claim).quantities
        for judged in result.quantities:
            quantity = quantities[judged.name]
            if quantity.kind in DRAWABLE and judged.interval is not None:
                drawn.append((f"{judged.name} ({result.scale})" if name_scale else judged.name, quantity, judged))
    return drawn


def anchors(rows: Sequence[Row], *, width: float = 5.2, small: bool = False) -> Figure:
    """Measured values of each seed, their mean and interval, between nothing and reported; the bar is dashed."""
    with matplotlib.rc_context(_FONT):
        height = (0.34 if small else 0.5) * len(rows) + (0.42 if small else 0.6)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        low, high = -0.25, 1.25
        for row, (_, quantity, judged) in enumerate(rows):
            colour = COLOURS[judged.verdict]
            values = [_clip(place(quantity, value)) for value in judged.values]
            if judged.interval is not None:
                ends = [_clip(place(quantity, end)) for end in (judged.interval.low, judged.interval.high)]
                mean = _clip(place(quantity, judged.interval.mean))
                axes.plot(ends, [row, row], color=colour, linewidth=4, alpha=0.35, solid_capstyle="butt")
                axes.plot([mean], [row], marker=_marker(mean), color=colour, markersize=5)
                low, high = min(low, *ends, mean), max(high, *ends, mean)
            axes.plot(
                values, [row + 0.22] * len(values), linestyle="", marker="o", markersize=3, color=colour, alpha=0.7
            )
            if judged.bar is not None:
                at = _clip(place(quantity, judged.bar))
                axes.plot([at, at], [row - 0.4, row + 0.4], color="#374151", linewidth=1, linestyle=(0, (3, 2)))
            low, high = min([low, *values]), max([high, *values])
        for at in (0.0, 1.0):
            axes.axvline(at, color="#9ca3af", linewidth=0.8, zorder=0)
        axes.set_xlim(low - 0.08, high + 0.08)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axes.set_xticks([0.0, 1.0], ["nothing", "reported"])
        axes.tick_params(length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color("#d1d5db")
        return figure


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
) -> Figure:
    """A table of signed values as colours, green above 0 and red below, each with its text; None stays white."""
    shown = [[math.nan if value is None else value for value in row] for row in values]
    reach = max((abs(value) for row in shown for value in row if math.isfinite(value)), default=0.0) or 1.0
    with matplotlib.rc_context(_FONT):
        figure = Figure(figsize=(1.8 + 0.95 * len(columns), 1.0 + 0.34 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(shown, cmap="RdYlGn", vmin=-reach, vmax=reach, alpha=0.6, aspect="auto")
        for row, line in enumerate(texts):
            for column, text in enumerate(line):
                axes.text(column, row, text, ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="left")
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return figure


def _clip(value: float) -> float:
    # A diverged seed lies infinitely far off; it is drawn at the edge.
    return max(LEAST, min(MOST, value)) if not math.isnan(value) else LEAST


def _marker(mean: float) -> str:
    """A diamond; at the edge an arrow, so that the edge is not read as the value."""
    return "<" if mean <= LEAST else ">" if mean >= MOST else "D"


def svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element to stand in a page, with ``title`` for those who cannot see it."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_FONT):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids are unique within a page only if each figure has its own.
    mark = format(abs(hash_of(text)) % 16**8, "08x")
    text = re.sub(r'id="([^"]+)"', rf'id="f{mark}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>f{mark}-", text)
    escaped = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1)


def png(figure: Figure, path: str) -> None:
    """The figure as a PNG of a width that Zenn shows well."""
    with matplotlib.rc_context(_FONT):
        figure.savefig(path, format="png", dpi=160, metadata={"Software": None}, facecolor="white")


def hash_of(text: str) -> int:
    """A number that is the same in every process."""
    import zlib

    return zlib.crc32(text.encode())
