"""The trainings behind the figures on digits and on NWT's objectives.

Each is a function that trains. `measured` records and replays it; `kept` calls it once and keeps what came of it.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import Digits, accuracy, small_resnet
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import geomprobe
from geomprobe.corridor import CLR

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Task:
    """Digits for the quickstart's ResNet to learn.

    Attributes:
        name: for files and titles.
        width: of the ResNet.
        noisy: crop, flip and drop out, as the quickstart does; without, the loss can reach 0.
        batch_size: of the 1,497 digits that are trained on.
    """

    name: str
    width: int = 16
    noisy: bool = True
    batch_size: int = 64


QUICKSTART = Task("quickstart")
NOISELESS = Task("noiseless", noisy=False)
NARROW = Task("narrow", width=8)


@dataclass(frozen=True)
class Epoch:
    """An epoch's mean loss over its minibatches, the held-out accuracy after it, and the rates of its steps."""

    loss: float
    accuracy: float
    rate: float
    least_rate: float
    greatest_rate: float


def train_digits(task: Task, make_optimizer: MakeOptimizer, epochs: int) -> list[Epoch]:
    """Train on digits at the optimizer's own rates; a probe is attached, and is inert outside of a pass."""
    model = small_resnet(task.width)
    data = Digits(train=True)
    if not task.noisy:
        data.augment = None
        for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
            dropout.p = 0.0
    loader = DataLoader(data, task.batch_size, shuffle=True, drop_last=True)
    held_out = DataLoader(Digits(train=False), 300)
    optimizer = make_optimizer(model.parameters())

    past = []
    probe = geomprobe.attach(model, optimizer)
    for _ in probe.epochs(epochs):
        losses, rates = [], []
        for images, labels in probe.batches(loader):
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            probe.backward(loss)
            if isinstance(optimizer, CLR):
                optimizer.step(loss=loss)
            else:
                optimizer.step()
            losses.append(loss.item())
            rates.append(float(optimizer.param_groups[0]["lr"]))
        mean_loss, mean_rate = statistics.fmean(losses), statistics.fmean(rates)
        past.append(Epoch(mean_loss, accuracy(model, held_out), mean_rate, min(rates), max(rates)))
    return past


def descend(make_loss: Callable[[], nn.Module], rate: float, epochs: int, steps: int) -> None:
    """Gradient descent on a module whose ``forward()`` is its loss, in epochs of so many steps."""
    objective = make_loss()
    optimizer = torch.optim.SGD(objective.parameters(), lr=rate)
    probe = geomprobe.attach(objective, optimizer)
    for _ in probe.epochs(epochs):
        for _ in range(steps):
            optimizer.zero_grad()
            probe.backward(objective())
            optimizer.step()


def measured(train: Callable[[], Any], run: Path, seed: int = 0) -> geomprobe.Trace:
    """The certified trace of a training, recorded and replayed unless ``run`` has it already."""
    if (run / "trace.h5").exists() and (trace := geomprobe.open_trace(run)).status == "complete":
        return trace
    return geomprobe.two_pass(train, run, seed=seed, force=True)


def kept(path: Path, seed: int, train: Callable[[], list[Epoch]]) -> list[Epoch]:
    """The epochs of a training, from its JSON file, which is written by training where it is missing."""
    if not path.exists():
        print(f"{path.stem} ...", file=sys.stderr, flush=True)
        torch.manual_seed(seed)
        past = train()
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps([asdict(epoch) for epoch in past], indent=1))
        unfinished.rename(path)
    return [Epoch(**epoch) for epoch in json.loads(path.read_text())]


def column(runs: Iterable[list[Epoch]], name: str) -> NDArray[np.float64]:
    """One number of each epoch of each run, [runs, epochs]."""
    return np.array([[getattr(epoch, name) for epoch in run] for run in runs])


def spread(values: NDArray[np.float64], form: str) -> str:
    """The mean over seeds, their minimum and maximum, as text."""
    return f"{values.mean():{form}} ({values.min():{form}} to {values.max():{form}})"
