"""What a replay measures at a step: one row of inner products on the device, Hg's among them.

Across processes the row is of the whole training, and the same on every process.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local, local_gradient
from geomprobe.distributed.layout import Layout
from geomprobe.errors import GeomprobeError
from geomprobe.measure.before_clipping import PRODUCTS, BeforeClipping
from geomprobe.measure.curvature.consensus import all_ready
from geomprobe.measure.curvature.hessian_gradient import Curvature, CurvatureUnavailable
from geomprobe.measure.curvature.lanczos import top_eigenvalue
from geomprobe.measure.inner_products import InnerProducts
from geomprobe.measure.options import MeasureOptions
from geomprobe.measure.per_rank import PerRankProducts
from geomprobe.probe.hooks.grad_scaler import unscaled
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.environment import RNGState, capture_rng
from geomprobe.trace.schema import FINAL, UNCLIPPED, parameter_column, product_column

CURVATURE_PRODUCTS = ("g.Hg", "Hg.Hg")


class Measurement:
    """The measurements of one replay.

    Args:
        probe: whose parameters are measured.
        measure: what to measure.
        layout: how the training lies across processes; found in the probe's model when None. All of them must
            then call `row` at each step.

    Attributes:
        layout: the same.
        curvature_missing: why Hg is left out, None where it is not.
    """

    def __init__(self, probe: Probe, measure: MeasureOptions, layout: Layout | None = None) -> None:
        self._probe, self._measure = probe, measure
        self.layout = Layout.of(probe.model, probe.parameters) if layout is None else layout
        self._parameters = list(probe.parameters.values())
        self._curvature_every = measure.curvature_interval
        second = self._curvature_every or measure.sharpness_every
        self._curvature = Curvature(self._parameters, probe.model, self.layout) if second else None
        self._of_ranks = PerRankProducts(self._parameters, self.layout) if measure.per_rank else None
        self._unclipped = BeforeClipping(self._parameters, self.layout) if measure.before_clipping else None
        self._fixed_loss: Callable[[], Tensor] | None = None
        self._complete = True
        self._parts = 0
        self._asked = False  # the other processes, at least once
        self._blocked: CurvatureUnavailable | None = None
        self._rng: RNGState | None = None
        self.curvature_missing: str | None = None

    def open(self, references: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make ready to measure against ``references``: weights by parameter name, on their device.

        Of DTensor parameters the references may be DTensors or this process's local values.
        """
        measure = self._measure
        self._products = InnerProducts(
            self._parameters,
            {name: list(weights.values()) for name, weights in references.items()},
            owned=self.layout.owned,
            per_parameter=measure.per_parameter,
            compiled=measure.compiled,
        )
        names = self._products.names
        self._own = [i for i, name in enumerate(names) if "/" not in name]
        own = [names[i] for i in self._own]
        curvature = list(CURVATURE_PRODUCTS) if self._curvature_every else []
        self.columns = [*(product_column(*_product(name)) for name in names), *map(product_column, curvature)]
        if measure.per_parameter:
            for products in (own, curvature):
                self.columns += [
                    parameter_column(p, name) for p in self._probe.parameters for name in products
                ]
        self._asked_for = ["secant_residual", "linear_decrease_gap"] if measure.finite_step else []
        self._asked_for += ["sharpness"] if measure.sharpness_every else []
        self.columns += [f"steps/{name}" for name in self._asked_for]
        if self._of_ranks is not None:
            self._of_ranks.open(list(references[FINAL].values()))
            self.columns += [f"ranks/{rank}/{product}" for rank, product in self._of_ranks.columns]
        if self._unclipped is not None:
            self._unclipped.open(list(references[FINAL].values()))
            self.columns += [f"{UNCLIPPED}/inner_products/{product}" for product in PRODUCTS]
        self._unmeasured = local(self._parameters[0]).new_full(
            (len(self.columns),), torch.nan, dtype=torch.float64, requires_grad=False
        )

    def curvature_found(self) -> dict[str, Any]:
        """For the manifest: how often Hg was taken and by which route, or why it was not."""
        if self.curvature_missing is not None:
            return {"every": 0, "missing": self.curvature_missing}
        route = self._curvature.route if self._curvature is not None else None
        return {"every": self._curvature_every, "route": route}

    def sharpness_of(self, closure: Callable[[], Tensor]) -> None:
        """Take the sharpness of the loss that ``closure`` evaluates, instead of the minibatch's."""
        self._fixed_loss = closure

    def fetched(self) -> None:
        """A batch has come: a forward pass before it that led to no backward pass does not count."""
        self._rng = None

    def entered(self) -> None:
        """The model is about to run: a closure will need the RNG streams as they are now."""
        if self._wants_graph() and self._rng is None:
            self._rng = capture_rng()

    def backward(
        self, loss: Tensor, closure: Callable[[], Tensor] | None, run: Callable[[], None], plain: bool
    ) -> None:
        """Run ``backward`` on a loss, keeping what Hg needs.

        Args:
            loss: what it is called on.
            closure: evaluates the same loss again, or None.
            run: the backward pass as the script asked for it.
            plain: whether that is ``loss.backward()``, without options.

        Raises:
            CurvatureUnavailable: Hg was required and has no exact route.
            ClosureMismatch: the closure evaluates another loss.
        """
        if self._unclipped is not None:
            self._unclipped.backward()
        with ExitStack() as stack:
            if self._of_ranks is not None and not self._probe.step % self._measure.every:
                stack.enter_context(self._of_ranks.watching(unscaled(loss)[1]))
            self._backward(loss, closure, run, plain)

    def _backward(
        self, loss: Tensor, closure: Callable[[], Tensor] | None, run: Callable[[], None], plain: bool
    ) -> None:
        if not self._wants_graph() or not plain or loss.numel() != 1 or self._blocked is not None:
            self._complete = self._complete and not self._wants_graph()
            run()
            return
        assert self._curvature is not None
        if (obstacle := self._curvature.obstacle(loss, closure)) is not None:
            self._blocked_by(CurvatureUnavailable(obstacle))
            run()
            return
        rng, self._rng = self._rng, None
        self._parts += 1
        try:
            self._curvature.backward(loss, closure=closure, rng=rng, scale=unscaled(loss)[1])
        except CurvatureUnavailable as error:  # found on the way: the gradients are complete
            self._blocked_by(error)

    def clipping(self, factor: Tensor | None) -> None:
        """The gradients, which are multiplied by ``factor``, are about to be clipped."""
        if self._unclipped is not None and not self._probe.step % self._measure.every:
            self._unclipped.clipping(factor)

    def clipping_missed(self) -> None:
        """The gradients have been clipped, before anything was there to measure them."""
        if self._unclipped is not None:
            self._unclipped.miss()

    def skipped(self) -> None:
        """A step was attempted, and its gradients have overflowed."""
        if self._unclipped is not None:
            self._unclipped.discard()

    def dropped(self) -> None:
        """The gradients so far were thrown away."""
        self._complete, self._parts = True, 0
        if self._of_ranks is not None:
            self._of_ranks.discard()
        self.skipped()
        if self._curvature is not None:
            self._curvature.discard()

    def row(
        self,
        gradients: Sequence[Tensor | None],
        grad_scale: Tensor | None,
        averaged: Tensor | None = None,
    ) -> Tensor:
        """The step's values, in the order of ``columns``; NaN where nothing is measured at this step.

        Args:
            gradients: one a parameter, as the optimizer has them.
            grad_scale: what they are multiplied by, under a GradScaler with a fused optimizer.
            averaged: further numbers of this process, such as its loss, float64. The row then begins with their
                means over the processes. They are exchanged with the sums over the weights, in one all-reduce.
        """
        own = self._unmeasured[:0] if averaged is None else averaged
        if self._probe.step % self._measure.every:
            self.dropped()
            return torch.cat([self.layout.exchange(self._unmeasured[:0], own)[1], self._unmeasured])
        pairs = zip(gradients, self._parameters, strict=True)
        here = [local_gradient(gradient, parameter) for gradient, parameter in pairs]
        products = self._products.measure(here, grad_scale)
        vectors = [_unscaled_gradient(gradient, grad_scale) for gradient in here]
        unclipped = self._unmeasured[:0]
        if self._unclipped is not None:
            unclipped = self._unclipped.measure(here, grad_scale)
        ready = self._ready(here)
        asked_for, secant = self._asked_for_values(vectors, ready)
        curvature = self._curvature_products(vectors, ready)
        of_rank = self._of_ranks.measure() if self._of_ranks is not None else self._unmeasured[:0]
        self.dropped()
        parts = [products, curvature, secant, unclipped]
        flat = torch.cat([part.reshape(-1) for part in parts])
        sums, means, of_ranks = self.layout.exchange(flat, own, of_rank)
        pieces = sums.split([part.numel() for part in parts])
        whole = (p.view(part.shape) for p, part in zip(pieces, parts, strict=True))
        products, curvature, secant, unclipped = whole
        if secant.numel():
            asked_for["secant_residual"] = (secant[1] / secant[0]).sqrt()
        if self._measure.per_parameter:
            of_each = [products[1:, self._own].reshape(-1), curvature[1:].reshape(-1)]
            products, curvature = products[0], torch.cat([curvature[0], *of_each])
        rest = [asked_for[name].reshape(1) for name in self._asked_for]
        return torch.cat([means, products, curvature, *rest, of_ranks.reshape(-1), unclipped])

    def _due(self, every: int) -> bool:
        step = self._probe.step
        return (
            self._curvature is not None and every > 0 and not step % every and not step % self._measure.every
        )

    def _wants_curvature(self) -> bool:
        return self._due(self._curvature_every)

    def _wants_graph(self) -> bool:
        return self._wants_curvature() or (
            self._due(self._measure.sharpness_every) and self._fixed_loss is None
        )

    def _asked_for_values(
        self, vectors: Sequence[Tensor | None], ready: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What was asked for beside the inner products, and the squares of g and of its turn over a step."""
        missing = self._unmeasured.new_full((), torch.nan)
        found, squares = dict.fromkeys(self._asked_for, missing), self._unmeasured[:0]
        lr = float(self._probe.optimizer.param_groups[0].get("lr", 0.0))
        try:
            if self._measure.finite_step and self._wants_curvature() and ready and lr:
                assert self._curvature is not None
                step = self._curvature.over_step(vectors, lr)
                if step is not None:
                    squares = self._products_with(step.turned, vectors, "g.g", "w.w")
                    found["linear_decrease_gap"] = step.gap
            if self._due(self._measure.sharpness_every) and (self._fixed_loss or ready):
                found["sharpness"] = missing.new_tensor(self._sharpness())
        except CurvatureUnavailable as error:
            self._do_without(error)
        return found, squares

    def _sharpness(self) -> float:
        assert self._curvature is not None
        curvature = self._curvature
        if self._fixed_loss is None:
            product: Callable[[list[Tensor]], list[Tensor]] = functools.partial(curvature.product, keep=True)
        else:
            product = curvature.products_of(self._fixed_loss)
        like = [local(parameter) for parameter in self._parameters]
        return top_eigenvalue(product, like, total=self.layout.total).value

    def _ready(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether every micro-batch of this step went through the curvature's own backward, on each process."""
        first, self._asked = not self._asked, True
        if not self._wants_graph() and not first:
            return False
        used = {p: g is not None for p, g in zip(self._probe.parameters, gradients, strict=True)}
        whole = self._complete and self._parts > 0
        try:
            ready = all_ready(self.layout, whole, self._blocked, used, self._unmeasured.device)
        except CurvatureUnavailable as error:
            self._do_without(error)
            return False
        return ready and self._wants_graph()

    def _curvature_products(self, vectors: Sequence[Tensor | None], ready: bool) -> Tensor:
        """This process's part of ``g.Hg`` and ``Hg.Hg``, with a row for each parameter if asked for."""
        rows = (1 + len(self._parameters),) if self._measure.per_parameter else ()
        missing = self._unmeasured.new_full((*rows, 2), torch.nan)
        if not self._curvature_every:
            return missing[..., :0]
        if not ready or not self._wants_curvature():
            return missing
        assert self._curvature is not None
        try:
            product = self._curvature.product(vectors)
        except CurvatureUnavailable as error:
            self._do_without(error)
            return missing
        per_parameter = self._measure.per_parameter
        return self._products_with(product, vectors, "w.g", "w.w", per_parameter=per_parameter)

    def _products_with(
        self,
        tensors: Sequence[Tensor],
        vectors: Sequence[Tensor | None],
        *names: str,
        per_parameter: bool = False,
    ) -> Tensor:
        """This process's part of some inner products of ``tensors``, which are w there, and ``vectors``, g."""
        sums = InnerProducts(tensors, {}, owned=self.layout.owned, per_parameter=per_parameter)
        return sums.measure(vectors)[..., [sums.names.index(name) for name in names]]

    def _blocked_by(self, error: CurvatureUnavailable) -> None:
        if self.layout.world_size == 1:
            self._do_without(error)
        else:
            self._blocked = error  # the others must hear of it, and at this moment they are in their backward

    def _do_without(self, error: GeomprobeError) -> None:
        self.dropped()
        self._curvature = self._blocked = None
        self.curvature_missing = str(error)
        if self._measure.curvature_required:
            raise error
        if self.layout.rank == 0:
            print(f"geomprobe: from step {self._probe.step} on, Hg is left out: {error}", file=sys.stderr)


def _unscaled_gradient(gradient: Tensor | None, scale: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return dense if scale is None else dense / scale


def _product(name: str) -> tuple[str, str]:
    """``g.d`` or ``references/best/inner_products/g.d`` as product and reference."""
    *path, product = name.split("/")
    return product, path[1] if path else FINAL
