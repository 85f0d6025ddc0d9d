"""Plain-text tables and numbers for terminals and pipes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from geomprobe.trace.printable import printable


def number(value: float, digits: int = 4) -> str:
    """A float in at most ``digits`` significant digits; whole numbers in full, ``-`` for NaN.

    >>> number(0.123456), number(1200.0), number(float("nan")), number(-1e-12), number(1e30)
    ('0.1235', '1200', '-', '-1e-12', '1e+30')
    """
    if math.isnan(value):
        return "-"
    if abs(value) < 1e9 and value == int(value):
        return str(int(value))
    return f"{value:.{digits}g}"


def percent(share: float) -> str:
    """A share of 1 in percent.

    >>> percent(0.125)
    '12.5 %'
    """
    return f"{100 * share:.1f} %"


def size(num_bytes: int) -> str:
    """A file size in decimal units.

    >>> size(512), size(46_912_000)
    ('512 B', '46.9 MB')
    """
    if num_bytes < 1000:
        return f"{num_bytes} B"
    power = min((len(str(num_bytes)) - 1) // 3, 4)
    return f"{num_bytes / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell, two spaces apart; those numbered in ``right`` are aligned right.

    >>> print(table(["name", "rows"], [["rsi", "12"], ["cosine", "3"]], right=[1]))
    name    rows
    rsi       12
    cosine     3
    """
    lines = [[printable(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if column in right else text.ljust(widths[column])

    return "\n".join("  ".join(cell(text, i) for i, text in enumerate(line)).rstrip() for line in lines)
