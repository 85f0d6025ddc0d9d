"""The loss of a step is that of the backward passes which its gradients are made of, or it is not known, and why."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from geomprobe.measure.gradient_sources import GradientSources
from geomprobe.probe.events import Weight
from geomprobe.probe.listeners import LossTracker
from geomprobe.trace.absence import CARRIED, NO_SCALAR, UNSEEN, WRITTEN, Absence


class Training:
    """Two parameters, and backward passes that the sources follow."""

    def __init__(self, attach: bool = True) -> None:
        self.parameters = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)]
        self.losses = LossTracker()
        self.sources = GradientSources(self.losses)
        if attach:
            self.attach()

    def attach(self) -> None:
        probe: Any = SimpleNamespace(parameters=dict(zip("ab", self.parameters, strict=True)), optimizers=[None])
        self.sources.attached(probe)

    def backward(self, *losses: Tensor, weights: list[Weight] | None = None) -> None:
        self.losses.losses_seen(losses)
        with self.sources.backward_pass(losses, weights or [None] * len(losses)):
            torch.autograd.backward(losses, None if weights is None else [torch.as_tensor(w) for w in weights])

    def loss(self, factor: float = 1.0) -> Tensor:
        """14 times the factor."""
        a, b = self.parameters
        return factor * ((a**2).sum() + (b**2).sum())

    def settled(self) -> tuple[float, set[Absence]]:
        loss, holds = self.sources.settle()
        found = {reason for reason, holding in zip(GradientSources.REASONS, holds, strict=True) if holding}
        return (loss.item(), found) if not loss.isnan() else (-1.0, found)


@pytest.fixture
def training() -> Training:
    return Training()


def test_passes_add_up(training: Training) -> None:
    training.backward(training.loss())
    training.backward(training.loss(2.0))
    assert training.settled() == (42.0, set())


@pytest.mark.parametrize("how", ["none", "in place", "data", "assigned"])
def test_a_pass_whose_gradients_are_zeroed_is_no_part(training: Training, how: str) -> None:
    training.backward(training.loss(5.0))
    for p in training.parameters:
        assert p.grad is not None
        if how == "none":
            p.grad = None
        elif how == "in place":
            p.grad.zero_()
        elif how == "data":
            p.grad.data.zero_()
        else:
            p.grad = torch.zeros_like(p)
    training.backward(training.loss())
    assert training.settled() == (14.0, set())


WRITES: dict[str, Callable[[list[Tensor]], Any]] = {
    "one of them zeroed": lambda p: p[0].grad.zero_(),
    "clamped": lambda p: [t.grad.data.clamp_(-1, 1) for t in p],
    "halved": lambda p: [t.grad.div_(2) for t in p],
    "one set to None": lambda p: setattr(p[1], "grad", None),
    "exchanged": lambda p: setattr(p[0], "grad", p[0].grad.clone() + 1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_another_writer_leaves_the_loss_unknown(training: Training, write: Callable[[list[Tensor]], Any]) -> None:
    training.backward(training.loss())
    write(training.parameters)
    assert training.settled() == (-1.0, {WRITTEN})


def test_a_known_writer_leaves_the_loss(training: Training) -> None:
    training.backward(training.loss())
    training.sources.rescaling(training.parameters)
    torch.nn.utils.clip_grad_norm_(training.parameters, 0.1)
    training.sources.rescaled()
    assert training.settled() == (14.0, set())


def test_gradients_of_the_step_before_are_no_part_unless_they_stay(training: Training) -> None:
    training.backward(training.loss())
    training.settled()
    training.sources.after_update()
    training.backward(training.loss())
    assert training.settled() == (-1.0, {CARRIED})
    training.sources.after_update()
    for p in training.parameters:
        p.grad = None
    training.backward(training.loss())
    assert training.settled() == (14.0, set())


def test_gradients_that_no_pass_has_made(training: Training) -> None:
    for p, g in zip(training.parameters, torch.autograd.grad(training.loss(), training.parameters), strict=True):
        p.grad = g
    assert training.settled() == (-1.0, {UNSEEN})


def test_a_vector_is_no_loss(training: Training) -> None:
    vector = training.parameters[0] ** 2
    training.losses.losses_seen([vector])
    with training.sources.backward_pass([vector], [torch.ones(2)]):
        vector.backward(torch.ones(2))
    assert training.settled() == (-1.0, {NO_SCALAR})


def test_weights_of_losses_count(training: Training) -> None:
    training.backward(training.loss(), training.loss(2.0), weights=[3.0, 0.5])
    assert training.settled() == (56.0, set())


def test_a_loss_of_something_else_does_not_count(training: Training) -> None:
    other = torch.ones(1, requires_grad=True)
    training.backward(training.loss(), (other**2).sum())
    training.backward((other**2).sum())
    assert training.settled() == (14.0, set())


def test_a_pass_that_raises_leaves_the_loss_unknown(training: Training) -> None:
    training.parameters[0].register_post_accumulate_grad_hook(_interrupt)
    with pytest.raises(ZeroDivisionError):
        training.backward(training.loss())
    assert training.settled() == (-1.0, {WRITTEN})


def _interrupt(_: Tensor) -> None:
    raise ZeroDivisionError


def test_leaves_of_the_losses_are_followed_before_it_is_known_what_is_trained() -> None:
    training, other = Training(attach=False), torch.ones(1, requires_grad=True)
    training.backward((other**2).sum())
    training.backward(training.loss(5.0))
    for p in training.parameters:
        p.grad = torch.zeros_like(p)
    other.grad = torch.tensor([7.0])  # nobody measures it
    training.backward(training.loss())
    training.attach()
    assert training.settled() == (14.0, set())


class Two(Training):
    """Each parameter has an optimizer of its own."""

    def attach(self) -> None:
        self.optimizers = [torch.optim.SGD([each], lr=0.1) for each in self.parameters]
        self.probe: Any = SimpleNamespace(
            parameters=dict(zip("ab", self.parameters, strict=True)), optimizers=self.optimizers
        )
        self.move(0)
        self.sources.attached(self.probe)

    def move(self, number: int) -> None:
        self.probe.moves = [number == i for i in range(2)]

    def update(self, number: int) -> tuple[float, set[Absence]]:
        self.move(number)
        found = self.settled()
        self.sources.after_update()
        self.losses.after_update()
        return found


def test_an_update_uses_up_the_gradients_of_its_own_optimizer_only() -> None:
    training = Two()
    training.backward(training.loss())
    assert training.update(0) == (14.0, set())
    training.move(1)
    assert len(training.sources.earlier) == 0  # no share is known before `settle`
    assert training.update(1) == (14.0, set())
    training.backward(training.loss())
    assert training.update(0)[1] == {CARRIED}


def test_what_waits_is_of_an_earlier_update() -> None:
    training = Two()
    training.backward(training.loss())
    training.update(0)
    training.move(1)
    training.settled()
    assert [share.item() for share in training.sources.earlier] == [1.0]
    assert not training.sources.found


def test_a_pass_that_reaches_the_other_optimizer_only_is_no_part_of_the_loss() -> None:
    training = Two()
    a, b = training.parameters
    training.backward((a**2).sum())
    training.backward((b**2).sum())
    assert training.update(0) == (5.0, set())
    assert training.update(1) == (9.0, set())


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_that_were_zeroed_while_they_waited_are_gone(in_place: bool) -> None:
    training = Two()
    training.backward(training.loss())
    training.update(0)
    for optimizer in training.optimizers:
        optimizer.zero_grad(set_to_none=not in_place)
    training.backward(training.loss(2.0))
    assert training.update(0) == (28.0, set())
    assert training.update(1) == (28.0, set())


def test_gradients_that_were_written_to_while_they_waited_have_no_loss() -> None:
    training = Two()
    training.backward(training.loss())
    training.update(0)
    training.parameters[1].grad.mul_(2)  # type: ignore[union-attr]
    assert training.update(1) == (-1.0, {WRITTEN})


def test_many_passes_that_wait_become_one_of_no_known_loss() -> None:
    training = Two()
    for _ in range(GradientSources.LONGEST + 2):
        training.optimizers[0].zero_grad()
        training.backward(training.loss())
        assert training.update(0) == (14.0, set())
    assert len(training.sources._passes) <= GradientSources.LONGEST + 1
    assert training.update(1)[1] == {CARRIED}


def test_a_resumed_pass_knows_what_waits() -> None:
    training, again = Two(), Two()
    training.backward(training.loss())
    training.update(0)
    for now, then in zip(again.parameters, training.parameters, strict=True):
        now.grad = None if then.grad is None else then.grad.clone()
    again.sources.load_state_dict(training.sources.state_dict())
    again.sources.restored()
    shares = []
    for each in (again, training):
        assert each.update(1) == (14.0, set())
        each.backward(each.loss())
        assert each.update(0)[1] == {CARRIED}
        each.move(0)
        shares.append([share.item() for share in each.sources.earlier])
    assert shares == [[], []]


def test_clipping_of_the_other_optimizers_gradients_bends_nothing() -> None:
    training = Two()
    training.backward(training.loss())
    training.sources.rescaling([training.parameters[1]])
    assert not training.sources.bent
    training.sources.rescaling([])
    assert training.sources.bent


def test_a_step_that_writes_to_the_gradients_of_the_other_optimizer_is_seen() -> None:
    training = Two()
    training.backward(training.loss())
    training.move(0)
    training.settled()
    training.parameters[1].grad.mul_(2)  # type: ignore[union-attr]
    training.sources.after_update()
    assert training.update(1) == (-1.0, {WRITTEN})
