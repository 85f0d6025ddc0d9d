"""A column of a trace as the learning-rate schedule of another training.

NWT figure 3 compares the locally optimal learning rate (NWT eq. 5) with the schedules that are used in practice. With a
column as schedule, a training can show how well it serves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from geomprobe.errors import UsageError
from geomprobe.trace.reader import Trace, open_trace
from geomprobe.trace.schema import describe

Smoothing = Literal["epoch"] | int | None
Array = NDArray[np.float64]


class TraceLR(LRScheduler):
    """A scheduler that takes the rate of each step from a list. Call ``step()`` after each update.

    After the end of the list the last rate stays. Each group keeps the ratio that its rate had to the rate of the first
    group when the scheduler was made.

    Args:
        optimizer: the optimizer whose rates are set.
        rates: one a step, positive, in the optimizer's own unit.
        last_epoch: as for torch's schedulers, counted in steps.

    Raises:
        UsageError: the first group's rate is 0, so there are no ratios to keep.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> scheduler = TraceLR(optimizer, np.array([0.5, 0.25]))
    >>> found = []
    >>> for _ in range(3):
    ...     found += scheduler.get_last_lr()
    ...     optimizer.step()
    ...     scheduler.step()
    >>> found
    [0.5, 0.25, 0.25]
    """

    def __init__(self, optimizer: Optimizer, rates: Array, last_epoch: int = -1) -> None:
        self.rates = torch.as_tensor(rates, dtype=torch.float64)  # in state_dict, too
        first = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        if not first[0]:
            raise UsageError(
                "The first group's learning rate is 0: groups keep the ratios of their rates to it. Make the optimizer "
                "with another, such as 1.0."
            )
        self.ratios = [rate / first[0] for rate in first]
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The groups' rates at the present step."""
        rate = float(self.rates[min(self.last_epoch, len(self.rates) - 1)])
        return [rate * ratio for ratio in self.ratios]


def from_trace(
    trace: Trace | str | os.PathLike[str],
    column: str = "lolr",
    *,
    smooth: Smoothing = "epoch",
    scale: float = 1.0,
) -> Callable[[Optimizer], TraceLR]:
    """A schedule that follows a trace's column step by step: call it with an optimizer.

    Args:
        trace: an open trace, or a run folder.
        column: in units of a learning rate: ``lolr``, ``clr``, ``lr``, or one of these of another reference or of a
            held-out minibatch, such as ``held_out/lolr``.
        smooth: ``"epoch"`` for the mean of each epoch; a number N for the median of the N steps around each; None for
            the column as it is.
        scale: a factor on all of it.

    Returns:
        A function that makes a `TraceLR` from an optimizer. See `rates` for what it takes, and for what is raised.

    >>> import tempfile, geomprobe
    >>> def train(schedule=None):
    ...     model = torch.nn.Linear(2, 1)
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ...     scheduler = schedule(optimizer) if schedule else None
    ...     for _ in geomprobe.attach(model, optimizer, scheduler=scheduler).epochs(3):
    ...         optimizer.zero_grad()
    ...         model(torch.ones(4, 2)).square().mean().backward()
    ...         optimizer.step()
    ...         if scheduler:
    ...             scheduler.step()
    >>> schedule = from_trace(geomprobe.two_pass(train, tempfile.mkdtemp(), seed=0), "lolr", smooth=None)
    >>> train(schedule)
    """
    found = trace if isinstance(trace, Trace) else open_trace(trace)
    return partial(TraceLR, rates=rates(found, column, smooth=smooth, scale=scale))


def rates(trace: Trace, column: str, *, smooth: Smoothing = "epoch", scale: float = 1.0) -> Array:
    """A trace's column as positive learning rates [num_steps].

    Steps without a finite number are interpolated between their neighbors; at the ends they take the nearest. A rate
    that is not positive after smoothing is replaced by the smallest positive one: a locally optimal rate is negative
    where the gradient points away from the reference.

    Args:
        trace, column, smooth, scale: as for `from_trace`.

    Raises:
        UnknownColumn: the trace has no such column.
        UsageError: the column is no learning rate, nothing in it is positive, or it has no epochs to smooth over.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from geomprobe.trace.stream.writer import PartWriter, Table
    >>> path = Path(tempfile.mkdtemp()) / "part.h5"
    >>> table = Table("values", ("steps/epoch", "groups/0/lr"), "float64")
    >>> with PartWriter(path, schema="geomprobe-trace", tables=[table], attributes={}) as part:
    ...     part.append({"values": np.array([[0, 0.5], [0, np.nan], [1, 0.25]])})
    >>> rates(open_trace(path), "lr", smooth=None), rates(open_trace(path), "lr", scale=2)
    (array([0.5  , 0.375, 0.25 ]), array([1. , 1. , 0.5]))
    """
    values = trace[column]
    units = describe(column).units
    if units != "lr":
        raise UsageError(f"{column} is in units of {units}, and a schedule is made of learning rates (units lr)")
    if not scale > 0:
        raise UsageError(f"scale={scale}: a factor on learning rates is positive")
    values = np.where(np.isfinite(values), values, np.nan)
    smoothed = scale * _smoothed(trace, values, smooth)
    if not (smoothed > 0).any():
        raise UsageError(f"{column} of {trace.path} holds no positive number: there is no rate to take from it")
    return np.maximum(smoothed, smoothed[smoothed > 0].min())


def _smoothed(trace: Trace, values: Array, smooth: Smoothing) -> Array:
    if smooth == "epoch":
        return _filled(_of_epochs(trace, values))
    filled = _filled(values)
    if smooth is None:
        return filled
    if isinstance(smooth, bool) or not isinstance(smooth, int) or smooth < 1:
        raise UsageError(f"smooth={smooth!r}: name 'epoch', a number of steps from 1 on, or None")
    windows = (filled[max(0, t - (smooth - 1) // 2) : t + smooth // 2 + 1] for t in range(len(filled)))
    return np.array([np.median(window) for window in windows])


def _of_epochs(trace: Trace, values: Array) -> Array:
    """For each step, the mean of its epoch."""
    epoch = trace["epoch"]
    known = np.isfinite(epoch)
    if not known.any():
        raise UsageError(f"{trace.path} has no epochs to smooth over: give a number of steps as smooth")
    means: Any = np.full(len(values), np.nan)
    for number in np.unique(epoch[known]):
        inside = epoch == number
        measured = values[inside & np.isfinite(values)]
        means[inside] = measured.mean() if len(measured) else np.nan
    return means


def _filled(values: Array) -> Array:
    measured = np.flatnonzero(np.isfinite(values))
    if not len(measured):
        return values
    return np.interp(np.arange(len(values)), measured, values[measured])
