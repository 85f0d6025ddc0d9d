"""Points and gradients for the tests of the fused read, and what their sums are in extended precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from geomprobe.kernels.fused_read import Reading
from geomprobe.kernels.tensor_digests import TensorDigests

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Around the sizes at which rows, tiles and chunks of each dtype begin and end.
SHAPES = [(), (0,), (1,), (3, 5), (4095,), (4096,), (4097,), (64, 128), (8191,), (8193,), (16384,), (16385,), (150001,)]


def normal(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def expected_digests(tensors: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[int]:
    digests = TensorDigests(torch.device("cpu"))
    return digests([_held(*pair) for pair in zip(tensors, weights, strict=True)]).tolist()


def _held(tensor: Tensor | None, weight: Tensor) -> list[Tensor]:
    if tensor is None:
        return []
    if tensor.is_sparse:
        return [tensor._indices(), tensor._values()]
    order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
    return [tensor.detach().resolve_neg().permute(order).contiguous()]


def extended(tensor: Tensor | None, like: Tensor) -> np.ndarray:
    dense = torch.zeros_like(like) if tensor is None else tensor.detach().to_dense()
    return dense.double().cpu().contiguous().numpy().astype(np.longdouble).reshape(-1)


def assert_read(
    reading: Reading,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    *references: Sequence[Tensor],
) -> None:
    """A reading with the sums of each parameter is what it must be."""
    assert reading.weights.tolist() == expected_digests(weights, weights)
    assert reading.gradients.tolist() == expected_digests(gradients, weights)
    assert reading.sums is not None
    assert reading.sums.shape == (1 + len(weights), 3 + 3 * len(references))
    rows, scales = [], []
    for index, (w, g) in enumerate(zip(weights, gradients, strict=True)):
        x, y = extended(w, w), extended(g, w)
        pairs = [(y, y), (x, y), (x, x)]
        for reference in references:
            d = x - extended(reference[index], w)
            pairs += [(y, d), (x, d), (d, d)]
        rows.append([(a * b).sum() for a, b in pairs])
        scales.append([np.sqrt((a * a).sum() * (b * b).sum()) for a, b in pairs])
    expected, scale = np.array(rows), np.array(scales)
    assert_close(reading.sums[1:], expected, scale)
    assert_close(reading.sums[0], expected.sum(0), scale.sum(0))
    assert_close(reading.norms, expected[:, 0], scale[:, 0])


def assert_close(found: Tensor, expected: np.ndarray, scale: np.ndarray) -> None:
    assert found.dtype == torch.float64
    assert (np.abs(found.cpu().numpy() - expected) <= 1e-13 * scale).all()
