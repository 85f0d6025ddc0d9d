"""The inner products by plain torch are those of the whole tensors, however these lie and are cut."""

from __future__ import annotations

import pytest
import torch

from geomprobe.kernels import torch_kernel
from geomprobe.kernels.torch_kernel import memory_order, products, squared_norm


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (64,), (65,), (3, 5, 70)])
def test_tensors_of_any_shape_are_cut_into_blocks_without_loss(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_kernel, "BLOCK", 64)
    w, g, a, b = torch.randn(4, *shape, dtype=torch.float64)
    expected = [(x * y).sum() for x, y in [(g, g), (w, g), (w, w)]]
    expected += [(x * (w - star)).sum() for star in (a, b) for x in (g, w, w - star)]
    torch.testing.assert_close(products(w, g, [a, b]), torch.stack(expected))
    torch.testing.assert_close(squared_norm(g), expected[0].view(1))


def test_the_order_of_memory_is_that_of_the_strides() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert memory_order(x) == (0, 1, 2, 3)
    assert memory_order(x.contiguous(memory_format=torch.channels_last)) == (0, 2, 3, 1)
    assert memory_order(x.permute(3, 1, 0, 2)) == (2, 1, 3, 0)
