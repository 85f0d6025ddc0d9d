"""One check of a trace: the rows it looked at, the worst of them, its tolerance, and the outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Rows = NDArray[np.bool_]

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"

UNIT_ROUNDOFF = 2.0**-53
"""Largest relative error of one float64 operation."""

DERIVED = 16 * UNIT_ROUNDOFF
"""Tolerance for a column that is derived from others in float64.

No column takes more than 4 operations (``cosine``: two roots, two quotients), no recomputation here
more than 6 (``rsi / eb^2``), each off by at most one unit roundoff: 10, rounded up to a power of two.
"""


@dataclass(frozen=True)
class Check:
    """What one check found.

    ``worst`` and ``tolerance`` are those of the row that came closest to its tolerance (or exceeded it
    the most), both relative to the size of the terms that were compared; ``row`` is its step.
    """

    name: str
    outcome: str
    rows: int = 0
    worst: float = float("nan")
    tolerance: float = float("nan")
    row: int | None = None
    note: str = ""

    @property
    def excess(self) -> float:
        """``worst / tolerance``: above 1 is a failure.

        >>> Check("x", PASS, 5, 1.0, 4.0, 3).excess
        0.25
        """
        if self.worst == 0:
            return 0.0
        return self.worst / self.tolerance if self.tolerance else float("inf")

    def as_json(self) -> dict[str, Any]:
        """The check as a dictionary of JSON values; numbers that do not exist are None.

        >>> skipped("eq. 4", "momentum 0.9").as_json()["worst"] is None
        True
        """
        numbers = {
            key: value if np.isfinite(value) else None
            for key, value in (("worst", self.worst), ("tolerance", self.tolerance))
        }
        return {**self.__dict__, **numbers}


def skipped(name: str, why: str) -> Check:
    """A check that does not apply, and why.

    >>> skipped("eq. 4", "the optimizer is Adam").outcome
    'SKIPPED'
    """
    return Check(name, SKIPPED, note=why)


def held(name: str, true: bool, note: str = "") -> Check:
    """A check without numbers.

    >>> held("certificate", True).outcome
    'PASS'
    """
    return Check(name, PASS if true else FAIL, note=note)


def compare(name: str, deviation: ArrayLike, tolerance: ArrayLike, rows: Rows, note: str = "") -> Check:
    """Hold ``abs(deviation) <= tolerance`` in each of ``rows`` (all [T]; tolerance may be a scalar).

    A NaN deviation breaks the check: the caller leaves out rows where there is nothing to compare.

    >>> compare("x", [0.0, 3.0], 1.0, np.array([True, True]))
    Check(name='x', outcome='FAIL', rows=2, worst=3.0, tolerance=1.0, row=1, note='')
    """
    if not rows.any():
        return skipped(name, note or "no row to check")
    steps = np.flatnonzero(rows)
    size = np.abs(np.asarray(deviation, float))[steps]
    size[np.isnan(size)] = np.inf
    allowed = np.broadcast_to(np.asarray(tolerance, float), rows.shape)[steps]
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(size == 0, 0.0, size / allowed)
    worst = int(np.argmax(excess))
    outcome = PASS if excess[worst] <= 1 else FAIL
    return Check(
        name, outcome, len(steps), float(size[worst]), float(allowed[worst]), int(steps[worst]), note
    )


def worst_of(name: str, checks: list[Check]) -> Check:
    """One check out of several of a kind: the one that came closest to its tolerance, its name in the note.

    >>> worst_of("both", [Check("a", PASS, 5, 0.1, 1.0, 3), Check("b", FAIL, 5, 9.0, 1.0, 4)]).note
    'b'
    """
    done = [check for check in checks if check.outcome != SKIPPED]
    if not done:
        return skipped(name, checks[0].note if checks else "nothing to check")
    failed = [check for check in done if check.outcome == FAIL]
    worst = max(failed or done, key=lambda check: check.excess)
    rows = sum(check.rows for check in done)
    note = worst.name if worst.excess else ""
    return Check(name, worst.outcome, rows, worst.worst, worst.tolerance, worst.row, note)
