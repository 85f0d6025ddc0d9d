"""Every cell of every loop of the zoo is right, or absent with a reason where the loop says that it may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from behavior.zoo.witness import Loop, all_loops, examine
from geomprobe.errors import GeomprobeError

EACH = 6  # of so many loops the quick checks run one; which one, the order of their names decides

LOOPS = [
    pytest.param(loop, id=str(loop), marks=() if i % EACH == 0 else pytest.mark.slow)
    for i, loop in enumerate(sorted(all_loops().values(), key=str))
]


@pytest.mark.parametrize("loop", LOOPS)
def test_loop(loop: Loop, tmp_path: Path) -> None:
    if loop.refused is not None:
        with pytest.raises(GeomprobeError, match=loop.refused):
            examine(loop, tmp_path / "run")
        return
    verdict = examine(loop, tmp_path / "run")
    assert not verdict.wrong, "\n".join([f"{loop.what}:", *verdict.wrong])
