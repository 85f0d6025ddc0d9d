"""Whatever a state holds comes back as it was from a file that is read without running code."""

from __future__ import annotations

import enum
import io
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from geomprobe.errors import RunError
from geomprobe.passes.checkpoint.plain_values import StateOf, decode, encode


class Mode(enum.Enum):
    FAST = "fast"


class Place(NamedTuple):
    epoch: int
    at: Any


def round_trip(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(encode(value), file)
    file.seek(0)
    return decode(torch.load(file, weights_only=True))


PLAIN = [
    None,
    -3,
    7**2000,
    1.5,
    1 + 2j,
    "a\ud800",
    b"\x00\xff",
    bytearray(b"ab"),
    [1, (2, [3])],
    {1: "a", None: 2, "b": {}},
    {(1, 2): "a", Mode.FAST: 2},
    {"__geomprobe__": "int", "value": 3},
    OrderedDict([("b", 1), ("a", 2)]),
    Counter({5: 2, 9: 1}),
    defaultdict(list, {"a": [1]}),
    defaultdict(None, {"a": 1}),
    deque([1, 2], maxlen=3),
    {3, 4},
    frozenset({"a"}),
    Mode.FAST,
    Place(1, [2]),
    torch.float16,
    torch.Size([2, 3]),
    torch.device("cpu"),
    np.float32(0.1),
    np.int64(7),
    np.str_("a"),
    np.datetime64("2020-01-01"),
    {"lr_lambdas": [None], "last_epoch": 3},
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_values_come_back_equal_and_of_their_type(value: Any) -> None:
    back = round_trip(value)
    assert back == value
    assert type(back) is type(value)
    for name in ("maxlen", "default_factory"):
        assert getattr(back, name, None) == getattr(value, name, None)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">u2").reshape(2, 3),
        np.array(3.5),
        np.zeros((0, 4), np.int8),
        np.array(["a", "bcd"]),
        np.array([(1, "x")], dtype=[("n", "<i4"), ("s", "U3")]),
    ],
    ids=str,
)
def test_arrays_come_back_to_the_bit_and_can_be_written(array: np.ndarray[Any, Any]) -> None:
    back = round_trip(array)
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert back.flags.writeable


@pytest.mark.parametrize("layout", ["coo", "coalesced", "csr", "csc", "bsr", "bsc"])
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_tensors_come_back_with_their_parts(layout: str) -> None:
    tensor = torch.sparse_coo_tensor([[0, 0, 1]], torch.ones(3, 2), (3, 2), check_invariants=False)
    if layout == "coalesced":
        tensor = tensor.coalesce()
    elif layout != "coo":
        block = (2, 2) if layout[0] == "b" else None
        tensor = torch.eye(4).to_sparse(layout=getattr(torch, f"sparse_{layout}"), blocksize=block)
    back = round_trip(tensor)
    assert back.layout == tensor.layout
    assert torch.equal(back.to_dense(), tensor.to_dense())
    if tensor.layout == torch.sparse_coo:
        assert back.is_coalesced() == tensor.is_coalesced()
        assert torch.equal(back._indices(), tensor._indices())


def test_tensors_keep_strides_and_what_they_are_and_share_nothing_with_what_is_trained_on() -> None:
    wide = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    weight = nn.Parameter(torch.ones(2))
    kept = encode({"wide": wide, "weight": weight, "twice": [wide, wide], "plain": (plain := [1])})
    before = wide.clone()
    with torch.no_grad():
        wide.zero_()
        weight.zero_()
    plain.append(2)
    back = decode(kept)
    assert torch.equal(back["wide"], before)
    assert back["wide"].stride() == before.stride()
    assert isinstance(back["weight"], nn.Parameter)
    assert back["weight"].tolist() == [1, 1]
    assert back["twice"][0] is back["twice"][1] is back["wide"]
    assert back["plain"] == [1]


def test_a_random_generator_goes_on() -> None:
    generator = torch.Generator().manual_seed(3)
    torch.rand(2, generator=generator)
    back = round_trip({"generator": generator})["generator"]
    assert torch.equal(torch.rand(4, generator=back), torch.rand(4, generator=generator))


class Odd:
    """Nothing that a checkpoint can hold."""


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Odd(), "Odd at ['order'][1]"),
        (lambda: None, "builtins.function at ['order'][1]"),
        (np.array([Odd()]), "numpy.ndarray at ['order'][1]"),
        (defaultdict(lambda: 1), "collections.defaultdict at ['order'][1]"),
    ],
    ids=["object", "function", "objects", "factory"],
)
def test_what_cannot_be_kept_is_named_with_its_owner_its_place_and_its_type(value: Any, named: str) -> None:
    with pytest.raises(RunError) as raised:
        encode({"stateful": {"s": StateOf("the state_dict of 's'", {"order": [0, value]})}})
    for words in ("the state_dict of 's' holds", named, "Take it out of the state_dict"):
        assert words in str(raised.value)


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(RunError, match="holds itself"):
        encode(endless)


def test_a_class_that_is_not_there_is_named() -> None:
    kept = encode(Mode.FAST)
    kept["class"] = (__name__, "Gone")
    with pytest.raises(RunError, match=r"needs .*test_plain_values\.Gone, which this process does not have"):
        decode(kept)
