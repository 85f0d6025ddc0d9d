"""Rows of a trace that several processes have to find equal before one of them commits them."""

from __future__ import annotations

from geomprobe.ranks import Ranks
from geomprobe.streaming import Stream, Tables


class CommonRows:
    """Holds rows back until every process has compared their steps with its own recording.

    Args:
        stream: where rank 0 commits them; None on the others, which only tell how far they have come.
        ranks: the processes of the run.
        first: the first step.
    """

    def __init__(self, stream: Stream | None, ranks: Ranks, first: int) -> None:
        self._stream, self._ranks = stream, ranks
        self._compared = first
        self._held: list[tuple[int, Tables]] = []

    def append(self, blocks: Tables) -> None:
        """Take rows that are equal here, and commit those that all have found equal."""
        self._compared += len(next(iter(blocks.values())))
        if self._stream is None:
            self._ranks.say("compared", self._compared)
            return
        self._held.append((self._compared, blocks))
        self._commit(self._ranks.least_said("compared"))

    def commit_all(self) -> None:
        """Every process has found everything equal."""
        self._commit(None)

    def close(self) -> None:
        """Let go of the part; rows that are held back are not written."""
        if self._stream is not None:
            self._stream.close()

    def _commit(self, until: int | None) -> None:
        assert self._stream is not None or not self._held
        while self._stream is not None and self._held and (until is None or self._held[0][0] <= until):
            self._stream.append(self._held.pop(0)[1])
