"""Draw CG's figures from run folders: a line for the mean over seeds, a band from their minimum to their maximum.

    python scripts/experiments figure cg fig2 runs/clr-0 runs/clr-1 runs/sgd-0 runs/sgd-1 -o clr.png
    python scripts/experiments figure cg fig7 runs/clr-0 runs/clr-1 -o hg.png

Runs that differ in nothing but their seed make one line. Held-out accuracies are what the training script printed
while it was recorded; they are read from the file RUN.log beside a run, and left out where there is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from catalog.entry import Lines
from catalog.runs import log_of
from matplotlib.figure import Figure

import geomprobe
from figures.drawing import Array, colored, draw_band, finish, scale, seeds_band, steps_band
from figures.style import new_figure
from geomprobe.corridor import occupancy

HELD_OUT = re.compile(r"^epoch +(\d+) .*held-out accuracy (\S+)$", re.MULTILINE)

INSIDE = 0.1
"""Relative residual below which a step counts as taken in a near-corridor: a tenth of the gradient turns."""


def held_out_error(folder: Path) -> Array:
    """Percent of held-out images told wrong after each epoch, as the script printed it; NaN where it did not."""
    epochs = len(geomprobe.open_trace(folder).per_epoch("loss").epoch)
    errors = np.full(epochs, np.nan)
    if (log := log_of(folder)).exists():
        for epoch, accuracy in HELD_OUT.findall(log.read_text()):
            errors[int(epoch) - 1] = 100 * (1 - float(accuracy))
    return errors


def loss_and_error(lines: Lines) -> Figure:
    """Training loss and held-out error by epoch (figs. 2, 3, 5, 6, 8, 9)."""
    figure = new_figure(10.0, 3.9)
    left, right = figure.subplots(1, 2)
    for label, folders, color in colored(lines):
        draw_band(left, seeds_band(folders, "loss"), color, label)
        errors = np.stack([held_out_error(folder) for folder in folders])
        epoch = np.arange(errors.shape[1])
        right.fill_between(epoch, errors.min(0), errors.max(0), color=color, alpha=0.18, linewidth=0)
        right.plot(epoch, errors.mean(0), color=color, label=label, linewidth=1.4)
    scale(left, "loss")
    scale(right, "error")
    return finish(figure, [left, right])


def rates(lines: Lines) -> Figure:
    """The learning rate that each step took: the seeds' mean by epoch, and the range of all steps (fig. 4)."""
    figure = new_figure(3.8 * len(lines) + 0.6, 3.2)
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for (label, folders, color), panel in zip(colored(lines), panels, strict=True):
        mean = seeds_band(folders, "lr")
        each = [steps_band(folder, "lr") for folder in folders]
        low, high = np.min([band.low for band in each], 0), np.max([band.high for band in each], 0)
        panel.fill_between(mean.epoch, low, high, color=color, alpha=0.18, linewidth=0)
        panel.plot(mean.epoch, mean.mean, color=color, linewidth=1.4)
        panel.set_title(label, fontsize="medium")
        scale(panel, "lr")
    return finish(figure, panels)


def loss_and_hg(lines: Lines) -> Figure:
    """Training loss and the norm of Hg by epoch (fig. 7)."""
    figure = new_figure(10.0, 3.6)
    panels = figure.subplots(1, 2)
    for panel, column in zip(panels, ("loss", "hg_norm"), strict=True):
        for label, folders, color in colored(lines):
            draw_band(panel, seeds_band(folders, column), color, label)
        scale(panel, column)
    return finish(figure, panels)


def share_of_corridors(lines: Lines) -> Figure:
    """How much of each run is in near-corridors, when, and how fast the gradient turns whatever the rate."""
    figure = new_figure(11.4, 3.9)
    curves, shares, turns = figure.subplots(1, 3)
    for label, (folder,), color in colored(lines):
        trace = geomprobe.open_trace(folder)
        found = occupancy(trace)
        curves.semilogx(found.thresholds, 100 * found.share, color=color, label=label)
        epoch, inside = trace["epoch"], trace["relative_residual"] < INSIDE
        epochs = np.unique(epoch)
        shares.plot(epochs, [100 * inside[epoch == each].mean() for each in epochs], color=color)
        draw_band(turns, steps_band(folder, "corridor_residual"), color, "")
    curves.axvline(INSIDE, color="0.6", linewidth=0.8, zorder=0)
    curves.set_xlabel("threshold of the relative residual")
    curves.set_ylabel("steps below the threshold (%)")
    shares.set_ylabel(f"steps of the epoch below {INSIDE:g} (%)")
    scale(turns, "corridor_residual")
    return finish(figure, [curves, shares, turns], 3)


FIGURES: dict[str, Callable[[Lines], Figure]] = {
    **{f"fig{number}": loss_and_error for number in (2, 3, 5, 6, 8, 9)},
    "fig4": rates,
    "fig7": loss_and_hg,
    "corridors": share_of_corridors,
}
