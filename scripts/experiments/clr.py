"""CLR against SGD at fixed rates on digits, as CG's figures 2 and 4: the runs, the figures and a table.

    python scripts/experiments figure clr             3 tasks, 7 methods, 3 seeds, 40 epochs: half an hour on a core
    python scripts/experiments figure clr --quick     1 task, 2 methods, 2 seeds, 2 epochs

Each run is kept as a small JSON file, and made only once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from digit_runs import (
    NARROW,
    NOISELESS,
    QUICKSTART,
    Epoch,
    MakeOptimizer,
    Task,
    column,
    kept,
    spread,
    train_digits,
)
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
    """The epochs of a run, from its file or by training."""
    name = f"{task.name}-{method.name}-{epochs}-epochs-seed-{seed}".replace(", ", "-").replace(" ", "-")
    return kept(folder / f"{name}.json", seed, functools.partial(train_digits, task, method.make, epochs))


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
    return {pair: Curves(**{f.name: column(runs[pair], f.name) for f in fields(Curves)}) for pair in pairs}


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
                panel.fill_between(epoch, values.min(0), values.max(0), color=method.color, alpha=0.15, linewidth=0)
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
            panel.plot(epoch, curves.rate.mean(0), method.style, color=method.color, label=method.name, lw=1.3)
            panel.fill_between(epoch, low, high, color=method.color, alpha=0.15, linewidth=0)
        panel.set_yscale("log")
        panel.set_title(TITLES[task], fontsize="medium")
        panel.set_xlabel("epoch")
    panels[0, 0].set_ylabel("learning rate used")
    light_grid(panels.flat)
    legend_below(drawing, panels[0], 4)
    return drawing


def table(sweep: Sweep, found: Results) -> str:
    """The numbers, as Markdown; the last two over the last epochs: the seeds' mean, minimum and maximum."""
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


def draw_all(figures: Path, runs: Path, quick: bool) -> None:
    """Make the runs that are missing, draw both figures into a folder, and print the table."""
    sweep = QUICK if quick else FULL
    found = results(sweep, runs)
    save(draw_curves(sweep, found), figures / "clr_sgd.png")
    save(draw_rates(sweep, found), figures / "clr_values.png")
    print(f"\n{sweep.epochs} epochs, {sweep.seeds} seeds\n\n{table(sweep, found)}")
