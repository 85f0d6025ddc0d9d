"""The trainings behind the theory's figures: digits, objectives without beneficial geometry, and a random walk.

Each is a function that trains, so that it can be called once, or recorded and replayed by `measured`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digits import Digits, accuracy, small_resnet
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
    """What an epoch came to: its minibatches' mean loss, held-out accuracy after it, and the rates of its steps."""

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
    """The certified trace of a training, recorded and replayed unless ``run`` holds it already."""
    if (run / "trace.h5").exists() and (trace := geomprobe.open_trace(run)).status == "complete":
        return trace
    return geomprobe.two_pass(train, run, seed=seed, force=True)
