"""Evidence sees the ordinary ways to write to a tensor, those that leave no mark as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from geomprobe.probe.evidence import evidence, marks

CPU = torch.device("cpu")

UNMARKED: dict[str, Callable[[Tensor], object]] = {
    "zeroed": lambda t: t.data.zero_(),
    "clamped": lambda t: t.data.clamp_(-1, 1),
    "scaled": lambda t: t.data.mul_(0.5),
    "negated": lambda t: t.data.neg_(),
    "its signs": lambda t: t.data.sign_(),
    "by NumPy": lambda t: t.numpy().__imul__(3),
}


@pytest.mark.parametrize("write", UNMARKED.values(), ids=UNMARKED)
def test_a_write_that_leaves_no_mark_is_seen(write: Callable[[Tensor], object]) -> None:
    tensor = torch.tensor([0.5, -2.0, 3.0])
    before, marked = evidence([tensor], CPU), marks([tensor])
    write(tensor)
    assert marks([tensor]) == marked
    assert not torch.equal(evidence([tensor], CPU), before)


def test_a_write_or_another_memory_changes_the_mark() -> None:
    tensor = torch.ones(3)
    found = marks([tensor])
    tensor.mul_(1.0)
    found += marks([tensor])
    tensor.data = torch.ones(3)
    found += marks([tensor])
    assert len(set(found)) == 3


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_several_types_and_none(other: torch.dtype) -> None:
    tensors = [torch.tensor([3.0, 4.0]), None, torch.tensor([6.0, 8.0], dtype=other), torch.empty(0)]
    assert evidence(tensors, CPU)[:2].tolist() == [[5.0, 0.0, 10.0, 0.0], [3.0, 0.0, 6.0, 0.0]]


def test_sparse_and_strided_tensors() -> None:
    sparse = torch.tensor([[0.0, 3.0], [4.0, 0.0]]).to_sparse()
    turned = torch.tensor([[1.0, 2.0], [2.0, 4.0]]).t()
    assert evidence([sparse, turned], CPU).tolist() == [[5.0, 5.0], [3.0, 1.0], [4.0, 4.0], [4.0, 4.0]]
    assert marks([sparse])[0] is not None
