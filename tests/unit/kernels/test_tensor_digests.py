"""How many words are in rows, and how many numbers are mixed. What digests see is in reproducibility/test_digest.py."""

from __future__ import annotations

import pytest

from geomprobe.kernels.tensor_digests import slots, words_in_rows


@pytest.mark.parametrize(
    ("elements", "size", "words", "mixed"),
    [(0, 4, 0, 0), (8191, 4, 0, 8191), (8192, 4, 4096, 16 + 256), (8193, 4, 4096, 16 + 256 + 1), (8192, 8, 8192, 288)],
)
def test_whole_tiles_are_in_rows_and_the_rest_is_mixed_one_by_one(
    elements: int, size: int, words: int, mixed: int
) -> None:
    assert words_in_rows(elements, size) == words
    assert slots(elements, size) == mixed
