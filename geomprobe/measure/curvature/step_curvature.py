"""Hg, finite steps and sharpness: the quantities of second order, and the losses of the step, kept for them."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.distributed.layout import Layout
from geomprobe.errors import GeomprobeError
from geomprobe.kernels.fused_read import FusedRead
from geomprobe.kernels.transfer import moved
from geomprobe.measure.curvature.autograd_graph import (
    CurvatureUnavailable,
    coarsest_epsilon,
    inspect_graph,
    own_functions,
    unproven_function,
)
from geomprobe.measure.curvature.global_loss import fail_together
from geomprobe.measure.curvature.hessian_gradient import Curvature
from geomprobe.measure.curvature.lanczos import top_eigenvalue
from geomprobe.measure.curvature.symmetry import apart, asymmetric, default_interval, direction, turned
from geomprobe.measure.gradient_sources import BackwardPass, GradientSources
from geomprobe.measure.inner_products import PairProducts
from geomprobe.measure.options import MeasureOptions
from geomprobe.measure.quantity import Combine, Part, Quantity, Recorded, Step
from geomprobe.probe.events import Closure, Events
from geomprobe.probe.evidence import Mark, marks
from geomprobe.probe.hooks.global_hooks import unscaled
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.isolation import RNGState, capture_rng
from geomprobe.trace.absence import ELSEWHERE, GIVEN_UP, HOOKED, LATE, NOT_CAUGHT
from geomprobe.trace.schema import parameter_column, product_column


class _Weights(NamedTuple):
    """What tells whether the weights are still what they were: their marks, and the digest of each."""

    marks: list[Mark]
    digests: Tensor

    def differ_from(self, other: _Weights) -> Tensor:
        """Whether they are, on their device."""
        if self.marks != other.marks:
            return torch.ones((), dtype=torch.bool, device=self.digests.device)
        return (self.digests != other.digests).any()


class StepCurvature(Events):
    """Runs the backward passes of the steps whose Hessian is wanted, and knows whether it caught all of a step's.

    `Measurement` owns it. Where a Hessian is wanted it is a listener of the pass, in the thread that trains.

    Args:
        probe: whose parameters and model.
        options: which steps' Hessian is wanted.
        layout: how the training is spread over processes.
        sources: knows which backward passes the step's gradient is made of.

    Attributes:
        curvature: takes the products; None where no Hessian is wanted, or none can be had.
        ready: the same at a step that was settled with all of its losses caught, on every process; else None.
        fixed_loss: the script's own choice of the loss whose sharpness is wanted.
        missing: why Hg is left out, None where it is not.
        unproven: whether the last check found gradients that are those of no function, on their device.
        has_own_functions: whether the last loss has torch.autograd.Functions of the script in it.
        epsilon: machine epsilon of the coarsest type that the first of the losses passes through.
    """

    ABSENT = (ELSEWHERE, NOT_CAUGHT, LATE, HOOKED, GIVEN_UP)

    def __init__(
        self, probe: Probe, options: MeasureOptions, layout: Layout, sources: GradientSources | None = None
    ) -> None:
        self._probe, self._options, self._layout, self.sources = probe, options, layout, sources
        self._parameters = list(probe.parameters.values())
        wanted = options.curvature_interval or options.sharpness_every
        self.curvature = Curvature(self._parameters, probe.model, layout) if wanted else None
        self.ready: Curvature | None = None
        self.fixed_loss: Closure | None = None
        self.missing: str | None = None
        self.unproven: Tensor | None = None
        self.epsilon = 0.0
        self.has_own_functions = False
        self._read: FusedRead | None = None
        self._complete = True  # no backward pass of the step went another way
        self._caught = 0
        self._same_use_checked = layout.world_size == 1
        self._blocked: CurvatureUnavailable | None = None
        self._held: dict[tuple[bool, ...], Tensor] = {}  # what the host may know of `ABSENT`, on the device
        self._rng: RNGState | None = None
        self._saved_otherwise = self._calls_seen = False
        self._seen: list[_Weights] = []  # since the last backward pass, when the model was called
        self._evaluated: list[tuple[BackwardPass | None, list[_Weights]]] = []  # of each backward pass of the step

    def fetch_ended(self, came: bool) -> None:
        if came and torch.is_grad_enabled():  # a forward pass before it that led to no backward pass does not count
            self._rng = None

    def saved_otherwise(self) -> None:
        self._saved_otherwise = True

    def begin(self) -> None:
        self.after_update()

    def after_update(self) -> None:
        # Where the script calls only parts of its model, nothing tells when; its weights may move at any time.
        self._seen = []
        if not self._calls_seen and self._wanted():
            self._see_weights()

    def part_entered(self) -> None:
        if not self._calls_seen and self._wanted():
            self._seen.append(self._weights())  # in whatever way they were moved since

    def entered(self, inputs: Any) -> None:
        if not self._calls_seen:
            self._calls_seen, self._seen = True, []
        if not self._wanted():
            return
        if self._rng is None:
            self._rng = capture_rng()  # a closure will need the random streams as they are now
        self._see_weights()

    def backward(self, loss: Tensor, closure: Closure | None, run: Callable[[], None], plain: bool) -> None:
        """Run ``backward`` on a loss; see `Measurement.differentiate`."""
        wanted = self._wanted()
        curvature = self.curvature
        if not wanted or curvature is None or not plain or loss.numel() != 1 or self._blocked is not None:
            self._complete = self._complete and not wanted
            run()
            return
        graph = inspect_graph(loss)
        if (blocker := curvature.blocker(graph, closure)) is not None:
            self._block(CurvatureUnavailable(blocker))
            run()
            return
        if not self._seen:
            self._see_weights()
        if closure is None and (own := own_functions(graph)) and self._options.check_curvature_every != 0:
            self._block(CurvatureUnavailable(unproven_function(own[0])))
            run()
            return
        self.has_own_functions = bool(own_functions(graph))
        rng, self._rng, seen, self._seen = self._rng, None, self._seen, []
        self._caught += 1
        if not self.epsilon:
            self.epsilon = coarsest_epsilon(loss)
        source = None if self.sources is None else self.sources.running
        self._evaluated.append((source, seen))
        try:
            curvature.backward(loss, closure=closure, rng=rng, scale=unscaled(loss)[1], graph=graph, source=source)
        except CurvatureUnavailable as error:  # found on the way: the gradients are complete
            self._block(error)

    def settle(self, gradients: Sequence[Tensor | None]) -> None:
        """The step is about to be measured: find out, with all processes, whether its losses are `ready`.

        At the first step measured the processes also compare which parameters they used.

        Args:
            gradients: local values.

        Raises:
            CurvatureUnavailable: Hg was required, and one process has no exact route.
            UnsupportedTraining: the processes used different parameters.
        """
        self.ready = None
        wanted = self._wanted()
        if not wanted and self._same_use_checked:
            return
        self._same_use_checked = True
        ready = self._complete and self._caught > 0
        if self._layout.world_size > 1:
            try:
                ready = self._all_ready(ready, gradients)
            except CurvatureUnavailable as error:
                self.give_up(error)
                return
        if ready and wanted:
            self.ready = self.curvature

    def absent(self) -> Tensor | None:
        """For each of `ABSENT`, 1 where it holds at the step that was settled; None where no Hessian is wanted."""
        if not self._due():
            return None
        device = self._parameters[0].device
        lost = self.ready is None
        seen_some = self._caught > 0 or not self._complete
        late = lost and not seen_some and self.sources is not None and self.sources.found
        hooked = self._saved_otherwise or any(source.hooked for source, _ in self._evaluated if source is not None)
        host = (lost and seen_some, late, hooked, False) if self.curvature is not None else (False, False, False, True)
        if host not in self._held:
            self._held[host] = moved([0.0, *map(float, host)], device, torch.float64)
        held = self._held[host]
        if self.curvature is None:
            return held
        now = self._weights() if self.ready is not None else None
        elsewhere: list[Tensor] = []
        for source, seen in self._evaluated if now is not None else ():
            assert now is not None
            share = None if source is None else source.share
            for weights in seen:
                differ = now.differ_from(weights)
                elsewhere.append(differ if share is None else differ & (share != 0))
        for share in [] if self.sources is None else self.sources.earlier:  # another optimizer has stepped since
            elsewhere.append(share != 0)
        if not elsewhere:
            return held
        return torch.cat([torch.stack(elsewhere).any().double().reshape(1), held[1:]])

    def _see_weights(self) -> None:
        """Note the weights that a loss is evaluated at: at the model's first call, and at others where they changed."""
        if not self._seen or marks(self._parameters) != self._seen[-1].marks:
            self._seen.append(self._weights())

    def _weights(self) -> _Weights:
        values = [local(p).detach() for p in self._parameters]
        if self._read is None:
            self._read = FusedRead(values)
        return _Weights(marks(self._parameters), self._read.look(values)[0])

    def sharpness_of(self, closure: Closure) -> None:
        self.fixed_loss = closure

    def gradients_dropped(self) -> None:
        self.discard()
        self.after_update()

    def step_skipped(self) -> None:
        if len(self._probe.optimizers) == 1:  # else those of the others may be finite
            self.discard()  # its gradients have overflowed: no later one is finite with them

    def discard(self) -> None:
        """Free the losses' graphs: the gradients so far were thrown away, or their step is measured."""
        self._complete, self._caught, self.ready = True, 0, None
        self._seen, self._evaluated, self._saved_otherwise = [], [], False
        if self.curvature is not None:
            self.curvature.discard()

    def give_up(self, error: GeomprobeError) -> None:
        """Leave Hg out from here on, and say why.

        Raises:
            CurvatureUnavailable: Hg was required.
        """
        self.discard()
        self.curvature = self._blocked = None
        self.missing = str(error)
        if self._options.curvature_required:
            raise error
        if self._layout.rank == 0:
            print(f"geomprobe: from step {self._probe.step} on, Hg is left out: {error}", file=sys.stderr)

    def _wanted(self) -> bool:
        """Whether this step's own losses are wanted, and can be had."""
        return self.curvature is not None and self._due()

    def _due(self) -> bool:
        step, options = self._probe.step, self._options
        if step % options.every:
            return False
        if options.curvature_interval and not step % options.curvature_interval:
            return True
        fixed = self.fixed_loss is not None
        return bool(options.sharpness_every) and not step % options.sharpness_every and not fixed

    def _block(self, error: CurvatureUnavailable) -> None:
        if self._layout.world_size == 1:
            self.give_up(error)
        else:
            self._blocked = error  # the others learn of it in `settle`: now they are in their backward pass

    def _all_ready(self, ready: bool, gradients: Sequence[Tensor | None]) -> bool:
        """Whether every process has caught all losses of the step, ``ready`` where this one has.

        Raises:
            CurvatureUnavailable: one of them is blocked.
            UnsupportedTraining: they used different parameters, and the optimizer has what comes of it.
        """
        layout, device = self._layout, self._parameters[0].device
        used = {p: g is not None for p, g in zip(self._probe.parameters, gradients, strict=True)}
        # Ready, partly caught, blocked: the largest over all processes holds.
        state = 2 if self._blocked is not None else 0 if ready else 1
        mark = crc32(bytes(used.values()))
        state, largest, smallest = layout.largest([state, mark, -mark], device)
        if largest != -smallest:
            layout.require_same_use(used, device)
        if state == 2:
            fail_together(layout, self._blocked, device)
        return state == 0


class FiniteStep(Quantity):
    """``secant_residual`` and ``linear_decrease_gap``: what a whole step changes on its own minibatch.

    The one is the turn of the gradient, the other the loss above its linear decrease; see `SideLoss.over_step`.
    """

    name = "finite_step"
    of_step_loss = True
    option, cadence = "finite_step", "curvature_interval"
    columns = ("steps/secant_residual", "steps/linear_decrease_gap")

    def open(self, recorded: Recorded) -> None:
        self._products = PairProducts(self.training.parameters, self.training.layout.owned)

    def local(self, step: Step) -> dict[str, Part] | None:
        lr = float(self.training.probe.optimizer.param_groups[0].get("lr", 0.0))
        if (curvature := self.training.curvature.ready) is None or not lr:
            return None
        if (change := curvature.over_step(step.vectors, lr)) is None:
            return None
        return {
            "products": Part(self._products(step.vectors, change.turned), Combine.SUM),
            "gap": Part(change.gap, Combine.SAME),
        }

    def finish(self, whole: Mapping[str, Tensor]) -> Tensor:
        of_gradient, _, of_turn = whole["products"]
        return torch.stack([(of_turn / of_gradient).sqrt(), whole["gap"]])


class Sharpness(Quantity):
    """``sharpness``: the top eigenvalue of the Hessian of the minibatch's loss, or of one that the script names."""

    name = "sharpness"
    of_step_loss = True
    option, cadence = "sharpness_every", "sharpness_every"
    columns = ("steps/sharpness",)

    def local(self, step: Step) -> dict[str, Part] | None:
        losses = self.training.curvature
        product: Callable[[list[Tensor]], list[Tensor]]
        if losses.fixed_loss is not None and losses.curvature is not None:
            product = losses.curvature.products_of(losses.fixed_loss)
        elif losses.fixed_loss is None and losses.ready is not None:
            product = functools.partial(losses.ready.product, keep=True)
        else:
            return None
        like = [local(parameter) for parameter in self.training.parameters]
        value = top_eigenvalue(product, like, total=self.training.layout.total).value
        found = torch.tensor([value], dtype=torch.float64, device=like[0].device)
        return {"sharpness": Part(found, Combine.SAME)}


class HessianGradient(Quantity):
    """``g.Hg`` and ``Hg.Hg``; of each parameter tensor too, if asked for. It frees the graphs of the step's losses.

    Now and then it checks that there is a Hessian at all; see `geomprobe.measure.curvature.symmetry`.
    """

    PRODUCTS = ("g.Hg", "Hg.Hg")
    name = "hg"
    of_step_loss = True
    option, cadence = "curvature_interval", "curvature_interval"

    def open(self, recorded: Recorded) -> None:
        columns = [product_column(product) for product in self.PRODUCTS]
        if self.training.options.per_parameter:
            names = self.training.probe.parameters
            columns += [parameter_column(name, product) for name in names for product in self.PRODUCTS]
        self.columns = tuple(columns)
        every = self.training.options.check_curvature_every
        steps = None if recorded.record is None else recorded.record.num_steps
        self._check_every = default_interval(steps) if every is None else every
        layout, members = self.training.layout, self.training.parameters
        self._products = PairProducts(members, layout.owned, per_parameter=self.training.options.per_parameter)
        self._totals = PairProducts(members, layout.owned)
        self._seed = recorded.seed + (layout.rank if layout.sharded else 0)
        self._next_check = 0

    def local(self, step: Step) -> dict[str, Part] | None:
        if (curvature := self.training.curvature.ready) is None:
            return None
        g, parts = step.vectors, {}
        if checked := bool(self._check_every) and step.number >= self._next_check:
            self._next_check = step.number - step.number % self._check_every + self._check_every
            u = direction([local(p) for p in self.training.parameters], self._seed + step.number)
            again: Sequence[Tensor | None] | None = curvature.gradient() if self._comparable else None
            hu = curvature.product(u, keep=True)
        differences = self._differences(curvature, g) if checked and self.training.curvature.has_own_functions else None
        hg = curvature.product(g)
        parts["products"] = Part(self._products(g, hg)[..., 1:], Combine.SUM)
        if checked:
            parts["check"] = Part(torch.stack([self._totals(u, hg), self._totals(g, hu)]), Combine.SUM)
        if checked and again is not None:
            sources = self.training.curvature.sources
            again = again if sources is None else sources.of_moving(again)
            parts["gradient"] = Part(self._totals(again, g), Combine.SUM)
        if differences is not None:
            far, near = differences
            better = [2 * b - a for a, b in zip(far, near, strict=True)]
            off, moved = ([a - b for a, b in zip(*pair, strict=True)] for pair in ((better, hg), (far, near)))
            found = torch.stack([self._totals(off, off), self._totals(moved, moved), self._totals(hg, hg)])
            parts["differences"] = Part(found[:, 0], Combine.SUM)
        return parts

    @property
    def _comparable(self) -> bool:
        """Whether the optimizer's gradient is a multiple of that of the losses, which clipping each value ends."""
        sources = self.training.curvature.sources
        return sources is None or not sources.bent

    def _differences(self, curvature: Curvature, g: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor]] | None:
        """Two finite differences of the gradient along ``g``, over a step and over half of it."""
        weights = [local(p).detach() for p in self.training.parameters]
        of_g, _, of_w = self.training.layout.sum(self._totals(g, weights)).tolist()
        of_w, of_g = math.sqrt(of_w), math.sqrt(of_g)
        if not of_g or not math.isfinite(of_g):
            return None
        step = torch.finfo(weights[0].dtype).eps ** (1 / 3) * (of_w or 1.0) / of_g
        changes = [curvature.over_step(g, length) for length in (step, step / 2)]
        return None if changes[0] is None or changes[1] is None else (changes[0].turned, changes[1].turned)

    def finish(self, whole: Mapping[str, Tensor]) -> Tensor:
        if "check" in whole:
            of_loss = self.training.curvature
            count = sum(p.numel() for p in self.training.parameters)
            of_loss.unproven = asymmetric(whole["check"], count, of_loss.epsilon)
            if "gradient" in whole:
                of_loss.unproven = of_loss.unproven | turned(whole["gradient"], of_loss.epsilon)
            if "differences" in whole:
                of_loss.unproven = of_loss.unproven | apart(whole["differences"], of_loss.epsilon)
        products = whole["products"]
        return torch.cat([products[0], products[1:].reshape(-1)]) if products.dim() > 1 else products
