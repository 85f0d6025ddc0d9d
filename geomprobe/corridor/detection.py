"""The near-corridors of a run: stays below a threshold of the relative residual, and the share of steps below it.

A row that was not measured (NaN) is neither inside nor outside. Shares are shares of the measured rows. A stay starts
at a measured row below the threshold, and ends at the next measured row that is not below it. So with
``--curvature-every N`` each measurement stands for the steps up to the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geomprobe.errors import UsageError

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]


@runtime_checkable
class Columns(Protocol):
    """The part of a trace that this module reads: named columns, one row a step."""

    @property
    def columns(self) -> Sequence[str]: ...

    def __getitem__(self, name: str, /) -> Floats: ...


Source = Columns | ArrayLike


@dataclass(frozen=True)
class Segments:
    """The stays inside near-corridors.

    Attributes:
        threshold: relative residual below which a row is inside.
        entries: the first step of each stay, int64 [k].
        exits: the first step after each stay, int64 [k]; where the run ends in a stay, the step after the last.
        share: measured rows inside, over measured rows.
        measured: how many rows were measured.
    """

    threshold: float
    entries: Steps
    exits: Steps
    share: float
    measured: int

    @property
    def lengths(self) -> Steps:
        """Steps in each stay, int64 [k]."""
        return self.exits - self.entries


@dataclass(frozen=True)
class Occupancy:
    """The share of measured rows whose relative residual is below each threshold.

    Attributes:
        thresholds: increasing, [k].
        share: between 0 and 1, never decreasing, [k].
    """

    thresholds: Floats
    share: Floats


def segments(source: Source, threshold: float, *, smooth: int | None = None) -> Segments:
    """The stays of a run in near-corridors (CG theorem 2.11: in a corridor the residual is 0).

    Args:
        source: a trace, of which ``relative_residual`` and ``step`` are read, or a 1-D array of residuals,
            one a step.
        threshold: a row is inside where the relative residual is below this.
        smooth: width, in measured rows, of a centered moving average (over fewer rows at the ends). It takes
            minibatch noise out of entries and exits. None uses the rows as they are.

    Raises:
        UsageError: nothing was measured, the array is not 1-D, ``threshold`` is not positive, or ``smooth``
            is below 1.

    >>> nan = float("nan")
    >>> found = segments([0.5, 0.01, nan, 0.02, 0.3, 0.01], threshold=0.1)
    >>> found.entries.tolist(), found.exits.tolist(), found.lengths.tolist(), found.share
    ([1, 5], [4, 6], [3, 1], 0.6)
    """
    if not threshold > 0:
        raise UsageError(f"the threshold of a relative residual must be positive, but it is {threshold!r}")
    steps, residuals, end = _measured(source, smooth)
    inside = residuals < threshold
    changes = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    # A stay that lasts to the end of the run ends at index len(steps), where `end` is appended.
    moments = np.append(steps, end)[changes]
    return Segments(threshold, moments[::2], moments[1::2], float(inside.mean()), len(steps))


def occupancy(source: Source, thresholds: ArrayLike | None = None, *, smooth: int | None = None) -> Occupancy:
    """The share of the run inside near-corridors, at each of many thresholds.

    Args:
        source, smooth: as for `segments`.
        thresholds: increasing. None takes 200, evenly spaced in their logarithm, from the smallest positive
            residual to just above the largest finite one, so that the curve covers all of them.

    Raises:
        UsageError: as `segments`.

    >>> curve = occupancy([0.001, 0.01, 0.1, 1.0], [0.05, 0.5, 5.0])
    >>> curve.share.tolist()
    [0.5, 0.75, 1.0]
    """
    _, residuals, _ = _measured(source, smooth)
    given = _spanning(residuals) if thresholds is None else np.asarray(thresholds, float)
    below = np.searchsorted(np.sort(residuals), given, side="left")
    return Occupancy(given, below / len(residuals))


def _measured(source: Source, smooth: int | None) -> tuple[Steps, Floats, int]:
    """Steps and residuals of the measured rows, and the step after the last row of all."""
    if isinstance(source, Columns):
        residuals, steps = source["relative_residual"], source["step"].astype(np.int64)
    else:
        residuals = np.asarray(source, float)
        steps = np.arange(residuals.size)
    if residuals.ndim != 1:
        raise UsageError(f"residuals are one number a step, but the array's shape is {residuals.shape}")
    known = ~np.isnan(residuals)
    if not known.any():
        raise UsageError(
            f"the relative residual was measured at none of {residuals.size} steps, so there is nothing to "
            "find corridors in: replay with Hg (--curvature-every N, without --no-curvature)"
        )
    return steps[known], _smoothed(residuals[known], smooth), int(steps[-1]) + 1


def _smoothed(residuals: Floats, window: int | None) -> Floats:
    if window is None:
        return residuals
    if window < 1:
        raise UsageError(f"smooth is a number of measured rows, at least 1, but it is {window!r}")
    ones = np.ones(min(window, 2 * len(residuals) - 1))  # one more row on either side would change nothing
    rows = slice((len(ones) - 1) // 2, (len(ones) - 1) // 2 + len(residuals))
    sums, counts = np.convolve(residuals, ones)[rows], np.convolve(np.ones_like(residuals), ones)[rows]
    return sums / counts


def _spanning(residuals: Floats) -> Floats:
    positive = residuals[(residuals > 0) & np.isfinite(residuals)]
    low, high = (positive.min(), positive.max()) if positive.size else (np.finfo(float).eps, 1.0)
    curve = np.geomspace(low, high, 200)
    curve[-1] = np.nextafter(high, np.inf)
    return curve
