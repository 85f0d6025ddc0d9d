"""What a replay is asked to measure."""

from __future__ import annotations

from dataclasses import dataclass

from geomprobe.errors import UsageError
from geomprobe.measure.option_fields import Options, option, whole


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(Options):
    """What a replay measures.

    Raises:
        UsageError: a number that means nothing, or options that exclude each other.

    >>> MeasureOptions(every=10, curvature_every=0).argv()
    ['--every', '10', '--no-curvature']
    """

    every: int = option(1, "measure each N-th step; every step is compared", metavar="N", parse=whole(1))
    curvature_every: int | None = option(
        None,
        "take Hg at each N-th step, if that is measured, and stop where Hg has no exact route (default: at each "
        "measured step where it has one)",
        metavar="N",
        parse=whole(0),
        constants={"--no-curvature": (0, "leave Hg out")},
    )
    check_curvature_every: int | None = option(
        None,
        "check at each N-th step, if Hg is taken there, that the gradients have a Hessian at all: one more product; 0 "
        "for never (default: five times in a run)",
        metavar="N",
        parse=whole(0),
    )
    finite_step: bool = option(
        False,
        "where Hg is taken, also measure the loss and the gradient of the same minibatch after a whole step (needs "
        "probe.backward(loss, closure=...))",
    )
    sharpness_every: int = option(
        0,
        "take the top eigenvalue of the Hessian at each N-th step, if that is measured; 0 for never (Lanczos: tens of "
        "products each)",
        metavar="N",
        parse=whole(0),
    )
    held_out_every: int = option(
        0,
        "measure a minibatch that the update does not use at each N-th step, 0 for never (needs probe.held_out)",
        metavar="N",
        parse=whole(0),
    )
    full_gradient_every: int = option(
        0,
        "measure the gradient over all samples before the first step and at the end of each N-th epoch, 0 for never; "
        "it stands in the row of the step that follows (needs probe.full_gradient_of)",
        metavar="N",
        parse=whole(0),
    )
    per_parameter: bool = option(False, "keep the inner products of each parameter tensor too")
    per_rank: bool = option(
        False, "under DDP, also keep those of each process's own gradient, before they are averaged"
    )
    before_clipping: bool = option(False, "also measure each step's gradient before the script clipped it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finite_step and self.curvature_every == 0:
            raise UsageError(
                "finite_step is measured where Hg is, and curvature_every=0 leaves Hg out: drop one of them"
            )

    @property
    def curvature_interval(self) -> int:
        """Hg is wanted at each so-many-th measured step; 0 for never."""
        return 1 if self.curvature_every is None else self.curvature_every

    @property
    def curvature_required(self) -> bool:
        """Whether the replay fails where Hg has no exact route; else Hg is left out there, and the reason noted."""
        return self.curvature_every is not None or self.sharpness_every > 0
