"""A Jacobian that is not symmetric is found, one that is only rounded is not."""

from __future__ import annotations

import pytest
import torch

from geomprobe.measure.curvature.symmetry import asymmetric, direction


def found(matrix: torch.Tensor, seed: int) -> bool:
    g = torch.randn(len(matrix), generator=torch.Generator().manual_seed(seed)).to(matrix)
    (u,) = direction([g], seed)
    jg, ju = matrix.T @ g, matrix.T @ u
    products = torch.stack([u @ u, u @ jg, jg @ jg, g @ g, g @ ju, ju @ ju]).double().view(2, 3)
    return bool(asymmetric(products, len(g), torch.finfo(matrix.dtype).eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(20))
def test_only_asymmetry_is_found(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    whole = torch.randn(40, 40, generator=generator).to(dtype)
    symmetric = whole + whole.T
    assert not found(symmetric, seed)
    scaled = torch.cat([torch.ones(20), torch.full((20,), 0.5)]).to(dtype)
    assert found(scaled[:, None] * symmetric, seed)


def test_a_direction_repeats_and_leaves_the_run_alone() -> None:
    before = torch.get_rng_state()
    (a,), (b,), (c,) = (direction([torch.zeros(5)], seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)
