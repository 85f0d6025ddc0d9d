"""Where a process of a run stands: how far its training has come, in which line, and since when."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from types import FrameType
from typing import NamedTuple

from geomprobe._package import FOLDER

STAGES = (
    "",
    "waiting for a batch",
    "with its batch",
    "in the forward pass",
    "in the backward pass",
    "at the optimizer's step",
)
# Code in these folders is not the user's own.
_FOREIGN = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(FOLDER), "<")
_EXCHANGES = os.sep.join(("", "torch", "distributed", ""))


class Place(NamedTuple):
    """Where a process stands.

    >>> print(Place(117, 1, False, "train.py:31", 1800.0))
    at step 117, waiting for a batch, train.py:31
    """

    step: int
    stage: int
    """An index into `STAGES`."""
    exchanging: bool
    """Whether it waits in a call of torch.distributed."""
    line: str
    """Of the user's code, empty where there is none."""
    still: float
    """For how many seconds it has stood there."""
    left: bool = False
    """Whether it has left the run."""

    def __str__(self) -> str:
        where = f"{'at' if self.stage else 'before'} step {self.step}"
        what = "in an exchange" if self.exchanging else ""
        return ", ".join(filter(None, (where, STAGES[self.stage], what, self.line)))

    @property
    def progress(self) -> tuple[int, int, bool]:
        """How far it has come: of two processes that wait for each other, the one with less delays the other."""
        return self.step, self.stage, self.exchanging


class ProgressMarker:
    """Where one process's training stands: its main thread marks it at each event, and the watchdog's thread looks."""

    def __init__(self) -> None:
        self._step = self._stage = self._moves = 0
        self._seen = -1
        self._still = 0.0

    def at(self, step: int, stage: int) -> None:
        """Mark that the main thread has come to a stage of a step; an index into `STAGES`."""
        self._step, self._stage = step, stage
        self._moves += 1

    def look(self, elapsed: float, left: bool = False) -> Place:
        """Where it stands, ``elapsed`` seconds after the last look."""
        self._still = self._still + elapsed if self._moves == self._seen else 0.0
        self._seen = self._moves
        frame = main_frame()
        exchanging = frame is not None and _EXCHANGES in frame.f_code.co_filename
        return Place(self._step, self._stage, exchanging, _user_line(frame), self._still, left)


def main_frame() -> FrameType | None:
    """What the main thread is executing."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _user_line(frame: FrameType | None) -> str:
    """The innermost line of the user's own code that a frame was reached from, such as ``train.py:31``."""
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_FOREIGN):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
