"""The backward pass that stays differentiable: what it leaves in .grad, and the products that it gives."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.hessian_cases import case, dense_product, flat, gradients, relative, same_bits
from torch import nn

from geomprobe.measure.curvature.autograd_graph import CurvatureUnavailable
from geomprobe.measure.curvature.double_backward import backward_with_graph, hessian_vector_product


def test_two_backward_passes_over_a_shared_graph_give_the_product_of_their_sum():
    it = case("mlp")
    hidden = it.model[:2](it.inputs.double())
    first, second = it.model[2:](hidden).square().sum(), it.model[2:](hidden).cos().sum()
    graphs = [backward_with_graph(loss, it.parameters) for loss in (first, second)]
    found = hessian_vector_product(graphs, it.parameters, gradients(it.parameters))

    def loss(model):
        out = model(it.inputs.double())
        return out.square().sum() + out.cos().sum()

    assert relative(flat(found), dense_product(it.model, loss, 0, gradients(it.parameters))) < 1e-10


def test_a_parameter_the_loss_does_not_depend_on_has_product_zero():
    used, unused, frozen = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True), torch.ones(1)
    graph = backward_with_graph(used.pow(3).sum(), [used, unused, frozen])
    found = hessian_vector_product([graph], [used, unused, frozen], [used.grad, None, None])
    assert [t.tolist() for t in found] == [[18.0, 18.0], [0.0, 0.0, 0.0], [0.0]]
    assert unused.grad is None


def test_a_loss_linear_in_the_parameters_has_product_zero():
    w, x = torch.randn(4, requires_grad=True), torch.randn(4)
    graph = backward_with_graph(w @ x, [w])
    assert torch.equal(hessian_vector_product([graph], [w], [w.grad])[0], torch.zeros(4))


def test_hooks_that_change_gradients_do_not_change_the_hessian():
    it = case("mlp")
    for p in it.parameters:
        p.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    for apart in (False, True):
        it.model.zero_grad()
        graph = backward_with_graph(it.loss(), it.parameters, apart=apart)
        assert max(p.grad.abs().max() for p in it.parameters) <= 1e-3
        found = hessian_vector_product([graph], it.parameters, gradients(it.parameters))
        assert relative(flat(found), dense_product(it.model, it.loss, 0, gradients(it.parameters))) < 1e-10


def test_sparse_embedding_gradients_give_a_dense_product():
    torch.manual_seed(0)
    table = nn.Embedding(5, 3, sparse=True)
    rows = torch.tensor([1, 4, 1])
    graph = backward_with_graph(table(rows).pow(3).sum(), [table.weight])
    assert table.weight.grad.is_sparse
    (found,) = hessian_vector_product([graph], [table.weight], [table.weight.grad])
    counts = torch.tensor([0.0, 2.0, 0.0, 0.0, 1.0])[:, None]
    w = table.weight.detach()
    torch.testing.assert_close(found, counts * 6 * w * (counts * 3 * w**2))


def test_accumulation_keeps_the_very_gradient_tensors():
    it = case("mlp")
    it.loss().backward()
    before = gradients(it.parameters)
    backward_with_graph(it.loss(), it.parameters)
    assert all(p.grad is g for p, g in zip(it.parameters, before, strict=True))
    assert torch.is_grad_enabled()


def test_gradients_known_to_have_two_formulas_keep_the_plain_bits():
    it = case("gated", torch.float32)
    plain = torch.autograd.grad(it.loss(), it.parameters)
    recast = torch.autograd.grad(it.loss(), it.parameters, create_graph=True)
    backward_with_graph(it.loss(), it.parameters)
    assert all(map(same_bits, gradients(it.parameters), plain))
    assert not all(map(same_bits, recast, plain))


def test_gradients_clipped_in_place_are_the_vector_and_leave_the_graph_alone():
    it = case("convolutional")
    graph = backward_with_graph(it.loss(), it.parameters)
    torch.nn.utils.clip_grad_norm_(it.parameters, 1e-2)
    found = hessian_vector_product([graph], it.parameters, gradients(it.parameters))
    assert float(flat(gradients(it.parameters)).norm()) == pytest.approx(1e-2, rel=1e-3)
    assert relative(flat(found), dense_product(it.model, it.loss, 0, gradients(it.parameters))) < 1e-10


def test_a_graph_is_used_up_by_its_product_unless_it_is_kept():
    it = case("mlp")
    graph = backward_with_graph(it.loss(), it.parameters)
    v = gradients(it.parameters)
    kept = hessian_vector_product([graph], it.parameters, v, keep_graphs=True)
    last = hessian_vector_product([graph], it.parameters, v)
    assert all(map(torch.equal, kept, last))
    with pytest.raises(CurvatureUnavailable, match="a second time"):
        hessian_vector_product([graph], it.parameters, v)


@pytest.mark.parametrize("hooked", [False, True])
def test_equal_gradients_of_two_parameters_do_not_share_memory(hooked):
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    for parameter in (a, b) if hooked else ():
        parameter.register_hook(lambda g: None)
    backward_with_graph((a + b).pow(2).sum(), [a, b])
    a.grad.zero_()
    assert b.grad.tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("apart", [False, True])
def test_graphs_die_by_themselves_with_the_product(apart):
    gc.collect()
    gc.disable()
    try:
        it = case("mlp")
        hidden = it.model[:2](it.inputs.double())
        loss = F.cross_entropy(it.model[2:](hidden), it.targets)
        activation = weakref.ref(hidden)
        del hidden
        graph = backward_with_graph(loss, it.parameters, apart=apart)
        del loss
        assert activation() is not None
        hessian_vector_product([graph], it.parameters, gradients(it.parameters))
        assert activation() is None
    finally:
        gc.enable()
