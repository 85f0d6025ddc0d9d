"""The figures of a run's page: small ones, a column each, with a text that says what each shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from geomprobe.corridor.detection import occupancy
from geomprobe.report.curves import Curve, Groups, groups, null_model
from geomprobe.report.html.elements import Markup, tag, typeset
from geomprobe.report.html.style import LINES
from geomprobe.report.html.svg import ALARM, inline, page_colors
from geomprobe.report.plot import figure, occupancy_figure
from geomprobe.report.table import number
from geomprobe.trace.schema import describe, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from geomprobe.trace.reader import Trace

_SIZE = (4.4, 3.0)
_DASHES = ((1, 0), (6, 2), (2, 2), (6, 2, 2, 2))
"""On and off lengths, so that no line is told from another by its color alone."""
RESIDUAL = "relative_residual"


def shown(trace: Trace, columns: Sequence[str]) -> list[str]:
    """Those of the columns that have a number to draw."""
    grouped = groups(trace)
    return [name for name in columns if name in trace and _drawable(grouped.curve(trace[name]))]


def column_figures(trace: Trace, columns: Sequence[str], *more: Markup) -> Markup:
    """A figure for each of the columns that were measured, and a key to their lines; empty without any.

    Args:
        trace: the trace.
        columns: of ``/steps``.
        more: figures to put beside them.

    Raises:
        UsageError: matplotlib is not installed.
    """
    names = shown(trace, columns)
    if not names:
        return Markup()
    grouped = groups(trace)
    entries = [("line", f"mean of each {_group(grouped)}"), ("band", "its minimum to maximum")]
    if any(null_model(trace, name) is not None for name in names):
        entries.append(("null", "random walk of as many steps (NWT eq. 8)"))
    if _different(trace, grouped) is not None:
        entries.append(("alarm", "not the recorded run"))
    return Markup(_key(entries) + _grid([*(_of_column(trace, grouped, name) for name in names), *more]))


def reference_figures(trace: Trace) -> Markup:
    """Distance and cosine against every reference; empty where there is only the final iterate."""
    names = shown(trace, ["distance", "cosine"]) if len(trace.references) > 1 else []
    if not names:
        return Markup()
    grouped = groups(trace)
    entries = [(f"reference-{i}", name) for i, name in enumerate(trace.references)]
    return Markup(_key(entries) + _grid([_against_all(trace, grouped, name) for name in names]))


def occupancy_curve(trace: Trace) -> Markup:
    """The figure of how much of training was below each relative residual, for a trace that has any.

    Empty where all of them are one number, which makes no curve.
    """
    curve = occupancy(trace)
    if np.allclose(curve.thresholds, curve.thresholds[0], rtol=1e-6, atol=0):
        return Markup()
    low, high = number(curve.thresholds[0]), number(curve.thresholds[-1])
    alt = (
        f"Occupancy of near-corridors: the share of measured steps below each relative residual, "
        f"{percent(curve.share[0])} below {low}, {percent(curve.share[-1])} below {high}."
    )

    def draw() -> Figure:
        drawing = occupancy_figure([trace])
        drawing.axes[0].set_ylabel("share of steps")
        return drawing

    caption = tag("figcaption", tag("strong", "occupancy"), ": share of measured steps below each threshold")
    return tag("figure", _drawn(trace, "occupancy", draw, alt), caption)


def percent(share: float) -> str:
    """A share of 1 in percent.

    >>> percent(0.125)
    '12.5 %'
    """
    return f"{100 * share:.1f} %"


def _grid(figures: Sequence[Markup]) -> Markup:
    return tag("div", *figures, class_="figures")


def _of_column(trace: Trace, grouped: Groups, name: str) -> Markup:
    def draw() -> Figure:
        drawing = figure([trace], [name])
        start = _different(trace, grouped)
        if start is not None:
            drawing.axes[0].axvspan(start, grouped.x[-1], color=ALARM, alpha=0.1, linewidth=0)
        return drawing

    described = describe(f"steps/{name}")
    curve = grouped.curve(trace[name])
    alt = f"{name}: {described.long_name}, by {grouped.axis}. {_ends(grouped, curve)}"
    meaning = f": {described.long_name}, {typeset(described.formula)} ({described.source})"
    return tag("figure", _drawn(trace, name, draw, alt), tag("figcaption", tag("strong", name), meaning))


def _against_all(trace: Trace, grouped: Groups, name: str) -> Markup:
    curves = {each: grouped.curve(trace[_path(each, name)]) for each in trace.references}

    def draw() -> Figure:
        drawing = figure([trace], [name], with_null_model=False)
        panel = drawing.axes[0]
        for artist in [*panel.lines, *panel.collections]:
            artist.remove()
        for curve, color, dashes in zip(curves.values(), cycle(LINES), cycle(_DASHES), strict=False):
            marker = "." if len(curve.x) < 2 else ""
            panel.plot(curve.x, curve.mean, color=color, dashes=dashes, marker=marker)
        panel.relim()
        panel.autoscale_view()
        return drawing

    ends = " ".join(f"{each}: {_ends(grouped, curve)}" for each, curve in curves.items())
    alt = f"{name} against each reference, by {grouped.axis}. {ends}"
    meaning = f" against each reference, mean of each {_group(grouped)}"
    caption = tag("figcaption", tag("strong", name), meaning)
    return tag("figure", _drawn(trace, f"{name}-references", draw, alt), caption)


def _drawn(trace: Trace, name: str, draw: Callable[[], Figure], alt: str) -> Markup:
    """A figure at its size in the page, where its key is; only a doubtful status is said on it."""
    doubt = "" if trace.status == "complete" else trace.status.upper()
    with page_colors():
        drawing = draw()
        drawing.set_size_inches(*_SIZE)
        for legend in list(drawing.legends):
            legend.remove()
        drawing.suptitle(doubt, color=ALARM, weight="bold")
        return inline(drawing, name, f"{doubt}: {alt}" if doubt else alt)


def _drawable(curve: Curve) -> bool:
    return bool(np.isfinite(curve.mean).any())


def _path(reference: str, column: str) -> str:
    return f"references/{escape(reference)}/{column}"


def _group(grouped: Groups) -> str:
    if grouped.axis == "epoch":
        return "epoch"
    width = int(np.count_nonzero(grouped.of_row == 0))
    return f"window of {width} steps" if width > 1 else "step"


def _different(trace: Trace, grouped: Groups) -> float | None:
    """Where on the axis the rows begin that are not the recorded run's."""
    rows = np.flatnonzero(trace["same"] == 0) if "same" in trace else np.array([], int)
    drawn = grouped.of_row[rows]
    drawn = drawn[drawn >= 0]
    return float(grouped.x[drawn[0]]) if len(drawn) else None


def _ends(grouped: Groups, curve: Curve) -> str:
    known = np.flatnonzero(np.isfinite(curve.mean))
    if not len(known):
        return "Not measured."
    first, last = known[0], known[-1]
    return (
        f"The mean goes from {number(curve.mean[first])} at {grouped.axis} {number(curve.x[first])} to "
        f"{number(curve.mean[last])} at {grouped.axis} {number(curve.x[last])}; all values lie between "
        f"{number(np.nanmin(curve.low))} and {number(np.nanmax(curve.high))}."
    )


def _key(entries: Sequence[tuple[str, str]]) -> Markup:
    return tag("ul", *(tag("li", _swatch(kind), text) for kind, text in entries), class_="key")


def _swatch(kind: str) -> Markup:
    """A short piece of a line or band, as the figures draw it."""
    return tag("svg", *_strokes(kind), viewBox="0 0 28 12", aria_hidden="true")


def _strokes(kind: str) -> Iterator[Markup]:
    if kind.startswith("reference-"):
        i = int(kind.removeprefix("reference-"))
        yield _stroke(f"var(--line-{i % len(LINES) + 1})", 2, " ".join(map(str, _DASHES[i % len(_DASHES)])))
    elif kind == "null":
        yield _stroke("var(--soft)", 2, "5 3")
    elif kind == "line":
        yield _stroke("var(--line-1)", 2, "none")
    else:
        color, opacity = ("var(--alarm)", "0.2") if kind == "alarm" else ("var(--line-1)", "0.3")
        yield tag("rect", width=28, height=12, style=f"fill: {color}; fill-opacity: {opacity}")


def _stroke(color: str, width: int, dashes: str) -> Markup:
    style = f"stroke: {color}; stroke-width: {width}; stroke-dasharray: {dashes}"
    return tag("line", x1=0, y1=6, x2=28, y2=6, style=style)
