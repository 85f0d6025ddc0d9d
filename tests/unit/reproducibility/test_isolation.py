"""What a side computation does to generators, buffers, gradients, modes, hooks and weights is undone after it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from geomprobe.reproducibility.isolation import (
    capture_rng,
    keep_gradients,
    keep_rng,
    keep_state,
    move_weights,
    restore_rng,
    side_computation,
    silence_hooks,
)
from geomprobe.reproducibility.seeding import seed_everything


def draws() -> list[float]:
    """From every stream of the three generators, those with a cached second normal included."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(()).item(),
        torch.randn(()).item(),
    ]


def test_generators_are_put_back_also_after_an_error() -> None:
    seed_everything(3)
    expected = draws()
    seed_everything(3)

    def fail() -> None:
        with keep_rng():
            draws()
            torch.manual_seed(9)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert draws() == expected


class Everything:
    """A model with a gradient, a buffer and a hook, and all that a side computation may change of it."""

    def __init__(self) -> None:
        self.model = nn.BatchNorm1d(2)
        self.model.weight.register_hook(lambda gradient: 2 * gradient)
        self.model(torch.randn(4, 2)).square().sum().backward()
        self.parameters = list(self.model.parameters())

    def state(self) -> list[object]:
        model = self.model
        tensors = [model.weight, model.bias, model.weight.grad, model.bias.grad, *model.buffers()]
        hooks = list((model.weight._backward_hooks or {}).values())
        return [torch.get_rng_state().tolist(), *(t.tolist() for t in tensors), hooks, model.training]

    def meddle(self) -> None:
        torch.rand(3)
        self.model(torch.randn(4, 2)).sum().backward()
        self.model.running_mean = torch.ones(2)
        self.model.eval()


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "raises"])
def test_a_side_computation_leaves_everything_as_it_was(fails: bool) -> None:
    it = Everything()
    before = it.state()
    try:
        moved = move_weights(it.parameters, [torch.ones(2), None], -0.5)
        with side_computation(it.model, it.parameters), moved:
            it.meddle()
            assert it.state() != before
            if fails:
                raise RuntimeError("inside")
    except RuntimeError:
        assert fails
    assert it.state() == before


def test_each_manager_protects_what_it_names_and_nothing_else() -> None:
    it = Everything()
    before = it.state()
    with keep_state(it.model):
        it.meddle()
    assert it.state()[0] == before[0]
    assert it.state()[5:8] == before[5:8]
    assert it.state()[-1] != before[-1]
    it = Everything()
    before = it.state()
    with keep_gradients(it.parameters):
        assert all(p.grad is None for p in it.parameters)
        it.meddle()
    assert it.state()[3:5] == before[3:5]
    assert it.state()[0] != before[0]


def test_silenced_hooks_do_not_run_and_come_back() -> None:
    w = torch.ones(1, requires_grad=True)
    w.register_hook(lambda gradient: 0 * gradient)
    with silence_hooks([w]):
        assert torch.autograd.grad(3 * w, w)[0].item() == 3
    assert torch.autograd.grad(3 * w, w)[0].item() == 0


def test_moved_weights_come_back_in_their_own_memory() -> None:
    w = torch.ones(2)
    memory = w.data_ptr()
    with move_weights([w], [torch.ones(2)], 0.5):
        w += 7
        assert w.tolist() == [8.5, 8.5]
    assert (w.tolist(), w.data_ptr()) == ([1.0, 1.0], memory)


def test_a_restored_state_gives_the_same_draws_again_and_again() -> None:
    draws()  # leaves a cached normal in python's and NumPy's generators
    state = capture_rng()
    first = draws()
    for _ in range(2):
        restore_rng(state)
        assert draws() == first


def test_capturing_draws_nothing() -> None:
    seed_everything(3)
    expected = draws()
    seed_everything(3)
    capture_rng()
    assert draws() == expected
