"""Figures of corridors themselves: landscapes with lines of steepest descent, and descent against the flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colors
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from figures.style import BLUE, GRAY, GREEN, ORANGE, Drawn, Size, legend_below, light_grid, new_figure
from geomprobe.corridor import (
    ConcaveCone,
    ConvexCone,
    GluedCorridors,
    Landscape,
    LinearPiece,
    Quadratic,
    RuledSurface,
    gradient_descent,
    gradient_flow,
    momentum,
)
from geomprobe.trace import geometry

EXTENT = 3.0
PALE = colors.LinearSegmentedColormap.from_list("pale", ["#3b5b8c", "#9fb6cd", "#eef1ea", "#fbe9b7"])


def points(*rows: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def ring(radius: float, count: int = 8) -> list[Tensor]:
    angles = [2 * math.pi * (k + 0.5) / count for k in range(count)]
    return points(*((radius * math.cos(angle), radius * math.sin(angle)) for angle in angles))


MARKS = 8


class Scene(NamedTuple):
    """A landscape, where its lines of steepest descent start, and how far they are followed.

    Attributes:
        reach: for how long, in units of E / ||g||^2, which takes a corridor to loss 0 (CG eq. 3).
        intervals: equal times that this is cut into, a multiple of `MARKS`.
    """

    title: str
    landscape: Landscape
    starts: list[Tensor]
    reach: float = 0.99  # short of the apex of a cone, where there is no gradient
    intervals: int = MARKS


ORIGIN = points([0.0, 0.0])[0]
SMOOTH = [
    Scene(
        "linear piece (ex. 2.2)",
        LinearPiece([0.5, 0.25], offset=1.2, start=ORIGIN),
        points([2.8, -0.4], [2.8, 0.6], [2.8, 1.6], [2.8, 2.6]),
    ),
    Scene("convex cone (ex. 2.3)", ConvexCone(start=ORIGIN), ring(2.9)),
    Scene("concave cone (ex. 2.4)", ConcaveCone(beta=EXTENT, start=ORIGIN), ring(0.3)),
    Scene("ruled surface (ex. 2.5, fig. 1a)", RuledSurface(axes=[1.5, 0.4], start=ORIGIN), ring(2.9, 10)),
    Scene(
        "quadratic, no corridor (ex. 2.7)",
        Quadratic([[1.0, 0.0], [0.0, 0.3]], start=ORIGIN),
        ring(2.9),
        reach=4.0,
        intervals=3 * MARKS,
    ),
]
GLUED = Scene(
    "corridors glued together (ex. 2.6, fig. 1b)",
    GluedCorridors.figure_1b(ORIGIN),
    points([-0.2, 1.4], [-0.2, 1.7], [0.3, 1.2], [-1.9, -2.9], [2.1, -2.9], [-2.9, 2.6], [2.8, 2.2]),
)


def draw_landscapes(size: Size) -> Drawn:
    """CG's examples 2.2 to 2.7 as surfaces, their lines of steepest descent marked at equal times (CG fig. 1)."""
    figure = Figure(figsize=(10.5, 7.0))
    figure.subplots_adjust(0.0, 0.03, 0.97, 0.96, wspace=0.05, hspace=0.1)
    scenes = [*SMOOTH[:4], GLUED, SMOOTH[4]]
    bends = {}
    for place, scene in enumerate(scenes, start=1):
        panel = figure.add_subplot(2, 3, place, projection="3d", computed_zorder=False)
        lines = glued_lines(scene) if scene is GLUED else smooth_lines(scene)
        draw_scene(panel, scene, lines, size.grid)
        bends[scene.title] = max(map(bend, lines))
    smooth = [bends[scene.title] for scene in SMOOTH]
    return Drawn(figure, {"bend_in_corridors": max(smooth[:-1]), "bend_in_quadratic": smooth[-1]})


def smooth_lines(scene: Scene) -> list[Tensor]:
    """The flow from each start at equal times, as far as the scene's reach; all of them in one integration."""
    energy, starts = scene.landscape.energy, torch.stack(scene.starts)
    slope = torch.func.grad(lambda each: energy(each).sum())(starts)
    duration = scene.reach * energy(starts) / slope.square().sum(1)

    def at_each_pace(theta: Tensor) -> Tensor:
        return (duration * energy(theta.view_as(starts))).sum()

    times = np.linspace(0, 1, scene.intervals + 1).tolist()
    flow = gradient_flow(at_each_pace, times, starts.flatten())
    return list(flow.view(len(times), *starts.shape).unbind(1))


def glued_lines(scene: Scene) -> list[Tensor]:
    """Descent in small steps, which off the seams is the flow itself, until it is at a bottom, at equal times."""
    energy, starts = scene.landscape.energy, torch.stack(scene.starts)
    paths = gradient_descent(lambda theta: energy(theta.view_as(starts)).sum(), 0.02, 150, starts.flatten())
    lines = []
    for path in paths.view(-1, *starts.shape).unbind(1):
        above = path[: int((energy(path) > 0.04).sum())]
        lines.append(above[torch.linspace(0, len(above) - 1, 3 * MARKS + 1).round().long()])
    return lines


def bend(line: Tensor) -> float:
    """How far a path leaves the straight line at constant speed that it starts on, in its own lengths."""
    steps = torch.arange(len(line), dtype=line.dtype)[:, None]
    straight = line[0] + steps * (line[1] - line[0])
    return float((line - straight).norm(dim=1).max() / (line[-1] - line[0]).norm())


def draw_scene(panel: Any, scene: Scene, lines: Sequence[Tensor], grid: int) -> None:
    axis = torch.linspace(-EXTENT, EXTENT, grid, dtype=torch.float64)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    height = scene.landscape.energy(torch.stack([x, y], -1))
    panel.plot_surface(
        x.numpy(), y.numpy(), height.numpy(), cmap=PALE, rcount=grid, ccount=grid, antialiased=False, zorder=1
    )
    for line in lines:
        x, y, z = *line.T.numpy(), scene.landscape.energy(line).numpy()
        panel.plot(x, y, z, color=ORANGE, linewidth=1.6, zorder=2)
        every = len(x) // MARKS
        panel.plot(x[::every], y[::every], z[::every], ".", color="black", markersize=3.5, zorder=3)
    panel.view_init(elev=42, azim=-60)
    panel.set_title(scene.title, fontsize="medium")
    panel.set_xlabel("θ₁", labelpad=-6)
    panel.set_ylabel("θ₂", labelpad=-6)
    panel.set_zlabel("loss E", labelpad=-6)
    panel.tick_params(labelsize="x-small", pad=-2)
    panel.locator_params(nbins=4)


RULED = RuledSurface(axes=[1.5, 0.4], start=points([2.4, 2.0])[0])
BOWL = Quadratic(points([1.6, 0.3])[0].diag(), start=points([2.4, 2.0])[0])


def draw_descent_and_flow() -> Drawn:
    """Gradient descent and the gradient flow in a corridor and outside of one, and their distance (CG thm. 3.1)."""
    figure = new_figure(11.0, 4.2)
    inside, outside, distances = figure.subplots(1, 3)
    draw_paths(inside, "in a corridor: ruled surface", RULED, 0.3, 5)
    draw_paths(outside, "outside: quadratic", BOWL, 0.8, 5)
    rates = np.geomspace(1e-3, 1e-1, 13)
    gap, remainder, drift = (np.array(values) for values in zip(*(gaps(BOWL, h) for h in rates), strict=True))
    corridor = np.array([gaps(RULED, h)[0] for h in rates])
    slopes = {"slope_of_gap": order(rates, gap), "slope_of_remainder": order(rates, remainder)}
    second, third = (f"slope {slope:.2f}" for slope in slopes.values())
    distances.loglog(rates, gap, "o", color=BLUE, ms=5, label=f"quadratic: ‖GD − flow‖, {second}")
    distances.loglog(rates, drift, "-", color=BLUE, label="quadratic: flow drift h²‖Hg‖/2")
    distances.loglog(rates, remainder, "s", color=GREEN, ms=4, label=f"the same less (h²/2) Hg, {third}")
    rounding = np.maximum(corridor, np.finfo(float).eps / 2)  # 0 has no place on a logarithmic axis
    distances.loglog(rates, rounding, "^", color=ORANGE, ms=4, label="corridor: ‖GD − flow‖")
    distances.set_xlabel("learning rate h")
    distances.set_ylabel("distance in θ after one step")
    distances.set_title("one step from the same point", fontsize="medium")
    light_grid([distances])
    legend_below(figure, [inside, outside, distances], 3)
    return Drawn(figure, {**slopes, "gap_in_corridor": float(corridor.max())})


def gaps(landscape: Landscape, h: float) -> tuple[float, float, float]:
    """After one step: descent's distance from the flow, what is left of it without (h^2/2) Hg, and that term's norm."""
    theta = landscape.theta.detach()
    flow = gradient_flow(landscape, [h], rtol=1e-13, atol=1e-15)[0]
    away = flow - gradient_descent(landscape, h, 1)[1]
    gradient = torch.func.grad(landscape.energy)
    hg = torch.func.jacrev(gradient)(theta) @ gradient(theta)
    drift = geometry.flow_drift(h, hg.square().sum().item())
    return away.norm().item(), (away - h**2 / 2 * hg).norm().item(), float(drift)


def order(rates: NDArray[np.float64], distance: NDArray[np.float64]) -> float:
    return float(np.polyfit(np.log(rates), np.log(distance), 1)[0])


def draw_paths(panel: Any, title: str, landscape: Landscape, h: float, steps: int) -> None:
    axis = torch.linspace(-0.9, 2.9, 97, dtype=torch.float64)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    height = landscape.energy(torch.stack([x, y], -1))
    levels = height.max().item() * np.linspace(0.02, 1, 12)
    panel.contour(x.numpy(), y.numpy(), height.numpy(), levels, colors="0.8", linewidths=0.7)
    flow = gradient_flow(landscape, np.linspace(0, h * steps, 31).tolist())
    at_steps = gradient_flow(landscape, [h * n for n in range(steps + 1)])
    panel.plot(*flow.T.numpy(), color=GRAY, linewidth=1.2, label="gradient flow")
    panel.plot(*at_steps.T.numpy(), "o", color=GRAY, fillstyle="none", markersize=9, label="flow at time nh")
    descent = gradient_descent(landscape, h, steps)
    panel.plot(*descent.T.numpy(), "o", color=ORANGE, markersize=4, label="gradient descent")
    heavy = momentum(landscape, h / 4, steps, beta=0.5)
    panel.plot(*heavy.T.numpy(), "x", color=BLUE, markersize=6, label="momentum, h/4, β = 0.5")
    panel.set_title(f"{title}, h = {h:g}", fontsize="medium")
    panel.set_xlabel("θ₁")
    panel.set_ylabel("θ₂")
    panel.set_aspect("equal")
