"""Draw NWT's figures from run folders: a line for the mean of an epoch, a band from its minimum to its maximum.

    python scripts/experiments figure nwt fig1 runs/a runs/b -o gamma.png           a line a run
    python scripts/experiments figure nwt fig2 runs/a runs/b -o columns.png         a column a run
    python scripts/experiments figure nwt fig4-epochs runs/long -o budgets.png      against each reference that it kept

As in the paper the final epoch is left out, where w nears w*; and of a run whose rate decays to almost nothing, which
in the paper are those on ImageNet, the last 25 of 180 epochs. Cosines come with the null model, dotted: what a random
walk of as many steps shows (NWT eq. 8), which the choice of w* alone brings about.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from catalog.entry import Lines
from matplotlib.figure import Figure

import geomprobe
from figures.drawing import Array, Band, colored, draw_band, finish, scale, steps_band
from figures.style import new_figure
from geomprobe.trace import geometry

LEFT_OUT = 25 / 180
"""The share of epochs at the end of a decaying schedule that NWT's figures leave out."""


def measured(folder: Path, column: str) -> Band:
    """A run's line and band, without the epochs that the paper leaves out."""
    return steps_band(folder, column).until(-left_out(folder))


def left_out(folder: Path) -> int:
    """How many epochs at the end are not drawn: one, or a share of them where the rate ends below 1 % of its most."""
    trace = geomprobe.open_trace(folder)
    rate = trace["lr"]
    decayed = rate[-1] < 0.01 * rate.max()
    return math.ceil(len(trace.per_epoch("lr").epoch) * LEFT_OUT) if decayed else 1


def null_model(folder: Path) -> tuple[Array, Array]:
    """Epochs, and the cosine that a random walk of the run's length has on average over each (NWT eq. 8)."""
    trace = geomprobe.open_trace(folder)
    walk = geometry.random_walk_cosine(trace.num_steps - trace["step"])
    epochs, place = np.unique(trace["epoch"], return_inverse=True)
    kept = slice(-left_out(folder))
    return epochs[kept], (np.bincount(place, walk) / np.bincount(place))[kept]


def overlay(*columns: str) -> Callable[[Lines], Figure]:
    """A function that draws these columns side by side, all runs over one another."""

    def draw(lines: Lines) -> Figure:
        figure = new_figure(4.6 * len(columns) + 0.8, 3.9)
        panels = figure.subplots(1, len(columns), squeeze=False)[0]
        for panel, column in zip(panels, columns, strict=True):
            for label, folders, color in colored(lines):
                for folder in folders:
                    draw_band(panel, measured(folder, column), color, label)
                    if column == "cosine":
                        panel.plot(*null_model(folder), ":", color=color, linewidth=1.0)
            if column == "cosine":
                panel.plot([], [], ":", color="0.4", linewidth=1.0, label="random walk (eq. 8)")
            scale(panel, column)
        return finish(figure, panels, 3)

    return draw


def scenarios(lines: Lines) -> Figure:
    """RSI, EB and the cosine from top to bottom, a column for each run (fig. 2)."""
    columns = ("rsi", "eb", "cosine")
    figure = new_figure(3.5 * len(lines) + 0.6, 6.4)
    panels = figure.subplots(len(columns), len(lines), sharex="col", squeeze=False)
    for (label, folders, color), below in zip(colored(lines), panels.T, strict=True):
        for panel, column in zip(below, columns, strict=True):
            for folder in folders:
                draw_band(panel, measured(folder, column), color, "")
                if column == "cosine":
                    panel.plot(*null_model(folder), ":", color="0.4", lw=1.0, label="random walk (eq. 8)")
            scale(panel, column)
        below[0].set_title(label, fontsize="medium")
    for panel in panels[:, 1:].flat:
        panel.set_ylabel("")
    for panel in panels[:-1].flat:
        panel.set_xlabel(" ")
    return finish(figure, panels.flat)


def distances(lines: Lines) -> Figure:
    """The distance from the final weights over the whole of training, all runs over one another (fig. 12)."""
    figure = new_figure(5.4, 3.9)
    panel = figure.subplots()
    for label, folders, color in colored(lines):
        for folder in folders:
            draw_band(panel, steps_band(folder, "distance"), color, label)
    scale(panel, "distance")
    return finish(figure, [panel])


def distances_by_scenario(lines: Lines) -> Figure:
    """The distance from the final weights over the whole of training, a panel for each run (fig. 13)."""
    figure = new_figure(3.5 * len(lines) + 0.6, 3.0)
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for (label, folders, color), panel in zip(colored(lines), panels, strict=True):
        for folder in folders:
            draw_band(panel, steps_band(folder, "distance"), color, "")
        panel.set_title(label, fontsize="medium")
        scale(panel, "distance")
    return finish(figure, panels)


def rate_and_schedule(lines: Lines) -> Figure:
    """loLR of each run beside the schedule that trained it, each over its own greatest (section 6 on ImageNet)."""
    figure = new_figure(5.4, 3.9)
    panel = figure.subplots()
    for label, folders, color in colored(lines):
        for folder in folders:
            suggested, used = measured(folder, "lolr"), measured(folder, "lr")
            panel.plot(suggested.epoch, suggested.mean / suggested.mean.max(), color=color, label=label)
            panel.plot(used.epoch, used.mean / used.mean.max(), "--", color=color, linewidth=1.0)
    panel.plot([], [], "--", color="0.4", linewidth=1.0, label="the rate that was used")
    panel.set_ylabel("loLR, over its greatest")
    panel.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    return finish(figure, [panel], 3)


def epoch_budgets(lines: Lines) -> Figure:
    """Cosines of one run against its weights after several budgets of epochs, which it kept as references (fig. 4).

    At a constant rate a shorter run is the beginning of a longer one from the same seed.
    """
    ((folder,),) = lines.values()
    trace = geomprobe.open_trace(folder)
    ends = {name: int(name.removeprefix("step-")) for name in trace.references if name.startswith("step-")}
    ends["final"] = trace.num_steps
    epoch = trace["epoch"]
    budgets: dict[str, Band] = {}
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        trained = int(epoch[end - 1]) + 1
        band = trace.per_epoch(f"references/{name}/cosine")
        whole = Band(band.epoch, band.mean, band.minimum, band.maximum)
        budgets[f"{trained} epochs"] = whole.until(trained - 1)
    figure = new_figure(5.4, 3.9)
    panel = figure.subplots()
    for label, _, color in colored({budget: [folder] for budget in budgets}):
        draw_band(panel, budgets[label], color, label)
    scale(panel, "cosine")
    return finish(figure, [panel])


FIGURES: dict[str, Callable[[Lines], Figure]] = {
    "fig1": overlay("cosine"),
    "fig2": scenarios,
    "fig3": overlay("lolr"),
    "fig3-schedule": rate_and_schedule,
    "fig4": overlay("cosine"),
    "fig4-epochs": epoch_budgets,
    **{f"fig{number}": overlay("rsi", "eb") for number in (7, 8, 9, 10, 11)},
    "fig6": overlay("cosine"),
    "fig12": distances,
    "fig13": distances_by_scenario,
    "fig14": overlay("cosine"),
}
