"""A schedule made from a trace, beside others of the same mean rate, on digits.

    python scripts/experiments figure schedule              5 schedules, 3 seeds, 30 epochs: ten minutes on a core
    python scripts/experiments figure schedule --quick      2 seeds, 3 epochs

A run of SGD at a fixed rate is recorded and replayed. The epoch means of its locally optimal rate (NWT eq. 5), scaled
to the fixed rate's mean, are the schedule that other seeds are trained with. Each run is kept as a small JSON file, and
made only once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from digit_runs import QUICKSTART, Epoch, column, kept, measured, spread, train_digits
from figures.style import BLUE, GRAY, GREEN, ORANGE, PINK, legend_below, light_grid, new_figure, save
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn
from torch.optim import SGD, Optimizer

from geomprobe.corridor.schedules import TraceLR, rates

RATE = 0.1
"""Of the run that the schedule is made from, and the mean of every schedule."""

LAST = 3
"""Epochs over which the end of a run is averaged."""

Rates = NDArray[np.float64]


@dataclass(frozen=True)
class Way:
    """A schedule by name, and how it is drawn."""

    name: str
    rates: Callable[[Rates], Rates]
    color: str
    style: str = "-"


def cosine(found: Rates) -> Rates:
    return 1 + np.cos(np.pi * np.arange(len(found)) / len(found))


WAYS = [
    Way("loLR of another run", lambda found: found, ORANGE),
    Way("the same, backwards", lambda found: found[::-1], PINK, "--"),
    Way("fixed", np.ones_like, BLUE),
    Way("cosine to 0", cosine, GREEN),
    Way("linear to 0", lambda found: 1 - np.arange(len(found)) / len(found), GRAY, ":"),
]


def schedules(epochs: int, folder: Path) -> dict[str, Rates]:
    """The rates of every way [steps], each of mean `RATE`, from a run that is made where it is missing."""
    train = functools.partial(train_digits, QUICKSTART, functools.partial(SGD, lr=RATE), epochs)
    found = rates(measured(train, folder / f"source-{epochs}-epochs"), "lolr", smooth="epoch")
    drawn = {way.name: way.rates(found) for way in WAYS}
    return {name: RATE * each / each.mean() for name, each in drawn.items()}


def following(parameters: Iterable[nn.Parameter], chosen: Rates) -> Optimizer:
    """SGD that takes chosen rates step by step."""
    optimizer = SGD(parameters, lr=RATE)
    scheduler = TraceLR(optimizer, chosen)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


def result(way: Way, chosen: Rates, seed: int, epochs: int, folder: Path) -> list[Epoch]:
    """The epochs of a run, from its file or by training."""
    path = folder / f"{way.name.replace(',', '').replace(' ', '-')}-{epochs}-epochs-seed-{seed}.json"
    optimizer = functools.partial(following, chosen=chosen)
    return kept(path, seed, functools.partial(train_digits, QUICKSTART, optimizer, epochs))


Results = dict[str, list[list[Epoch]]]


def results(chosen: dict[str, Rates], seeds: int, epochs: int, folder: Path) -> Results:
    """All runs, seed by seed, so that an early end leaves whole comparisons."""
    found: Results = {way.name: [] for way in WAYS}
    for seed in range(1, seeds + 1):  # the source has seed 0
        for way in WAYS:
            found[way.name].append(result(way, chosen[way.name], seed, epochs, folder))
    return found


def draw(chosen: dict[str, Rates], found: Results) -> Figure:
    """The rates, and training loss and held-out error: the seeds' mean, and a band over all of them."""
    drawing = new_figure(10.4, 3.6)
    rate, loss, error = panels = drawing.subplots(1, 3)
    for way in WAYS:
        runs, steps = found[way.name], chosen[way.name]
        epochs = len(runs[0])
        shown = np.linspace(0, epochs, len(steps), endpoint=False)
        rate.plot(shown, steps, way.style, color=way.color, label=way.name, lw=1.3)
        for panel, values in ((loss, column(runs, "loss")), (error, 100 * (1 - column(runs, "accuracy")))):
            x = np.arange(1, epochs + 1)
            panel.plot(x, values.mean(0), way.style, color=way.color, label=way.name, lw=1.3)
            panel.fill_between(x, values.min(0), values.max(0), color=way.color, alpha=0.15, linewidth=0)
    for panel, name in zip(panels, ("learning rate", "training loss (nats)", "held-out error (%)"), strict=True):
        panel.set_ylabel(name)
        panel.set_xlabel("epochs trained")
    loss.set_yscale("log")
    error.set_yscale("log")
    light_grid(panels)
    legend_below(drawing, panels[:1], 5)
    return drawing


def table(found: Results) -> str:
    """The numbers over the last epochs, as Markdown: the seeds' mean, minimum and maximum."""
    rows = ["| schedule | training loss | held-out accuracy (%) |", "|---|---|---|"]
    for name, runs in found.items():
        loss, accuracy = (column(runs, key)[:, -LAST:].mean(1) for key in ("loss", "accuracy"))
        cells = [name, spread(loss, ".3f"), spread(100 * accuracy, ".1f")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def draw_all(figures: Path, runs: Path, quick: bool) -> None:
    """Make the runs that are missing, draw the figure into a folder, and print the table."""
    seeds, epochs = (2, 3) if quick else (3, 30)
    runs.mkdir(parents=True, exist_ok=True)
    chosen = schedules(epochs, runs)
    found = results(chosen, seeds, epochs, runs)
    save(draw(chosen, found), figures / "schedule.png")
    print(f"\n{epochs} epochs, {seeds} seeds\n\n{table(found)}")
