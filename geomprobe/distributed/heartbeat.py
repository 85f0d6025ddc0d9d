"""Finds out, from the heartbeats of a run's processes, whether one has died, or holds all the others up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from geomprobe.distributed.progress import Place

BEAT_S = 1.0
SILENCE_S = 120.0  # longer than any library keeps Python's lock to itself, which keeps a process silent too
BROKEN_S = 5.0  # the same, where an exchange has broken, so that somebody is gone


class Heartbeat(NamedTuple):
    """A sign of life of a process: its serial number, and where the process stands."""

    number: int
    place: Place


class FailureDetector:
    """Judges the heartbeats of all processes. It knows no clock: the watchdog hands it the time between two beats.

    One interval counts for no more than two beats, so that all processes may be suspended and go on later.

    Args:
        size: how many processes there are.
        patience: seconds that all may stand still.

    Attributes:
        exchange_broken: whether an exchange of the training has broken here, so that somebody must be gone.

    >>> detector = FailureDetector(2, patience=2.0)
    >>> late, waiting = Place(7, 1, False, "data.py:9", 2.0), Place(7, 4, False, "", 2.0)
    >>> detector.add({0: Heartbeat(1, waiting), 1: Heartbeat(1, late)}, 1.0)
    >>> print(detector.verdict())
    the run has stood still for 2 s, because of rank 1: rank 1 stands at step 7, waiting for a batch, data.py:9;
    rank 0 waits at step 7, in the backward pass. Mend ...
    """

    def __init__(self, size: int, patience: float) -> None:
        self._size, self._patience = size, patience
        self._beats: dict[int, Heartbeat] = {}
        self._silent: dict[int, float] = {}
        self.exchange_broken = False

    def add(self, beats: Mapping[int, Heartbeat | None], elapsed: float) -> None:
        """Take the latest beat of each process that was asked for, None where it has not begun."""
        for rank, beat in beats.items():
            if beat is not None and beat != self._beats.get(rank):
                self._beats[rank], self._silent[rank] = beat, 0.0
            else:
                self._silent[rank] = self._silent.get(rank, 0.0) + min(elapsed, 2 * BEAT_S)

    def verdict(self) -> str | None:
        """What all processes have to stop for, naming the one that it is due to; None while all is well."""
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
        least = min(place.progress for place in inside.values())
        behind = [rank for rank, place in inside.items() if place.progress == least]
        ahead = [rank for rank in inside if rank not in behind]
        left = [rank for rank in places if rank not in inside]
        due = f", because of {_named(behind)}" if ahead else ""
        stands = (
            *_standing(behind, places, "stands", "stand"),
            *_standing(ahead, places, "waits", "wait"),
            *_standing(left, places, "left", "left"),
        )
        return (
            f"the run has stood still for {still:.0f} s{due}: {'; '.join(stands)}. Mend what holds it up, or, if it "
            "needs so long, allow more by --patience SECONDS (patience= in Python)."
        )


def _standing(ranks: Sequence[int], places: Mapping[int, Place], one: str, several: str) -> list[str]:
    """Who stands where, those at the same place together."""
    at: dict[str, list[int]] = {}
    for rank in ranks:
        at.setdefault(str(places[rank]), []).append(rank)
    return [f"{_named(group)} {one if len(group) == 1 else several} {place}" for place, group in at.items()]


def _named(ranks: Sequence[int]) -> str:
    """Ranks in words.

    >>> _named([2]), _named([0, 1, 3])
    ('rank 2', 'ranks 0, 1 and 3')
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
