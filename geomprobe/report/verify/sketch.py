"""Whether the sketches of a recording fit the inner products that its replay has measured, within their stated errors.

The deviation of each estimate is divided by its standard error, which gives a z-score. Two bounds follow from how the
scores of a projection to K numbers are spread. Both leave a chance of one in a million that a good sketch fails.

Each score: a sum of K products of pairs of nearly normal numbers is further than ``sqrt(2 x) + x sqrt(2 / K)`` standard
errors from its mean with a probability of at most ``2 exp(-x)`` (Laurent and Massart 2000, lemma 1). With n scores, x
is ``log(2 n / 10^-6)``, whether or not they depend on one another.

Their mean: the errors of two products ``a.b`` and ``c.e`` have the covariance ``((a.c)(b.e) + (a.e)(b.c)) / K``, which
the sketch itself estimates. So the variance of the mean is known, although the steps of a run are alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from geomprobe.errors import RunError
from geomprobe.report.verify.check import Array, Check, Precision, Rows, compare, skipped, worst_of
from geomprobe.trace.locate import NothingThere
from geomprobe.trace.record import NoSketch
from geomprobe.trace.schema import FINAL, product_column

if TYPE_CHECKING:
    from geomprobe.trace.reader import Trace
    from geomprobe.trace.sketch import Sketch

CHANCE = 1e-6
_MOST = 1000
"""Steps whose mean is tested: each needs its covariance with every other one."""
_PRODUCTS = ("g.g", "w.g", "w.w", "g.d", "w.d", "d.d")
_NAMES = "sketch against the columns, each step", "sketch against the columns, mean"


def check_sketch(trace: Trace, p: Precision) -> list[Check]:
    """The checks of the sketch that the recording beside a trace has; none where there is no such sketch."""
    try:
        sketch = trace.sketch
        if trace.status == "complete" and FINAL in sketch.references:
            return of_products(trace, sketch, p)
    except (NoSketch, NothingThere):
        return []
    except RunError:
        return [skipped(name, "the recording cannot be read") for name in _NAMES]
    return [skipped(name, "the trace is not proven to be of the recorded run") for name in _NAMES]


def of_products(trace: Trace, sketch: Sketch, p: Precision) -> list[Check]:
    """Compare each kind of product, of all the steps that have a sketch and were measured."""
    exact = {name: trace[product_column(name)][sketch.steps] for name in _PRODUCTS}
    vectors = {"g": sketch.gradients(), "w": sketch.weights(), "d": sketch.offsets(FINAL)}
    each, means = [], []
    for name in _PRODUCTS:
        a, b = name.split(".")
        with np.errstate(invalid="ignore", over="ignore"):
            size = np.sqrt(exact[f"{a}.{a}"] * exact[f"{b}.{b}"])
            deviation = sketch.inner(vectors[a], vectors[b]).value - exact[name]
            error = np.sqrt((size**2 + exact[name] ** 2) / sketch.size)
        rows = np.isfinite(size) & np.isfinite(exact[name]) & (size > 0)
        if sketch.exact:
            each.append(compare(f"{name}, exact", deviation / np.where(rows, size, 1), p.sums, rows))
            continue
        score = np.where(rows, deviation / np.where(rows, error, 1), np.nan)
        each.append(compare(name, score, _bound(sketch.size, len(_PRODUCTS) * rows.sum()), rows))
        means.append(_mean(name, score, error, vectors[a], vectors[b], rows))
    checks = [worst_of(name, found) for name, found in zip(_NAMES, (each, means), strict=True) if found]
    return [_at_step(check, sketch) for check in checks]


def _mean(name: str, score: Array, error: Array, a: Array, b: Array, rows: Rows) -> Check:
    """Compare the mean of the scores with its own standard error."""
    chosen = np.flatnonzero(rows)
    chosen = chosen[:: -(-len(chosen) // _MOST) or 1]
    if not len(chosen):
        return skipped(name, "no row to check")
    a, b, weight = a[chosen], b[chosen], 1 / (len(chosen) * error[chosen])
    across = a @ b.T
    covariance = ((a @ a.T) * (b @ b.T) + across * across.T) / a.shape[1]
    spread = np.sqrt(max(float(weight @ covariance @ weight), 1 / len(chosen) ** 2))
    mean = np.array([score[chosen].mean() / spread])
    return compare(name, mean, _bound(a.shape[1], len(_PRODUCTS)), np.array([True]))


def _bound(size: int, count: int) -> float:
    """How many standard errors none of ``count`` scores exceeds, but for `CHANCE`.

    >>> round(_bound(4096, 345), 2)
    6.83
    """
    x = np.log(2 * max(count, 1) / CHANCE)
    return float(np.sqrt(2 * x) + x * np.sqrt(2 / size))


def _at_step(check: Check, sketch: Sketch) -> Check:
    """A check of rows of the sketch, with the run's step in the place of the row."""
    return check if check.row is None else replace(check, row=int(sketch.steps[check.row]))
