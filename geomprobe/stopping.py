"""Stop a pass when a queue asks for it by SIGTERM, in a state that it can go on from."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Protocol


class Stoppable(Protocol):
    """What can be asked to stop."""

    stop_asked: bool


@contextlib.contextmanager
def stopping_when_asked(current: Stoppable) -> Iterator[None]:
    """Let SIGTERM, by which a queue announces the end, stop the pass where it can go on later; a second one kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def stop(number: int, frame: object) -> None:
        signal.signal(number, before)
        if os.getpid() == own:
            current.stop_asked = True
        else:  # in a process that the script has forked
            os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
