"""The compiled loop gives the bits of the definition, wherever a piece of a vector begins and ends."""

import numpy as np
import pytest

from geomprobe.kernels.numba_sketch import LANES, add
from geomprobe.trace import projection


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [2, 63, 64, 100, 4096])
def test_every_beginning_and_end_of_a_piece_gives_the_bits_of_the_definition(dtype, size):
    numbers = np.random.default_rng(size)
    for start in (0, 1, 63, size - 1, size + 5, (1 << 40) + 12345):
        for count in (0, 1, LANES - 1, LANES, 64, 65, 9000):
            x = numbers.standard_normal(count + 1).astype(dtype)[1:]  # aligned for its elements alone
            x[: count // 2] *= dtype(1e20)
            found, wanted = np.ones(size), np.ones(size)
            add(x, start, found, projection.keys(3))
            projection.add(x, start, wanted, seed=3)
            assert np.array_equal(found, wanted)


def test_zeros_keep_their_signs_and_what_is_not_finite_comes_through():
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan] * 20, np.float32)
    found, wanted = np.full(128, -0.0), np.full(128, -0.0)
    add(x, 7, found, projection.keys(0))
    projection.add(x, 7, wanted, 0)
    finite = ~np.isnan(wanted)
    assert found[finite].tobytes() == wanted[finite].tobytes()
    assert np.isnan(found[~finite]).all()
