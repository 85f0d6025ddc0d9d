"""Hg of a step by either route, held against dense Hessians in float64."""

from __future__ import annotations

import weakref

import pytest
import torch
from support.hessian_cases import CASES, PRECISIONS, case, dense_product, flat, gradients, relative

from geomprobe.errors import UsageError
from geomprobe.measure.curvature.hessian_gradient import Curvature
from geomprobe.reproducibility.isolation import capture_rng


@PRECISIONS
@pytest.mark.parametrize("name", CASES)
def test_graph_product_is_the_dense_hessian_times_the_gradient(name, dtype, tolerance):
    it = case(name, dtype)
    torch.manual_seed(3)
    curvature = Curvature(it.parameters, it.model)
    curvature.backward(it.loss())
    found = curvature.product(gradients(it.parameters))
    expected = dense_product(it.model, it.loss, 3, gradients(it.parameters))
    assert relative(flat(found), expected) < tolerance
    assert curvature.route == ("graph, apart" if name == "gated" else "graph")


@pytest.mark.parametrize("name", CASES)
def test_later_steps_run_one_pass_and_agree_with_the_dense_hessian(name):
    it = case(name)
    curvature = Curvature(it.parameters, it.model)
    for seed in (1, 2):
        it.model.zero_grad()
        torch.manual_seed(seed)
        curvature.backward(it.loss())
        found = curvature.product(gradients(it.parameters))
    expected = dense_product(it.model, it.loss, 2, gradients(it.parameters))
    assert relative(flat(found), expected) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "convolutional", "transformer"])
@pytest.mark.parametrize("route", ["graph", "closure"])
def test_product_under_accumulation_is_of_the_accumulated_loss(name, route):
    it = case(name)
    curvature = Curvature(it.parameters, it.model)
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]

    def total(model):
        return sum(it.loss(model, part, 3) for part in parts)

    torch.manual_seed(8)
    if route == "closure":
        curvature.route = "closure"
    for part in parts:
        rng = capture_rng()
        curvature.backward(it.loss(part=part, parts=3), closure=lambda part=part: it.loss(part=part, parts=3), rng=rng)
    found = curvature.product(gradients(it.parameters))
    assert curvature.route == route
    assert relative(flat(found), dense_product(it.model, total, 8, gradients(it.parameters))) < 1e-10


@pytest.mark.parametrize("route", ["graph", "closure"])
def test_product_is_of_the_unscaled_loss_and_of_any_vector(route):
    it = case("mlp")
    scale = torch.tensor(1024.0, dtype=torch.float64)
    curvature = Curvature(it.parameters)
    if route == "closure":
        curvature.route = "closure"
    curvature.backward(it.loss() * scale, closure=it.loss, scale=scale)
    vectors = [torch.randn_like(p) for p in it.parameters]
    kept = [curvature.product(vectors, keep=True), curvature.product([2 * v for v in vectors])]
    expected = dense_product(it.model, it.loss, 0, vectors)
    assert relative(flat(kept[0]), expected) < 1e-10
    assert relative(flat(kept[1]), 2 * expected) < 1e-10


def test_a_discarded_step_frees_its_graph_and_counts_for_nothing():
    it = case("mlp")
    curvature = Curvature(it.parameters)
    curvature.backward(it.loss() * 100)
    hidden = it.model[:2](it.inputs.double())
    activation = weakref.ref(hidden)
    curvature.backward(it.model[2:](hidden).sum())
    del hidden
    curvature.discard()
    assert activation() is None
    it.model.zero_grad()
    curvature.backward(it.loss())
    found = curvature.product(gradients(it.parameters))
    assert relative(flat(found), dense_product(it.model, it.loss, 0, gradients(it.parameters))) < 1e-10


def test_a_nonfinite_loss_gives_a_nonfinite_product_by_both_routes():
    w = torch.tensor([0.0], requires_grad=True)

    def loss():
        return (w.log() * w).sum()

    assert loss().isnan()
    for closure, route in ((None, "graph"), (loss, "closure")):
        w.grad = None
        curvature = Curvature([w])
        curvature.route = None if route == "graph" else "closure"
        curvature.backward(loss(), closure=closure)
        assert not curvature.product([w.grad])[0].isfinite()


def test_a_product_without_a_backward_is_a_usage_error():
    with pytest.raises(UsageError, match="no backward"):
        Curvature([torch.ones(1, requires_grad=True)]).product([None])
