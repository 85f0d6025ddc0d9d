"""What holds of the gradients that a trace has beside the step's own: held-out, full, and before clipping."""

from __future__ import annotations

import numpy as np

from geomprobe.report.verify.any_optimizer import FROM_PRODUCTS, Columns, relative
from geomprobe.report.verify.check import DERIVED, Check, compare, worst_of
from geomprobe.report.verify.rounding import Precision
from geomprobe.trace import geometry
from geomprobe.trace.schema import ORACLES


def check_side_gradients(c: Columns, p: Precision) -> list[Check]:
    """The checks of each such group that the trace has.

    Args:
        c: its columns.
        p: how exact its numbers are.

    Raises:
        RunError: a column of the trace is damaged.
    """
    return [check for group in ORACLES if f"{group}/cosine" in c.trace for check in _checks(c, p, group)]


def _checks(c: Columns, p: Precision, group: str) -> list[Check]:
    derived, products = [], f"{group}/inner_products"
    for column, (inputs, compute) in {"grad_norm": (("g.g",), geometry.grad_norm), **FROM_PRODUCTS}.items():
        if f"{group}/{column}" not in c.trace:  # the distance is the step's
            continue
        stored = c[f"{group}/{column}"]
        expected = compute(*(c[f"{products}/{name}"] for name in inputs))
        rows = np.isfinite(stored) | np.isfinite(expected)
        derived.append(compare(column, relative(stored, expected), DERIVED, rows))
    # It is taken at the weights that the step's own gradient is taken at.
    d_d, own = c[f"{products}/d.d"], c["inner_products/d.d"]
    same = compare(
        f"{group}: d.d is the step's", relative(d_d, own), 2 * p.sums, np.isfinite(d_d) & np.isfinite(own)
    )
    return [worst_of(f"{group} = f(inner products)", derived), same, _bounded(c, p, group)]


def _bounded(c: Columns, p: Precision, group: str) -> Check:
    cosine = c[f"{group}/cosine"]
    over = np.maximum(np.abs(cosine) - 1, 0)
    return compare(f"{group}: |cosine| <= 1", over, 2 * p.sums, np.isfinite(cosine))
