"""The step's own gradient beside those of held-out minibatches and of all samples, on digits.

    python scripts/experiments figure held-out              2 runs of 20 epochs: five minutes on a core
    python scripts/experiments figure held-out --quick      2 epochs

NWT section 6 calls it a critical limitation that the gradients measured are those that led to the final iterate. Beside
them, this measures the cosine of a fresh minibatch as large of digits that the run never trains on, one of digits that
it does train on but not at this step, and of the gradient over all that it trains on.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from digits import Digits, small_resnet
from figures.style import BLUE, GREEN, ORANGE, PINK, legend_below, light_grid, new_figure, save
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

import geomprobe
from geomprobe import Trace

BATCH = 64
UNSEEN, SEEN = "unseen digits", "training digits, drawn afresh"


def train(drawn: str, epochs: int) -> None:
    """The quickstart's training, by SGD at a fixed rate; a fresh minibatch is drawn from one of two sets."""
    model = small_resnet(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = Digits(train=True)
    probe = geomprobe.attach(model, optimizer)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    probe.held_out(loss_of, DataLoader(data if drawn == SEEN else Digits(train=False), BATCH))
    probe.full_gradient_of(loss_of, DataLoader(data, 500))
    for _ in probe.epochs(epochs):
        for batch in probe.batches(DataLoader(data, BATCH, shuffle=True, drop_last=True)):
            optimizer.zero_grad()
            probe.backward(loss_of(batch))
            optimizer.step()


def traces(epochs: int, folder: Path) -> dict[str, Trace]:
    """The certified trace of the one run, by where the fresh minibatches are drawn from."""
    found = {}
    for name in (UNSEEN, SEEN):
        training = functools.partial(train, name, epochs)
        path = folder / f"{name.partition(',')[0].replace(' ', '-')}-{epochs}-epochs"
        if not (path / "trace.h5").exists():
            geomprobe.record(training, path, seed=0, force=True).close()
            options = {"curvature_every": 0, "held_out_every": 1, "full_gradient_every": 1}
            geomprobe.replay(training, path, **options)
        found[name] = geomprobe.open_trace(path)
    return found


def draw(found: dict[str, Trace]) -> Figure:
    """Epoch means of the cosine, and the rows of the last epoch."""
    drawing = new_figure(8.6, 3.6)
    whole, last = panels = drawing.subplots(1, 2)
    own = found[UNSEEN]
    final = own["epoch"] == own["epoch"].max()
    steps = own.num_steps - own["step"]
    lines = [("the step's own", own, "cosine", BLUE)]
    lines += [
        (name, trace, "held_out/cosine", color)
        for (name, trace), color in zip(found.items(), (ORANGE, GREEN), strict=True)
    ]
    for name, trace, column, color in lines:
        curve = trace.per_epoch(column)
        whole.plot(curve.epoch, curve.mean, color=color, label=name, lw=1.3)
        whole.fill_between(curve.epoch, curve.minimum, curve.maximum, color=color, alpha=0.15, linewidth=0)
        measured = final & np.isfinite(trace[column])
        last.plot(steps[measured], trace[column][measured], ".-", color=color, label=name, lw=1.0)
    full = np.isfinite(own["full_gradient/cosine"])
    whole.plot(
        own["epoch"][full],
        own["full_gradient/cosine"][full],
        "s",
        color=PINK,
        ms=4,
        label="all training digits",
    )
    for panel in panels:
        panel.set_ylabel("cosine")
        panel.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    whole.set_xlabel("epoch")
    last.set_xlabel("steps left, last epoch")
    last.invert_xaxis()
    light_grid(panels)
    legend_below(drawing, panels[:1], 4)
    return drawing


def table(found: dict[str, Trace]) -> str:
    """Means of the cosine over the first and second half of training and over the last epoch, as Markdown."""
    rows = [
        "| gradient | first half | second half, without the last epoch | last epoch | last step |",
        "|---|---|---|---|---|",
    ]
    own = found[UNSEEN]
    columns = [("the step's own", own["cosine"])]
    columns += [(name, trace["held_out/cosine"]) for name, trace in found.items()]
    columns += [("all training digits, at epochs' ends", own["full_gradient/cosine"])]
    epoch, last = own["epoch"], own["epoch"].max()
    for name, values in columns:
        spans = (epoch < last / 2, (epoch >= last / 2) & (epoch < last), epoch == last)
        numbers = [values[span & np.isfinite(values)] for span in spans]
        cells = [f"{chosen.mean():.3f}" if len(chosen) else "–" for chosen in numbers]
        cells += [f"{values[np.isfinite(values)][-1]:.3f}"]
        rows.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(rows)


def draw_all(figures: Path, runs: Path, quick: bool) -> None:
    """Make the runs that are missing, draw the figure into a folder, and print the table."""
    epochs = 2 if quick else 20
    found = traces(epochs, runs)
    save(draw(found), figures / "held_out.png")
    print(f"\n{epochs} epochs\n\n{table(found)}")
