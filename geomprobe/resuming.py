"""Where a pass goes on that was cut off, or begins in the middle: from which checkpoint, over which rows."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomprobe import checkpoint
from geomprobe.errors import RunError
from geomprobe.loops import Position
from geomprobe.run import Run
from geomprobe.trace.part import Header


@dataclass(frozen=True)
class Resumption:
    """How a pass goes on.

    Attributes:
        manifest: of the run as it was begun.
        earlier: the parts that earlier attempts have committed.
        reached: how far their rows reach.
        first: the first step whose row is wanted.
        step: the step to go on from.
        checkpoint: the state before that step; None for the start of the script, as ever.
        position: where the script's loops stand there.
        digests: of the state, by component.
    """

    manifest: dict[str, Any]
    earlier: tuple[Header, ...] = ()
    reached: int = 0
    first: int = 0
    step: int = 0
    checkpoint: Path | None = None
    position: Position | None = None
    digests: dict[str, list[int]] | None = None


def resumption(
    run: Run, manifest: dict[str, Any], earlier: Sequence[Header], reached: int, latest: int, first: int = 0
) -> Resumption:
    """Go on from the last whole checkpoint at or before a step; a damaged one is named and passed over.

    Args:
        run: whose checkpoints.
        manifest: of the run as it was begun.
        earlier: the parts of earlier attempts.
        reached: how far their rows reach.
        latest: the step.
        first: the first step whose row is wanted.
    """
    for step in reversed(checkpoint.saved(run.checkpoints)):
        path = checkpoint.folder(run.checkpoints, step)
        if not 0 < step <= latest:
            continue
        try:
            facts = checkpoint.verify(path)
        except RunError as error:
            print(f"geomprobe: {error}: an earlier one is taken", file=sys.stderr)
            continue
        position = Position(*facts["position"])
        return Resumption(manifest, tuple(earlier), reached, first, step, path, position, facts["digests"])
    return Resumption(manifest, tuple(earlier), reached, first)


def segments(steps: Sequence[int], total: int, count: int) -> list[tuple[int, int]]:
    """Cut a run at its checkpoints into pieces whose longest is as short as can be.

    Args:
        steps: of the checkpoints.
        total: steps of the run.
        count: how many pieces at most.

    Returns:
        First step and the step after the last of each piece; fewer than ``count`` where checkpoints are too few.

    >>> segments([0, 10, 20, 30, 40], 45, 2)
    [(0, 20), (20, 45)]
    >>> segments([0, 5, 10, 15], 20, 3)
    [(0, 10), (10, 15), (15, 20)]
    >>> segments([0], 45, 3)
    [(0, 45)]
    """
    cuts = sorted({0, total, *(step for step in steps if 0 < step < total)})
    low, high = max(b - a for a, b in itertools.pairwise(cuts)), total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_pieces(cuts, middle, 0)) <= count else (middle + 1, high)
    return _pieces(cuts, low, count)


def _pieces(cuts: Sequence[int], longest: int, count: int) -> list[tuple[int, int]]:
    """Pieces of at most ``longest`` steps, as few as can be, or ``count``; no two cuts are farther apart than that."""
    pieces: list[tuple[int, int]] = []
    first = 0
    for i, (cut, following) in enumerate(itertools.pairwise(cuts)):
        left = len(cuts) - 1 - i  # pieces that the rest could still be cut into
        if cut > first and (following - first > longest or len(pieces) + 1 + left <= count):
            pieces.append((first, cut))
            first = cut
    return [*pieces, (first, cuts[-1])]
