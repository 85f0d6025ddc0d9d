"""Stop a pass when a queue asks for it by SIGTERM, in a state that another process can go on from."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator

from geomprobe.distributed.ranks import Ranks
from geomprobe.distributed.step_barrier import StepBarrier

_AT_ONCE_S = 1.0


class StopRequest:
    """Whether a pass is to stop; all processes of the run stop before the same step.

    Args:
        ranks: the processes of the run.

    Attributes:
        asked: whether this process was asked to.

    >>> stop = StopRequest(Ranks())
    >>> stop.due(0); stop.asked = True; stop.due(1)
    False
    True
    """

    def __init__(self, ranks: Ranks) -> None:
        self.asked = False
        self._barrier = StepBarrier(ranks, "stop")

    def due(self, step: int) -> bool:
        """Whether to stop before ``step``; every process asks at each place between two steps."""
        if self.asked:
            self._barrier.call()
        return self._barrier.due(step)

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
