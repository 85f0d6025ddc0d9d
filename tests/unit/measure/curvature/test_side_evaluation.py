"""Products and gradients from a loss that is evaluated again, which nothing of the training may notice."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from support.hessian_cases import CASES, PRECISIONS, case, dense_product, flat, gradients, relative, same_bits

from geomprobe.measure.curvature.double_backward import hessian_vector_product
from geomprobe.measure.curvature.side_evaluation import ClosureMismatch, SideLoss
from geomprobe.reproducibility.isolation import capture_rng


def side_product(closure, parameters, vectors, *, loss, module=None, **options):
    """``H v`` of the loss that ``closure`` evaluates on the side."""
    graph = SideLoss(closure, loss, module=module, **options).graph(parameters)
    return hessian_vector_product([graph], parameters, vectors, module=module)


def finite_step(closure, parameters, direction, lr, *, loss, **options):
    """What changes over a step along ``direction`` of the loss that ``closure`` evaluates on the side."""
    return SideLoss(closure, loss, **options).over_step(parameters, direction, lr)


@PRECISIONS
@pytest.mark.parametrize("name", CASES)
def test_side_product_is_the_dense_hessian_times_the_gradient(name, dtype, tolerance):
    it = case(name, dtype)
    torch.manual_seed(3)
    rng = capture_rng()
    loss = it.loss()
    loss.backward()
    torch.rand(7)
    found = side_product(it.loss, it.parameters, gradients(it.parameters), loss=loss.detach(), rng=rng, module=it.model)
    expected = dense_product(it.model, it.loss, 3, gradients(it.parameters))
    assert relative(flat(found), expected) < tolerance


def test_a_loss_linear_in_the_parameters_has_side_product_zero():
    w, x = torch.randn(4, requires_grad=True), torch.randn(4)
    assert torch.equal(side_product(lambda: w @ x, [w], [x], loss=(w @ x).detach())[0], torch.zeros(4))


@pytest.mark.parametrize("measure", [side_product, lambda c, p, v, **k: finite_step(c, p, v, 0.1, **k).turned])
def test_a_closure_may_draw_zero_gradients_and_move_buffers(measure):
    it = case("convolutional", torch.float32)
    optimizer = torch.optim.SGD(it.parameters, lr=0.1)
    loss = it.loss()
    loss.backward()
    held = gradients(it.parameters)
    state = [*held, *it.parameters, *it.model.buffers()]
    before = [t.detach().clone() for t in (*state, torch.get_rng_state())]
    memory, moved = [t.data_ptr() for t in state], []

    def closure():
        optimizer.zero_grad(set_to_none=False)
        again = it.loss() + 0 * torch.rand(()) * np.random.rand() * random.random()
        moved.append(not torch.equal(it.model[1].running_mean, before[len(held) + len(it.parameters)]))
        it.model[1].running_mean = torch.zeros(3)  # replaced rather than written to
        return again

    numbers = random.getstate(), np.random.get_state()[1].tolist()
    measure(closure, it.parameters, held, loss=loss.detach(), module=it.model)
    state = [*gradients(it.parameters), *it.parameters, *it.model.buffers()]
    assert all(map(same_bits, before, (*state, torch.get_rng_state())))
    assert [t.data_ptr() for t in state] == memory
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers
    assert moved[0]


def test_a_closure_of_another_minibatch_is_caught_with_both_values():
    it = case("mlp")
    loss = it.loss()
    other = it.loss(part=slice(0, 3)).item()
    with pytest.raises(ClosureMismatch) as error:
        side_product(lambda: it.loss(part=slice(0, 3)), it.parameters, gradients(it.parameters), loss=loss.detach())
    assert repr(other) in str(error.value)
    assert repr(loss.item()) in str(error.value)


def test_a_closure_off_by_one_ulp_is_caught_unless_other_kernels_are_at_work():
    it = case("mlp")
    loss = it.loss().detach()
    near = torch.nextafter(loss, loss + 1)
    arguments = (it.loss, it.parameters, gradients(it.parameters))
    with pytest.raises(ClosureMismatch, match="at most 0 allowed"):
        side_product(*arguments, loss=near)
    side_product(*arguments, loss=near, tolerance=1e-12)


def test_a_closure_with_another_dropout_mask_is_caught():
    it = case("transformer")
    loss = it.loss().detach()
    with pytest.raises(ClosureMismatch, match="another loss"):
        side_product(it.loss, it.parameters, gradients(it.parameters), loss=loss, rng=capture_rng())


def test_a_closure_that_returns_a_number_is_caught():
    it = case("mlp")
    with pytest.raises(ClosureMismatch, match="no graph"):
        side_product(lambda: it.loss().item(), it.parameters, [None] * 6, loss=it.loss().detach())


def test_a_closure_that_ran_backward_itself_is_told_so():
    it = case("mlp")

    def closure():
        loss = it.loss()
        loss.backward()
        return loss

    with pytest.raises(ClosureMismatch, match="called backward"):
        side_product(closure, it.parameters, [None] * 6, loss=it.loss().detach())
    assert gradients(it.parameters) == [None] * 6


def test_a_failing_closure_leaves_everything_in_place():
    it = case("convolutional")
    it.loss().backward()
    held, weights = gradients(it.parameters), [p.data_ptr() for p in it.parameters]
    copies = [b.clone() for b in (*it.parameters, *it.model.buffers())]
    before = torch.get_rng_state()
    calls = []

    def closure():
        calls.append(1)
        torch.rand(1)
        if len(calls) == 2:
            raise RuntimeError("out of coffee")
        return it.loss()

    loss = it.loss().detach()
    copies[len(weights) :] = [b.clone() for b in it.model.buffers()]
    with pytest.raises(RuntimeError, match="out of coffee"):
        finite_step(closure, it.parameters, held, 0.1, loss=loss, module=it.model)
    assert all(p.grad is g for p, g in zip(it.parameters, held, strict=True))
    assert [p.data_ptr() for p in it.parameters] == weights
    assert all(map(same_bits, copies, (*it.parameters, *it.model.buffers())))
    assert torch.equal(before, torch.get_rng_state())


def test_the_finite_step_is_the_difference_of_gradients_a_step_apart():
    it = case("transformer")
    torch.manual_seed(4)
    rng = capture_rng()
    loss = it.loss()
    loss.backward()
    v = gradients(it.parameters)
    found = finite_step(it.loss, it.parameters, v, 0.3, loss=loss.detach(), rng=rng, module=it.model).turned
    moved = copy.deepcopy(it)
    with torch.no_grad():
        for p, g in zip(moved.parameters, v, strict=True):
            p -= 0.3 * g
    moved.model.zero_grad()
    torch.manual_seed(4)
    moved.loss().backward()
    expected = (flat(v) - flat(gradients(moved.parameters))) / 0.3
    torch.testing.assert_close(flat(found), expected, rtol=1e-12, atol=1e-14)


def test_the_finite_step_tends_to_the_hessian_product_on_a_smooth_loss():
    it = case("tied")
    it.loss().backward()
    v = gradients(it.parameters)
    hessian = dense_product(it.model, it.loss, 0, v)
    errors = [
        relative(flat(finite_step(it.loss, it.parameters, v, lr, loss=it.loss().detach()).turned), hessian)
        for lr in (1e-2, 1e-3)
    ]
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05)
