"""What holds in a trace of plain SGD alone: NWT's eq. 4 row by row, and the last step's direction and length.

The weights obey ``w' = w - lr G + e`` with a rounding error ``e`` that ``Precision.update_error``
bounds by ``E``. So, with ``d' = w' - w*``:

- eq. 4: ``||d - lr G||^2 = ||d' - e||^2`` is within ``2 E ||d'|| + E^2`` of ``||d'||^2``;
- the last step: ``d' = 0``, so ``d = lr G - e``. Then ``| ||d|| - lr ||G|| | <= E``, and the angle between
  ``d`` and ``G`` has a sine of at most ``r = E / ||d||``: ``1 - cosine <= 1 - sqrt(1 - r^2) <= r^2``.

The inner products' own errors, ``sums`` relative to the norms, add to each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from geomprobe.report.verify.any_optimizer import Columns
from geomprobe.report.verify.check import FAIL, Array, Check, Precision, Rows, compare, skipped
from geomprobe.trace import geometry

EQ4 = "distance[t+1] from row t (NWT eq. 4)"
LENGTH = "distance[T-1] = lr grad_norm"
DIRECTION = "cosine[T-1] = 1 (NWT section 4.1)"

_SUSPECTS = "the trace is wrong, or something besides the optimizer moves the weights"


def why_not_plain_sgd(manifest: Mapping[str, Any]) -> str:
    """What the manifest says that is not plain SGD; empty where it is.

    >>> why_not_plain_sgd({"optimizer": {"class": "SGD", "groups": [{"lr": 0.1, "momentum": 0.9}]}})
    'momentum is 0.9'
    >>> why_not_plain_sgd({"optimizer": {"class": "SGD", "groups": [{"lr": 0.1, "momentum": 0}]}})
    ''
    """
    optimizer = manifest.get("optimizer") or {}
    if optimizer.get("class") != "SGD":
        return f"the optimizer is {optimizer.get('class', 'unknown')}"
    for group in optimizer.get("groups") or []:
        for setting in ("momentum", "weight_decay", "nesterov", "maximize"):
            if group.get(setting):
                return f"{setting} is {group[setting]}"
    return ""


def check_plain_sgd(c: Columns, p: Precision, certified: bool) -> list[Check]:
    """Eq. 4, and the last step's length and direction, or why each does not apply.

    ``certified`` says that the last row's step reached w_T: without it the trace has no last step.
    """
    why = why_not_plain_sgd(c.trace.manifest)
    if why:
        return [skipped(name, why) for name in (EQ4, LENGTH, DIRECTION)]
    settled, why = _settled(c)
    last = (
        _last_step(c, p, settled)
        if certified
        else [skipped(name, "no certified last step") for name in (LENGTH, DIRECTION)]
    )
    return [_eq4(c, p, settled, why, certified), *last]


def _settled(c: Columns) -> tuple[Rows, str]:
    """Rows whose update is ``-lr G`` with one lr for all weights, and why the others are not."""
    lr = c["steps/lr"]
    same_lr, plain = np.isfinite(lr), np.ones(len(lr), bool)
    for i in range(len(c.trace.manifest["optimizer"].get("groups") or [])):
        same_lr &= ~(np.isfinite(c[f"groups/{i}/lr"]) & (c[f"groups/{i}/lr"] != lr))
        for setting in ("momentum", "weight_decay"):
            plain &= ~(np.abs(c[f"groups/{i}/{setting}"]) > 0)
    if not plain.any():
        return plain, "momentum or weight decay is on"
    if not (same_lr & plain).any():
        return same_lr & plain, "the groups' learning rates differ, or are unknown"
    return same_lr & plain, "no two neighboring rows measured"


def _eq4(c: Columns, p: Precision, settled: Rows, why: str, certified: bool) -> Check:
    lr, names = c["steps/lr"], ("g.d", "g.g", "d.d", "w.w")
    g_d, g_g, d_d, w_w = (c[f"inner_products/{name}"] for name in names)
    rows = settled & c.finite(*(f"inner_products/{name}" for name in names))
    next_d_d, next_w_w = np.append(d_d[1:], 0.0 if certified else np.nan), np.append(w_w[1:], np.nan)
    rows &= np.isfinite(next_d_d) & (np.diff(c["steps/step"], append=len(lr)) == 1)
    tolerance = _eq4_tolerance(p, d_d, next_d_d, lr**2 * g_g, w_w, next_w_w)
    scale = np.where(d_d > 0, d_d, 1.0)
    gap = next_d_d - geometry.next_square_distance(lr, g_d, g_g, d_d)
    check = compare(EQ4, gap / scale, tolerance / scale, rows, "" if rows.any() else why)
    return replace(check, note=_SUSPECTS) if check.outcome == FAIL else check


def _eq4_tolerance(p: Precision, d_d: Array, next_d_d: Array, step_2: Array, w_w: Array, next_w_w: Array) -> Array:
    """``2 E ||d'|| + E^2`` for the update; for the sums, ``sums`` times each term of both sides."""
    with np.errstate(invalid="ignore"):
        step, weight = np.sqrt(step_2), np.sqrt(w_w)
        next_weight = np.where(np.isfinite(next_w_w), np.sqrt(next_w_w), weight + step)
        error = p.update_error(next_weight, step)
        update = 2 * error * np.sqrt(next_d_d) + error**2
        return update + p.sums * (next_d_d + (np.sqrt(d_d) + step) ** 2)


def _last_step(c: Columns, p: Precision, settled: Rows) -> list[Check]:
    last = np.zeros(len(settled), bool)
    last[-1] = settled[-1] and c.finite("steps/distance", "steps/grad_norm", "steps/lr")[-1]
    if not last.any():
        return [skipped(name, "the last row is not measured, or not plain SGD") for name in (LENGTH, DIRECTION)]
    distance = c["steps/distance"]
    step = np.abs(c["steps/lr"]) * c["steps/grad_norm"]
    with np.errstate(all="ignore"):
        error = p.update_error(np.sqrt(c["inner_products/w.w"]) + step, step)
        ratio, gap = error / distance, (distance - step) / distance
    if error[-1] >= distance[-1]:
        why = f"the last step ({distance[-1]:.1e}) is below the rounding of the weights ({error[-1]:.1e})"
        return [skipped(name, why) for name in (LENGTH, DIRECTION)]
    length = compare(LENGTH, gap, ratio + 2 * p.sums, last)
    return [length, compare(DIRECTION, 1 - c["steps/cosine"], ratio**2 + 2 * p.sums, last)]
