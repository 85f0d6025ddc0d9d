"""What a replay is asked to measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from geomprobe.errors import UsageError


@dataclass(frozen=True)
class MeasureOptions:
    """What a replay measures.

    Attributes:
        every: measure each N-th step; every step is compared all the same.
        curvature_every: take Hg at each N-th step, of those that are measured; 0 for never.
        finite_step: where Hg is taken, evaluate the minibatch's loss after a whole step as well.
        sharpness_every: take the Hessian's top eigenvalue at each N-th step, of those that are measured.
        held_out_every: measure a minibatch that the update does not use at each N-th step; 0 for never.
        full_gradient_every: measure the gradient over all samples at the end of each N-th epoch; 0 for never.
        curvature_required: fail where Hg has no exact route, instead of leaving it out and saying so.
        per_parameter: keep the inner products of each parameter tensor too.
        per_rank: under DDP, keep those of each rank's own gradient too, before the ranks' are averaged (and
            clipped): its minibatch is the rank's share of the step's.
        before_clipping: keep those of the gradient before the script clipped it, too.
        compiled: compile the inner products, which pays off in long runs.
    """

    every: int = 1
    curvature_every: int = 1
    finite_step: bool = False
    sharpness_every: int = 0
    held_out_every: int = 0
    full_gradient_every: int = 0
    curvature_required: bool = False
    per_parameter: bool = False
    per_rank: bool = False
    before_clipping: bool = False
    compiled: bool = False

    @classmethod
    def asked(cls, *, curvature_every: int | None, **options: Any) -> MeasureOptions:
        """What the options of `geomprobe.replay` ask for.

        Args:
            curvature_every: None for each measured step where Hg has an exact route.
            **options: the others, each under the name of its attribute.

        Raises:
            UsageError: a number that means nothing, or options that exclude each other.

        >>> MeasureOptions.asked(curvature_every=None).curvature_required
        False
        """
        measure = cls(
            curvature_every=1 if curvature_every is None else curvature_every,
            curvature_required=curvature_every is not None or options.get("sharpness_every", 0) > 0,
            **options,
        )
        if measure.every < 1:
            raise UsageError(f"every={measure.every}: measure each N-th step with N at least 1")
        for name in ("curvature_every", "sharpness_every", "held_out_every", "full_gradient_every"):
            if (number := getattr(measure, name)) < 0:
                raise UsageError(f"{name}={number}: name each N-th, or 0 for never")
        if measure.finite_step and not measure.curvature_every:
            raise UsageError(
                "finite_step is measured where Hg is, and curvature_every=0 leaves Hg out: drop one of them"
            )
        return measure

    def described(self) -> dict[str, Any]:
        """For the manifest."""
        return {"every": self.every, "per_parameter": self.per_parameter, "compiled": self.compiled}
