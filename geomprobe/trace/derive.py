"""Raw columns in, every column of a trace out, by the formulas in `schema`: sealing and live reading share this."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from geomprobe.trace import schema

Array = NDArray[np.float64]


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
        if path == "steps/step":
            return self._step
        column = schema.describe(path)
        if column.compute is None:
            return self._measured(path)
        inputs = (self._measured(schema.input_path(path, name, self._raw)) for name in column.inputs.split())
        values: Array = column.compute(*inputs)
        return values
