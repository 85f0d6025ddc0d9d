"""What a replay measures at a step: a list of quantities, and one all-reduce over the processes for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import is_dtensor, local_gradient
from geomprobe.distributed.layout import Layout
from geomprobe.kernels.fused_read import Reading
from geomprobe.kernels.transfer import moved
from geomprobe.measure.curvature.autograd_graph import CurvatureUnavailable
from geomprobe.measure.curvature.step_curvature import FiniteStep, HessianGradient, Sharpness, StepCurvature
from geomprobe.measure.gradient_products import BeforeClipping, PerRankProducts, ReferenceProducts
from geomprobe.measure.gradient_sources import GradientSources
from geomprobe.measure.options import MeasureOptions
from geomprobe.measure.quantity import Combine, Part, Quantity, Recorded, References, Step, Training
from geomprobe.measure.side_gradient import FullGradient, HeldOutGradient
from geomprobe.probe.events import Closure, Events
from geomprobe.probe.hooks.global_hooks import muted
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.step_reader import StepReader
from geomprobe.trace.absence import UNPROVEN, Absence
from geomprobe.trace.record import Record

QUANTITIES: tuple[type[Quantity], ...] = (
    ReferenceProducts,
    BeforeClipping,
    FiniteStep,
    Sharpness,
    HessianGradient,  # after the two others: its product frees the graphs that they use
    PerRankProducts,
    HeldOutGradient,
    FullGradient,
)
"""All that a replay can measure, in the order in which a step measures it."""


class Measurement(Events):
    """The quantities that one replay measures, called in the thread that trains.

    Args:
        probe: whose parameters are measured.
        options: what to measure.
        sources: knows which backward passes a step's gradient is made of.
        layout: how the training is spread over processes; found in the probe's model when None. All of them must
            then call `row` at each step.
        reader: of the pass, which reads for the step's fingerprint too; an own one when None.
        quantities: what there is to measure, as far as the options ask for it.

    Attributes:
        layout: the same.
        columns: dataset paths by the quantity's name, once it is open.
        listeners: what the pass reports to: this object, and the losses of the step where their Hessian is wanted.
    """

    def __init__(
        self,
        probe: Probe,
        options: MeasureOptions,
        layout: Layout | None = None,
        sources: GradientSources | None = None,
        reader: StepReader | None = None,
        quantities: Sequence[type[Quantity]] = QUANTITIES,
    ) -> None:
        self._probe, self._options = probe, options
        self.layout = Layout.of(probe.model, probe.parameters) if layout is None else layout
        self._curvature = StepCurvature(probe, options, self.layout, sources)
        self.listeners: list[Events] = [self] if self._curvature.curvature is None else [self._curvature, self]
        self._parameters: list[Tensor] = list(probe.parameters.values())
        self._reader = StepReader(self._parameters) if reader is None else reader
        training = Training(probe, self._parameters, options, self.layout, self._curvature, self._reader)
        self._sharded = any(is_dtensor(parameter) for parameter in self._parameters)
        self._quantities = {of.name: of(training) for of in quantities if not of.option or getattr(options, of.option)}
        self.columns: dict[str, tuple[str, ...]] = {}
        self._no_reasons = torch.empty(0, dtype=torch.float64, device=self._parameters[0].device)
        self._not_known = moved(torch.nan, self._no_reasons.device, torch.float64)
        self._numbers: dict[tuple[Absence, ...], Tensor] = {}  # of the reasons that a step may have, on their device
        self._before_backward = self._overriding(Quantity.before_backward)
        self._after_backward = self._overriding(Quantity.after_backward)
        self._before_clipping = self._overriding(Quantity.before_clipping)
        self._clipping_missed = self._overriding(Quantity.clipping_missed)
        self._step_skipped = self._overriding(Quantity.step_skipped)
        self._gradients_dropped = self._overriding(Quantity.gradients_dropped)

    def _overriding(self, event: Callable[..., None]) -> list[Callable[..., None]]:
        """The methods of the quantities that define an event of their own: the others cost a step no call."""
        name = event.__name__
        return [getattr(q, name) for q in self._quantities.values() if getattr(type(q), name) is not event]

    def open(self, references: References, *, record: Record | None = None, seed: int = 0) -> None:
        """Make ready to measure; called once, before the first update.

        Args:
            references: weights by parameter name, on their device, by the reference's name. Of DTensor parameters
                they may be DTensors or this process's local values.
            record: the recording, which knows when epochs began.
            seed: the run's.
        """
        for quantity in self._quantities.values():
            quantity.open(Recorded(references, record, seed))
        self.columns = {name: quantity.columns for name, quantity in self._quantities.items()}
        device = self._parameters[0].device
        self._unmeasured = {
            name: torch.full((len(columns),), torch.nan, dtype=torch.float64, device=device)
            for name, columns in self.columns.items()
        }

    def curvature_found(self) -> dict[str, Any]:
        """For the manifest: how often Hg was taken and by which route, or why it was not."""
        if self._curvature.missing is not None:
            return {"every": 0, "missing": self._curvature.missing}
        curvature = self._curvature.curvature
        return {
            "every": self._options.curvature_interval,
            "route": None if curvature is None else curvature.route,
        }

    # Events

    def differentiate(self, loss: Tensor, closure: Closure | None, run: Callable[[], None], plain: bool) -> None:
        """Run a backward pass, keeping what the quantities need of it; see `Events.differentiate`.

        Raises:
            CurvatureUnavailable: Hg was required and has no exact route.
            ClosureMismatch: the closure evaluates another loss.
        """
        try:
            for before in self._before_backward:
                before(loss)
            self._curvature.backward(loss, closure, run, plain)
        finally:
            for after in self._after_backward:
                after()

    def before_clipping(self, factor: Tensor | None) -> None:
        for before in self._before_clipping:
            before(factor)

    def clipping_missed(self) -> None:
        """The gradients have been clipped, before there was anything to measure them."""
        for missed in self._clipping_missed:
            missed()

    def step_skipped(self) -> None:
        for skipped in self._step_skipped:
            skipped()

    def gradients_dropped(self) -> None:
        for dropped in self._gradients_dropped:
            dropped()

    # The row of a step

    def read(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> Reading:
        """Read the weights and the gradients, and take the inner products where the step is measured."""
        return self._reader.read(gradients, grad_scale, sums=self._is_measured(self._probe.step))

    def row(
        self,
        gradients: Sequence[Tensor | None],
        grad_scale: Tensor | None,
        means: Mapping[str, Tensor] | None = None,
        absent: Tensor | None = None,
        reading: Reading | None = None,
    ) -> dict[str, Tensor]:
        """The step's values; nothing of it is an event of the run, and the run stays as it is.

        Args:
            gradients: one a parameter, as the optimizer has them.
            grad_scale: what they are multiplied by, under a GradScaler with a fused optimizer.
            means: further numbers of this process by name, such as its loss, float64 of one dimension.
            absent: for each of `GradientSources.REASONS`, 1 where it holds on this process.
            reading: what `read` has given, where the caller has asked for it.

        Returns:
            float64 of one dimension, on the parameters' device: for each of ``means`` the mean over the processes, by
            the name of each quantity its values in the order of `columns`, NaN where it is not measured, and under
            ``absent`` the sum of the numbers of the reasons that hold; see `geomprobe.trace.absence`.
        """
        number = self._probe.step
        with muted():
            parts = self._parts(number, gradients, grad_scale, reading)
            holds, numbers = self._absent(absent)
            self._curvature.discard()
            self.gradients_dropped()
            for name, values in {**(means or {}), "absent": holds}.items():
                parts[name] = {name: Part(values, Combine.MEAN)}
            whole = self._combined(parts)
        row = {name: whole[name][name] for name in means or ()}
        for name, quantity in self._quantities.items():
            row[name] = quantity.finish(whole[name]) if name in whole else self._unmeasured[name]
        found = whole["absent"]["absent"]
        found = found if self.layout.world_size == 1 else found > 0
        row["absent"] = (found * numbers).sum().reshape(1)
        if of_loss := [q.name for q in self._quantities.values() if q.of_step_loss and q.name in whole]:
            unknown, unproven = found.any(), self._curvature.unproven
            if unproven is not None:
                row["absent"] += UNPROVEN.number * unproven
                unknown = unknown | unproven
            for name in of_loss:
                row[name] = torch.where(unknown, self._not_known, row[name])
        return row

    def _absent(self, of_sources: Tensor | None) -> tuple[Tensor, Tensor]:
        """The reasons for which values of the step's own loss are left out: whether each holds here, and its number."""
        of_curvature = self._curvature.absent()
        holds: list[Tensor] = []
        of: tuple[Absence, ...] = ()
        if of_sources is not None:
            holds, of = [*holds, of_sources], GradientSources.REASONS
        if of_curvature is not None:
            holds, of = [*holds, of_curvature], (*of, *StepCurvature.ABSENT)
        if of not in self._numbers:
            numbers = [float(absence.number) for absence in of]
            self._numbers[of] = moved(numbers, self._no_reasons.device, torch.float64)
        return torch.cat(holds) if len(holds) > 1 else next(iter(holds), self._no_reasons), self._numbers[of]

    def _is_measured(self, number: int) -> bool:
        return not number % self._options.every

    def _parts(
        self, number: int, gradients: Sequence[Tensor | None], grad_scale: Tensor | None, reading: Reading | None
    ) -> dict[str, dict[str, Part]]:
        """This process's values by quantity, of those that are measured at this step."""
        due = {name: quantity for name, quantity in self._quantities.items() if quantity.due(number)}
        if not due:
            return {}
        if self._sharded:
            pairs = zip(gradients, self._parameters, strict=True)
            gradients = [local_gradient(gradient, parameter) for gradient, parameter in pairs]
        if self._is_measured(number):
            self._curvature.settle(gradients)
        reading = self.read(gradients, grad_scale) if reading is None else reading
        step = Step(number, gradients, grad_scale, reading.sums)
        parts = {}
        for name, quantity in due.items():
            try:
                if (found := quantity.local(step)) is not None:
                    parts[name] = found
            except CurvatureUnavailable as error:  # on every process alike: they failed together
                self._curvature.give_up(error)
        return parts

    def _combined(self, parts: Mapping[str, Mapping[str, Part]]) -> dict[str, dict[str, Tensor]]:
        """What one all-reduce makes of all processes' values, under the same names."""
        whole = {
            name: {
                key: values.unsqueeze(0) if how is Combine.GATHER else values
                for key, (values, how) in of_quantity.items()
            }
            for name, of_quantity in parts.items()
        }
        if self.layout.world_size == 1:
            return whole
        kinds = Combine.SUM, Combine.MEAN, Combine.GATHER
        sent = [
            [
                (name, key, part.values)
                for name, of_quantity in parts.items()
                for key, part in of_quantity.items()
                if part.combine is how
            ]
            for how in kinds
        ]
        none = torch.empty(0, dtype=torch.float64, device=self._parameters[0].device)
        flat = [torch.cat([none, *(values.reshape(-1) for _, _, values in of_kind)]) for of_kind in sent]
        for how, of_kind, result in zip(kinds, sent, self.layout.exchange(*flat), strict=True):
            pieces = result.split([values.numel() for _, _, values in of_kind], dim=-1)
            for (name, key, values), piece in zip(of_kind, pieces, strict=True):
                whole[name][key] = piece if how is Combine.GATHER else piece.view(values.shape)
        return whole
