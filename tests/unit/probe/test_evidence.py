"""A mark sees the ordinary ways to write to a tensor; a digest sees those that leave no mark."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from geomprobe.kernels.fused_read import FusedRead
from geomprobe.probe.evidence import marks

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
    look = FusedRead([tensor], backend="torch").look
    (before, _), marked = look([tensor]), marks([tensor])
    before = before.clone()
    write(tensor)
    assert marks([tensor]) == marked
    assert not torch.equal(look([tensor])[0], before)


def test_a_write_or_another_memory_changes_the_mark() -> None:
    tensor = torch.ones(3)
    found = marks([tensor])
    tensor.mul_(1.0)
    found += marks([tensor])
    tensor.data = torch.ones(3)
    found += marks([tensor])
    assert len(set(found)) == 3


def test_a_sparse_tensor_has_a_mark() -> None:
    assert marks([torch.tensor([[0.0, 3.0], [4.0, 0.0]]).to_sparse(), None])[0] is not None
