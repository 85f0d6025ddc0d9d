"""Finds out, while a run of several processes trains, whether one of them has died, hangs, or has failed.

A thread in each process publishes a heartbeat each second, and reads those of others from the store that they share.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from geomprobe.distributed.progress import Place, ProgressMarker, main_frame
from geomprobe.errors import GeomprobeError

BEAT_S = 1.0
INTERVAL_S = 2 * BEAT_S  # more than that between two beats is not counted: the process was suspended
SILENCE_S = 120.0  # longer than any library keeps Python's lock to itself, which keeps a process silent too
BROKEN_S = 5.0  # the same, where an exchange has broken, so that a process is gone
GRACE_S = 10.0  # for a process to stop by itself, when another has failed
_KEY = "failed"


class Heartbeat(NamedTuple):
    """A sign of life of a process: its serial number, and where the process stands."""

    number: int
    place: Place


class FailureDetector:
    """Judges the heartbeats of all processes. It has no clock: the watchdog gives it the time between two beats.

    A long interval counts for little, so that all processes may be suspended and continue later.

    >>> detector = FailureDetector(2, patience=2.0)
    >>> late, waiting = Place(7, 1, False, "data.py:9", 2.0), Place(7, 4, False, "", 2.0)
    >>> detector.add({0: Heartbeat(1, waiting), 1: Heartbeat(1, late)}, 1.0)
    >>> print(detector.verdict())
    the run has stood still for 2 s, because of rank 1: rank 1 stands at step 7, waiting for a batch, data.py:9;
    rank 0 waits at step 7, in the backward pass. Mend ...
    """

    def __init__(self, size: int, patience: float) -> None:
        self._size, self._patience = (
            size,
            patience,
        )  # how many processes, and how many seconds all may stand still
        self._beats: dict[int, Heartbeat] = {}
        self._silent: dict[int, float] = {}
        self.exchange_broken = False  # an exchange of the training has broken here, so that a process must be gone

    def add(self, beats: Mapping[int, Heartbeat | None], elapsed: float) -> None:
        """Take the latest beat of each process that was asked for, None where it has not started."""
        for rank, beat in beats.items():
            if beat is not None and beat != self._beats.get(rank):
                self._beats[rank], self._silent[rank] = beat, 0.0
            else:
                self._silent[rank] = self._silent.get(rank, 0.0) + min(elapsed, INTERVAL_S)

    def verdict(self) -> str | None:
        """What all processes have to stop for, with the name of the one that causes it; None while all is well."""
        return self._gone() or self._standstill()

    def _gone(self) -> str | None:
        limit = BROKEN_S if self.exchange_broken else min(SILENCE_S, self._patience)
        for rank, silent in sorted(self._silent.items(), key=lambda item: -item[1]):
            beat = self._beats.get(rank)
            if beat is None:
                if silent >= self._patience:
                    return (
                        f"rank {rank} has not begun within {silent:.0f} s. Did its process die, or was it started with "
                        "another command? Start all of them again."
                    )
            elif beat.place.left:
                if self.exchange_broken:
                    return f"rank {rank} has left the run {beat.place}, and the others have not."
            elif silent >= limit:
                return (
                    f"rank {rank} has given no sign of life for {silent:.0f} s: its process was killed or stopped, or "
                    f"its machine is gone. It was last {beat.place}."
                )
        return None

    def _standstill(self) -> str | None:
        places = {rank: beat.place for rank, beat in sorted(self._beats.items())}
        inside = {rank: place for rank, place in places.items() if not place.left}
        still = min((place.still for place in inside.values()), default=0.0)
        if len(places) < self._size or not inside or still < self._patience:
            return None
        farthest_back = min(place.progress for place in inside.values())
        behind = [rank for rank, place in inside.items() if place.progress == farthest_back]
        ahead = [rank for rank in inside if rank not in behind]
        left = [rank for rank in places if rank not in inside]
        cause = f", because of {_named(behind)}" if ahead else ""
        stands = (
            *_standing(behind, places, "stands", "stand"),
            *_standing(ahead, places, "waits", "wait"),
            *_standing(left, places, "left", "left"),
        )
        return (
            f"the run has stood still for {still:.0f} s{cause}: {'; '.join(stands)}. Mend what delays it, or, if it "
            "needs so long, allow more by --patience SECONDS (patience= in Python)."
        )


def _standing(ranks: Sequence[int], places: Mapping[int, Place], one: str, several: str) -> list[str]:
    """Who stands where, those at the same place together."""
    at: dict[str, list[int]] = {}
    for rank in ranks:
        at.setdefault(str(places[rank]), []).append(rank)
    return [f"{_named(group)} {one if len(group) == 1 else several} {place}" for place, group in at.items()]


def _named(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


class Failure(NamedTuple):
    """Why a run stops."""

    text: str
    code: int
    """What its processes exit with."""
    raised_by: int | None = None
    """The rank that reports it of itself; None where the watchdogs found it."""

    def as_seen_by(self, rank: int) -> str:
        """The message of another rank.

        >>> Failure("ValueError: no", 1, raised_by=2).as_seen_by(0)
        'rank 0 stops because rank 2 did: ValueError: no'
        """
        cause = ":" if self.raised_by is None else f" because rank {self.raised_by} did:"
        return f"rank {rank} stops{cause} {self.text}"


class Watchdog:
    """Exchanges heartbeats in a thread from `start` to `stop`, and ends this process where it waits in vain.

    Rank 0 reads the heartbeats of every process, and the others those of rank 0. Python's faulthandler could end a
    process too, but it has one timer, and that is the user's.

    Args:
        store: what the processes share.
        rank: this one.
        size: how many there are.
        patience: seconds that all may stand still.
        progress: of this process; its main thread marks it.
        each_beat: called by the thread at each beat, to look up what else the store has.

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
        self._thread.start()

    def stop(self) -> None:
        """End the thread, with a last heartbeat: this process has left the run."""
        self._over.set()
        self._thread.join(2 * BEAT_S)

    def report(self, failure: Failure) -> None:
        """Make all processes stop for ``failure``, or for another one's if that was reported before."""
        if self.failure is None:
            with contextlib.suppress(Exception):  # where the store is gone, the others notice that
                first = self._store.compare_set(_KEY, "", json.dumps(failure))
                self.failure = Failure(*json.loads(first))

    def found_after_break(self) -> Failure | None:
        """Wait for the cause of an exchange that broke in the main thread; None where no other process failed."""
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
        """Use the store in a thread that can be left behind: no call of a store obeys a time limit."""

        def run() -> None:
            try:
                talk(*arguments)
            except Exception as error:  # of torch's own kinds, which differ by version
                self._store_failed(f"is gone ({error}).")

        thread = threading.Thread(target=run, name="geomprobe-heartbeat", daemon=True)
        thread.start()
        waited = 0.0
        # In short waits, so that a job that is suspended as a whole can continue later.
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
