"""Draw a curve with the dots of Braille characters: two by four in the place of a letter."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_BRAILLE = 0x2800
# By row and column of a letter's dots, the bit in Unicode's Braille patterns.
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


class Drawing(NamedTuple):
    """Lines of text, and what is drawn on their lowest and highest row of dots."""

    lines: list[str]
    low: float
    high: float


def draw(x: Array, y: Array, width: int, height: int, *, plain: bool = False) -> Drawing:
    """A curve's mean over each column of dots, from the lowest mean to the highest.

    Args:
        x: where the points are; the first and the last one are at the edges. At least one.
        y: their values, all finite.
        width: letters in a line.
        height: lines.
        plain: draw with asterisks, for terminals that know ASCII only.

    >>> print("\\n".join(draw(np.arange(8.0), np.arange(8.0), 4, 2).lines))
    ⠀⠀⡠⠊
    ⡠⠊⠀⠀
    >>> draw(np.array([0.0, 1.0]), np.array([2.0, 1.0]), 2, 2, plain=True)
    Drawing(lines=['* ', ' *'], low=1.0, high=2.0)
    """
    across, down = (1, 1) if plain else (2, 4)
    dots = np.zeros((height * down, width * across), bool)
    columns, means = _means(_scaled(x, dots.shape[1]), y, dots.shape[1])
    dots[dots.shape[0] - 1 - _scaled(means, dots.shape[0]), columns] = True
    cells = dots.reshape(height, down, width, across).transpose(0, 2, 1, 3)
    if plain:
        lines = ["".join("*" if cell.any() else " " for cell in line) for line in cells]
    else:
        codes = (cells * np.array(_BITS)).sum(axis=(2, 3)) + _BRAILLE
        lines = ["".join(map(chr, line)) for line in codes]
    return Drawing(lines, float(means.min()), float(means.max()))


def _means(place: NDArray[np.int64], y: Array, count: int) -> tuple[NDArray[np.int64], Array]:
    """The columns that hold points, and the mean of their points."""
    number = np.bincount(place, minlength=count)
    held = np.flatnonzero(number)
    return held, np.bincount(place, weights=y, minlength=count)[held] / number[held]


def _scaled(values: Array, count: int) -> NDArray[np.int64]:
    """Values as whole numbers from 0 for the lowest to ``count - 1`` for the highest."""
    low, high = values.min(), values.max()
    share = (values - low) / (high - low) if high > low else np.zeros(len(values))
    return np.rint(share * (count - 1)).astype(np.int64)
