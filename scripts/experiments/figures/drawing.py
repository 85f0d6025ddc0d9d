"""What the papers' figures have in common: a line and a band by epoch, their colors and scales."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from catalog.entry import Lines
from matplotlib.figure import Figure
from numpy.typing import NDArray

import geomprobe
from figures.style import BLUE, GREEN, ORANGE, PINK, legend_below, light_grid
from geomprobe.report.curves import labels

Array = NDArray[np.float64]

COLORS = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", "black")

DECADE = 10.0
"""Ratio of largest to smallest from which an axis is logarithmic; below it its ticks would be crowded."""

NAMES = {
    "rsi": "RSI (1/rate)",
    "eb": "EB (1/rate)",
    "cosine": "cosine γ",
    "lolr": "loLR",
    "distance": "‖w − w*‖",
    "loss": "training loss (nats)",
    "hg_norm": "‖Hg‖",
    "lr": "learning rate",
    "error": "held-out error (%)",
    "corridor_residual": "‖Hg‖ / ‖g‖",
}


@dataclass(frozen=True)
class Band:
    """A line with a band, one point an epoch."""

    epoch: Array
    mean: Array
    low: Array
    high: Array

    def until(self, end: int | None) -> Band:
        """The epochs before ``end``, counted from the last one where it is negative, as a slice does."""
        return Band(self.epoch[:end], self.mean[:end], self.low[:end], self.high[:end])


def steps_band(folder: Path, column: str) -> Band:
    """NWT's: the mean of an epoch's steps, and their minimum and maximum."""
    found = geomprobe.open_trace(folder).per_epoch(column)
    return Band(found.epoch, found.mean, found.minimum, found.maximum)


def seeds_band(folders: Sequence[Path], column: str) -> Band:
    """CG's: the mean over seeds of an epoch's mean, and the minimum and maximum over the seeds."""
    found = [geomprobe.open_trace(folder).per_epoch(column) for folder in folders]
    means = np.stack([each.mean for each in found])
    return Band(found[0].epoch, means.mean(0), means.min(0), means.max(0))


def lines_of_runs(folders: Sequence[Path], seeds_together: bool) -> Lines:
    """The lines of a figure, labeled with what differs between them.

    Args:
        folders: of the runs, in the order of the figure.
        seeds_together: whether all runs of one script with the same arguments are one line, or each run is one.
    """
    groups: dict[object, list[Path]] = defaultdict(list)
    for folder in folders:
        script = geomprobe.open_trace(folder).manifest["script"]
        groups[(script["path"], *script["argv"]) if seeds_together else folder].append(folder)
    names = labels([geomprobe.open_trace(group[0]) for group in groups.values()])
    return dict(zip(names, groups.values(), strict=True))


def draw_band(panel: Any, band: Band, color: str, label: str, style: str = "-") -> None:
    panel.fill_between(band.epoch, band.low, band.high, color=color, alpha=0.18, linewidth=0)
    panel.plot(band.epoch, band.mean, style, color=color, label=label, linewidth=1.4)


def colored(lines: Lines) -> Iterator[tuple[str, Sequence[Path], str]]:
    """Each line's label, folders and color."""
    for index, (label, folders) in enumerate(lines.items()):
        yield label, folders, COLORS[index % len(COLORS)]


def scale(panel: Any, column: str) -> None:
    """A logarithmic axis for what spans decades, linear about 0 where it has both signs."""
    panel.set_ylabel(NAMES[column])
    if column in ("cosine", "distance"):
        panel.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        return
    drawn = np.concatenate([np.ravel(each.get_paths()[0].vertices[:, 1]) for each in panel.collections])
    if (drawn > 0).all():
        panel.set_yscale("log" if drawn.max() > DECADE * drawn.min() else "linear")
    elif (drawn < 0).any():
        size = np.abs(drawn[drawn != 0])
        panel.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(np.quantile(size, 0.1))))
        panel.axhline(0, color="0.6", linewidth=0.8, zorder=0)


def finish(figure: Figure, panels: Iterable[Any], columns: int = 4) -> Figure:
    """The epochs' axis, a light grid, and one legend below."""
    panels = list(panels)
    for panel in panels:
        if not panel.get_xlabel():
            panel.set_xlabel("epoch")
            panel.locator_params(axis="x", integer=True)
    light_grid(panels)
    legend_below(figure, panels, columns)
    return figure
