"""Stop a pass when a queue asks for it by SIGTERM, in a state that it can go on from."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Protocol

_AT_ONCE_S = 1.0


class Stoppable(Protocol):
    """What can be asked to stop."""

    stop_asked: bool


@contextlib.contextmanager
def stopping_when_asked(current: Stoppable) -> Iterator[None]:
    """Let SIGTERM, by which a queue announces the end, stop the pass where it can go on later.

    Another one kills, unless it comes at once: a queue and a launcher that passes its signals on may both send it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()
    asked = math.inf

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        asked = min(asked, time.monotonic())
        forked = os.getpid() != own  # by the script
        if forked or time.monotonic() - asked > _AT_ONCE_S:
            signal.signal(number, before)
            os.kill(os.getpid(), number)
        else:
            current.stop_asked = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
