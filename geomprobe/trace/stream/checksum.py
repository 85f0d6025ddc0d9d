"""Checksums of a table's rows, so that a reader knows a row that was written from one that only looks like it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15


def row_checksums(step: NDArray[np.int64], rows: NDArray[Any]) -> NDArray[np.int64]:
    """One checksum a row [k]: of its step, and of the bits of its numbers in their places.

    Wrapping sums of products with one odd number a column: a changed bit always shows, and a hole of
    zeros, as a power cut leaves, is no valid row.

    Args:
        step: the rows' steps [k].
        rows: 8-byte numbers [k, columns].

    >>> step = np.arange(2)
    >>> rows = np.array([[1.0, 2.0], [2.0, 1.0]])
    >>> sums = row_checksums(step, rows)
    >>> bool(sums[0] == row_checksums(step[:1], rows[1:])[0])
    False
    """
    factors = odd_factors(rows.shape[1] + 1)
    marks = (step.astype(np.uint64) + np.uint64(1)) * factors[0]
    products = np.ascontiguousarray(rows).view(np.uint64) * factors[1:]
    return (marks + products.sum(axis=1, dtype=np.uint64)).view(np.int64)


def odd_factors(count: int) -> NDArray[np.uint64]:
    """Odd 64-bit numbers [count] without pattern, the same in every version: SplitMix64's finalizer of 1, 2, 3, ..."""
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
