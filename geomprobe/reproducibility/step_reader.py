"""The one read of the weights and the gradients of a step, for its fingerprint and for what is measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import is_dtensor, local, local_gradient
from geomprobe.kernels.fused_read import FusedRead, Reading


class StepReader:
    """Reads parameters, gradients and references where they lie; of DTensors, what this process has of them.

    A pass has one. It is asked once a step, just before the update.

    Args:
        parameters: the measured ones. Tied weights appear once.
        others: further weights of the model, which have digests alone.
    """

    def __init__(self, parameters: Sequence[Tensor], others: Sequence[Tensor] = ()) -> None:
        self._parameters, self._others = list(parameters), list(others)
        self._distributed = any(map(is_dtensor, self._parameters))
        self._fused = FusedRead(list(map(local, self._parameters)))
        self._rest = FusedRead(list(map(local, self._others))) if others else None
        self._alone: StepReader | None = None

    def refer_to(
        self,
        references: Mapping[str, Sequence[Tensor]],
        *,
        owned: Sequence[bool] | None = None,
        per_parameter: bool = False,
    ) -> tuple[str, ...]:
        """Take the inner products with these references from now on; gives their names, as `FusedRead.names`.

        Raises:
            UsageError: a reference does not match the parameters.
        """
        points = {name: [local(tensor) for tensor in reference] for name, reference in references.items()}
        weights = list(map(local, self._parameters))
        self._fused = FusedRead(weights, points, owned=owned, per_parameter=per_parameter)
        return self._fused.names

    @torch.no_grad()
    def read(
        self, gradients: Sequence[Tensor | None], grad_scale: Tensor | float | None = None, *, sums: bool = True
    ) -> Reading:
        """What the weights and ``gradients``, one a parameter, hold now; the digests of other weights come last.

        Raises:
            UnsupportedTraining: a parameter changed its shape, a gradient does not match its parameter, or sums are
                wanted of parameters that cannot be measured.
        """
        weights = None
        if self._distributed:
            pairs = zip(gradients, self._parameters, strict=True)
            gradients = [local_gradient(gradient, parameter) for gradient, parameter in pairs]
            weights = [local(parameter) for parameter in self._parameters]
        reading = self._fused.read(gradients, weights=weights, grad_scale=grad_scale, sums=sums)
        if self._rest is None:
            return reading
        rest, _ = self._rest.look([local(tensor) for tensor in self._others])
        return reading._replace(weights=torch.cat([reading.weights, rest]))

    def look(self) -> Reading:
        """What the weights alone hold now; may be called between steps."""
        if self._alone is None:
            self._alone = StepReader(self._parameters, self._others)
        return self._alone.read([None] * len(self._parameters), sums=False)
