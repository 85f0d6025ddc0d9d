"""What holds in a trace of plain SGD alone: NWT's eq. 4 row by row, and the last step's direction and length.

The weights obey ``w' = w - lr G + e`` with a rounding error ``e`` that ``Precision.update_error``
bounds by ``E``. So, with ``d' = w' - w*``:

- eq. 4: ``||d - lr G||^2 = ||d' - e||^2`` is within ``2 E ||d'|| + E^2`` of ``||d'||^2``;
- the last step: ``d' = 0``, so ``d = lr G - e``. Then ``| ||d|| - lr ||G|| | <= E``, and the angle between
  ``d`` and ``G`` has a sine of at most ``r = E / ||d||``: ``1 - cosine <= 1 - sqrt(1 - r^2) <= r^2``.

The inner products' own errors, ``sums`` relative to the norms, add to each.

Where several optimizers step the model, G is 0 for what the moving one does not hold, so each row that plain SGD moves
obeys the same, whatever the others are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def why_not_plain_sgd(manifest: Mapping[str, Any], number: int = 0) -> str:
    """What the manifest says of an optimizer that is not plain SGD; empty where it is.

    ``number`` is its place among several, as in the column ``optimizer``.

    >>> why_not_plain_sgd({"optimizer": {"class": "SGD", "groups": [{"lr": 0.1, "momentum": 0.9}]}})
    'momentum is 0.9'
    >>> why_not_plain_sgd({"optimizer": {"class": "SGD", "groups": [{"lr": 0.1, "momentum": 0}]}})
    ''
    """
    name = dict(enumerate(_classes(manifest))).get(number, "unknown")
    if name != "SGD":
        return f"the optimizer is {name}"
    for group in (group for group in _groups(manifest) if group.get("optimizer", 0) == number):
        for setting in ("momentum", "weight_decay", "nesterov", "maximize"):
            if group.get(setting):
                return f"{setting} is {group[setting]}"
    return ""


def _groups(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    return (manifest.get("optimizer") or {}).get("groups") or []


def _classes(manifest: Mapping[str, Any]) -> list[str]:
    """The optimizers' classes, by their numbers."""
    named = str((manifest.get("optimizer") or {}).get("class", "unknown"))
    return named.split(" + ") if any("optimizer" in group for group in _groups(manifest)) else [named]


def check_plain_sgd(c: Columns, p: Precision, certified: bool) -> list[Check]:
    """Eq. 4, and the last step's length and direction, or why each does not apply.

    ``certified`` says that the last row's step reached w_T: without it the trace has no last step.
    """
    several = range(len(_classes(c.trace.manifest)))
    why_not = {number: why_not_plain_sgd(c.trace.manifest, number) for number in several}
    if all(why_not.values()):
        return [skipped(name, "; ".join(dict.fromkeys(why_not.values()))) for name in (EQ4, LENGTH, DIRECTION)]
    settled, why = _settled(c, [number for number, why in why_not.items() if not why])
    last = (
        _last_step(c, p, settled)
        if certified
        else [skipped(name, "no certified last step") for name in (LENGTH, DIRECTION)]
    )
    return [_eq4(c, p, settled, why, certified), *last]


def _settled(c: Columns, plain_sgd: Sequence[int]) -> tuple[Rows, str]:
    """Rows whose update is ``-lr G`` with one lr for all weights that it moves, and why the others are not.

    ``plain_sgd`` are the numbers of the optimizers that are plain SGD where the run begins.
    """
    lr = c["steps/lr"]
    moving = c["steps/optimizer"] if "steps/optimizer" in c.trace else np.zeros(len(lr))
    same_lr, plain = np.isfinite(lr), np.isin(moving, plain_sgd)
    for i, group in enumerate(_groups(c.trace.manifest)):
        own = moving == group.get("optimizer", 0)
        same_lr &= ~(own & np.isfinite(c[f"groups/{i}/lr"]) & (c[f"groups/{i}/lr"] != lr))
        for setting in ("momentum", "weight_decay"):
            plain &= ~(own & (np.abs(c[f"groups/{i}/{setting}"]) > 0))
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
