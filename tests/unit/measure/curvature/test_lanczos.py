"""The top eigenvalue by Lanczos, held against dense eigenvalues in float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.hessian_cases import case, dense_hessian
from torch import Tensor

from geomprobe.measure.curvature.double_backward import backward_with_graph, hessian_vector_product
from geomprobe.measure.curvature.lanczos import top_eigenvalue


def symmetric(eigenvalues: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return (basis @ torch.diag(eigenvalues.double()) @ basis.T).to(dtype)


@pytest.mark.parametrize(
    "eigenvalues",
    [
        torch.linspace(-1.0, 1.0, 40),
        torch.cat([torch.tensor([-50.0]), torch.linspace(0.0, 1.0, 39)]),  # the largest in magnitude is negative
        torch.cat([torch.zeros(38), torch.tensor([3.0, 3.0])]),
        -torch.linspace(1.0, 2.0, 40),
    ],
    ids=["spread", "negative outlier", "degenerate", "negative definite"],
)
def test_the_value_is_the_largest_eigenvalue_within_its_residual(eigenvalues):
    matrix = symmetric(eigenvalues)
    top = top_eigenvalue(lambda v: [matrix @ v[0]], [matrix[0]], iterations=200, tolerance=1e-8)
    expected = float(torch.linalg.eigvalsh(matrix)[-1])
    assert top.value == pytest.approx(expected, abs=1e-7)
    assert abs(top.value - expected) <= top.residual + 1e-12


@pytest.mark.parametrize("name", ["mlp", "convolutional", "tied"])
def test_the_sharpness_of_a_network_is_the_top_eigenvalue_of_its_dense_hessian(name):
    it = case(name)
    graph = backward_with_graph(it.loss(), it.parameters)
    top = top_eigenvalue(
        lambda v: hessian_vector_product([graph], it.parameters, v, keep_graphs=True),
        it.parameters,
        iterations=60,
        tolerance=1e-9,
    )
    dense = dense_hessian(it.model, it.loss)
    assert top.value == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-8)


def test_in_float32_many_iterations_without_a_basis_lose_no_accuracy():
    matrix = symmetric(torch.cat([torch.tensor([10.0, 9.99]), torch.linspace(0.0, 1.0, 98)]), torch.float32)
    top = top_eigenvalue(lambda v: [matrix @ v[0]], [matrix[0]], iterations=100, tolerance=0.0)
    assert top.products == 100
    assert top.value == pytest.approx(10.0, rel=1e-6)


@pytest.mark.parametrize(("tolerance", "iterations"), [(1e-1, 50), (1e-3, 50), (0.0, 4), (0.0, 999)])
def test_it_stops_once_the_residual_is_small_or_the_iterations_are_over(tolerance, iterations):
    matrix = symmetric(torch.linspace(0.0, 1.0, 50))
    residuals = []
    for most in range(1, 51):
        top = top_eigenvalue(lambda v: [matrix @ v[0]], [matrix[0]], iterations=most, tolerance=0.0)
        residuals.append(top.residual / top.value)
    small = [count for count, residual in enumerate(residuals, 1) if residual <= tolerance]
    top = top_eigenvalue(lambda v: [matrix @ v[0]], [matrix[0]], iterations=iterations, tolerance=tolerance)
    assert top.products == min([iterations, 50, *small])


def test_the_zero_operator_has_eigenvalue_zero_after_one_product():
    assert top_eigenvalue(lambda v: [0 * v[0]], [torch.ones(5)]) == (0.0, 0.0, 1)


def test_a_product_that_is_not_finite_gives_nan():
    assert math.isnan(top_eigenvalue(lambda v: [v[0] * torch.inf], [torch.ones(5)]).value)


def test_the_global_rng_is_not_touched_and_the_generator_decides_the_start():
    matrix = symmetric(torch.linspace(0.0, 1.0, 50))
    before = torch.get_rng_state()

    def top(seed: int | None) -> float:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return top_eigenvalue(lambda v: [matrix @ v[0]], [matrix[0]], iterations=3, generator=generator).value

    assert top(None) == top(None)
    assert top(4) == top(4) != top(5)
    assert torch.equal(before, torch.get_rng_state())


def test_no_iterations_or_nothing_to_iterate_on_is_refused():
    for like, iterations in (([torch.ones(2)], 0), ([], 5), ([torch.ones(0)], 5)):
        with pytest.raises(ValueError, match="top_eigenvalue needs"):
            top_eigenvalue(lambda v: v, like, iterations=iterations)
