"""CLR against SGD at fixed rates on digits, as CG's figures 2 and 4: the runs, the figures and a table.

    python scripts/experiments/clr.py                 3 tasks, 7 methods, 3 seeds, 40 epochs: half an hour on a core
    python scripts/experiments/clr.py --quick         1 task, 2 methods, 2 seeds, 2 epochs

Each run is kept as a small JSON file; runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from digit_runs import NARROW, NOISELESS, QUICKSTART, Epoch, MakeOptimizer, Task, train_digits
from figures.style import legend_below, light_grid, new_figure, save
from matplotlib.figure import Figure
from numpy.typing import NDArray

from geomprobe.corridor import CLR

TITLES = {
    QUICKSTART: "width 16, augmentation, dropout",
    NOISELESS: "width 16, neither",
    NARROW: "width 8, augmentation, dropout",
}


@dataclass(frozen=True)
class Method:
    """An optimizer by name, and how it is drawn."""

    name: str
    make: MakeOptimizer
    color: str
    style: str = "-"


def sgd(rate: float, color: str) -> Method:
    return Method(f"SGD, rate {rate:g}", functools.partial(torch.optim.SGD, lr=rate), color)


# Viridis for the fixed rates, from low to high, and Okabe and Ito's orange and black for CLR.
METHODS = [
    sgd(0.01, "#440154"),
    sgd(0.03, "#3b528b"),
    sgd(0.1, "#21918c"),
    sgd(0.3, "#5ec962"),
    sgd(1.0, "#c8b400"),
    Method("CLR", CLR, "#d55e00"),
    Method("CLR, at most 1", functools.partial(CLR, max_lr=1.0), "black", "--"),
]

LAST = 5
"""Epochs over which the end of a run is averaged."""


@dataclass(frozen=True)
class Sweep:
    """Which runs there are: each method on each task from each seed."""

    tasks: Sequence[Task]
    methods: Sequence[Method]
    seeds: int
    epochs: int


FULL = Sweep([QUICKSTART, NOISELESS, NARROW], METHODS, 3, 40)
QUICK = Sweep([NOISELESS], [METHODS[3], METHODS[5]], 2, 2)


def result(task: Task, method: Method, seed: int, epochs: int, folder: Path) -> list[Epoch]:
    """What a run came to, from its file or by making it."""
    name = f"{task.name}-{method.name}-{epochs}-epochs-seed-{seed}".replace(", ", "-").replace(" ", "-")
    path = folder / f"{name}.json"
    if not path.exists():
        print(f"{name} ...", file=sys.stderr, flush=True)
        torch.manual_seed(seed)
        past = train_digits(task, method.make, epochs)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps([asdict(epoch) for epoch in past], indent=1))
        unfinished.rename(path)
    return [Epoch(**epoch) for epoch in json.loads(path.read_text())]


@dataclass(frozen=True)
class Curves:
    """A method's runs on a task, each [seeds, epochs]."""

    loss: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    rate: NDArray[np.float64]
    least_rate: NDArray[np.float64]
    greatest_rate: NDArray[np.float64]


Results = dict[tuple[Task, Method], Curves]


def results(sweep: Sweep, folder: Path) -> Results:
    """All runs of a sweep, seed by seed, so that an early end leaves whole comparisons."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(task, method) for task in sweep.tasks for method in sweep.methods]
    runs: dict[tuple[Task, Method], list[list[Epoch]]] = {pair: [] for pair in pairs}
    for seed in range(sweep.seeds):
        for task, method in pairs:
            runs[task, method].append(result(task, method, seed, sweep.epochs, folder))

    def column(pair: tuple[Task, Method], name: str) -> NDArray[np.float64]:
        return np.array([[getattr(epoch, name) for epoch in run] for run in runs[pair]])

    return {pair: Curves(**{f.name: column(pair, f.name) for f in fields(Curves)}) for pair in pairs}


def draw_curves(sweep: Sweep, found: Results) -> Figure:
    """Training loss and held-out error of each task: the seeds' mean, and a band over all of them (CG fig. 2)."""
    drawing = new_figure(3.4 * len(sweep.tasks) + 0.6, 5.6)
    panels = drawing.subplots(2, len(sweep.tasks), sharex=True, squeeze=False)
    for task, (upper, lower) in zip(sweep.tasks, panels.T, strict=True):
        for method in sweep.methods:
            curves = found[task, method]
            for panel, values in ((upper, curves.loss), (lower, 100 * (1 - curves.accuracy))):
                epoch = np.arange(1, values.shape[1] + 1)
                panel.plot(epoch, values.mean(0), method.style, color=method.color, label=method.name, lw=1.3)
                panel.fill_between(
                    epoch, values.min(0), values.max(0), color=method.color, alpha=0.15, linewidth=0
                )
        for panel in (upper, lower):
            panel.set_yscale("log")
        upper.set_title(TITLES[task], fontsize="medium")
        lower.set_xlabel("epochs trained")
    panels[0, 0].set_ylabel("training loss (nats)")
    panels[1, 0].set_ylabel("held-out error (%)")
    light_grid(panels.flat)
    legend_below(drawing, panels[0], 4)
    return drawing


def draw_rates(sweep: Sweep, found: Results) -> Figure:
    """The rates that CLR chose: mean over the steps of an epoch and the seeds, band over all of them (CG fig. 4)."""
    drawing = new_figure(3.4 * len(sweep.tasks) + 0.6, 3.4)
    panels = drawing.subplots(1, len(sweep.tasks), sharex=True, sharey=True, squeeze=False)
    for task, panel in zip(sweep.tasks, panels[0], strict=True):
        for method in (method for method in sweep.methods if method.name.startswith("CLR")):
            curves = found[task, method]
            epoch = np.arange(1, curves.rate.shape[1] + 1)
            low, high = curves.least_rate.min(0), curves.greatest_rate.max(0)
            panel.plot(
                epoch, curves.rate.mean(0), method.style, color=method.color, label=method.name, lw=1.3
            )
            panel.fill_between(epoch, low, high, color=method.color, alpha=0.15, linewidth=0)
        panel.set_yscale("log")
        panel.set_title(TITLES[task], fontsize="medium")
        panel.set_xlabel("epoch")
    panels[0, 0].set_ylabel("learning rate used")
    light_grid(panels.flat)
    legend_below(drawing, panels[0], 4)
    return drawing


def table(sweep: Sweep, found: Results) -> str:
    """The numbers, as Markdown; the last two over the last epochs: the seeds' mean, their least and greatest."""
    rows = [
        "| task | method | epochs to a loss of 0.2 | of 0.01 | training loss | held-out accuracy (%) |",
        "|---|---|---|---|---|---|",
    ]
    for (task, method), curves in found.items():
        cells = [TITLES[task], method.name, reached(curves.loss, 0.2), reached(curves.loss, 0.01)]
        loss, accuracy = (values[:, -LAST:].mean(1) for values in (curves.loss, curves.accuracy))
        cells += [spread(loss, ".2g"), spread(100 * accuracy, ".1f")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def reached(loss: NDArray[np.float64], level: float) -> str:
    """After how many epochs each seed's loss was first below a level; a dash where it never was."""
    below = loss < level
    return ", ".join(str(row.argmax() + 1) if row.any() else "–" for row in below)


def spread(values: NDArray[np.float64], form: str) -> str:
    return f"{values.mean():{form}} ({values.min():{form}} to {values.max():{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("docs/gallery"), help="folder of the figures"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/clr"), help="folder of the runs")
    parser.add_argument("--quick", action="store_true", help="a tiny sweep")
    arguments = parser.parse_args()
    sweep = QUICK if arguments.quick else FULL
    found = results(sweep, arguments.runs)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, drawing in (("clr_sgd", draw_curves(sweep, found)), ("clr_values", draw_rates(sweep, found))):
        path = arguments.output / f"{name}.png"
        save(drawing, path)
        print(f"Wrote {path}")
    print(f"\ntorch {torch.__version__}, {platform.machine()}, {sweep.epochs} epochs, {sweep.seeds} seeds\n")
    print(table(sweep, found))


if __name__ == "__main__":
    main()
