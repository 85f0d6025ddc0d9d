"""Digests see every bit of any tensor, anywhere, and nothing else; leaves see all of a batch."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch import Tensor

from geomprobe.kernels.tensor_digests import TensorDigests
from geomprobe.reproducibility.digest import fold, host_digest, leaves, rng_digests

CPU = torch.device("cpu")

# Below, at and above the size from which a tensor is read as a matrix of 64-bit words, and with rests.
SIZES = [1, 7, 1000, 8 * 4096 // 4 - 1, 8 * 4096 // 4, 30_011]

EIGHT_BITS = [
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    *EIGHT_BITS,
]


def digest(*tensors: Tensor) -> int:
    return int(TensorDigests(CPU)([tensors]).item())


def raw(tensor: Tensor) -> Tensor:
    """The tensor's own bytes, as a view."""
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return flat.reshape(-1).view(torch.uint8)


def filled(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * 100
    if dtype == torch.bool:
        return values > 0
    return values.to(dtype)


@pytest.mark.parametrize("size", SIZES)
def test_any_one_flipped_bit_changes_the_digest(size: int) -> None:
    tensor, seen = filled(size), set()
    digests, before = TensorDigests(CPU), digest(tensor)
    everywhere = range(32 * size) if size < 100 else np.random.default_rng(size).integers(32 * size, size=300)
    for bit in (*everywhere, 0, 32 * size - 1):
        raw(tensor)[bit // 8] ^= 1 << int(bit % 8)
        seen.add(digests([[tensor]]).item())
        raw(tensor)[bit // 8] ^= 1 << int(bit % 8)
    assert before not in seen
    assert len(seen) >= len(set(everywhere))
    assert digest(tensor) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [5, 70_001])
def test_one_changed_element_shows_in_every_dtype(dtype: torch.dtype, size: int) -> None:
    tensor = filled(size, dtype)
    before = digest(tensor)
    for position in (0, size // 2, size - 1):
        other = tensor.clone()
        raw(other)[position * tensor.element_size()] ^= 1
        assert digest(other) != before
    assert digest(tensor.clone()) == before


@pytest.mark.parametrize("size", SIZES[1:])
def test_swapped_elements_show_wherever_they_are(size: int) -> None:
    tensor, generator = filled(size), np.random.default_rng(size)
    before = digest(tensor)
    pairs = [*generator.choice(size, (200, 2)), (0, 1), (0, size - 1), (size - 2, size - 1), (0, size // 2)]
    pairs += [(i, i + step) for step in (1, 2, 511, 512, 513, 1024) for i in range(0, size - step, 1999)]
    for a, b in pairs:
        if tensor[a] != tensor[b]:
            other = tensor.clone()
            other[[a, b]] = other[[b, a]]
            assert digest(other) != before, (a, b)


def test_swapped_blocks_rows_and_halves_show() -> None:
    tensor = filled(40_000)
    others = [tensor.flip(0), tensor.roll(1), tensor.roll(512), tensor.roll(20_000)]
    for width in (2, 16, 512, 5_000):
        other = tensor.clone()
        other[:width], other[-width:] = tensor[-width:], tensor[:width]
        others.append(other)
    assert len({digest(other) for other in (tensor, *others)}) == len(others) + 1


def test_elements_swapped_between_the_tensors_of_a_group_show() -> None:
    for sizes in ((10, 10), (9_000, 9_000), (50, 20_000)):
        a, b = (filled(size, seed=i) for i, size in enumerate(sizes))
        before = digest(a, b)
        for i, j in ((0, 0), (3, 7), (len(a) - 1, len(b) - 1)):
            c, d = a.clone(), b.clone()
            c[i], d[j] = b[j], a[i]
            assert digest(c, d) != before
        assert digest(b, a) != before


def test_groups_are_told_apart_and_do_not_touch_each_other() -> None:
    a, b = filled(20), filled(20_000, seed=1)
    digests = TensorDigests(CPU)
    first, second, none, again = digests([[a], [b], [], [a]]).tolist()
    assert (first, second, none, again) == (digest(a), digest(b), 0, digest(a))
    assert digests([[b], [a]]).tolist() == [second, first]


def test_bits_count_and_not_values() -> None:
    zeros = torch.zeros(2, 5)
    assert digest(zeros) != digest(-zeros)
    nan = torch.full((3,), torch.nan)
    other = nan.clone()
    other.view(torch.int32)[1] ^= 1  # a NaN with another payload
    assert other.isnan().all()
    assert digest(nan) == digest(nan.clone())
    assert digest(nan) != digest(other)


def test_equal_values_all_over_still_show_one_change() -> None:
    for value in (0.0, 1.0, -1.0):
        tensor = torch.full((30_000,), value)
        before = digest(tensor)
        tensor[12_345] = 0.5
        assert digest(tensor) != before


def test_empty_and_dimensionless_tensors_have_digests() -> None:
    assert digest(torch.empty(0)) == digest(torch.empty(3, 0)) == 0
    assert digest(torch.tensor(1.5)) == digest(torch.tensor([1.5])) != digest(torch.tensor(2.5))
    assert digest(torch.empty(0), torch.ones(2)) == digest(torch.ones(2))


@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (16, 32, 9, 9)])
def test_a_layout_has_a_digest_of_its_own_that_sees_every_element(shape: tuple[int, ...]) -> None:
    tensor = filled(int(np.prod(shape))).view(shape)
    layouts = [
        tensor.to(memory_format=torch.channels_last),
        tensor.transpose(0, 1),
        tensor[::2],
        tensor[..., 1:],
    ]
    for layout in layouts:
        before = digest(layout)
        assert digest(layout.clone()) == before
        other = layout.clone()
        other[(-1,) * layout.dim()] += 1
        assert digest(other) != before


def test_an_expanded_tensor_is_digested_whole() -> None:
    once, other = filled(5), filled(5, seed=1)
    assert len({digest(t.expand(n, 5)) for t in (once, other) for n in (1, 2, 3)}) == 6


def test_a_view_that_begins_off_a_word_has_the_digest_of_its_copy() -> None:
    tensor = filled(40_000)
    for start in (1, 2, 3):
        assert digest(tensor[start:]) == digest(tensor[start:].clone())


def test_a_sparse_tensor_shows_a_change_of_value_or_place() -> None:
    def sparse(row: int, value: float) -> Tensor:
        return torch.sparse_coo_tensor(
            torch.tensor([[row]]), torch.tensor([[value, 2.0]]), (10, 2), check_invariants=True
        )

    assert digest(sparse(3, 1.0)) == digest(sparse(3, 1.0))
    assert len({digest(sparse(3, 1.0)), digest(sparse(3, 1.5)), digest(sparse(4, 1.0))}) == 3


def test_digesting_changes_nothing_and_draws_nothing() -> None:
    weight = torch.nn.Parameter(filled(20_000))
    version, before, state = weight._version, weight.detach().clone(), torch.get_rng_state()
    digest(weight)
    assert weight._version == version
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_number_of_threads_does_not_matter() -> None:
    tensors = [filled(size, seed=size) for size in (3, 5_000, 300_000)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(TensorDigests(CPU)([tensors, tensors[::-1]]).tolist())
    finally:
        torch.set_num_threads(before)
    assert found == [found[0]] * 4


def test_another_process_gives_the_same_digests() -> None:
    code = (
        "import torch; from geomprobe.kernels.tensor_digests import TensorDigests;"
        "from geomprobe.reproducibility.digest import host_digest, leaves;"
        "t = torch.arange(50_000).sin();"
        "print(TensorDigests(torch.device('cpu'))([[t], [t[:9], t[9:]]]).tolist(),"
        "host_digest(*leaves({'a': {3, 1, 2}, 'b': ('x', 'y'), 'c': {'p', 'q', 'r'}})[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1",
            "OMP_NUM_THREADS": "2",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    t = torch.arange(50_000).sin()
    here = TensorDigests(CPU)([[t], [t[:9], t[9:]]]).tolist()
    rest = host_digest(*leaves({"a": {3, 1, 2}, "b": ("x", "y"), "c": {"p", "q", "r"}})[1])
    assert done.stdout == f"{here} {rest}\n"


def test_batches_of_ever_new_lengths_do_not_pile_up() -> None:
    digests = TensorDigests(CPU)
    for size in range(1, 100):
        tensor = filled(size)
        assert digests([[tensor]]).item() == digest(tensor)
    assert len(digests._slots) < 20


def test_folding_keeps_order_and_stays_in_64_bits() -> None:
    digests = [2**63 - 1, -(2**63), 0, 1]
    assert len({fold(a, b) for a in digests for b in digests}) == 16
    assert all(-(2**63) <= fold(a, b) < 2**63 for a in digests for b in digests)
    assert host_digest(b"ab", b"c") != host_digest(b"a", b"bc")


# Batches


@dataclasses.dataclass
class Batch:
    x: Tensor
    name: str


Pair = namedtuple("Pair", "x y")


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: object) -> None:
        self.x = x


class Derived(Slotted):
    def __init__(self, x: object) -> None:
        super().__init__(x)
        self.own = "attribute"


ONE, TWO = torch.tensor([1.0]), torch.tensor([2.0])


def seen(batch: object) -> int:
    """All that leaves finds in a batch, as one digest."""
    tensors, rest = leaves(batch)
    return host_digest(*rest, *(raw(tensor.contiguous()).numpy().tobytes() for tensor in tensors))


@pytest.mark.parametrize(
    ("batch", "other"),
    [
        ((ONE, "a"), (ONE, "b")),
        ((ONE, TWO), (TWO, ONE)),
        ([ONE], (ONE,)),
        ({"x": ONE, "y": TWO}, {"x": TWO, "y": ONE}),
        ({"x": ONE}, {"y": ONE}),
        (OrderedDict(x=ONE), OrderedDict(x=TWO)),
        (Batch(ONE, "a"), Batch(TWO, "a")),
        (Batch(ONE, "a"), Batch(ONE, "b")),
        (Pair(ONE, TWO), Pair(TWO, ONE)),
        ((1, 2.0), (1, 3.0)),
        ((True, None), (False, None)),
        (1, 1.0),
        (b"a", b"b"),
        ("1", 1),
        (0.0, -0.0),
        (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
        (np.zeros(4), np.zeros((2, 2))),
        (np.zeros(2, np.int64), np.zeros(2)),
        (np.float32(1), np.float32(2)),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        (np.array(["a", None], object), np.array(["b", None], object)),
        ({"deep": [(ONE, {"er": ["x", {"est": 1}]})]}, {"deep": [(ONE, {"er": ["x", {"est": 2}]})]}),
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.float32)),
        ({1, 2}, {1, 3}),
        (["ab", "c"], ["a", "bc"]),
        ([[1], 2], [[1, 2]]),
        ({"x": {"y": 1}, "z": 2}, {"x": {"y": 1, "z": 2}}),
        ([[], [1]], [[1], []]),
        ([(ONE, TWO)], [(ONE,), (TWO,)]),
        (range(3), range(4)),
        (Slotted(ONE), Slotted(TWO)),
        (Derived(ONE), Derived(TWO)),
        (np.arange(4).reshape(2, 2), np.arange(4).reshape(2, 2).T),
    ],
)
def test_leaves_see_the_difference_and_only_that(batch: object, other: object) -> None:
    assert seen(batch) != seen(other)
    assert seen(batch) == seen(batch)


def test_leaves_give_the_tensors_in_order() -> None:
    tensors, _ = leaves({"b": (ONE, [TWO]), "a": Batch(torch.tensor([3.0]), "x")})
    assert [tensor.item() for tensor in tensors] == [1.0, 2.0, 3.0]


def test_a_batch_that_holds_itself_is_seen_whole() -> None:
    def graph(value: Tensor) -> Slotted:
        node = Derived(value)
        node.neighbors = [node, {"back": node}]
        return node

    assert seen(graph(ONE)) == seen(graph(ONE)) != seen(graph(TWO))


# Random generators


@pytest.mark.parametrize(
    ("stream", "draw"),
    [
        ("python", random.random),
        ("numpy", np.random.rand),
        ("torch", lambda: torch.rand(1)),
        ("python", lambda: random.gauss(0, 1)),
        ("numpy", np.random.randn),
    ],
)
def test_one_draw_changes_the_digest_of_its_generator_alone(stream: str, draw: object) -> None:
    before = rng_digests()
    draw()  # type: ignore[operator]
    after = rng_digests()
    assert {name for name in before if before[name] != after[name]} == {stream}


def test_digests_of_generators_draw_nothing() -> None:
    states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    assert rng_digests() == rng_digests()
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(legacy=False), states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
