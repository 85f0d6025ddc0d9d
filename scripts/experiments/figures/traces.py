"""Figures of measured runs: NWT's objectives and random walk, and digits with CLR and with momentum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from digit_runs import NOISELESS, QUICKSTART, MakeOptimizer, Task, descend, measured, train_digits
from numpy.typing import NDArray
from torch import nn

from figures.style import BLUE, GRAY, GREEN, ORANGE, PINK, Drawn, Size, legend_below, light_grid, new_figure
from geomprobe import Trace
from geomprobe.corridor import CLR, AsymmetricLinear, RandomWalk, SinusoidalMixture, occupancy, segments
from geomprobe.trace import geometry

Array = NDArray[np.float64]
STEPS = 50  # of an epoch on an objective without data
LINE_AND_BAND = "line: mean of an epoch; band: its minimum to maximum"


def epochs_with_band(panel: Any, trace: Trace, column: str, color: str, label: str, last: bool = True) -> None:
    """A line of epoch means and a band from epoch minimum to maximum, as NWT draw theirs."""
    found = trace.per_epoch(column)
    kept = slice(None) if last else slice(-1)
    x, mean, low, high = (v[kept] for v in (found.epoch, found.mean, found.minimum, found.maximum))
    panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    panel.plot(x, mean, color=color, label=label, linewidth=1.4)


def draw_counterexamples(size: Size, runs: Path) -> Drawn:
    """RSI and the cosine on ALM, and on SM at two rates (NWT fig. 5, without the final epoch as there)."""
    objectives: list[tuple[str, str, Callable[[], nn.Module], float]] = [
        ("ALM, rate 0.001", "alm-0.001", functools.partial(AsymmetricLinear, 100), 1e-3),
        ("SM, rate 0.003", "sm-0.003", functools.partial(SinusoidalMixture, 100), 3e-3),
        ("SM, rate 0.001", "sm-0.001", functools.partial(SinusoidalMixture, 100), 1e-3),
    ]
    figure = new_figure(10.0, 4.8)
    panels = figure.subplots(2, 3, sharex=True)
    numbers = {}
    for (title, name, make, rate), (upper, lower) in zip(objectives, panels.T, strict=True):
        train = functools.partial(descend, make, rate, size.descent_epochs, STEPS)
        trace = measured(train, runs / f"{name}-{size.descent_epochs}-epochs")
        epochs_with_band(upper, trace, "rsi", BLUE, LINE_AND_BAND, last=False)
        epochs_with_band(lower, trace, "cosine", BLUE, LINE_AND_BAND, last=False)
        upper.set_title(title, fontsize="medium")
        lower.set_xlabel(f"epoch of {STEPS} steps")
        numbers[f"share of steps with a negative cosine, {title}"] = float((trace["cosine"] < 0).mean())
    for panel in panels.flat:
        panel.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    for panel in panels[0]:
        panel.set_yscale("symlog", linthresh=10)
    panels[0, 0].set_ylabel("RSI (1/rate)")
    panels[1, 0].set_ylabel("cosine γ")
    light_grid(panels.flat)
    legend_below(figure, panels.flat, 1)
    return Drawn(figure, numbers)


def draw_random_walk(size: Size, runs: Path) -> Drawn:
    """RSI, EB and the cosine of random walks against NWT eq. 8, one of them through the two passes."""
    rate, steps = 0.1, size.walk_steps
    make = functools.partial(RandomWalk, size.walk_dimension)
    name = f"walk-{size.walk_dimension}-dimensions-{steps}-steps"
    trace = measured(functools.partial(descend, make, rate, 1, steps), runs / name)
    walks = np.stack([walk(size, rate, seed) for seed in range(size.walks)])
    left = steps - np.arange(steps)
    laws = [1 / (rate * left), left**-0.5 / rate, geometry.random_walk_cosine(left)]
    figure = new_figure(10.0, 3.6)
    panels = figure.subplots(1, 3)
    names = [("rsi", "RSI (1/rate)"), ("eb", "EB (1/rate)"), ("cosine", "cosine γ")]
    for i, (panel, (column, label), law) in enumerate(zip(panels, names, laws, strict=True)):
        low, middle, high = np.quantile(walks[:, i], [0, 0.5, 1], axis=0)
        panel.fill_between(
            left, low, high, color=BLUE, alpha=0.25, lw=0, label=f"{size.walks} walks, minimum to maximum"
        )
        panel.loglog(left, middle, color=BLUE, linewidth=1.4, label="median walk")
        panel.loglog(left, law, "--", color="black", linewidth=1.2, label="NWT eq. 8")
        panel.loglog(left, trace[column], ".", color=ORANGE, ms=3, label="one walk, recorded and replayed")
        panel.invert_xaxis()
        panel.set_xlabel("steps left, T − t")
        panel.set_ylabel(label)
    light_grid(panels)
    legend_below(figure, panels, 4)
    error = np.median(walks, axis=0) / np.array(laws) - 1
    slope = np.polyfit(np.log(left), np.log(np.median(walks[:, 2], axis=0)), 1)[0]
    return Drawn(figure, {"cosine_slope": float(slope), "worst_error_of_median": float(abs(error).max())})


def walk(size: Size, rate: float, seed: int) -> Array:
    """RSI, EB and the cosine [3, T] of one walk towards its last point."""
    source = torch.Generator().manual_seed(seed)
    module = RandomWalk(size.walk_dimension, generator=source, dtype=torch.float64)
    g = torch.stack([torch.autograd.grad(module(), module.theta)[0] for _ in range(size.walk_steps)])
    d = rate * g.flip(0).cumsum(0).flip(0)  # w_t - w_T: the steps still to come
    g_g, g_d, d_d = ((a * b).sum(1).numpy() for a, b in ((g, g), (g, d), (d, d)))
    return np.stack([geometry.rsi(g_d, d_d), geometry.eb(g_g, d_d), geometry.cosine(g_d, g_g, d_d)])


class Digits(NamedTuple):
    """A measured training on digits."""

    title: str
    name: str
    task: Task
    make: MakeOptimizer
    color: str


SMALL = functools.partial(torch.optim.SGD, lr=0.01)
MOMENTUM = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
DIGITS = [
    Digits("SGD, rate 0.01", "small-rate", QUICKSTART, SMALL, PINK),
    Digits("SGD, rate 0.05, momentum 0.9", "momentum", QUICKSTART, MOMENTUM, BLUE),
    Digits("CLR", "clr", QUICKSTART, CLR, ORANGE),
    Digits("CLR, no noise", "clr-noiseless", NOISELESS, CLR, GREEN),
]


def digits_traces(size: Size, runs: Path) -> list[tuple[Digits, Trace]]:
    return [
        (each, measured(functools.partial(train_digits, each.task, each.make, size.epochs), folder))
        for each in DIGITS
        for folder in [runs / f"digits-{each.name}-{size.epochs}-epochs"]
    ]


def draw_loss_and_hg(size: Size, runs: Path) -> Drawn:
    """Loss, the norm of Hg and the relative residual along runs on digits (CG fig. 7)."""
    figure = new_figure(10.8, 6.2)
    panels = figure.subplots(3, 4, sharex=True, sharey="row")
    numbers = {}
    rows = [("loss", "loss (nats)"), ("hg_norm", "‖Hg‖"), ("relative_residual", "rate · ‖Hg‖ / ‖g‖")]
    for (each, trace), column_of_panels in zip(digits_traces(size, runs), panels.T, strict=True):
        for panel, (column, _) in zip(column_of_panels, rows, strict=True):
            epochs_with_band(panel, trace, column, each.color, "")
            panel.set_yscale("log")
        column_of_panels[0].set_title(each.title, fontsize="medium")
        column_of_panels[-1].set_xlabel("epoch")
        found = trace.per_epoch("relative_residual").mean
        numbers[f"mean residual of the first epoch, {each.title}"] = float(found[0])
        numbers[f"mean residual of the last epoch, {each.title}"] = float(found[-1])
    for panel, (_, label) in zip(panels[:, 0], rows, strict=True):
        panel.set_ylabel(label)
    figure.align_ylabels(panels[:, 0].tolist())
    light_grid(panels.flat)
    return Drawn(figure, numbers)


def draw_schedules(size: Size, runs: Path) -> Drawn:
    """The rates that loLR and CLR would have set along the same run, and the one used (NWT fig. 3, CG fig. 4)."""
    figure = new_figure(10.8, 3.6)
    panels = figure.subplots(1, 4, sharey=True)
    numbers = {}
    for (each, trace), panel in zip(digits_traces(size, runs), panels, strict=True):
        epochs_with_band(panel, trace, "lolr", BLUE, "loLR (NWT eq. 5)", last=False)
        epochs_with_band(panel, trace, "clr", ORANGE, "CLR (CG eq. 3)", last=False)
        used = trace.per_epoch("lr")
        panel.plot(used.epoch[:-1], used.mean[:-1], "--", color="black", lw=1.2, label="rate used")
        momentum = trace.manifest["optimizer"]["groups"][0].get("momentum", 0)
        if momentum > 0:
            summed = used.mean[:-1] / (1 - momentum)
            panel.plot(used.epoch[:-1], summed, ":", color="black", label="rate / (1 − momentum)")
        panel.set_yscale("log")
        panel.set_title(each.title, fontsize="medium")
        panel.set_xlabel("epoch")
        numbers[f"steps with loLR below 0, {each.title}"] = float((trace["lolr"] < 0).sum())
        numbers[f"CLR at the first step, {each.title}"] = trace["clr"][0]
        numbers[f"greatest CLR of the first epoch, {each.title}"] = trace["clr"][trace["epoch"] == 0].max()
    panels[0].set_ylabel("learning rate")
    light_grid(panels)
    legend_below(figure, panels, 4)
    return Drawn(figure, numbers)


THRESHOLDS = (0.1, 0.3, 1.0)
SMOOTH = 23  # steps of an epoch


def draw_occupancy(size: Size, runs: Path) -> Drawn:
    """The share of each run inside near-corridors at every threshold, and its stays at three of them."""
    figure = new_figure(10.0, 4.4)
    curves, stays = figure.subplots(1, 2, width_ratios=[1, 1.3])
    numbers = {}
    traces = digits_traces(size, runs)
    for row, (each, trace) in enumerate(traces):
        for smooth, style in ((None, "-"), (SMOOTH, ":")):
            found = occupancy(trace, smooth=smooth)
            label = each.title if smooth is None else None
            curves.semilogx(found.thresholds, 100 * found.share, style, color=each.color, label=label)
        for level, threshold in enumerate(THRESHOLDS):
            inside = segments(trace, threshold, smooth=SMOOTH)
            bars = list(zip(inside.entries, inside.lengths, strict=True))
            stays.broken_barh(bars, (level + 0.22 * row - 0.43, 0.2), color=each.color, linewidth=0)
            numbers[f"share below {threshold:g}, {each.title}"] = segments(trace, threshold).share
            numbers[f"averaged stays below {threshold:g}, {each.title}"] = len(inside.entries)
    curves.plot([], [], ":", color=GRAY, label=f"averaged over {SMOOTH} steps, an epoch")
    curves.set_xlabel("threshold of the relative residual")
    curves.set_ylabel("steps below the threshold (%)")
    stays.set_yticks(range(len(THRESHOLDS)), [f"{threshold:g}" for threshold in THRESHOLDS])
    stays.set_ylim(-0.5, len(THRESHOLDS) - 0.5)
    stays.set_xlim(0, max(trace.num_steps for _, trace in traces))
    stays.set_xlabel("step")
    stays.set_ylabel("threshold")
    stays.set_title(f"stays below it, averaged over {SMOOTH} steps", fontsize="medium")
    light_grid([curves, stays])
    legend_below(figure, [curves], 3)
    return Drawn(figure, numbers)
