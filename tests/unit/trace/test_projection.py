"""The projection is a count sketch: without bias, of the variance that its page says, and by the hash that it says."""

import numpy as np
import pytest
from support.sealed_runs import train

from geomprobe.trace import projection

SEEDS = 1000
SIZE = 16


def projections(x, size=SIZE, seeds=SEEDS):
    """[seeds, size]"""
    out = np.zeros((seeds, size))
    for seed in range(seeds):
        projection.add(x, 0, out[seed], seed)
    return out


def vectors(kind):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 203))
    if kind == "a real gradient and its way":
        run = train(steps=20)
        return run.gradients[5], run.weights[5] - run.weights[-1]
    return {
        "generic": (a, b),
        "alike": (a, a + 0.1 * b),
        "constant": (np.ones(203), np.ones(203)),
        "constant and generic": (np.ones(203), b),
        "in step with the blocks": ((np.arange(203) % SIZE == 0) * 1.0, np.cos(2 * np.pi * np.arange(203) / SIZE)),
    }[kind]


def pairs_that_can_meet(a, b):
    """The variance that the module derives: the sum over pairs of two blocks, over K."""
    terms = (a[:, None] * b + b[:, None] * a) ** 2
    block = np.arange(len(a)) // SIZE
    return (terms * (block[:, None] < block)).sum() / SIZE


KINDS = [
    "generic",
    "a real gradient and its way",
    "alike",
    "constant",
    "constant and generic",
    "in step with the blocks",
]


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_have_no_bias_and_the_stated_variance(kind):
    a, b = vectors(kind)
    found = (projections(a) * projections(b)).sum(1)
    variance = pairs_that_can_meet(a, b)
    assert abs(found.mean() - a @ b) < 4.5 * np.sqrt(variance / SEEDS)
    kurtosis = ((found - found.mean()) ** 4).mean() / found.var() ** 2
    assert found.var() / variance == pytest.approx(1, abs=4.5 * np.sqrt((kurtosis - 1) / SEEDS))
    bound = ((a @ a) * (b @ b) + (a @ b) ** 2) / SIZE
    assert (0.85 if len(a) > 200 else 0.5) * bound < variance < bound


def test_signs_and_turns_are_even_and_differ_from_seed_to_seed():
    negative = np.array([projection.signs(seed, 0, 256) for seed in range(1000)])
    assert abs(negative.mean() - 0.5) < 4.5 * 0.5 / np.sqrt(negative.size)
    agree = (negative[:, :-1] == negative[:, 1:]).mean()
    assert abs(agree - 0.5) < 0.01
    turns = np.bincount([projection.turn(0, block, 10) for block in range(10000)])
    assert len(turns) == 10
    assert abs(turns - 1000).max() < 4.5 * np.sqrt(900)


def test_up_to_as_many_elements_as_numbers_inner_products_are_exact():
    a, b = np.random.default_rng(1).standard_normal((2, SIZE))
    pa, pb = projections(a, seeds=1)[0], projections(b, seeds=1)[0]
    assert pa @ pb == pytest.approx(a @ b, rel=1e-13)


def test_the_hash_is_the_one_that_the_page_describes():
    # The first outputs of SplitMix64 seeded with 0, as published with it.
    assert [hex(word) for word in projection.words(0, 0, 3)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]
    sign_key, turn_key = projection.keys(3)
    mask = (1 << 64) - 1

    def word(key, j):
        return projection.mix((key + (j + 1) * projection.STEP) & mask)

    size, out, x = 24, np.zeros(24), np.arange(1.0, 201.0)
    for i in range(200):
        sign = -1 if (word(sign_key, i // 64) >> (i % 64)) & 1 else 1
        turn = ((word(turn_key, i // size) >> 32) * size) >> 32
        out[(i % size + turn) % size] += sign * x[i]
    found = np.zeros(24)
    projection.add(x, 0, found, 3)
    assert np.array_equal(found, out)
    assert {sign_key, turn_key} == {projection.mix(6), projection.mix(7)}


@pytest.mark.parametrize("size", [2, 5, 64, 100, 1000])
def test_a_vector_in_pieces_gives_the_same_bits(size):
    x = np.random.default_rng(2).standard_normal(700)
    whole, pieces = np.zeros(size), np.zeros(size)
    projection.add(x, 13, whole)
    for start, stop in [(0, 1), (1, 64), (64, 65), (65, 400), (400, 700)]:
        projection.add(x[start:stop], 13 + start, pieces)
    assert np.array_equal(whole, pieces)


def test_what_is_not_finite_comes_through():
    out = np.zeros(4)
    projection.add(np.array([1.0, np.inf, np.nan, 2.0]), 0, out)
    assert np.isinf(out).sum() == 1
    assert np.isnan(out).sum() == 1
