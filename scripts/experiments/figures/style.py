"""What the theory's figures have in common: how much is computed, their colors, and what a figure comes with."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette: every common kind of color vision can distinguish them.
BLUE, ORANGE, GREEN, PINK, GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.45"


@dataclass(frozen=True)
class Size:
    """How much is computed for the figures.

    Attributes:
        epochs: of each training on digits.
        descent_epochs: of the runs on NWT's objectives, 50 steps each.
        walks: random walks.
        walk_steps: steps of each.
        walk_dimension: far above the steps, for NWT eq. 8 to hold.
        grid: points a side of each surface.
    """

    epochs: int
    descent_epochs: int
    walks: int
    walk_steps: int
    walk_dimension: int
    grid: int


FULL = Size(epochs=30, descent_epochs=40, walks=100, walk_steps=100, walk_dimension=10_000, grid=61)
QUICK = Size(epochs=2, descent_epochs=3, walks=20, walk_steps=20, walk_dimension=10_000, grid=15)


class Drawn(NamedTuple):
    """A figure, and the numbers that its page quotes."""

    figure: Figure
    numbers: dict[str, float]


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def light_grid(panels: Iterable[Any]) -> None:
    for panel in panels:
        panel.grid(alpha=0.25, linewidth=0.5)


def legend_below(figure: Figure, panels: Iterable[Any], columns: int) -> None:
    """One entry a name over all the panels, off the data."""
    entries: dict[str, Any] = {}
    for panel in panels:
        handles, names = panel.get_legend_handles_labels()
        entries.update(zip(names, handles, strict=True))
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 256 colors, and print its path: surfaces take a third of the space, and lines look the same."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)
    print(f"Wrote {path}", flush=True)
