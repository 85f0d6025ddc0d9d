"""The base of all that a replay measures at a step: its columns, the events it wants, and how processes combine it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from geomprobe.distributed.layout import Layout
from geomprobe.measure.options import MeasureOptions
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.step_reader import StepReader
from geomprobe.trace.record import Record
from geomprobe.trace.schema import FINAL

if TYPE_CHECKING:
    from geomprobe.measure.curvature.step_curvature import StepCurvature

References = Mapping[str, Mapping[str, Tensor]]


class Combine(Enum):
    """What the all-reduce of a step makes of the processes' values."""

    SUM = "sum over the weights: added where these are sharded, and whole on each process where they are not"
    MEAN = "mean over the processes"
    GATHER = "all of them, [processes, values]"
    SAME = "equal on every process before: nothing is sent"


class Part(NamedTuple):
    """Values of this process at a step, float64 on the parameters' device, and what is to become of them."""

    values: Tensor
    combine: Combine


@dataclass(frozen=True)
class Training:
    """What a quantity may know of the training that it measures.

    Attributes:
        parameters: the measured ones.
        options: what the replay was asked to measure.
        layout: how the training is spread over processes.
        curvature: the losses of the present step, for products with their Hessian.
        reader: reads the weights and the gradient of each step.
    """

    probe: Probe
    parameters: list[Tensor]
    options: MeasureOptions
    layout: Layout
    curvature: StepCurvature
    reader: StepReader


class Recorded(NamedTuple):
    """What the recording gives to measure by: weights by the reference's and the parameter's name, and the run."""

    references: References
    record: Record | None
    seed: int

    @property
    def final(self) -> list[Tensor]:
        """The final iterate, one tensor a parameter."""
        return list(self.references[FINAL].values())


class Step:
    """The step that is about to be taken.

    Args:
        number: counted from 0.
        gradients: local values, one a parameter, as the optimizer has them.
        grad_scale: what they are multiplied by, under a GradScaler with a fused optimizer.
        products: what the reader found: the inner products by `Training.reader`'s names.
    """

    def __init__(
        self,
        number: int,
        gradients: Sequence[Tensor | None],
        grad_scale: Tensor | None = None,
        products: Tensor | None = None,
    ) -> None:
        self.number, self.gradients, self.grad_scale, self.products = number, gradients, grad_scale, products

    @cached_property
    def vectors(self) -> list[Tensor | None]:
        """The gradients, dense and unscaled."""
        dense = [g.to_dense() if g is not None and g.is_sparse else g for g in self.gradients]
        if self.grad_scale is None:
            return dense
        return [None if g is None else g / self.grad_scale for g in dense]


class Quantity(ABC):
    """One thing that a replay measures; a subclass for each, listed in `geomprobe.measure.measurement.QUANTITIES`.

    `Measurement` makes it once the probe is attached, calls `open` before the first update, and from then on at each
    step that is `due`: `local`, one all-reduce for all quantities together, `finish`. The events come in between, in
    the thread that trains; a subclass defines those that it wants.

    Attributes:
        name: of the quantity among the others.
        option: the field of `MeasureOptions` that asks for it; it is always measured where that is empty.
        cadence: the field that holds at which of the measured steps it is due.
        of_step_loss: whether it is of the step's own loss, and so left out where that is not known.
        columns: dataset paths in the trace, in the order of what `finish` returns; complete after `open`.
    """

    name: ClassVar[str]
    option: ClassVar[str] = ""
    cadence: ClassVar[str] = "every"
    of_step_loss: ClassVar[bool] = False
    columns: tuple[str, ...] = ()

    def __init__(self, training: Training) -> None:
        self.training = training
        self._cadences = training.options.every, getattr(training.options, self.cadence)

    def open(self, recorded: Recorded) -> None:
        """Make ready to measure, and name the columns."""

    def due(self, step: int) -> bool:
        """Whether it is measured at a step; the same on every process."""
        every, cadence = self._cadences
        return not step % every and not step % cadence

    @abstractmethod
    def local(self, step: Step) -> dict[str, Part] | None:
        """This process's values at a step by name, or None, on every process alike, where it has none there."""

    def finish(self, whole: Mapping[str, Tensor]) -> Tensor:
        """The columns' values, one dimension, from what the all-reduce made of `local`'s values."""
        return torch.cat([values.reshape(-1) for values in whole.values()])

    # Events, as in `geomprobe.probe.events`

    def before_backward(self, loss: Tensor) -> None:
        """A backward pass of ``loss`` is about to run."""

    def after_backward(self) -> None:
        """It has run, or raised."""

    def before_clipping(self, factor: Tensor | None) -> None:
        """The gradients, which are multiplied by ``factor``, are about to be clipped."""

    def clipping_missed(self) -> None:
        """The gradients have been clipped, before there was anything to measure them."""

    def step_skipped(self) -> None:
        """A step was attempted, and its gradients have overflowed."""

    def gradients_dropped(self) -> None:
        """The gradients so far were thrown away, or their step is measured."""
