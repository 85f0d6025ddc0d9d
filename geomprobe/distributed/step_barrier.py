"""The step before which all processes of a run do what one of them wants, such as to stop."""

from __future__ import annotations

import torch

from geomprobe.distributed.ranks import Ranks
from geomprobe.errors import RunError


class StepBarrier:
    """Brings processes that train in step to do something between the same two steps, without holding any of them up.

    Whoever wants it calls the others. Once all have heard, rank 0 names the step after its present one: no other can
    have passed that yet, since each update takes the gradients of all.

    Args:
        ranks: the processes of the run.
        name: of what they do; one appointment has it at a time.

    >>> stop = StepBarrier(Ranks(), "stop")
    >>> stop.due(0), stop.call(), stop.due(0), stop.due(1)
    (False, None, True, False)
    """

    def __init__(self, ranks: Ranks, name: str) -> None:
        self._ranks, self._name = ranks, name
        self._times = 0
        self._ready = False
        self._called = False
        self._last = -1

    def call(self) -> None:
        """Want it; again and again does no harm."""
        if not self._called:
            self._called = True
            self._ranks.call(self._key)

    def due(self, step: int) -> bool:
        """Whether it is to be done here; to be asked at every place between two steps, in the same order everywhere.

        Args:
            step: the next step.

        Raises:
            RunError: the processes are not in step, and this one has passed the others.
        """
        if self._ranks.alone:
            due, self._called = self._called, False
            return due
        if not self._ranks.hears(self._key):
            self._last = step
            return False
        at = self._agreed(step)
        if at is None or step < at:
            self._last = step
            return False
        if self._last >= at:
            raise RunError(
                f"rank {self._ranks.rank} is before step {step}, and the others do `{self._name}` before step {at}: "
                "they do not train in step, so they cannot do it together. What is committed is kept."
            )
        self._times, self._ready, self._called = self._times + 1, False, False
        return True

    @property
    def _key(self) -> str:
        return f"{self._name}/{self._times}"

    def _agreed(self, step: int) -> int | None:
        """The step that was named, if one was."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or this process might be many steps ahead of what it has computed
        if not self._ready:
            self._ready = True
            self._ranks.say(f"{self._key}/ready", True)
        if self._ranks.first and self._ranks.have_said(f"{self._key}/ready"):
            self._ranks.tell(f"{self._key}/step", step + 1)
        at: int | None = self._ranks.told(f"{self._key}/step")
        return at
