"""What holds in the trace of any run, whatever the optimizer: columns and inner products, bounds, other gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from geomprobe.report.verify.check import (
    DERIVED,
    Array,
    Check,
    Precision,
    Rows,
    compare,
    held,
    skipped,
    worst_of,
)
from geomprobe.trace.schema import (
    FINAL,
    FINAL_LINKS,
    ORACLES,
    REFERENCE_COLUMNS,
    STEP_COLUMNS,
    Column,
    escape,
    input_path,
    parameter_column,
    product_column,
)

if TYPE_CHECKING:
    from geomprobe.trace.reader import Trace

WEIGHTS = ("w.w", "w.d", "d.d")
GRADIENT = ("g.g", "w.g", "g.d")


class Identity(NamedTuple):
    """What a derived column satisfies, by another route than the one that computed it: products, no quotients.

    Attributes:
        inputs: the raw columns in it, as in `geomprobe.trace.schema.Column`.
        sides: from the column and its inputs, the two numbers that are equal.
        divisors: the inputs by which the column divides; where one is 0, the column is NaN.
    """

    inputs: str
    sides: Callable[..., tuple[Array, Array]]
    divisors: str = ""


def _is_norm(x: Array, square: Array) -> tuple[Array, Array]:
    return x * np.abs(x), square  # so that a norm with the wrong sign is no norm


COLUMNS = "columns = f(inner products)"

# No function of geometry.py is called here: it wrote the columns, and a formula that is wrong there must show.
IDENTITIES = {
    "lr": Identity("lr", lambda x, lr: (x, lr)),
    "grad_norm": Identity("g.g", _is_norm),
    "distance": Identity("d.d", _is_norm),
    "hg_norm": Identity("Hg.Hg", _is_norm),
    "grad_dot_offset": Identity("g.d", lambda x, g_d: (x, g_d)),
    "g_hg": Identity("g.Hg", lambda x, g_hg: (x, g_hg)),
    "rsi": Identity("g.d d.d", lambda x, g_d, d_d: (x * d_d, g_d), "d.d"),
    "eb": Identity("g.g d.d", lambda x, g_g, d_d: (x * np.sqrt(d_d), np.sqrt(g_g)), "d.d"),
    "lolr": Identity("g.d g.g", lambda x, g_d, g_g: (x * g_g, g_d), "g.g"),
    "clr": Identity("loss g.g", lambda x, loss, g_g: (x * g_g, loss), "g.g"),
    "cosine": Identity("g.d g.g d.d", lambda x, g_d, g_g, d_d: (x * np.sqrt(g_g) * np.sqrt(d_d), g_d), "g.g d.d"),
    "corridor_residual": Identity("Hg.Hg g.g", lambda x, hg_hg, g_g: (x * np.sqrt(g_g), np.sqrt(hg_hg)), "g.g"),
    "relative_residual": Identity(
        "lr Hg.Hg g.g", lambda x, lr, hg_hg, g_g: (x * np.sqrt(g_g), lr * np.sqrt(hg_hg)), "g.g"
    ),
    "flow_drift": Identity("lr Hg.Hg", lambda x, lr, hg_hg: (2 * x, lr * lr * np.sqrt(hg_hg))),
}
"""By the name of a derived column, of the step, of a reference, or of a gradient beside the step's own."""


@dataclass(frozen=True)
class Columns:
    """A trace's columns by path, with NaN for those it does not have, and the rows that it should hold."""

    trace: Trace
    measured: Rows

    def __getitem__(self, path: str) -> Array:
        if path not in self.trace:
            return np.full(self.trace.num_steps, np.nan)
        return np.asarray(self.trace[path], float)

    def finite(self, *paths: str) -> Rows:
        """Rows where each of these columns holds a number."""
        return np.logical_and.reduce([np.isfinite(self[path]) for path in paths])


def columns(trace: Trace) -> Columns:
    """The columns of a trace; rows are measured at each ``manifest["measure"]["every"]``-th step."""
    every = (trace.manifest.get("measure") or {}).get("every") or 1
    return Columns(trace, trace["step"] % every == 0)


def relative(stored: Array, expected: Array) -> Array:
    """``|stored - expected| / |expected|``; 0 where equal, infinite where only one of them is a number.

    Numbers too small for float64's full precision are compared by the smallest one that has it.

    >>> [float(x) for x in relative(np.array([1.5, 0.0, np.nan]), np.array([1.0, 0.0, 2.0]))]
    [0.5, 0.0, inf]
    """
    with np.errstate(all="ignore"):
        deviation = np.abs(stored - expected) / np.maximum(np.abs(expected), np.finfo(float).tiny)
    return np.where(stored == expected, 0.0, np.where(np.isnan(deviation), np.inf, deviation))


def check_identities(c: Columns, p: Precision) -> list[Check]:
    """Every check that holds for any optimizer, in the order of a report.

    Raises:
        RunError: a column of the trace is damaged.
    """
    return [
        _check_step(c),
        _check_present(c),
        _check_columns(c),
        *_check_quotients(c),
        _bounded("|cosine| <= 1", c["steps/cosine"], p),
        _check_distance(c, p),
        _check_cauchy_schwarz(c, p),
        _check_reference_norm(c, p),
        _check_final(c),
        _check_parameters(c, p),
    ]


def _check_step(c: Columns) -> Check:
    """``step`` counts 0, 1, 2, ... without a gap; in an unfinished trace, whose parts may not join yet, it rises."""
    stored = c["steps/step"]
    everywhere = np.ones(len(stored), bool)
    if c.trace.status == "incomplete":
        falls = np.append(False, np.diff(stored) <= 0)
        return compare("step rises", np.where(falls, np.inf, 0.0), 0.0, everywhere)
    return compare("step = 0, 1, ..., T-1", stored - np.arange(len(stored)), 0.0, everywhere)


def _check_present(c: Columns) -> Check:
    """Each row that should be measured is there; only weights or a gradient that overflowed excuse a NaN."""
    finite = {name: np.isfinite(c[f"inner_products/{name}"]) for name in WEIGHTS + GRADIENT}
    weights, gradient = finite["w.w"], finite["w.w"] & finite["g.g"]
    missing = weights & ~(finite["w.d"] & finite["d.d"])
    missing |= gradient & ~(finite["w.g"] & finite["g.d"])
    nothing = np.logical_and.reduce([np.isnan(c[f"inner_products/{name}"]) for name in finite])
    loss = c["steps/loss"]
    missing |= nothing & (np.isfinite(loss) | np.isnan(loss).all())
    return compare("no measured row is missing", np.where(missing, np.inf, 0.0), 0.0, c.measured)


def not_finite(c: Columns) -> int:
    """How many measured rows hold a loss, a weight or a gradient that is not finite (legal, and left out)."""
    rows = c.finite(*(f"inner_products/{name}" for name in WEIGHTS + GRADIENT))
    loss = c["steps/loss"]
    if not np.isnan(loss).all():
        rows &= np.isfinite(loss)
    return int((c.measured & ~rows).sum())


def _check_quotients(c: Columns) -> list[Check]:
    """Each of NWT section 3, NWT eq. 5 and CG eq. 3, from the columns that it divides.

    Only rows where the quotient is a number count: loLR outlives RSI at ``w = w*``.
    """
    rsi, eb, loss, grad_norm = (c[f"steps/{name}"] for name in ("rsi", "eb", "loss", "grad_norm"))
    with np.errstate(all="ignore"):
        quotients = {
            "cosine = rsi / eb": rsi / eb,
            "lolr = rsi / eb^2": rsi / eb**2,
            "clr = loss / grad_norm^2": loss / grad_norm**2,
        }
    checks = []
    for name, expected in quotients.items():
        column = name.split()[0]
        note = "the trace holds no loss" if column == "clr" and np.isnan(loss).all() else ""
        deviation = relative(c[f"steps/{column}"], expected)
        checks.append(compare(name, deviation, DERIVED, np.isfinite(expected), note))
    return checks


def _check_distance(c: Columns, p: Precision) -> Check:
    """``distance > 0`` before T, unless the weights stand still to the end for a reason that shows.

    They may: a step whose learning rate is 0, whose gradient is 0, or that is too short to survive
    the rounding of the weights moves nothing.
    """
    distance, rows = c["steps/distance"], np.isfinite(c["steps/distance"])
    step_norm = np.abs(c["steps/lr"]) * c["steps/grad_norm"]
    still = (distance == 0) & (step_norm <= p.update_error(np.sqrt(c["inner_products/w.w"]), step_norm))
    tail = np.logical_and.accumulate((still | ~rows)[::-1])[::-1]
    broken = (distance == 0) & ~tail
    stopped = np.flatnonzero(tail & rows)
    note = f"the weights stand still from step {stopped[0]} on" if len(stopped) else ""
    return compare("distance > 0 before T", np.where(broken, np.inf, 0.0), 0.0, rows, note)


def _check_columns(c: Columns) -> Check:
    """Every derived column of the step, and of each reference, follows from ``/inner_products``, loss and lr."""
    of_references = [
        _check_derived(c, each, f"references/{escape(each)}", REFERENCE_COLUMNS)
        for each in c.trace.references
        if each != FINAL
    ]
    return worst_of(COLUMNS, [_check_derived(c, "steps", "steps", STEP_COLUMNS), *of_references])


def _check_derived(c: Columns, name: str, group: str, columns: Sequence[Column]) -> Check:
    """Each derived column of a group satisfies its identity with the raw columns."""
    return worst_of(name, [_derived(c, f"{group}/{each.name}") for each in columns if each.compute])


def _derived(c: Columns, path: str) -> Check:
    identity = IDENTITIES[path.rpartition("/")[2]]
    stored = c[path]
    inputs = {name: c[input_path(path, name, c.trace)] for name in identity.inputs.split()}
    divisors = [inputs[name] for name in identity.divisors.split()]
    values = np.array(list(inputs.values()))
    defined = np.isfinite(values).all(axis=0) & np.all([each != 0 for each in divisors], axis=0)
    with np.errstate(all="ignore"):
        found, expected = identity.sides(stored, *values)
        # A quotient by a number near 0 may be too large for float64.
        overflows = np.any([np.isinf(stored) & np.isinf(expected / each) for each in divisors], axis=0)
    unbounded = np.isinf(values).any(axis=0) & ~np.isnan(values).any(axis=0)
    must_be_nan = ~defined & ~unbounded
    rows = (defined & ~overflows) | (must_be_nan & np.isfinite(stored))
    return compare(path, np.where(defined, relative(found, expected), np.inf), DERIVED, rows)


def _product(c: Columns, reference: str, name: str) -> Array:
    """An inner product by name; those with d are the reference's own."""
    return c[product_column(name, reference if "d" in name else FINAL)]


def _parameter_product(c: Columns, parameter: str, name: str) -> Array:
    return c[parameter_column(parameter, name)]


def _check_cauchy_schwarz(c: Columns, p: Precision) -> Check:
    """``|a.b| <= ||a|| ||b||`` for every pair of vectors measured, by reference and by parameter."""
    pairs = ("w.g", "g.d", "w.d")
    checks = [
        _cauchy_schwarz(p, reference, partial(_product, c, reference), pair)
        for reference in c.trace.references
        for pair in (*pairs, *(["g.Hg"] if reference == FINAL else []))
    ]
    checks += [
        _cauchy_schwarz(p, parameter, partial(_parameter_product, c, parameter), pair)
        for parameter in c.trace.parameters
        for pair in (*pairs, "g.Hg")
    ]
    return worst_of("Cauchy-Schwarz", checks)


def _cauchy_schwarz(p: Precision, where: str, find: Callable[[str], Array], pair: str) -> Check:
    a, b = pair.split(".")
    product, squares = find(pair), find(f"{a}.{a}") * find(f"{b}.{b}")
    with np.errstate(all="ignore"):
        over = np.maximum(np.abs(product) / np.sqrt(squares) - 1, 0)
    over = np.where((squares == 0) & (product == 0), 0.0, over)
    return compare(f"{pair} of {where}", over, 2 * p.sums, np.isfinite(product) & np.isfinite(squares))


def _check_reference_norm(c: Columns, p: Precision) -> Check:
    """``||w - d||^2 = w.w - 2 w.d + d.d`` is ``||w*||^2``: the same number at every step.

    Its error in a row is ``sums (||w|| + ||d||)^2``; each row is compared with the most exact one.
    """
    return worst_of("||w - d|| = ||w*|| is constant", [_constant(c, p, each) for each in c.trace.references])


def _constant(c: Columns, p: Precision, reference: str) -> Check:
    w_w, w_d, d_d = (_product(c, reference, name) for name in WEIGHTS)
    rows = np.isfinite(w_w + w_d + d_d)
    if not rows.any():
        return skipped(reference, "not measured")
    with np.errstate(all="ignore"):
        scale = (np.sqrt(w_w) + np.sqrt(d_d)) ** 2
    value = w_w - 2 * w_d + d_d
    best = int(np.argmin(np.where(rows, scale, np.inf)))
    scale = np.where(scale == 0, 1.0, scale)
    return compare(reference, (value - value[best]) / scale, p.sums * (1 + scale[best] / scale), rows)


def _check_final(c: Columns) -> Check:
    """``/references/final`` holds the very numbers of ``/steps`` and ``/inner_products``, in the file itself."""
    name = "references/final = steps"
    if c.trace.status == "incomplete":
        return skipped(name, "not sealed yet")
    stored = c.trace.stored_final()
    same = {path: np.array_equal(values, c[path], equal_nan=True) for path, values in stored.items()}
    unlike = [path for path in FINAL_LINKS if not same.get(path)]
    return held(name, not unlike, f"{', '.join(unlike)} differ" if unlike else "")


def _check_parameters(c: Columns, p: Precision) -> Check:
    """Each inner product is the sum of its parameters' (both sides off by ``sums ||a|| ||b||`` at most)."""
    name = "sum over parameters = whole"
    if not c.trace.parameters:
        return skipped(name, "not measured per parameter")
    checks = []
    for product in WEIGHTS + GRADIENT:
        a, b = product.split(".")
        whole = c[f"inner_products/{product}"]
        parts = (_parameter_product(c, each, product) for each in c.trace.parameters)
        total = sum(parts, np.zeros(len(whole)))
        scale = np.sqrt(c[f"inner_products/{a}.{a}"] * c[f"inner_products/{b}.{b}"])
        gap = np.abs(total - whole) / np.where(scale == 0, 1.0, scale)
        checks.append(compare(product, gap, 2 * p.sums, np.isfinite(whole)))
    return worst_of(name, checks)


def check_side_gradients(c: Columns, p: Precision) -> list[Check]:
    """What holds of the gradients beside the step's own: held-out, full, and before clipping.

    Raises:
        RunError: a column of the trace is damaged.
    """
    return [check for group in ORACLES if f"{group}/cosine" in c.trace for check in _of_side_gradient(c, p, group)]


def _of_side_gradient(c: Columns, p: Precision, group: str) -> list[Check]:
    derived = _check_derived(c, f"{group} = f(inner products)", group, ORACLES[group])
    # It is taken at the weights that the step's own gradient is taken at.
    d_d, own = c[f"{group}/inner_products/d.d"], c["inner_products/d.d"]
    both = np.isfinite(d_d) & np.isfinite(own)
    same = compare(f"{group}: d.d is the step's", relative(d_d, own), 2 * p.sums, both)
    return [derived, same, _bounded(f"{group}: |cosine| <= 1", c[f"{group}/cosine"], p)]


def _bounded(name: str, cosine: Array, p: Precision) -> Check:
    """``|cosine| <= 1``, up to the errors of ``G.d`` (``sums``) and of both norms (``sums / 2`` each)."""
    return compare(name, np.maximum(np.abs(cosine) - 1, 0), 2 * p.sums, np.isfinite(cosine))
