"""The inner products against sums in extended precision, for every dtype, layout and kind of gradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geomprobe.errors import UnsupportedTraining, UsageError
from geomprobe.measure.inner_products import InnerProducts, PairProducts
from geomprobe.reproducibility.step_reader import StepReader

SHAPES = [(7, 5), (), (300,), (0, 4), (3, 2, 5, 5), (1, 130), (11, 13), (1,)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Products:
    """All sums that a step's reader gives, with their names."""

    def __init__(self, weights: Sequence[Tensor], references: dict[str, Sequence[Tensor]], **options: Any) -> None:
        self._reader = StepReader(weights)
        self.names = self._reader.refer_to(references, **options)

    def measure(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | float | None = None) -> Tensor:
        sums = self._reader.read(gradients, grad_scale).sums
        assert sums is not None
        return sums


def normal(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def extended(tensor: Tensor | None, like: Tensor) -> np.ndarray:
    if tensor is None:
        return np.zeros(tuple(like.shape), np.longdouble)
    dense = tensor.detach().to_dense().double().cpu().contiguous().numpy()
    return dense.astype(np.longdouble)


def brute_force(
    w: Sequence[Tensor], g: Sequence[Tensor | None], *references: Sequence[Tensor], scale: float = 1.0
) -> np.ndarray:
    """[parameters, names], each sum over a whole tensor at once."""
    rows = []
    for index, weight in enumerate(w):
        x, y = extended(weight, weight), extended(g[index], weight) / np.longdouble(scale)
        sums = [(y * y).sum(), (x * y).sum(), (x * x).sum()]
        for reference in references:
            d = x - extended(reference[index], weight)
            sums += [(y * d).sum(), (x * d).sum(), (d * d).sum()]
        rows.append(sums)
    return np.array(rows)


def assert_equal(measured: Tensor, expected: np.ndarray, relative: float = 1e-12) -> None:
    assert measured.dtype == torch.float64
    np.testing.assert_allclose(measured.cpu().numpy(), expected.astype(float), rtol=relative, atol=0)


@pytest.mark.parametrize(("w_dtype", "g_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_every_pair_of_dtypes_is_summed_in_float64(w_dtype: torch.dtype, g_dtype: torch.dtype) -> None:
    w, g, final = normal(SHAPES, w_dtype, 0), normal(SHAPES, g_dtype, 1), normal(SHAPES, torch.float32, 2)
    measured = Products(w, {"final": final}).measure(g)
    assert_equal(measured, brute_force(w, g, final).sum(0))


@pytest.mark.parametrize("shape", [*SHAPES, (64,), (65,), (2, 64), (2, 65), (3, 5, 70), (1, 1, 200), (128, 1)])
def test_tensors_of_any_shape_are_cut_into_blocks_without_loss(shape: tuple[int, ...]) -> None:
    w, g, final = (normal([shape, (3,)], torch.float64, seed) for seed in range(3))
    measured = Products(w, {"final": final}, per_parameter=True).measure(g)
    assert_equal(measured[1:], brute_force(w, g, final))


@pytest.mark.parametrize("layouts", list(itertools.product(range(3), repeat=3)))
def test_the_right_elements_are_paired_whatever_the_memory_layouts(layouts: tuple[int, int, int]) -> None:
    def lay(tensor: Tensor, layout: int) -> Tensor:
        if layout == 1:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor.transpose(0, 3).contiguous().transpose(0, 3) if layout == 2 else tensor

    shapes = [(4, 6, 3, 2), (2, 3, 1, 1), (5, 70, 2, 1)]
    w, g, final = (
        [lay(tensor, layout) for tensor in normal(shapes, torch.float32, seed)] for seed, layout in enumerate(layouts)
    )
    measured = Products(w, {"final": final}).measure(g)
    assert_equal(measured, brute_force(w, g, final).sum(0))


def test_a_gradient_that_is_a_view_with_gaps_or_repeats_is_read_by_element() -> None:
    w, final = normal([(6, 8), (6, 8)], torch.float32, 0), normal([(6, 8), (6, 8)], torch.float32, 1)
    g = [torch.randn(6, 16)[:, ::2], torch.randn(8).expand(6, 8)]
    assert_equal(Products(w, {"final": final}).measure(g), brute_force(w, g, final).sum(0))


def test_a_small_cosine_keeps_its_digits() -> None:
    shapes = [(200, 300), (500, 500), (40,)]
    d, g = normal(shapes, torch.float64, 0), normal(shapes, torch.float64, 1)
    norm_d, norm_g = (torch.cat([t.flatten() for t in tensors]).norm() for tensors in (d, g))
    dot = sum(float((a * b).sum()) for a, b in zip(d, g, strict=True))
    final = normal(shapes, torch.float32, 2)
    w = [(f.double() + a).float() for f, a in zip(final, d, strict=True)]
    g = [(b + (0.003 * norm_g / norm_d - dot / norm_d**2) * a).float() for a, b in zip(d, g, strict=True)]
    expected = brute_force(w, g, final).sum(0)
    assert float(expected[3] / np.sqrt(expected[0] * expected[5])) == pytest.approx(0.003, rel=1e-3)
    assert_equal(Products(w, {"final": final}).measure(g), expected)


def test_weights_one_rounding_step_from_the_reference_have_their_exact_distance() -> None:
    final = normal([(1000,)], torch.float32, 0)
    w = [torch.nextafter(final[0], torch.full_like(final[0], torch.inf))]
    g = normal([(1000,)], torch.float32, 1)
    assert_equal(Products(w, {"final": final}).measure(g), brute_force(w, g, final).sum(0))


def test_a_weight_far_smaller_than_its_reference_is_not_lost_in_the_difference() -> None:
    w, final, g = [torch.tensor([2.0**-28])], [torch.tensor([1.0])], [torch.tensor([1.0])]
    g_d = Products(w, {"final": final}).measure(g)[3].item()
    assert g_d == 2.0**-28 - 1.0


def test_final_takes_the_bare_names_and_other_references_their_paths() -> None:
    w, g, a, final, b = (normal([(5, 3), (4,)], torch.float32, seed) for seed in range(5))
    products = Products(w, {"best": a, "final": final, "step-7": b})
    assert products.names == (
        *("g.g", "w.g", "w.w", "g.d", "w.d", "d.d"),
        *(f"references/best/inner_products/{name}" for name in ("g.d", "w.d", "d.d")),
        *(f"references/step-7/inner_products/{name}" for name in ("g.d", "w.d", "d.d")),
    )
    assert_equal(products.measure(g), brute_force(w, g, final, a, b).sum(0))


def test_without_a_reference_the_shared_sums_remain() -> None:
    w, g = normal(SHAPES, torch.float32, 0), normal(SHAPES, torch.float32, 1)
    products = Products(w, {})
    assert products.names == ("g.g", "w.g", "w.w")
    assert_equal(products.measure(g), brute_force(w, g).sum(0))


def test_the_rows_of_the_parameters_add_up_to_the_total() -> None:
    w, g, final, best = (normal(SHAPES, torch.float32, seed) for seed in range(4))
    references = {"final": final, "best": best}
    measured = Products(w, references, per_parameter=True).measure(g)
    expected = brute_force(w, g, final, best)
    assert_equal(measured[1:], expected)
    assert_equal(measured[0], expected.sum(0))
    assert_equal(Products(w, references).measure(g), expected.sum(0))


def test_a_parameter_without_a_gradient_counts_as_zero_gradient_and_in_the_distance() -> None:
    w, final = normal(SHAPES, torch.float32, 0), normal(SHAPES, torch.float32, 1)
    g: list[Tensor | None] = list(normal(SHAPES, torch.float32, 2))
    products = Products(w, {"final": final}, per_parameter=True)
    for missing in (2, 4):
        g[missing] = None
        assert_equal(products.measure(g)[1:], brute_force(w, g, final))
    assert_equal(products.measure([None] * len(w))[0], brute_force(w, [None] * len(w), final).sum(0))


@pytest.mark.parametrize("scale", [65536.0, 3.0, torch.tensor(65536.0), torch.tensor([12.5])])
def test_gradients_are_divided_by_the_grad_scale(scale: Tensor | float) -> None:
    w, g, final = (normal(SHAPES, torch.float32, seed) for seed in range(3))
    measured = Products(w, {"final": final}, per_parameter=True).measure(g, grad_scale=scale)
    assert_equal(measured[1:], brute_force(w, g, final, scale=float(scale)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_gradient_counts_as_its_dense_form(dtype: torch.dtype) -> None:
    w, final = normal([(50, 6), (7,), (9, 4)], dtype, 0), normal([(50, 6), (7,), (9, 4)], dtype, 1)
    rows = torch.tensor([[3, 49, 3, 0, *range(20, 40)]])
    elements = torch.tensor([[8, 0, 8], [1, 3, 1]])
    values = normal([(24, 6), (3,), (7,)], torch.float32, 2)
    g = [
        torch.sparse_coo_tensor(rows, values[0], (50, 6), check_invariants=True),
        values[2],
        torch.sparse_coo_tensor(elements, values[1], (9, 4), check_invariants=True),
    ]
    measured = Products(w, {"final": final}, per_parameter=True).measure(g)
    assert_equal(measured[1:], brute_force(w, [gradient.to_dense() for gradient in g], final))
    assert not g[0].is_coalesced()


def test_a_sparse_gradient_that_stores_nothing_is_zero() -> None:
    w, final = normal([(5, 2)], torch.float32, 0), normal([(5, 2)], torch.float32, 1)
    g = [torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 2), (5, 2), check_invariants=True)]
    assert_equal(Products(w, {"final": final}).measure(g), brute_force(w, g, final).sum(0))


def test_an_embedding_trained_with_sparse_gradients_is_measured_like_its_dense_twin() -> None:
    measured = []
    for sparse in (True, False):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(30, 4, sparse=sparse)
        embedding(torch.tensor([1, 5, 5, 29])).square().sum().backward()
        final = [torch.zeros(30, 4)]
        measured.append(Products([embedding.weight], {"final": final}).measure([embedding.weight.grad]))
    assert_equal(measured[0], measured[1].numpy())


def test_values_that_are_not_finite_come_through() -> None:
    w, g, final = (normal([(3,), (4,)], torch.float32, seed) for seed in range(3))
    w[0][1], g[1][2] = torch.inf, torch.nan
    measured = Products(w, {"final": final}, per_parameter=True).measure(g).tolist()
    assert measured[0][2] == measured[0][5] == torch.inf
    assert np.isnan(measured[0][0])
    assert np.isfinite(measured[1][0])


def test_weights_are_read_anew_at_each_measurement_also_when_their_storage_was_replaced() -> None:
    w = [torch.nn.Parameter(tensor) for tensor in normal([(5, 3)], torch.float32, 0)]
    g, final = normal([(5, 3)], torch.float32, 1), normal([(5, 3)], torch.float32, 2)
    products = Products(w, {"final": final})
    for replacement in (torch.randn(5, 3), torch.randn(3, 5).t()):
        w[0].data = replacement
        assert_equal(products.measure(g), brute_force(w, g, final).sum(0))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_measuring_changes_no_bit_of_the_run() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(72, 5))
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    final = [torch.randn_like(parameter) for parameter in parameters]
    everything = [*parameters, *(g for g in gradients if g is not None), *final]
    before = [tensor.detach().clone() for tensor in everything]
    versions, state = [tensor._version for tensor in everything], torch.get_rng_state()

    products = Products(parameters, {"final": final}, per_parameter=True)
    first, second = products.measure(gradients, 2.0), products.measure(gradients, 2.0)

    assert torch.equal(first, second)
    assert torch.equal(first, Products(parameters, {"final": final}, per_parameter=True).measure(gradients, 2.0))
    assert not first.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))
    assert versions == [tensor._version for tensor in everything]
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Operations(TorchDispatchMode):
    """The operations that run, and the bytes of the largest tensor that one of them allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func._schema.name)
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        new = [t.untyped_storage() for t in tensors_in(result) if t.untyped_storage().data_ptr() not in given]
        self.largest = max([self.largest, *(storage.nbytes() for storage in new)])
        return result


def test_measuring_never_waits_for_the_device() -> None:
    w, g, final = (normal(SHAPES, torch.float32, seed) for seed in range(3))
    products = Products(w, {"final": final}, per_parameter=True)
    with Operations() as operations:
        products.measure([None, *g[1:]], grad_scale=torch.tensor(4.0))
    assert not operations.names & {
        "aten::_local_scalar_dense",
        "aten::is_nonzero",
        "aten::equal",
        "aten::nonzero",
    }


@pytest.mark.parametrize(
    ("parameter", "says"),
    [
        (torch.zeros(2, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(2, dtype=torch.int64), "torch.int64"),
        (torch.zeros(2, 2).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(2, device="meta"), "parameter 1 is on meta, parameter 0 on cpu"),
    ],
)
def test_parameters_that_cannot_be_measured_are_refused(parameter: Tensor, says: str) -> None:
    with pytest.raises(UnsupportedTraining, match=says):
        Products([torch.zeros(3), parameter], {}).measure([None, None])


def test_no_parameters_are_refused() -> None:
    with pytest.raises(UsageError, match="no parameters"):
        Products([], {})


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ([torch.zeros(3)], r"'best'.*tensor 1 is missing, parameter 1 is \[2, 2\] on cpu"),
        (
            [torch.zeros(3), torch.zeros(2, 2), torch.zeros(1)],
            r"tensor 2 is \[1\] on cpu, parameter 2 is missing",
        ),
        ([torch.zeros(3), torch.zeros(4)], r"tensor 1 is \[4\] on cpu, parameter 1 is \[2, 2\]"),
        ([torch.zeros(3), torch.zeros(2, 2, device="meta")], r"tensor 1 is \[2, 2\] on meta"),
    ],
)
def test_a_reference_of_another_model_is_refused_by_name(reference: list[Tensor], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Products([torch.zeros(3), torch.zeros(2, 2)], {"best": reference})


@pytest.mark.parametrize(
    ("gradients", "says"),
    [
        ([torch.zeros(3)], "1 gradients for 2 parameters"),
        ([torch.zeros(3), torch.zeros(4)], r"gradient of parameter 1 is torch.strided \[4\]"),
        (
            [None, torch.zeros(2, 2).to_mkldnn()],
            "gradient of parameter 1 is torch._mkldnn",
        ),
    ],
)
def test_a_gradient_that_does_not_match_its_parameter_is_refused(gradients: list[Tensor | None], says: str) -> None:
    products = Products([torch.zeros(3), torch.zeros(2, 2)], {})
    with pytest.raises(UnsupportedTraining, match=says):
        products.measure(gradients)


def test_a_parameter_resized_during_training_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    products = Products([parameter], {})
    parameter.data = torch.zeros(4)
    with pytest.raises(UnsupportedTraining, match=r"parameter 0 changed its shape from \[3\] to \[4\]"):
        products.measure([None])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_sums_agree_and_nothing_waits_for_the_device() -> None:
    shapes = [(2000, 1500), (7,), (), (0, 3), (64, 64, 3, 3)]
    w, g, final = ([t.cuda() for t in normal(shapes, torch.float32, seed)] for seed in range(3))
    gradients = [*g[:4], None]
    products = Products(w, {"final": final})
    scale = torch.tensor(8.0, device="cuda")
    products.measure(gradients, scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        measured = products.measure(gradients, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert measured.is_cuda
    assert_equal(measured, brute_force(w, gradients, final, scale=8.0).sum(0))


def test_some_sums_are_given_by_name() -> None:
    w, g, final = (normal(SHAPES, torch.float32, seed) for seed in range(3))
    whole = Products(w, {"final": final})
    some = InnerProducts(w, final, only=("g.d", "w.g"))
    assert some.measure(g).tolist() == [whole.measure(g)[whole.names.index(name)] for name in ("g.d", "w.g")]


@pytest.mark.parametrize("per_parameter", [False, True])
def test_the_products_of_a_pair_of_vectors(per_parameter: bool) -> None:
    like, a, b = (normal(SHAPES, torch.float32, seed) for seed in range(3))
    some_a, some_b = [None, *a[1:]], [b[0], None, *b[2:]]
    pairs = PairProducts(like, per_parameter=per_parameter)
    for _ in range(2):
        found = pairs(some_a, some_b)
        expected = brute_force([b[0], torch.zeros_like(b[1]), *b[2:]], some_a)
        assert_equal(found[1:] if per_parameter else found, expected if per_parameter else expected.sum(0))
        assert_equal(found[0] if per_parameter else found, expected.sum(0))
