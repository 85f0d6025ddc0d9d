"""The thread in each process of a run that tells the others each second where it stands, and finds out who failed."""

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

GRACE_S = 10.0  # for a process to stop by itself, when another has failed
_KEY = "failed"


class Failure(NamedTuple):
    """Why a run stops.

    Attributes:
        text: what happened.
        code: what its processes exit with.
        raised_by: the rank that reports it of itself; None where the watchdogs found it out.
    """

    text: str
    code: int
    raised_by: int | None = None

    def as_seen_by(self, rank: int) -> str:
        """The message of another rank.

        >>> Failure("ValueError: no", 1, raised_by=2).as_seen_by(0)
        'rank 0 stops because rank 2 did: ValueError: no'
        """
        cause = ":" if self.raised_by is None else f" because rank {self.raised_by} did:"
        return f"rank {rank} stops{cause} {self.text}"


class Watchdog:
    """Exchanges heartbeats in a thread from `start` to `stop`, or ends a process that waits in vain.

    Rank 0 reads the heartbeats of every process, and the others those of rank 0. Python's faulthandler could end a
    process too, but it has one timer, and that is the user's.

    Args:
        store: what the processes share.
        rank: this one.
        size: how many there are.
        patience: seconds that all may stand still.
        progress: of this process; its main thread marks it.
        each_beat: what else is to be looked up in the store, by the same thread.

    Attributes:
        failure: what the run has to stop for, once there is something; the main thread reads it at each event.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        patience: float,
        progress: ProgressMarker,
        each_beat: Callable[[], None],
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._silence = min(SILENCE_S, patience)
        self._progress, self._each_beat = progress, each_beat
        self._detector = FailureDetector(size, patience)
        self._over = threading.Event()
        self._beats = 0
        self.failure: Failure | None = None
        self._thread = threading.Thread(target=self._watch, name="geomprobe-watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, with a last heartbeat that says that this process has left the run."""
        self._over.set()
        self._thread.join(2 * BEAT_S)

    def report(self, failure: Failure) -> None:
        """Have all processes stop for ``failure``, or for another one's if that was reported before."""
        if self.failure is None:
            with contextlib.suppress(Exception):  # where the store is gone, the others notice that
                first = self._store.compare_set(_KEY, "", json.dumps(failure))
                self.failure = Failure(*json.loads(first))

    def found_after_break(self) -> Failure | None:
        """What the main thread has to stop for whose exchange has broken, if that is not its own doing."""
        self._detector.exchange_broken = True
        deadline = time.monotonic() + BROKEN_S + 5 * BEAT_S
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(BEAT_S / 10)
        return self.failure

    def _watch(self) -> None:
        last = time.monotonic()
        while self.failure is None and not self._over.wait(BEAT_S):
            now = time.monotonic()
            self._answered(self._exchange, now - last)
            last = now
        failure = self.failure
        if failure is None:
            self._answered(self._beat, 0.0, True)
        elif failure.raised_by != self._rank and not self._over.wait(GRACE_S):
            self._end(failure)

    def _answered(self, talk: Callable[..., Any], *arguments: Any) -> None:
        """Talk with the store in a thread that can be left behind: no call of a store heeds a time limit."""

        def run() -> None:
            try:
                talk(*arguments)
            except Exception as error:  # of torch's own kinds, which differ by version
                self._store_failed(f"is gone ({error}).")

        thread = threading.Thread(target=run, name="geomprobe-heartbeat", daemon=True)
        thread.start()
        waited = 0.0
        # In short waits, so that a job that is suspended as a whole can go on later.
        while thread.is_alive() and waited < self._silence:
            thread.join(BEAT_S)
            waited += BEAT_S
        if thread.is_alive():
            self._store_failed(f"has not answered for {waited:.0f} s.")

    def _store_failed(self, how: str) -> None:
        if self.failure is None and not self._over.is_set():
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            holder = "rank 0" if holds_store() else "torchrun on the first machine"
            text = f"{holder}, which holds at {place} what the ranks share, has ended, or the network has: that store"
            self.failure = Failure(f"{text} {how}", GeomprobeError.exit_code)

    def _exchange(self, elapsed: float) -> None:
        own = self._beat(elapsed)
        self._each_beat()
        if self.failure is None and self._store.check([_KEY]):
            self.failure = Failure(*json.loads(self._store.get(_KEY)))
        everyone = self._rank == 0 or self._detector.exchange_broken
        others = [rank for rank in (range(self._size) if everyone else (0,)) if rank != self._rank]
        self._detector.add({self._rank: own, **{rank: self._beat_of(rank) for rank in others}}, elapsed)
        if self.failure is None and (verdict := self._detector.verdict()) is not None:
            self.report(Failure(verdict, GeomprobeError.exit_code))

    def _beat(self, elapsed: float, left: bool = False) -> Heartbeat:
        self._beats += 1
        beat = Heartbeat(self._beats, self._progress.look(elapsed, left))
        self._store.set(f"beat/{self._rank}", json.dumps(beat))
        return beat

    def _beat_of(self, rank: int) -> Heartbeat | None:
        key = f"beat/{rank}"
        if not self._store.check([key]):
            return None
        number, place = json.loads(self._store.get(key))
        return Heartbeat(number, Place(*place))

    def _end(self, failure: Failure) -> None:
        """End the process, whose main thread waits for what will not come; what is committed is safe."""
        with contextlib.suppress(Exception):
            print(f"geomprobe: {failure.as_seen_by(self._rank)} It stood here:", file=sys.stderr)
            traceback.print_stack(main_frame())
            sys.stderr.flush()
        os._exit(failure.code)


def holds_store() -> bool:
    """Whether rank 0 holds what the processes share, and not the agent of torchrun."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
