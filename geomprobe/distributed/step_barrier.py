"""The step before which all processes of a run do what one of them wants, such as to stop."""

from __future__ import annotations

import torch

from geomprobe.distributed.ranks import Ranks
from geomprobe.errors import RunError


class StepBarrier:
    """Brings processes that train in step to do something between the same two steps, without holding any of them up.

    Whoever wants it sets a flag. Once all processes have seen the flag, rank 0 names the step after its present one:
    no other can have passed that yet, since each update takes the gradients of all.

    Args:
        ranks: the processes of the run.
        name: of what they do; one barrier has it at a time.

    >>> stop = StepBarrier(Ranks(), "stop")
    >>> stop.due(0), stop.call(), stop.due(0), stop.due(1)
    (False, None, True, False)
    """

    def __init__(self, ranks: Ranks, name: str) -> None:
        self._ranks, self._name = ranks, name
        self._called = self._ready = False
        self._last = -1  # step that this process has passed
        self._times = 0  # that it has been done; each time has keys of its own
        self._key = f"{name}/0"

    def call(self) -> None:
        """Ask for it; a second call before it is done changes nothing."""
        if not self._called:
            self._called = True
            self._ranks.set_flag(self._key)

    def due(self, step: int) -> bool:
        """Whether it is to be done here; every process asks at every place between two steps, in the same order.

        Args:
            step: the next step.

        Raises:
            RunError: the processes are not in step, and this one has passed the others.
        """
        if not self._ranks.flag(self._key):
            self._last = step
            return False
        at = step if self._ranks.alone else self._agreed(step)
        if at is None or step < at:
            self._last = step
            return False
        if self._last >= at and not self._ranks.alone:
            raise RunError(
                f"rank {self._ranks.rank} is before step {step}, and the others do `{self._name}` before step {at}: "
                "they do not train in step, so they cannot do it together. What is committed is kept."
            )
        self._called = self._ready = False
        self._times += 1
        self._key = f"{self._name}/{self._times}"
        return True

    def _agreed(self, step: int) -> int | None:
        """The step that rank 0 has named, if it has."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or this process might be many steps ahead of what it has computed
        ready, named = f"{self._key}/ready", f"{self._key}/step"
        if not self._ready:
            self._ready = True
            self._ranks.publish(ready, True)
        at: int | None = self._ranks.published(named).get(0)
        if at is None and self._ranks.first and len(self._ranks.published(ready)) == self._ranks.size:
            at = step + 1
            self._ranks.publish(named, at)
        return at
