"""The figures that need one pass only, drawn from the sketches of recordings: gamma, and the horizon map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError
from geomprobe.report.plot import _GRAY, _legend, _line, _new_figure, _title, _without_tex, labels
from geomprobe.trace import geometry
from geomprobe.trace.reader import group_statistics
from geomprobe.trace.sketch import HorizonMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from geomprobe.trace.record import Record

WINDOWS = 50
"""How many windows of steps a curve or a map has where there are no epochs."""
_WIDE = 2
"""Standard errors from the mean to the edge of a band."""


@_without_tex()
def gamma_figure(records: Sequence[Record], *, skip_last_epoch: bool = False, with_null_model: bool = True) -> Figure:
    """Gamma against the final iterate, by epoch, as the sketches estimate it: a line with a band of its error a run.

    Raises:
        UsageError: matplotlib is not installed, or a recording has no final iterate yet.
        RunError: a recording has no sketch.
    """
    drawing = _new_figure(4.2)
    panel = drawing.subplots()
    for i, (record, name) in enumerate(zip(records, labels(records), strict=True)):
        sketch = record.sketch
        x, of_row, axis = _groups(record, skip_last_epoch)
        mean = sketch.mean_cosine(of_row=of_row, groups=len(x))
        panel.fill_between(
            x, mean.value - _WIDE * mean.error, mean.value + _WIDE * mean.error, alpha=0.25, color=_line(i)["color"]
        )
        panel.plot(x, mean.value, label=f"{name}, K = {sketch.size}", marker="." if len(x) < 2 else "", **_line(i))
        panel.set_xlabel(axis)
        if with_null_model:
            walk = geometry.random_walk_cosine(record.num_steps - sketch.steps)
            null = _means(walk, of_row, len(x))
            color = _GRAY if len(records) == 1 else _line(i)["color"]
            panel.plot(x, null, "--", color=color, label="" if i else "random walk (NWT eq. 8)", linewidth=1.2)
    panel.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    panel.set_ylabel("cosine γ, estimated")
    panel.set_title(f"band: mean ± {_WIDE} standard errors of the sketch", fontsize="small", color=_GRAY, loc="left")
    panel.grid(alpha=0.25, linewidth=0.5)
    _title(drawing, records)
    _legend(drawing, [panel])
    return drawing


@_without_tex()
def horizon_figure(record: Record) -> Figure:
    """The cosine between each step's gradient and the way of the next h steps: as a map, and its mean at each h.

    Raises:
        UsageError: matplotlib is not installed.
        RunError: the recording has no sketch, or only one step has.
    """
    found = record.sketch.horizon_map()
    if not np.isfinite(found.cosine.value).any():
        raise RunError(f"{record.path} has sketches of {len(found.steps)} steps: a horizon needs two of them")
    drawing = _new_figure(7.0)
    above, below = drawing.subplots(2, 1, height_ratios=(1.2, 1))
    _draw_map(drawing, above, found)
    _draw_means(below, found)
    _title(drawing, [record])
    _legend(drawing, [below])
    return drawing


def _draw_map(drawing: Figure, panel: Any, found: HorizonMap) -> None:
    """Windows of steps from left to right, horizons upwards; white where the cosine is 0, gray where there is none."""
    values, left, right = _windowed(found)
    largest = float(np.nanmax(np.abs(values)))
    ratio = np.sqrt(found.horizons[1:] / found.horizons[:-1]) if len(found.horizons) > 1 else np.array([1.1])
    edges = np.concatenate(
        [[found.horizons[0] / ratio[0]], found.horizons[:-1] * ratio, [found.horizons[-1] * ratio[-1]]]
    )
    mesh = panel.pcolormesh(
        np.append(left, right), edges, values, cmap="RdBu_r", vmin=-largest, vmax=largest, rasterized=True
    )
    panel.set_facecolor("0.85")
    panel.set_yscale("log")
    panel.set_ylabel("horizon h (steps)")
    panel.set_xlabel("step t")
    drawing.colorbar(mesh, ax=panel, label="cosine of $G_t$ and $w_t - w_{t+h}$", pad=0.02)


def _draw_means(panel: Any, found: HorizonMap) -> None:
    mean = found.mean
    known = np.isfinite(mean.value)
    h, value, error = found.horizons[known], mean.value[known], _WIDE * mean.error[known]
    panel.errorbar(
        h,
        value,
        error,
        marker="o",
        markersize=3,
        label=f"mean over t, ± {_WIDE} standard errors of the sketch",
        **_line(0),
    )
    panel.plot(found.horizons, found.random_walk(), "--", color=_GRAY, label="random walk, $h^{-1/2}$ (NWT eq. 8)")
    panel.set_xscale("log")
    if (value > error).all():
        panel.set_yscale("log")
    else:
        panel.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    panel.set_xlabel("horizon h (steps)")
    panel.set_ylabel("mean cosine")
    panel.grid(alpha=0.25, linewidth=0.5, which="both")


def _windowed(found: HorizonMap) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """The map's means over windows of steps [H, windows], the windows' left edges, and the right edge of the last."""
    width = max(1, -(-len(found.steps) // (2 * WINDOWS)))
    of_row = np.arange(len(found.steps)) // width
    means = np.array([_means(row, of_row, of_row[-1] + 1) for row in found.cosine.value])
    every = found.steps[1] - found.steps[0] if len(found.steps) > 1 else 1
    return means, found.steps[::width].astype(float), float(found.steps[-1] + every)


def _groups(record: Record, skip_last_epoch: bool) -> tuple[NDArray[np.float64], NDArray[np.intp], str]:
    """Where each group of sketched steps is drawn, the group of each [M] (-1 for none), and the name of the axis."""
    steps = record.sketch.steps
    epoch = record.steps["epoch"][steps]
    epochs = np.unique(epoch[np.isfinite(epoch)])
    if len(epochs) > 1:
        kept = epochs[:-1] if skip_last_epoch else epochs
        return kept, np.where(np.isin(epoch, kept), np.searchsorted(kept, epoch), -1), "epoch"
    width = max(1, -(-len(steps) // WINDOWS))
    window = np.arange(len(steps)) // width
    x = np.array([steps[window == i].mean() for i in np.unique(window)])
    return x, window, "step"


def _means(values: NDArray[np.float64], of_row: NDArray[np.intp], groups: int) -> NDArray[np.float64]:
    """The mean of each group's numbers; NaN where there is none."""
    return group_statistics(values, of_row, groups)[0]
