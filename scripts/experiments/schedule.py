"""A schedule made from a trace, held against others of the same mean rate, on digits.

    python scripts/experiments/schedule.py              5 ways, 3 seeds, 30 epochs: ten minutes on a core
    python scripts/experiments/schedule.py --quick      2 seeds, 3 epochs

A run of SGD at a fixed rate is recorded and replayed. The epoch means of its locally optimal rate (NWT eq. 5), scaled
to the fixed rate's mean, are the schedule that other seeds are trained with. Each run is kept as a small JSON file;
runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from digit_runs import QUICKSTART, Epoch, measured, train_digits
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
    """What a run came to, from its file or by making it."""
    path = folder / f"{way.name.replace(',', '').replace(' ', '-')}-{epochs}-epochs-seed-{seed}.json"
    if not path.exists():
        print(f"{path.stem} ...", file=sys.stderr, flush=True)
        torch.manual_seed(seed)
        past = train_digits(QUICKSTART, functools.partial(following, chosen=chosen), epochs)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps([asdict(epoch) for epoch in past], indent=1))
        unfinished.rename(path)
    return [Epoch(**epoch) for epoch in json.loads(path.read_text())]


Results = dict[str, list[list[Epoch]]]


def results(chosen: dict[str, Rates], seeds: int, epochs: int, folder: Path) -> Results:
    """All runs, seed by seed, so that an early end leaves whole comparisons."""
    found: Results = {way.name: [] for way in WAYS}
    for seed in range(1, seeds + 1):  # the source has seed 0
        for way in WAYS:
            found[way.name].append(result(way, chosen[way.name], seed, epochs, folder))
    return found


def column(runs: list[list[Epoch]], name: str) -> Rates:
    return np.array([[getattr(epoch, name) for epoch in run] for run in runs])


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
    for panel, name in zip(
        panels, ("learning rate", "training loss (nats)", "held-out error (%)"), strict=True
    ):
        panel.set_ylabel(name)
        panel.set_xlabel("epochs trained")
    loss.set_yscale("log")
    error.set_yscale("log")
    light_grid(panels)
    legend_below(drawing, panels[:1], 5)
    return drawing


def table(found: Results) -> str:
    """The numbers over the last epochs, as Markdown: the seeds' mean, their least and greatest."""
    rows = ["| schedule | training loss | held-out accuracy (%) |", "|---|---|---|"]
    for name, runs in found.items():
        loss, accuracy = (column(runs, key)[:, -LAST:].mean(1) for key in ("loss", "accuracy"))
        cells = [name, spread(loss, ".3f"), spread(100 * accuracy, ".1f")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def spread(values: Rates, form: str) -> str:
    return f"{values.mean():{form}} ({values.min():{form}} to {values.max():{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("docs/gallery"), help="folder of the figure"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/schedule"), help="folder of the runs")
    parser.add_argument("--quick", action="store_true", help="a tiny sweep")
    arguments = parser.parse_args()
    seeds, epochs = (2, 3) if arguments.quick else (3, 30)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    chosen = schedules(epochs, arguments.runs)
    found = results(chosen, seeds, epochs, arguments.runs)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "schedule.png"
    save(draw(chosen, found), path)
    print(f"Wrote {path}")
    print(f"\ntorch {torch.__version__}, {platform.machine()}, {epochs} epochs, {seeds} seeds\n")
    print(table(found))


if __name__ == "__main__":
    main()
