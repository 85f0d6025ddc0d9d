"""The random projection that a sketch is: K numbers of a vector of any length, from which inner products are estimated.

All elements of all parameters are numbered, in the order of the parameters and of each one's rows (C order). With i the
number of an element, the projection S has one nonzero entry in each column i, a sign s(i), in the row b(i):

    (S x)[k] = sum of s(i) x[i] over the elements i with b(i) = k            k = 0 .. K - 1

    mix(z):        z ^= z >> 30;  z *= 0xBF58476D1CE4E5B9;  z ^= z >> 27;  z *= 0x94D049BB133111EB;  z ^= z >> 31
    word(key, j):  mix(key + (j + 1) * 0x9E3779B97F4A7C15)
    s(i):          -1 where bit (i mod 64) of word(sign_key, i // 64) is set, else 1; the lowest bit is bit 0
    r(B):          ((word(turn_key, B) >> 32) * K) >> 32
    b(i):          ((i mod K) + r(i // K)) mod K

All on unsigned 64-bit integers that wrap; `word` is the j-th output of the generator SplitMix64. The keys are
``mix(2 * seed)`` for signs and ``mix(2 * seed + 1)`` for turns.

This is a count sketch (Charikar, Chen and Farach-Colton 2002) whose buckets have a structure: each block of K elements
gets signs, is turned as a ring by r(B), and is added. So a kernel adds runs of memory to runs of memory: it scatters
nothing, needs no atomic operations, and computes one hash for 64 elements. Bucket k takes at most one element of each
block. Added in the order of the blocks, each bucket's float64 sum has the same bits however the vector is cut.

Over the choice of the seed, and as far as SplitMix64's outputs are like independent ones:

**Without bias.** ``Sa . Sb = a.b + sum over i != j with b(i) = b(j) of s(i) s(j) a[i] b[j]``. The signs of two
different elements are independent and even, so each term of the sum has the mean 0, for any vectors and any buckets.

**Variance.** Signs of four elements are independent, so for given buckets it is the sum over pairs i < j in one bucket
of ``(a[i] b[j] + a[j] b[i])^2``. Two elements of one block are never in one bucket. Two of different blocks are with
probability 1/K, since the turn of one is uniform whatever the turn of the other. So over all turns the variance is at
most ``(||a||^2 ||b||^2 + (a.b)^2) / K``. It is less where few blocks hold the vectors. Where there is one block (K or
fewer elements), nothing shares a bucket, and inner products are exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SEED = 0
"""The seed of all recordings: so sketches of two runs of one model can be compared with one another."""

STEP = 0x9E3779B97F4A7C15
FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def mix(z: int) -> int:
    """SplitMix64's finalizer, a bijection of 64-bit integers.

    >>> hex(mix(STEP))
    '0xe220a8397b1dcdaf'
    """
    z = ((z ^ (z >> 30)) * FACTORS[0]) & _MASK
    z = ((z ^ (z >> 27)) * FACTORS[1]) & _MASK
    return z ^ (z >> 31)


def keys(seed: int) -> tuple[int, int]:
    """The keys of signs and of turns."""
    return mix((2 * seed) & _MASK), mix((2 * seed + 1) & _MASK)


def words(key: int, start: int, stop: int) -> NDArray[np.uint64]:
    """``word(key, j)`` for j from ``start`` to before ``stop``.

    >>> hex(words(0, 0, 1)[0])
    '0xe220a8397b1dcdaf'
    """
    z = np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(STEP) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FACTORS[0])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(FACTORS[1])
    return z ^ (z >> np.uint64(31))


def signs(seed: int, start: int, stop: int) -> NDArray[np.bool_]:
    """Whether each element from ``start`` to before ``stop`` has the sign -1."""
    first = start // 64
    of_words = words(keys(seed)[0], first, -(-stop // 64)).astype("<u8").view(np.uint8)
    bits = np.unpackbits(of_words, bitorder="little")
    return bits[start - 64 * first : stop - 64 * first].astype(bool)


def turn(seed: int, block: int, size: int) -> int:
    """By how many places a block is turned, 0 to ``size - 1``."""
    return int(((int(words(keys(seed)[1], block, block + 1)[0]) >> 32) * size) >> 32)


def runs(seed: int, start: int, stop: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Runs of elements that fall into a run of buckets, from ``start`` on: first element, the one after, first bucket.

    >>> list(runs(0, 2, 7, 4))
    [(2, 4, 0), (4, 7, 1)]
    """
    while start < stop:
        block, place = divmod(start, size)
        bucket = (place + turn(seed, block, size)) % size
        end = min(stop, start + size - place, start + size - bucket)
        yield start, end, bucket
        start = end


def add(x: NDArray[np.floating], start: int, out: Array, seed: int = SEED) -> None:
    """Add to ``out`` [K] the projection of consecutive elements: ``start`` is the first one's number, ``x`` the values.

    Pieces of a vector that come in the order of its elements give the same bits as the whole.

    >>> out = np.zeros(4)
    >>> add(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 2, out); out.tolist()
    [-1.0, 1.0, -4.0, 5.0]
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a diverged run's infinities and NaN come through
        y = np.where(signs(seed, start, start + len(x)), -x, x)
        for first, end, bucket in runs(seed, start, start + len(x), len(out)):
            out[bucket : bucket + end - first] += y[first - start : end - start]
