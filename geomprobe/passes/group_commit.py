"""Rows of a trace that several processes have to compare before one of them commits them."""

from __future__ import annotations

import math

from geomprobe.distributed.ranks import Ranks
from geomprobe.passes.attempts import AttemptLog, Tables
from geomprobe.trace.schema import VALUES


class GroupCommit:
    """Holds rows back until every process has compared their steps with its own recording.

    Args:
        stream: where rank 0 commits them; None on the others, which only tell how far they have come.
        ranks: the processes of the run.
        first: the first step.
        marked: rows that differ come too, and say so in their last column.
    """

    def __init__(self, stream: AttemptLog | None, ranks: Ranks, first: int, marked: bool = False) -> None:
        self._stream, self._ranks, self._marked = stream, ranks, marked
        self._compared = first
        self._held: list[tuple[int, Tables]] = []
        self._differs = False

    def append(self, blocks: Tables, equal: int | None = None) -> None:
        """Take the next rows, and commit those that all have compared.

        Args:
            blocks: by table.
            equal: how many of them are equal here, where not all are.
        """
        count = len(next(iter(blocks.values())))
        if equal is not None and equal < count and not self._differs:
            self._differs = True
            self._ranks.say("differs", self._compared + equal)
        self._compared += count
        if self._stream is None:
            self._ranks.say("compared", self._compared)
            return
        self._held.append((self._compared, blocks))
        self._commit(self._ranks.least_said("compared"))

    def commit_all(self) -> None:
        """Every process has compared everything."""
        self._commit(None)

    def close(self) -> None:
        """Let go of the part; rows that are held back are not written."""
        if self._stream is not None:
            self._stream.close()

    def _commit(self, until: int | None) -> None:
        assert self._stream is not None or not self._held
        while self._stream is not None and self._held and (until is None or self._held[0][0] <= until):
            stop, blocks = self._held.pop(0)
            if self._marked:
                values = blocks[VALUES]
                seam = min(self._ranks.so_far_said("differs"), default=math.inf)
                first = stop - len(values)
                if seam < stop:
                    values[max(0, int(seam) - first) :, -1] = 0.0
            self._stream.append(blocks)
