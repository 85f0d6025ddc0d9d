"""Threads of one process that tell the others of its run that it lives, and find out when one of them has failed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from geomprobe.distributed.heartbeat import BEAT_S, BROKEN_S, SILENCE_S, FailureDetector, Heartbeat
from geomprobe.distributed.progress import Place, ProgressMarker, main_frame
from geomprobe.errors import GeomprobeError

_GRACE_S = 10.0  # for a process to stop by itself, when another has failed
_KEY = "failed"


class Failure(NamedTuple):
    """Why a run stops.

    Attributes:
        text: what happened.
        code: what its processes exit with.
        raised_by: the rank that says so of itself; None where others found it out.
    """

    text: str
    code: int
    raised_by: int | None = None

    def told(self, rank: int) -> str:
        """What another rank says of it, or any, if it was found out.

        >>> Failure("ValueError: no", 1, raised_by=2).told(0)
        'rank 0 stops because rank 2 did: ValueError: no'
        """
        cause = ":" if self.raised_by is None else f" because rank {self.raised_by} did:"
        return f"rank {rank} stops{cause} {self.text}"


class Watchdog:
    """Keeps watch in the background, until it is stopped, or ends a process that waits in vain.

    One thread talks with the store; where that holds it up, because the process that keeps the store does not
    answer, the other one notices. Rank 0 hears every process, and the others hear rank 0.

    Args:
        store: what the processes share.
        rank: this one.
        size: how many there are.
        patience: seconds that all may stand still.
        whereabouts: of this one.
        hear: asks the store for what else there is to know.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        patience: float,
        whereabouts: ProgressMarker,
        hear: Callable[[], None],
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._silence = min(SILENCE_S, patience)
        self._whereabouts, self._hear = whereabouts, hear
        self._judge = FailureDetector(size, patience)
        self._over = threading.Event()
        self._beats = 0
        self._unanswered = 0.0
        self.failure: Failure | None = None
        self._threads = [
            threading.Thread(target=job, name=f"geomprobe-{job.__name__}", daemon=True)
            for job in (self._talk, self._wait_for_failure)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, with word that this process has left."""
        self._over.set()
        for thread in self._threads:
            thread.join(2 * BEAT_S)

    def tell(self, failure: Failure) -> None:
        """Let all processes stop for ``failure``, or for another one's if that was told before."""
        if self.failure is None:
            with contextlib.suppress(Exception):  # where the store is gone, the others notice that
                told = self._store.compare_set(_KEY, "", json.dumps(failure))
                self.failure = Failure(*json.loads(told))

    def found_after_break(self) -> Failure | None:
        """An exchange of the training has broken: what for, if it is not this process's own doing."""
        self._judge.exchange_broken = True
        deadline = time.monotonic() + BROKEN_S + 5 * BEAT_S
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(BEAT_S / 10)
        return self.failure

    def _talk(self) -> None:
        last = time.monotonic()
        try:
            while not self._over.wait(BEAT_S):
                now = time.monotonic()
                self._exchange(now - last)
                last, self._unanswered = now, 0.0
            self._beat(left=True)
        except Exception as error:  # of torch's own kinds, which differ by version
            if self.failure is None and not self._over.is_set():
                self.failure = Failure(f"{_shared_store()} is gone ({error}).", GeomprobeError.exit_code)

    def _exchange(self, elapsed: float) -> None:
        own = self._beat(elapsed)
        self._hear()
        if self.failure is None and self._store.check([_KEY]):
            self.failure = Failure(*json.loads(self._store.get(_KEY)))
        everyone = self._rank == 0 or self._judge.exchange_broken
        others = [rank for rank in (range(self._size) if everyone else (0,)) if rank != self._rank]
        self._judge.hear({self._rank: own, **{rank: self._heard(rank) for rank in others}}, elapsed)
        if self.failure is None and (verdict := self._judge.verdict()) is not None:
            self.tell(Failure(verdict, GeomprobeError.exit_code))

    def _beat(self, elapsed: float = 0.0, left: bool = False) -> Heartbeat:
        self._beats += 1
        beat = Heartbeat(self._beats, self._whereabouts.look(elapsed, left))
        self._store.set(f"beat/{self._rank}", json.dumps(beat))
        return beat

    def _heard(self, rank: int) -> Heartbeat | None:
        key = f"beat/{rank}"
        if not self._store.check([key]):
            return None
        number, place = json.loads(self._store.get(key))
        return Heartbeat(number, Place(*place))

    def _wait_for_failure(self) -> None:
        while self.failure is None and not self._over.wait(BEAT_S):
            self._unanswered += BEAT_S
            if self._unanswered > self._silence:
                text = f"{_shared_store()} has not answered for {self._unanswered:.0f} s."
                self.failure = Failure(text, GeomprobeError.exit_code)
        if (
            self.failure is not None
            and self.failure.raised_by != self._rank
            and not self._over.wait(_GRACE_S)
        ):
            self._end(self.failure)

    def _end(self, failure: Failure) -> None:
        """End the process, whose main thread waits for what will not come; what is committed is safe."""
        with contextlib.suppress(Exception):
            print(f"geomprobe: {failure.told(self._rank)} It stood here:", file=sys.stderr)
            traceback.print_stack(main_frame())
            sys.stderr.flush()
        os._exit(failure.code)


def holds_store() -> bool:
    """Whether rank 0 holds what the processes share, and not the agent of torchrun."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _shared_store() -> str:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    holder = "rank 0" if holds_store() else "torchrun on the first machine"
    return f"{holder}, which holds at {place} what the ranks share, has ended, or the network has: that store"
