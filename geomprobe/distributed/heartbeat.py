"""Judges, by the signs of life of a run's processes, whether one has died, or holds all the others up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from geomprobe.distributed.progress import Place

BEAT_S = 1.0
SILENCE_S = 120.0  # longer than any library keeps Python's lock to itself, which keeps a process silent too
BROKEN_S = 5.0  # the same, where an exchange has broken, so that somebody is gone


class Heartbeat(NamedTuple):
    """A sign of life: the how manieth it is, and where its process stands."""

    number: int
    place: Place


class FailureDetector:
    """Hears the beats of the processes of a run, and says what is wrong with them.

    Time is what passes between two hearings. So that all of them may be suspended and go on later, one interval
    counts for no more than two beats.

    Args:
        size: how many processes there are.
        patience: seconds that all may stand still.

    >>> judge = FailureDetector(2, patience=2.0)
    >>> late, waiting = Place(7, 1, False, "data.py:9", 2.0), Place(7, 4, False, "", 2.0)
    >>> judge.hear({0: Heartbeat(1, waiting), 1: Heartbeat(1, late)}, 1.0)
    >>> print(judge.verdict())
    the run has stood still for 2 s, because of rank 1: rank 1 stands at step 7, waiting for a batch, data.py:9;
    rank 0 waits at step 7, in the backward pass. Mend ...
    """

    def __init__(self, size: int, patience: float) -> None:
        self._size, self._patience = size, patience
        self._beats: dict[int, Heartbeat] = {}
        self._silent: dict[int, float] = {}
        self.exchange_broken = False

    def hear(self, beats: Mapping[int, Heartbeat | None], elapsed: float) -> None:
        """Take the latest beat of each process that was asked for, None where it has not begun."""
        elapsed = min(elapsed, 2 * BEAT_S)
        for rank, beat in beats.items():
            if beat is not None and beat != self._beats.get(rank):
                self._beats[rank], self._silent[rank] = beat, 0.0
            else:
                self._silent[rank] = self._silent.get(rank, 0.0) + elapsed

    def verdict(self) -> str | None:
        """What all processes have to stop for, naming the one that it is due to."""
        return self._gone() or self._standstill()

    def _gone(self) -> str | None:
        limit = min(SILENCE_S, self._patience)
        for rank, silent in sorted(self._silent.items(), key=lambda item: -item[1]):
            beat = self._beats.get(rank)
            if beat is None and silent >= self._patience:
                return (
                    f"rank {rank} has not begun within {silent:.0f} s. Did its process die, or was it started with "
                    "another command? Start all of them anew."
                )
            if beat is None:
                continue
            if beat.place.left and self.exchange_broken:
                return f"rank {rank} has left the run {beat.place}, and the others have not."
            if not beat.place.left and silent >= (BROKEN_S if self.exchange_broken else limit):
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
        said = [_standing(behind, places, "stands", "stand")]
        said += [_standing(ahead, places, "waits", "wait")] if ahead else []
        said += [_standing(left, places, "left", "left")] if left else []
        due = f", because of {_named(behind)}" if ahead else ""
        return (
            f"the run has stood still for {still:.0f} s{due}: {'; '.join(said)}. Mend what holds it up, or, if it "
            "needs so long, allow more by --patience SECONDS (patience= in Python)."
        )


def _standing(ranks: Sequence[int], places: Mapping[int, Place], one: str, several: str) -> str:
    """Who stands where, those at the same place together."""
    at: dict[str, list[int]] = {}
    for rank in ranks:
        at.setdefault(str(places[rank]), []).append(rank)
    return "; ".join(
        f"{_named(group)} {one if len(group) == 1 else several} {place}" for place, group in at.items()
    )


def _named(ranks: Sequence[int]) -> str:
    """Ranks in words.

    >>> _named([2]), _named([0, 1, 3])
    ('rank 2', 'ranks 0, 1 and 3')
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
