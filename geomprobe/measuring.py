"""What a replay measures at a step: one row of inner products on the device, Hg's among them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geomprobe.curvature import Curvature, CurvatureUnavailable
from geomprobe.determinism import RNGState, capture_rng
from geomprobe.double_backward import graph_of, hessian_vector_product, untouched
from geomprobe.errors import GeomprobeError
from geomprobe.inner_products import InnerProducts
from geomprobe.interception import unscaled
from geomprobe.preflight import dissect
from geomprobe.probe import Probe
from geomprobe.sharpness import top_eigenvalue
from geomprobe.trace.schema import FINAL, parameter_column, product_column

CURVATURE_PRODUCTS = ("g.Hg", "Hg.Hg")


@dataclass(frozen=True)
class Measure:
    """What a replay measures.

    Attributes:
        every: measure each N-th step; every step is compared all the same.
        curvature_every: take Hg at each N-th step, of those that are measured; 0 for never.
        finite_step: where Hg is taken, evaluate the minibatch's loss after a whole step as well.
        sharpness_every: take the Hessian's top eigenvalue at each N-th step, of those that are measured.
        curvature_required: fail where Hg has no exact route, instead of leaving it out and saying so.
        per_parameter: keep the inner products of each parameter tensor too.
        compiled: compile the inner products, which pays off in long runs.
    """

    every: int = 1
    curvature_every: int = 1
    finite_step: bool = False
    sharpness_every: int = 0
    curvature_required: bool = False
    per_parameter: bool = False
    compiled: bool = False

    def described(self) -> dict[str, Any]:
        """For the manifest."""
        return {"every": self.every, "per_parameter": self.per_parameter, "compiled": self.compiled}


class Measurement:
    """The measurements of one replay.

    Args:
        probe: whose parameters are measured.
        measure: what to measure.

    Attributes:
        curvature_missing: why Hg is left out, None where it is not.
    """

    def __init__(self, probe: Probe, measure: Measure) -> None:
        self._probe, self._measure = probe, measure
        self._parameters = list(probe.parameters.values())
        second = measure.curvature_every or measure.sharpness_every
        self._curvature = Curvature(self._parameters, probe.model) if second else None
        self._fixed_loss: Callable[[], Tensor] | None = None
        self._complete = True
        self._parts = 0
        self._rng: RNGState | None = None
        self.curvature_missing: str | None = None

    def open(self, references: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make ready to measure against ``references``, weights by parameter name on their device."""
        measure = self._measure
        self._products = InnerProducts(
            self._parameters,
            {name: list(weights.values()) for name, weights in references.items()},
            per_parameter=measure.per_parameter,
            compiled=measure.compiled,
        )
        names = self._products.names
        self._own = [i for i, name in enumerate(names) if "/" not in name]
        own = [names[i] for i in self._own]
        curvature = list(CURVATURE_PRODUCTS) if measure.curvature_every else []
        self.columns = [*(product_column(*_product(name)) for name in names), *map(product_column, curvature)]
        if measure.per_parameter:
            for products in (own, curvature):
                self.columns += [
                    parameter_column(p, name) for p in self._probe.parameters for name in products
                ]
        self._asked_for = ["secant_residual", "linear_decrease_gap"] if measure.finite_step else []
        self._asked_for += ["sharpness"] if measure.sharpness_every else []
        self.columns += [f"steps/{name}" for name in self._asked_for]
        self._unmeasured = torch.full_like(self._parameters[0], torch.nan, dtype=torch.float64).new_full(
            (len(self.columns),), torch.nan
        )

    def curvature_found(self) -> dict[str, Any]:
        """For the manifest: how often Hg was taken and by which route, or why it was not."""
        if self.curvature_missing is not None:
            return {"every": 0, "missing": self.curvature_missing}
        route = self._curvature.route if self._curvature is not None else None
        return {"every": self._measure.curvature_every, "route": route}

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
        if not self._wants_graph() or not plain or loss.numel() != 1:
            self._complete = self._complete and not self._wants_graph()
            run()
            return
        obstacles = dissect(loss).obstacles if closure is None else []
        if obstacles:
            self._do_without(CurvatureUnavailable(obstacles[0]))
            run()
            return
        assert self._curvature is not None
        rng, self._rng = self._rng, None
        self._parts += 1
        try:
            self._curvature.backward(loss, closure=closure, rng=rng, scale=unscaled(loss)[1])
        except CurvatureUnavailable as error:  # found on the way: the gradients are complete
            self._do_without(error)

    def dropped(self) -> None:
        """The gradients so far were thrown away."""
        self._complete, self._parts = True, 0
        if self._curvature is not None:
            self._curvature.discard()

    def row(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> Tensor:
        """The step's values, in the order of ``columns``; NaN where nothing is measured at this step.

        Args:
            gradients: one a parameter, as the optimizer has them.
            grad_scale: what they are multiplied by, under a GradScaler with a fused optimizer.
        """
        if self._probe.step % self._measure.every:
            self.dropped()
            return self._unmeasured
        products = self._products.measure(gradients, grad_scale)
        vectors = [_unscaled_gradient(gradient, grad_scale) for gradient in gradients]
        asked_for = self._asked_for_values(vectors)
        curvature = self._curvature_products(vectors)
        self.dropped()
        if not self._measure.per_parameter:
            return torch.cat([products, curvature, asked_for])
        parts = [products[0], curvature[0], products[1:, self._own].reshape(-1), curvature[1:].reshape(-1)]
        return torch.cat([*parts, asked_for])

    def _due(self, every: int) -> bool:
        step = self._probe.step
        return (
            self._curvature is not None and every > 0 and not step % every and not step % self._measure.every
        )

    def _wants_curvature(self) -> bool:
        return self._due(self._measure.curvature_every)

    def _wants_graph(self) -> bool:
        return self._wants_curvature() or (
            self._due(self._measure.sharpness_every) and self._fixed_loss is None
        )

    def _asked_for_values(self, vectors: Sequence[Tensor | None]) -> Tensor:
        """What was asked for beside the inner products, in the order of ``_asked_for``."""
        found = dict.fromkeys(self._asked_for, self._unmeasured.new_full((), torch.nan))
        lr = float(self._probe.optimizer.param_groups[0].get("lr", 0.0))
        try:
            if self._measure.finite_step and self._wants_curvature() and self._whole() and lr:
                assert self._curvature is not None
                step = self._curvature.over_step(vectors, lr)
                if step is not None:
                    found["secant_residual"] = (_square(step.turned) / _square(vectors)).sqrt()
                    found["linear_decrease_gap"] = step.gap
            if self._due(self._measure.sharpness_every) and (self._fixed_loss or self._whole()):
                found["sharpness"] = found["sharpness"].new_tensor(self._sharpness())
        except CurvatureUnavailable as error:
            self._do_without(error)
        return torch.stack([found[name] for name in self._asked_for]) if found else self._unmeasured[:0]

    def _sharpness(self) -> float:
        assert self._curvature is not None
        curvature, module = self._curvature, self._probe.model
        if self._fixed_loss is None:
            return top_eigenvalue(lambda v: curvature.product(v, keep=True), self._parameters).value
        with untouched(module), torch.enable_grad():
            graph = graph_of(self._fixed_loss(), self._parameters, module=module)
        return top_eigenvalue(
            lambda v: hessian_vector_product([graph], self._parameters, v, module=module, keep_graphs=True),
            self._parameters,
        ).value

    def _whole(self) -> bool:
        """Whether every micro-batch of this step went through the curvature's own backward."""
        return self._complete and self._parts > 0

    def _curvature_products(self, vectors: Sequence[Tensor | None]) -> Tensor:
        """``g.Hg`` and ``Hg.Hg``, with a row for each parameter where they were asked for."""
        rows = (1 + len(self._parameters),) if self._measure.per_parameter else ()
        missing = self._unmeasured.new_full((*rows, 2), torch.nan)
        if not self._measure.curvature_every:
            return missing[..., :0]
        if not self._wants_curvature() or not self._whole():
            return missing
        assert self._curvature is not None
        try:
            product = self._curvature.product(vectors)
        except CurvatureUnavailable as error:
            self._do_without(error)
            return missing
        sums = InnerProducts(product, {}, per_parameter=self._measure.per_parameter)
        measured = sums.measure(vectors)
        return measured[..., [sums.names.index("w.g"), sums.names.index("w.w")]]  # here w is Hg

    def _do_without(self, error: GeomprobeError) -> None:
        self.dropped()
        self._curvature = None
        self.curvature_missing = str(error)
        if self._measure.curvature_required:
            raise error
        print(f"geomprobe: from step {self._probe.step} on, Hg is left out: {error}", file=sys.stderr)


def _unscaled_gradient(gradient: Tensor | None, scale: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return dense if scale is None else dense / scale


def _square(vectors: Sequence[Tensor | None]) -> Tensor:
    present = [vector for vector in vectors if vector is not None]
    if not present:
        return torch.zeros((), dtype=torch.float64)
    products = InnerProducts(present, {})
    return products.measure([None] * len(present))[products.names.index("w.w")]


def _product(name: str) -> tuple[str, str]:
    """``g.d`` or ``references/best/inner_products/g.d`` as product and reference."""
    *path, product = name.split("/")
    return product, path[1] if path else FINAL
