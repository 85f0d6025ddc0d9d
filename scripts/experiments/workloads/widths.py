"""The width factor of NWT's models: every channel count times the same number."""

from __future__ import annotations

from geomprobe.errors import UsageError


def scaled(channels: int, width: float) -> int:
    """``channels`` times the factor ``width``, which has to be a whole number.

    Raises:
        UsageError: it is not, or not positive.

    >>> scaled(64, 0.5), scaled(64, 2)
    (32, 128)
    """
    found = channels * width
    if found < 1 or found != int(found):
        raise UsageError(
            f"width {width:g}: {channels} channels times {width:g} is {found:g}, which is no channel count. "
            f"Use a multiple of 1/{channels}."
        )
    return int(found)
