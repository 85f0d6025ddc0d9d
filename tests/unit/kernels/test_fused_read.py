"""One read gives the digests, and the sums in extended precision, by each backend, for tensors of any layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reads import DTYPES, SHAPES, assert_read, expected_digests, normal
from torch import Tensor

from geomprobe.errors import UnsupportedTraining, UsageError
from geomprobe.kernels.fused_read import FusedRead

BACKENDS = ["numba", "torch"]
backends = pytest.mark.parametrize("backend", BACKENDS)

# A tensor of [6, 5, 32, 33] that lies in memory otherwise than it is indexed.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda x: torch.cat([x, x + 1])[::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "odd offset": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
    "negated": lambda x: torch._neg_view(x),
}


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_digests_and_the_sums_are_right_for_every_size(backend: str, dtype: torch.dtype) -> None:
    w, g, a, b = (normal(SHAPES, dtype, seed) for seed in range(4))
    fused = FusedRead(w, {"a": a, "final": b}, per_parameter=True, backend=backend)
    assert fused.names[3:] == (
        "g.d",
        "w.d",
        "d.d",
        *(f"references/a/inner_products/{x}" for x in ("g.d", "w.d", "d.d")),
    )
    assert_read(fused.read(g), w, g, b, a)


@backends
@pytest.mark.parametrize(("w_dtype", "star_dtype"), list(itertools.permutations(DTYPES, 2)))
def test_the_weights_and_their_reference_may_be_of_two_dtypes(
    backend: str, w_dtype: torch.dtype, star_dtype: torch.dtype
) -> None:
    w, g, star = normal(SHAPES, w_dtype, 0), normal(SHAPES, w_dtype, 1), normal(SHAPES, star_dtype, 2)
    assert_read(FusedRead(w, {"final": star}, per_parameter=True, backend=backend).read(g), w, g, star)


@backends
def test_gradients_and_references_of_any_dtypes_stand_side_by_side(backend: str) -> None:
    combinations = list(itertools.product(DTYPES, repeat=3))
    w, g, star = (
        [normal([(4100,)], dtypes[which], 3 * seed + which)[0] for seed, dtypes in enumerate(combinations)]
        for which in range(3)
    )
    fused = FusedRead(w, {"final": star}, per_parameter=True, backend=backend)
    assert_read(fused.read(g), w, g, star)


@backends
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids="-".join)
def test_any_memory_layout_is_read_right(backend: str, layouts: tuple[str, str]) -> None:
    of_w, of_g = (LAYOUTS[name] for name in layouts)
    w, g, a, b = normal([(6, 5, 32, 33)], torch.float32, 0) * 4
    w, g, a, b = [of_w(w)], [of_g(g * 2)], [of_w(a + 1)], [of_g(b - 1)]
    resolved = [[x.resolve_neg()] for (x,) in (w, g, a, b)]
    fused = FusedRead(w, {"final": a, "b": b}, per_parameter=True, backend=backend)
    assert_read(fused.read(g), *resolved)


@backends
def test_a_missing_gradient_is_zero_and_a_sparse_one_is_what_it_is_dense(backend: str) -> None:
    w, star = normal([(40, 300)] * 3, torch.float32, 0), normal([(40, 300)] * 3, torch.float32, 1)
    rows = torch.sparse_coo_tensor([[3, 9, 3]], torch.randn(3, 300), (40, 300), check_invariants=True)
    gradients = [None, rows, normal([(40, 300)], torch.float32, 2)[0]]
    fused = FusedRead(w, {"final": star}, per_parameter=True, backend=backend)
    reading = fused.read(gradients)
    assert reading.gradients[0] == 0
    assert_read(reading, w, gradients, star)
    # A step later each has a gradient, then none has.
    others = normal([(40, 300)] * 3, torch.float32, 3)
    assert_read(fused.read(others), w, others, star)
    assert_read(fused.read([None] * 3), w, [None] * 3, star)


@backends
def test_a_not_finite_weight_does_not_reach_what_has_no_gradient(backend: str) -> None:
    w, star = [torch.full((9000,), torch.nan)], [torch.zeros(9000)]
    sums = FusedRead(w, {"final": star}, backend=backend).read([None]).sums
    assert sums is not None
    assert sums[[0, 1, 3]].tolist() == [0.0, 0.0, 0.0]
    assert sums[[2, 4, 5]].isnan().all()


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [5, 8999, 16383])
def test_infinities_and_nan_come_through(backend: str, dtype: torch.dtype, value: float, where: int) -> None:
    w, g = normal([(17000,)], dtype, 0), [torch.ones(17000, dtype=dtype)]
    g[0][where] = value
    reading = FusedRead(w, backend=backend).read(g)
    assert reading.sums is not None
    assert reading.norms.isnan().item() if value != value else reading.norms.item() == torch.inf
    assert reading.sums[0].isnan() if value != value else reading.sums[0] == torch.inf
    assert reading.sums[2].isfinite()
    assert reading.gradients.tolist() == expected_digests(g, w)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_finite_number_of_16_bits_is_exact(backend: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = torch.where(every.isfinite() & (every.abs() < 1e30), every, 0)
    one = torch.ones_like(every)
    w, g = list(every.view(-1, 1).unbind()), list(one.view(-1, 1).unbind())
    chosen = slice(None, None, 7) if backend == "torch" else slice(None)
    sums = FusedRead(w[chosen], per_parameter=True, backend=backend).read(g[chosen]).sums
    assert sums is not None
    assert torch.equal(sums[1:, 1], every.double()[chosen])


@backends
def test_weights_that_are_not_owned_have_digests_and_norms_but_no_sums(backend: str) -> None:
    w, g = normal([(9000,), (30,)], torch.float32, 0), normal([(9000,), (30,)], torch.float32, 1)
    fused = FusedRead(w, owned=[False, True], per_parameter=True, backend=backend)
    reading, whole = fused.read(g), FusedRead(w, per_parameter=True, backend=backend).read(g)
    assert reading.sums is not None
    assert whole.sums is not None
    assert torch.equal(reading.sums[1], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(reading.sums[[0, 2]], whole.sums[[2, 2]])
    assert torch.equal(reading.norms, whole.norms)
    assert torch.equal(reading.weights, whole.weights)


@backends
@pytest.mark.parametrize("scale", [8.0, torch.tensor(8.0)])
def test_the_sums_are_of_the_unscaled_gradient_and_the_norms_of_the_scaled(backend: str, scale: Any) -> None:
    w, g, star = (normal([(9000,)], torch.float32, seed) for seed in range(3))
    fused = FusedRead(w, {"final": star}, backend=backend)
    plain, scaled = fused.read(g), fused.read([8 * x for x in g], grad_scale=scale)
    assert plain.sums is not None
    assert scaled.sums is not None
    torch.testing.assert_close(scaled.sums, plain.sums, rtol=1e-15, atol=0)
    assert torch.equal(scaled.norms, 64 * plain.norms)


@backends
def test_without_sums_the_references_are_not_read(backend: str) -> None:
    w, g = normal(SHAPES, torch.float32, 0), normal(SHAPES, torch.float32, 1)
    fused = FusedRead(w, {"final": normal(SHAPES, torch.float64, 2)}, backend=backend)
    with_sums, without = fused.read(g), fused.read(g, sums=False)
    assert without.sums is None
    assert torch.equal(with_sums.weights, without.weights)
    assert torch.equal(with_sums.gradients, without.gradients)
    torch.testing.assert_close(with_sums.norms, without.norms, rtol=1e-13, atol=0)


@backends
def test_weights_are_read_where_they_lie_at_each_read(backend: str) -> None:
    (w,), (g,) = normal([(9000,)], torch.float32, 0), normal([(9000,)], torch.float32, 1)
    w = torch.nn.Parameter(w)
    fused = FusedRead([w], per_parameter=True, backend=backend)
    assert_read(fused.read([g]), [w], [g])
    with torch.no_grad():
        w.mul_(2)
    assert_read(fused.read([g]), [w], [g])
    w.data = torch.randn(9000, dtype=torch.float64)
    assert_read(fused.read([g.double()]), [w], [g.double()])


@backends
def test_a_read_leaves_no_trace(backend: str) -> None:
    w = [torch.nn.Parameter(x) for x in normal(SHAPES, torch.float32, 0)]
    g = normal(SHAPES, torch.float32, 1)
    before, state = [[x.detach().clone() for x in xs] for xs in (w, g)], torch.get_rng_state()
    reading = FusedRead(w, {"final": g}, backend=backend).read(g)
    assert all(torch.equal(x, y) for xs, ys in zip((w, g), before, strict=True) for x, y in zip(xs, ys, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(tensor is not None and tensor.requires_grad for tensor in reading)


@backends
def test_the_same_input_gives_the_same_bits(backend: str) -> None:
    w, g, star = (normal([(700, 900), (300,)], torch.float32, seed) for seed in range(3))
    fused = FusedRead(w, {"final": star}, backend=backend)
    found = [fused.read([x.clone() for x in g]).sums for _ in range(3)]
    assert found[0] is not None
    assert all(torch.equal(found[0], sums) for sums in found if sums is not None)


@backends
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_unusual_weights_have_digests_and_norms(backend: str, dtype: torch.dtype) -> None:
    w = [(10 * torch.randn(9000)).to(dtype), torch.randn(5)]
    g = [tensor.clone() for tensor in w]
    fused = FusedRead(w, backend=backend)
    reading = fused.read(g, sums=False)
    assert reading.weights.tolist() == reading.gradients.tolist() == expected_digests(w, w)
    values = torch.view_as_real(w[0]) if dtype.is_complex else w[0]
    torch.testing.assert_close(reading.norms[0], values.double().square().sum(), rtol=1e-13, atol=0)
    if not dtype.is_floating_point:
        with pytest.raises(UnsupportedTraining, match="only dense real parameters"):
            fused.read(g)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40000), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    missing=st.integers(0, 15),
    seed=st.integers(0, 2**16),
)
def test_the_backends_agree(sizes: list[int], dtype: torch.dtype, missing: int, seed: int) -> None:
    shapes = [(size,) for size in sizes]
    w, g, star = (normal(shapes, dtype, seed + i) for i in range(3))
    gradients = [None if missing >> i & 1 else x for i, x in enumerate(g)]
    for backend in BACKENDS:
        reading = FusedRead(w, {"final": star}, per_parameter=True, backend=backend).read(gradients)
        assert_read(reading, w, gradients, star)


def test_gradients_alone_are_read_by_the_same_kernel() -> None:
    turned = torch.arange(12.0).view(3, 4).T
    w = [torch.zeros(2), *normal(SHAPES, torch.float32, 1), torch.zeros(90, 90), torch.zeros(4, 3)]
    g = [None, *normal(SHAPES, torch.float32, 0), torch.eye(90).to_sparse(), turned]
    fused = FusedRead(w)
    digests, norms = fused.look(g)
    whole = FusedRead(w).read(g, sums=False)
    assert digests.tolist() == whole.gradients.tolist() == expected_digests(g, w)
    assert digests[-1] == fused.look([*g[:-1], turned.contiguous()])[0][-1]
    expected = [0.0 if x is None else float(x.to_dense().double().square().sum()) for x in g]
    torch.testing.assert_close(norms, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    digests, norms = fused.look([None] * len(w))
    assert not digests.any()
    assert not norms.any()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_what_cannot_be_read_is_refused() -> None:
    w = [torch.zeros(3)]
    with pytest.raises(UsageError, match="no parameters"):
        FusedRead([])
    with pytest.raises(UsageError, match="there is no backend 'cobol'"):
        FusedRead(w, backend="cobol")
    with pytest.raises(UsageError, match="reference 'final' does not match"):
        FusedRead(w, {"final": [torch.zeros(4)]})
    with pytest.raises(UsageError, match="missing"):
        FusedRead(w, {"final": []})
    with pytest.raises(UnsupportedTraining, match="2 gradients for 1 parameters"):
        FusedRead(w).read([None, None])
    with pytest.raises(UnsupportedTraining, match="the gradient of parameter 0 is"):
        FusedRead(w).read([torch.zeros(4)])
    with pytest.raises(UnsupportedTraining, match="the gradient of parameter 0 is"):
        FusedRead([torch.eye(3)]).read([torch.eye(3).to_sparse_csr()])
    fused = FusedRead(w)
    fused.read([None])
    w[0].resize_(4)
    with pytest.raises(UnsupportedTraining, match="changed its shape"):
        fused.read([None])
