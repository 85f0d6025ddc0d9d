"""Draw the figures of the two papers' theory into docs/gallery.

    python scripts/experiments/figures/theory.py  all of them; a quarter of an hour on two cores
    python scripts/experiments/figures/theory.py --only random_walk        one, or several

The runs behind them are recorded and replayed under runs/theory, and not made again while they are there.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path

import torch

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("docs/gallery"), help="folder of the figures"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/theory"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="tiny runs, to see that all works")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    for name in arguments.only:
        drawn = FIGURES[name](QUICK if arguments.quick else FULL, arguments.runs)
        path = arguments.output / f"{name}.png"
        save(drawn.figure, path)
        print(f"Wrote {path}")
        for what, value in drawn.numbers.items():
            print(f"    {what}: {value:.3g}")


if __name__ == "__main__":
    main()
