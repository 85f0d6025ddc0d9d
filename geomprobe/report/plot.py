"""The figure of one or several runs, as NWT's figure 2: epoch mean, band from minimum to maximum."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geomprobe.corridor.detection import occupancy
from geomprobe.errors import RunError, UsageError
from geomprobe.report import curves as curve_names
from geomprobe.report.curves import WIDE, Curve, column_name, groups, null_model
from geomprobe.report.output import written_aside
from geomprobe.trace.schema import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from geomprobe.trace.reader import Trace
    from geomprobe.trace.record import Record

COLUMNS = ("rsi", "eb", "cosine")

# Okabe and Ito's palette: its colors differ in every common kind of color vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GRAY = "0.45"
_LOGARITHMIC = ("rsi", "eb")
_LONG = 45
"""Characters of a name beyond which the legend has one column: two would not fit beside each other."""
_WIDEST = 80
"""Characters of a name's line: more would not fit the figure's width."""
_LINE = 0.22
"""Inches of a legend's line, by which the figure grows so that the panels do not shrink."""


@contextmanager
def _without_tex() -> Iterator[None]:
    """Where the user's settings want TeX, it would carry out what a name holds."""
    try:
        from matplotlib import rc_context
    except ImportError:
        yield
        return
    with rc_context({"text.usetex": False}):
        yield


@_without_tex()
def figure(
    traces: Sequence[Trace],
    columns: Sequence[str] = COLUMNS,
    *,
    skip_last_epoch: bool = False,
    with_null_model: bool = True,
) -> Figure:
    """One panel a column, one line a run; the null model (NWT eq. 8) dashed in gray.

    Raises:
        UsageError: matplotlib is not installed, or the runs have no common horizontal axis.
        UnknownColumn: a trace has no such column.
        RunError: a column without a single number in any of the runs.
    """
    grouped = [groups(trace, skip_last_epoch=skip_last_epoch) for trace in traces]
    axes = {each.axis for each in grouped}
    if len(axes) > 1:
        raise UsageError("some of these runs have epochs and some do not: plot them apart")
    drawing = _new_figure(1.1 + 2.2 * len(columns))
    panels = drawing.subplots(len(columns), 1, sharex=True, squeeze=False)[:, 0]
    for panel, column in zip(panels, columns, strict=True):
        curves = [each.curve(trace[column]) for each, trace in zip(grouped, traces, strict=True)]
        walks = [null_model(trace, column) if with_null_model else None for trace in traces]
        nulls = [None if w is None else each.curve(w) for each, w in zip(grouped, walks, strict=True)]
        _draw(panel, column, curves, nulls, labels(traces))
        _say_absent(panel, column, traces)
    panels[-1].set_xlabel(axes.pop())
    panels[-1].locator_params(axis="x", integer=True)
    drawing.align_ylabels(list(panels))
    _title(drawing, traces)
    _legend(drawing, list(panels))
    return drawing


@_without_tex()
def occupancy_figure(traces: Sequence[Trace], smooth: int | None = None) -> Figure:
    """The share of measured steps below every threshold of the relative residual, one line a run.

    Args:
        traces: whose replays took Hg.
        smooth: moving average over so many measured rows; None for none.

    Raises:
        UsageError: matplotlib is not installed, or a trace has no Hg.
    """
    drawing = _new_figure(4.0)
    panel = drawing.subplots()
    for i, (trace, name) in enumerate(zip(traces, labels(traces), strict=True)):
        curve = occupancy(trace, smooth=smooth)
        panel.plot(curve.thresholds, curve.share, label=name, **_line(i))
    panel.set_xscale("log")
    panel.set_ylim(0, 1.02)
    panel.set_xlabel("threshold of the relative residual lr ‖HG‖ / ‖G‖")
    panel.set_ylabel("share of measured steps below it")
    panel.grid(alpha=0.25, linewidth=0.5)
    _title(drawing, traces)
    _legend(drawing, [panel])
    return drawing


@_without_tex()
def save(drawing: Figure, path: Path) -> None:
    """Write a figure in the format that the file's suffix names.

    Raises:
        UsageError: matplotlib knows no such format.
        RunError: the file cannot be written; what was there before stays.
    """
    with written_aside(path) as aside:
        try:
            drawing.savefig(aside, dpi=150, format=path.suffix.removeprefix(".") or "png")
        except ValueError as error:
            raise UsageError(f"cannot write {path}: {error}") from error


def labels(traces: Sequence[Trace | Record]) -> list[str]:
    """The runs' names as matplotlib draws them letter by letter: ``$`` starts no formula, and ``_`` hides no line."""
    names = (name.replace("$", r"\$") for name in curve_names.labels(traces))
    return [f" {name}" if name.startswith("_") else name for name in names]


def _new_figure(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("plot needs matplotlib: pip install 'geomprobe[plot]'") from error
    return Figure(figsize=(7.0, height), layout="constrained")


def _line(run: int) -> dict[str, Any]:
    """The color and dashes of a run; runs of one color differ in their dashes."""
    kinds = ("-", "-.", ":")
    return {"color": _COLORS[run % len(_COLORS)], "linestyle": kinds[run // len(_COLORS) % len(kinds)]}


def _draw(panel: Any, column: str, curves: list[Curve], nulls: list[Curve | None], names: list[str]) -> None:
    if not any(np.isfinite(curve.mean).any() for curve in curves):
        raise RunError(f"{column} holds no numbers in {', '.join(names)}: it was not measured")
    for i, (curve, name) in enumerate(zip(curves, names, strict=True)):
        line, marker = _line(i), "." if len(curve.x) < 2 else ""
        panel.fill_between(curve.x, curve.low, curve.high, color=line["color"], alpha=0.2, linewidth=0)
        panel.plot(curve.x, curve.mean, label=name, marker=marker, **line)
    _draw_nulls(panel, nulls)
    _scale(panel, column, curves)
    panel.set_ylabel(_label(column))
    panel.grid(alpha=0.25, linewidth=0.5)


def _say_absent(panel: Any, column: str, traces: Sequence[Trace]) -> None:
    """Write under the curves why rows of this column are left out."""
    lines = [
        f"absent in {len(steps)} of {trace.num_steps} steps{f' of {name}' if len(traces) > 1 else ''}: {absence.reason}"
        for trace, name in zip(traces, labels(traces), strict=True)
        for absence, steps in trace.absences.items()
        if absence.hides_column(column)
    ]
    if lines:
        text = "\n".join(textwrap.fill(line, 2 * _WIDEST) for line in lines)
        panel.set_title(text, fontsize="xx-small", color=_GRAY, loc="left", parse_math=False)


def _draw_nulls(panel: Any, nulls: list[Curve | None]) -> None:
    """Each run's null model; gray where there is one for all, in the runs' colors where they differ."""
    drawn = [(i, null) for i, null in enumerate(nulls) if null is not None]
    first = drawn[0][1] if drawn else None
    one = all(first is not None and np.array_equal(null.mean, first.mean) for _, null in drawn)
    for i, null in drawn[:1] if one else drawn:
        panel.plot(null.x, null.mean, "--", color=_GRAY if one else _line(i)["color"], linewidth=1.2)
    if drawn:
        panel.plot([], [], "--", color=_GRAY, linewidth=1.2, label="random walk (NWT eq. 8)")


def _scale(panel: Any, column: str, curves: list[Curve]) -> None:
    values = np.concatenate([np.append(curve.low, curve.high) for curve in curves])
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    name = column.rpartition("/")[2]
    wide = len(size) and (name in _LOGARITHMIC or size.max() > WIDE * size.min())
    if name == "cosine" or not wide:
        if np.nanmin(values) < 0 < np.nanmax(values):
            panel.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    elif np.nanmin(values) >= 0:
        panel.set_yscale("log")
    else:
        panel.set_yscale("symlog", linthresh=10.0 ** np.floor(np.log10(np.quantile(size, 0.1))))


def _label(column: str) -> str:
    described = describe(column)
    name = column_name(described.name)
    place = column.rpartition("/")[0]
    bare = described.units in ("1", described.name)
    name = name if bare else f"{name} ({described.units})"
    return name if place in ("", "steps") else f"{name}\n{place}"


def _title(drawing: Figure, traces: Sequence[Trace | Record]) -> None:
    """The run, or how many; and in red, every run that is not proven to be the recorded one."""
    named = list(zip(labels(traces), traces, strict=True))
    doubts = [f"{name}: {trace.status.upper()}" for name, trace in named if trace.status != "complete"]
    whole = [f"{len(traces)} runs"] if len(traces) > 1 else [named[0][0]] * (not doubts)
    drawing.suptitle("\n".join(whole + doubts), fontsize="medium", color="#B00020" if doubts else "black")


def _legend(drawing: Figure, panels: Sequence[Any]) -> None:
    """One entry a run and one for the null model, below the panels, off the data."""
    entries: dict[str, Any] = {}
    for panel in panels:
        handles, names = panel.get_legend_handles_labels()
        entries.update(zip(names, handles, strict=True))
    columns = 1 if max(map(len, entries)) > _LONG else 2
    names = [textwrap.fill(name, _WIDEST, subsequent_indent="    ") for name in entries]
    lines = -(-sum(name.count("\n") + 1 for name in names) // columns)
    drawing.set_figheight(drawing.get_figheight() + _LINE * max(0, lines - 2))
    drawing.legend(list(entries.values()), names, loc="outside lower center", ncols=columns, frameon=False)
