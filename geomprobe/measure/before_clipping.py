"""The gradient as it was before the script clipped it, measured beside the one that the optimizer takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local_gradient
from geomprobe.distributed.layout import Layout
from geomprobe.errors import UsageError
from geomprobe.measure.inner_products import InnerProducts
from geomprobe.measure.options import MeasureOptions

PRODUCTS = ("g.g", "w.g", "g.d", "d.d")


class BeforeClipping:
    """Inner products, those of `PRODUCTS` against the final iterate, of each step's gradient before it is clipped.

    A step that clips nothing has those of the gradient that the optimizer takes.

    Args:
        parameters: the weights.
        layout: how they lie across processes; of DTensors the local values count.

    >>> w = torch.tensor([3.0, 4.0])
    >>> w.grad, before = torch.tensor([6.0, 8.0]), BeforeClipping([w], Layout())
    >>> before.open([torch.zeros(2)])
    >>> before.clipping(None)
    >>> w.grad.clamp_(max=1.0)
    tensor([1., 1.])
    >>> before.measure([w.grad], None)
    tensor([100.,  50.,  50.,  25.], dtype=torch.float64)
    """

    def __init__(self, parameters: Sequence[Tensor], layout: Layout) -> None:
        self._parameters, self._layout = list(parameters), layout
        self._products: InnerProducts | None = None
        self._held: tuple[list[Tensor | None], Tensor | None] | None = None
        self._measured: Tensor | None = None

    def open(self, final: Sequence[Tensor]) -> None:
        """Make ready to measure against the final iterate."""
        self._products = InnerProducts(self._parameters, {"final": final}, owned=self._layout.owned)

    @torch.no_grad()
    def clipping(self, factor: Tensor | None) -> None:
        """The present gradients, which are multiplied by ``factor``, are about to be clipped."""
        if self._measured is not None or self._held is not None:
            return  # they have been already, by another call
        gradients = [local_gradient(p.grad, p) for p in self._parameters]
        if self._products is None:  # the first step's, which is clipped before the final iterate is there
            self._held = [None if g is None else g.detach().clone() for g in gradients], factor
        else:
            self._measured = self._sums(gradients, factor)

    def backward(self) -> None:
        """A backward pass adds to the gradients: what is clipped already is not the step's gradient."""
        if self._measured is not None or self._held is not None:
            self.miss()

    def miss(self) -> None:
        """What the step's gradient was before it was clipped cannot be known."""
        self._held = None
        device = self._parameters[0].device
        self._measured = torch.full((len(PRODUCTS),), torch.nan, dtype=torch.float64, device=device)

    def measure(self, gradients: Sequence[Tensor | None], factor: Tensor | None) -> Tensor:
        """This process's part of the step's values, in the order of `PRODUCTS`.

        Args:
            gradients: local values, as the optimizer takes them.
            factor: what they are multiplied by.
        """
        if self._measured is not None:
            return self._measured
        return self._sums(*(self._held or (gradients, factor)))

    def discard(self) -> None:
        """The gradients so far were thrown away, or the step is over."""
        self._held = self._measured = None

    def _sums(self, gradients: Sequence[Tensor | None], factor: Tensor | None) -> Tensor:
        assert self._products is not None
        measured = self._products.measure(gradients, factor)
        return measured[[self._products.names.index(name) for name in PRODUCTS]]


def require_clipped(measure: MeasureOptions, recorded: Mapping[str, Any]) -> None:
    """Refuse to measure the gradient before clipping where there was none.

    Args:
        measure: what is asked for.
        recorded: the manifest of the recording.

    Raises:
        UsageError: the recording saw no clipping.

    >>> require_clipped(MeasureOptions(before_clipping=True), {"updates": {"clipped_by": ["clip_grad_norm_"]}})
    """
    if measure.before_clipping and not recorded.get("updates", {}).get("clipped_by"):
        raise UsageError(
            "the gradient before clipping was asked for, and the recording saw no call of clip_grad_norm_ or "
            "clip_grad_value_: what is measured is the gradient that they would have been given. Leave the option out."
        )
