"""The step before which all processes of a run do what one of them wants, such as to stop after SIGTERM."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator

import torch

from geomprobe.distributed.ranks import Ranks
from geomprobe.errors import RunError

_AT_ONCE_S = 1.0


class StepBarrier:
    """Lets processes that train in step do something between the same two steps; none waits for another.

    The process that wants it sets a flag. Once all processes have seen the flag, rank 0 names the step after its
    present one: no other can have passed that yet, since each update takes the gradients of all.

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
        """Whether it is to be done before ``step``; every process asks between any two steps, in the same order.

        Raises:
            RunError: the processes are not in step, and this one has passed the others.
        """
        at = None
        if self._ranks.flag(self._key):
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


class StopRequest(StepBarrier):
    """Whether a pass is to stop, for another process to continue it; all processes stop before the same step.

    Attributes:
        asked: whether this process was asked to.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks, "stop")
        self.asked = False

    def due(self, step: int) -> bool:
        if self.asked:
            self.call()
        return super().due(step)

    @contextlib.contextmanager
    def by_sigterm(self) -> Iterator[None]:
        """Let SIGTERM, by which a queue announces the end, ask while inside.

        Another one kills, unless it comes at once: a queue and a launcher that passes its signals on may both send it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        own = os.getpid()
        first = math.inf

        def stop(number: int, frame: object) -> None:
            nonlocal first
            first = min(first, time.monotonic())
            forked = os.getpid() != own  # by the script
            if forked or time.monotonic() - first > _AT_ONCE_S:
                signal.signal(number, before)
                os.kill(os.getpid(), number)
            else:
                self.asked = True

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
