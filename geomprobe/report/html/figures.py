"""The figures of a run's page: a small one for each column, and a text that describes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from geomprobe.corridor.detection import occupancy
from geomprobe.report.curves import Curve, Groups, groups, null_model
from geomprobe.report.html.svg import ALARM, LINES, inline
from geomprobe.report.plot import figure, occupancy_figure
from geomprobe.report.table import number, percent
from geomprobe.trace.schema import describe, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from geomprobe.trace.reader import Trace

RESIDUAL = "relative_residual"
_SECTIONS = {
    "geometry": ("rsi", "eb", "cosine", "lolr", "distance"),
    "corridors": (RESIDUAL, "clr", "sharpness", "secant_residual", "linear_decrease_gap"),
    "training": ("loss", "lr", "grad_norm"),
}
_SIZE = (4.4, 3.0)
_DASHES = ((1, 0), (6, 2), (2, 2), (6, 2, 2, 2))
"""On and off lengths, so that lines differ in more than their color."""


@dataclass(frozen=True)
class Key:
    """What a line of a figure stands for; a band, where it has an opacity. The color is a variable of the page's."""

    text: str
    color: str = "--line-1"
    dashes: str = "none"
    opacity: str = ""


@dataclass(frozen=True)
class Drawing:
    """A figure: the column that it shows, what that means, and the ``<svg>`` element."""

    name: str
    meaning: str
    svg: str


@dataclass(frozen=True)
class Gallery:
    """Figures that have one key."""

    keys: list[Key]
    figures: list[Drawing]

    def __contains__(self, column: str) -> bool:
        return any(figure.name == column for figure in self.figures)


def galleries(trace: Trace) -> dict[str, Gallery]:
    """The figures of what was measured, by section of the page; a section without any is left out.

    Raises:
        UsageError: matplotlib is not installed.
    """
    grouped = groups(trace)
    found = {section: _column_figures(trace, grouped, columns) for section, columns in _SECTIONS.items()}
    if len(trace.references) > 1:
        found["references"] = _reference_figures(trace, grouped)
    if RESIDUAL in found["corridors"]:
        found["corridors"].figures.extend(_occupancy(trace))
    return {section: gallery for section, gallery in found.items() if gallery.figures}


def typeset(formula: str) -> str:
    """A formula or unit of the schema in the characters that a page has for it.

    >>> typeset("||G||^2")
    '‖G‖²'
    """
    return formula.replace("||", "‖").replace("^2", "²")


def _drawable(trace: Trace, grouped: Groups, columns: Sequence[str]) -> dict[str, Curve]:
    """The curves of those of the columns that have a number to draw."""
    curves = {name: grouped.curve(trace[name]) for name in columns if name in trace}
    return {name: curve for name, curve in curves.items() if np.isfinite(curve.mean).any()}


def _column_figures(trace: Trace, grouped: Groups, columns: Sequence[str]) -> Gallery:
    curves = _drawable(trace, grouped, columns)
    keys = [Key(f"mean of each {_group(grouped)}"), Key("its minimum to maximum", opacity="0.3")]
    if any(null_model(trace, name) is not None for name in curves):
        keys.append(Key("random walk of as many steps (NWT eq. 8)", "--soft", "5 3"))
    if _different(trace, grouped) is not None:
        keys.append(Key("not the recorded run", "--alarm", opacity="0.2"))
    return Gallery(keys, [_column_figure(trace, grouped, name, curve) for name, curve in curves.items()])


def _column_figure(trace: Trace, grouped: Groups, name: str, curve: Curve) -> Drawing:
    def draw() -> Figure:
        drawing = figure([trace], [name])
        start = _different(trace, grouped)
        if start is not None:
            drawing.axes[0].axvspan(start, grouped.x[-1], color=ALARM, alpha=0.1, linewidth=0)
        return drawing

    described = describe(name)
    alt = f"{name}: {described.long_name}, by {grouped.axis}. {_ends(grouped, curve)}"
    meaning = f": {described.long_name}, {typeset(described.formula)} ({described.source})"
    return Drawing(name, meaning, _svg(trace, name, draw, alt))


def _reference_figures(trace: Trace, grouped: Groups) -> Gallery:
    """Distance and cosine against every reference."""
    keys = [
        Key(name, f"--line-{i % len(LINES) + 1}", " ".join(map(str, _DASHES[i % len(_DASHES)])))
        for i, name in enumerate(trace.references)
    ]
    names = _drawable(trace, grouped, ("distance", "cosine"))
    return Gallery(keys, [_against_all(trace, grouped, name) for name in names])


def _against_all(trace: Trace, grouped: Groups, name: str) -> Drawing:
    curves = {each: grouped.curve(trace[f"references/{escape(each)}/{name}"]) for each in trace.references}

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
    return Drawing(name, meaning, _svg(trace, f"{name}-references", draw, alt))


def _occupancy(trace: Trace) -> list[Drawing]:
    """How much of training was below each relative residual; no figure where all residuals are one number."""
    curve = occupancy(trace)
    if np.allclose(curve.thresholds, curve.thresholds[0], rtol=1e-6, atol=0):
        return []

    def draw() -> Figure:
        drawing = occupancy_figure([trace])
        drawing.axes[0].set_ylabel("share of steps")
        return drawing

    low, high = number(curve.thresholds[0]), number(curve.thresholds[-1])
    alt = (
        f"Occupancy of near-corridors: the share of measured steps below each relative residual, "
        f"{percent(curve.share[0])} below {low}, {percent(curve.share[-1])} below {high}."
    )
    meaning = ": share of measured steps below each threshold"
    return [Drawing("occupancy", meaning, _svg(trace, "occupancy", draw, alt))]


def _svg(trace: Trace, name: str, draw: Callable[[], Figure], alt: str) -> str:
    """A figure at its size in the page. The key is beside it; only a status that is in doubt is written on it."""
    doubt = "" if trace.status == "complete" else trace.status.upper()

    def small() -> Figure:
        drawing = draw()
        drawing.set_size_inches(*_SIZE)
        for legend in list(drawing.legends):
            legend.remove()
        drawing.suptitle(doubt, color=ALARM, weight="bold")
        return drawing

    return inline(small, name, f"{doubt}: {alt}" if doubt else alt)


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
