"""One check of a trace: the rows it looked at, the worst of them, and what rounding allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geomprobe.errors import RunError

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
        """The check as a dictionary of JSON values; numbers that do not exist are None."""
        numbers = {"worst": self.worst, "tolerance": self.tolerance}
        return {**self.__dict__, **{k: v if np.isfinite(v) else None for k, v in numbers.items()}}


def skipped(name: str, why: str) -> Check:
    """A check that does not apply, and why."""
    return Check(name, SKIPPED, note=why)


def held(name: str, true: bool, note: str = "") -> Check:
    """A check without numbers."""
    return Check(name, PASS if true else FAIL, note=note)


def compare(name: str, deviation: ArrayLike, tolerance: ArrayLike, rows: Rows, note: str = "") -> Check:
    """Check ``abs(deviation) <= tolerance`` in each of ``rows`` (all [T]; tolerance may be a scalar).

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
    return Check(name, outcome, len(steps), float(size[worst]), float(allowed[worst]), int(steps[worst]), note)


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


# dtype: unit roundoff (half the spacing of numbers at 1), smallest subnormal (spacing of numbers at 0).
_DTYPES = {
    "float64": (2.0**-53, 2.0**-1074),
    "float32": (2.0**-24, 2.0**-149),
    "bfloat16": (2.0**-8, 2.0**-133),
    "float16": (2.0**-11, 2.0**-24),
}


@dataclass(frozen=True)
class Precision:
    """The arithmetic that a run's weights live in.

    ``sums`` bounds the error of a measured inner product, ``|fl(a.b) - a.b| <= sums ||a|| ||b||``. The
    probe forms ``w - w*`` and every product in float64, and adds n of them, in whatever order: n unit
    roundoffs at most, and 8 more for the difference, the product and the arithmetic of the check.
    """

    dtype: str
    unit_roundoff: float
    smallest: float
    sums: float
    num_parameters: int

    def update_error(self, weight_norm: Any, step_norm: Any) -> Any:
        """Bound on ``||e||`` in ``w' = w - lr G + e``, one rounded SGD update (arrays or floats).

        Per element: the learning rate, a gradient scaler's quotient, and the product of the two round by
        ``u lr |g_i|`` each; the sum rounds by ``u |w'_i|``, or by half the smallest number where it lands
        among the subnormals, and the product likewise. Hence
        ``||e|| <= u ||w'|| + 3 u lr ||G|| + sqrt(n) smallest``.

        >>> p = precision({"model": {"dtype": "bfloat16"}}, num_parameters=1)
        >>> p.update_error(weight_norm=256.0, step_norm=0.0)
        1.0
        """
        floor = sqrt(self.num_parameters) * self.smallest
        return self.unit_roundoff * (weight_norm + 3 * step_norm) + floor


def precision(manifest: Mapping[str, Any], num_parameters: int) -> Precision:
    """The precision of a run: the coarsest of its manifest's ``model.dtype``, float32 where it does not say.

    Raises:
        RunError: a dtype that is none of float64, float32, bfloat16, float16.

    >>> precision({}, num_parameters=100).dtype
    'float32'
    """
    stated = (manifest.get("model") or {}).get("dtype") or "float32"
    dtypes = stated if isinstance(stated, list) else [stated]
    unknown = [dtype for dtype in dtypes if dtype not in _DTYPES]
    if unknown:
        raise RunError(f"the manifest's model.dtype is {stated!r}; verify knows the rounding of {', '.join(_DTYPES)}")
    roundoff, smallest = (max(values) for values in zip(*(_DTYPES[dtype] for dtype in dtypes), strict=True))
    sums = (num_parameters + 8) * UNIT_ROUNDOFF
    return Precision("+".join(dtypes), roundoff, smallest, sums, num_parameters)
