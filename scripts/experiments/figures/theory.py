"""Draw the figures of the two papers' theory into docs/gallery.

    python scripts/experiments figure theory                        all of them; a quarter of an hour on two cores
    python scripts/experiments figure theory --only random_walk     one, or several

The runs behind them are recorded and replayed under runs/theory, and not made again while they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from figures.landscapes import draw_descent_and_flow, draw_landscapes
from figures.style import FULL, QUICK, Drawn, Size, save
from figures.traces import (
    draw_counterexamples,
    draw_loss_and_hg,
    draw_occupancy,
    draw_random_walk,
    draw_schedules,
)

FIGURES: dict[str, Callable[[Size, Path], Drawn]] = {
    "landscapes": lambda size, _: draw_landscapes(size),
    "descent_and_flow": lambda *_: draw_descent_and_flow(),
    "counterexamples": draw_counterexamples,
    "random_walk": draw_random_walk,
    "loss_and_hg": draw_loss_and_hg,
    "schedules": draw_schedules,
    "occupancy": draw_occupancy,
}


def draw_all(figures: Path, runs: Path, quick: bool, only: Sequence[str]) -> None:
    """Draw the named figures into a folder, and print the numbers of each."""
    for name in only:
        drawn = FIGURES[name](QUICK if quick else FULL, runs)
        save(drawn.figure, figures / f"{name}.png")
        for what, value in drawn.numbers.items():
            print(f"    {what}: {value:.3g}")
