"""Hooks that only look are told from those that change a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from geomprobe.probe.hooks.gradient_hooks import watching_hooks


def changed_by(put_on: Callable[[torch.Tensor], Any]) -> bool:
    w = torch.ones(2, requires_grad=True)
    put_on(w)
    with watching_hooks([w]) as changed:
        (w**2).sum().backward()
    assert [id(tensor) for tensor in changed] in ([], [id(w)])
    return bool(changed)


def _write(w: torch.Tensor) -> None:
    assert w.grad is not None
    w.grad.mul_(2)


def _assign(w: torch.Tensor) -> None:
    assert w.grad is not None
    w.grad = w.grad * 2


LOOKING: dict[str, Callable[[torch.Tensor], Any]] = {
    "none": lambda w: None,
    "a logger": lambda w: w.register_hook(lambda g: None),
    "one that gives the gradient back": lambda w: w.register_hook(lambda g: g),
    "a logger of what is accumulated": lambda w: w.register_post_accumulate_grad_hook(lambda p: None),
}
CHANGING: dict[str, Callable[[torch.Tensor], Any]] = {
    "a clamp": lambda w: w.register_hook(lambda g: g.clamp(-1, 1)),
    "an assignment": lambda w: w.register_post_accumulate_grad_hook(_assign),
    "a write": lambda w: w.register_post_accumulate_grad_hook(_write),
}


@pytest.mark.parametrize("put_on", LOOKING.values(), ids=LOOKING)
def test_looking_changes_nothing(put_on: Callable[[torch.Tensor], Any]) -> None:
    assert not changed_by(put_on)


@pytest.mark.parametrize("put_on", CHANGING.values(), ids=CHANGING)
def test_a_change_is_seen(put_on: Callable[[torch.Tensor], Any]) -> None:
    assert changed_by(put_on)


def test_its_own_hooks_are_taken_off() -> None:
    w = torch.ones(1, requires_grad=True)
    w.register_hook(lambda g: None)
    with watching_hooks([w]):
        pass
    assert len(w._backward_hooks or {}) == 1
