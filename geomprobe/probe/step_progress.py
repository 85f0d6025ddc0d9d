"""How far within its step the training of this process has come, for the report of a hang."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from geomprobe.distributed.progress import ProgressMarker
from geomprobe.probe.events import Events

if TYPE_CHECKING:
    from geomprobe.probe.loops import Position
    from geomprobe.probe.probe import Probe


class StepProgress(Events):
    """Notes the stage of the step at each event; the watchdog's thread reads the marker.

    Args:
        marker: where it is noted; see `STAGES` of `geomprobe.distributed.progress` for the numbers.

    >>> marker = ProgressMarker()
    >>> StepProgress(marker).entered(())
    >>> marker.look(0.0).stage
    3
    """

    def __init__(self, marker: ProgressMarker) -> None:
        self._marker = marker
        self._probe: Probe | None = None

    def attached(self, probe: Probe) -> None:
        self._probe = probe

    def between_steps(self, position: Position) -> None:
        self._at(0)

    def fetching(self) -> None:
        self._at(1)

    def fetch_ended(self, came: bool) -> None:
        self._at(2)

    def fetched(self, batch: Any) -> None:
        self._at(2)

    def entered(self, inputs: Any) -> None:
        self._at(3)

    def losses_seen(self, losses: Sequence[Tensor]) -> None:
        self._at(4)

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        self._at(5)

    def after_update(self) -> None:
        self._at(0)

    def _at(self, stage: int) -> None:
        self._marker.at(0 if self._probe is None else self._probe.step, stage)
