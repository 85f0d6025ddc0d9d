"""Raw columns in, every column of a trace out: the one path that sealing and live reading share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from geomprobe.trace import geometry, schema

Array = NDArray[np.float64]
Formula = Callable[[Callable[[str], Array]], Array]

# Each takes a function from a raw path to its array.
_STEPS: dict[str, Formula] = {
    "lr": lambda of: of("groups/0/lr"),
    "grad_norm": lambda of: geometry.grad_norm(of("inner_products/g.g")),
    "clr": lambda of: geometry.clr(of("steps/loss"), of("inner_products/g.g")),
    "hg_norm": lambda of: geometry.grad_norm(of("inner_products/Hg.Hg")),
    "g_hg": lambda of: of("inner_products/g.Hg"),
    "corridor_residual": lambda of: geometry.corridor_residual(
        of("inner_products/Hg.Hg"), of("inner_products/g.g")
    ),
    "relative_residual": lambda of: geometry.relative_residual(
        of("groups/0/lr"), of("inner_products/Hg.Hg"), of("inner_products/g.g")
    ),
    "flow_drift": lambda of: geometry.flow_drift(of("groups/0/lr"), of("inner_products/Hg.Hg")),
}

# Each takes g.g, g.d and d.d of one reference.
_REFERENCE: dict[str, Callable[[Array, Array, Array], Array]] = {
    "distance": lambda g_g, g_d, d_d: geometry.distance(d_d),
    "grad_dot_offset": lambda g_g, g_d, d_d: g_d,
    "rsi": lambda g_g, g_d, d_d: geometry.rsi(g_d, d_d),
    "eb": lambda g_g, g_d, d_d: geometry.eb(g_g, d_d),
    "cosine": lambda g_g, g_d, d_d: geometry.cosine(g_d, g_g, d_d),
    "lolr": lambda g_g, g_d, d_d: geometry.lolr(g_d, g_g),
}


def sealed_columns(raw: Iterable[str]) -> list[str]:
    """Paths of all columns of the trace that raw columns make, without the final iterate's second names.

    Args:
        raw: the raw paths that were streamed.

    >>> "steps/cosine" in sealed_columns(["inner_products/g.d"])
    True
    """
    streamed = list(raw)
    paths = [f"steps/{column.name}" for column in schema.STEP_COLUMNS]
    paths += [f"inner_products/{column.name}" for column in schema.INNER_PRODUCTS]
    for name in dict.fromkeys(path.split("/")[1] for path in streamed if path.startswith("references/")):
        paths += [f"references/{name}/{column.name}" for column in schema.REFERENCE_COLUMNS]
    for name in dict.fromkeys(path.split("/")[0] for path in streamed):
        paths += [f"{name}/{column.name}" for column in schema.ORACLES.get(name, ())]
    return list(dict.fromkeys([*paths, *streamed]))


class Derived(Mapping[str, Array]):
    """All columns of a trace, each computed from the raw ones when it is looked up.

    Args:
        step: the steps of the rows [rows].
        raw: by raw path, an array [rows]; a quantity that was not measured may be missing, and is then NaN.

    Raises:
        KeyError: (on look-up) the path is no column of this trace.

    >>> raw = {"inner_products/g.d": np.array([6.0]), "inner_products/d.d": np.array([4.0])}
    >>> columns = Derived(np.array([0]), raw)
    >>> float(columns["steps/rsi"][0]), float(columns["references/final/distance"][0])
    (1.5, 2.0)
    """

    def __init__(self, step: NDArray[np.int64], raw: Mapping[str, Array]) -> None:
        self._step = step.astype(np.float64)
        self._raw = raw
        self._paths = dict.fromkeys(sealed_columns(raw))

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, path: str) -> Array:
        path = schema.canonical(path)
        if path not in self._paths:
            raise KeyError(path)
        with np.errstate(all="ignore"):
            return self._compute(path)

    def _measured(self, path: str) -> Array:
        found = self._raw.get(path)
        return np.full(len(self._step), np.nan) if found is None else found

    def _compute(self, path: str) -> Array:
        if path in self._raw:
            return self._raw[path]
        group, _, name = path.rpartition("/")
        if path == "steps/step":
            return self._step
        if name in _REFERENCE:
            products = "inner_products" if group == "steps" else f"{group}/inner_products"
            of_gradient = products if group in schema.ORACLES else "inner_products"
            g_g, g_d, d_d = (
                self._measured(column)
                for column in (f"{of_gradient}/g.g", f"{products}/g.d", f"{products}/d.d")
            )
            return _REFERENCE[name](g_g, g_d, d_d)
        if group in schema.ORACLES and name == "grad_norm":
            return geometry.grad_norm(self._measured(f"{group}/inner_products/g.g"))
        if group == "steps" and name in _STEPS:
            return _STEPS[name](self._measured)
        return self._measured(path)
