"""Sees whether a script's own hooks on losses and parameters change the gradients of a backward pass.

Hooks that only look, as loggers register them, change nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from geomprobe.probe.evidence import Mark, marks


@contextlib.contextmanager
def watching_hooks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Around a backward pass; gives the tensors whose hooks have changed a gradient, complete on leaving.

    >>> import torch
    >>> w = torch.ones(1, requires_grad=True)
    >>> _ = w.register_hook(lambda gradient: 2 * gradient)
    >>> with watching_hooks([w]) as changed:
    ...     (3 * w).sum().backward()
    >>> len(changed)
    1
    """
    changed: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for tensor in tensors:
            if not tensor.requires_grad:
                continue
            if tensor._backward_hooks:
                _watch_gradient(stack, tensor, changed)
            if getattr(tensor, "_post_accumulate_grad_hooks", None):
                _watch_accumulated(stack, tensor, changed)
        yield changed


def _watch_gradient(stack: contextlib.ExitStack, tensor: Tensor, changed: list[Tensor]) -> None:
    given: list[tuple[Tensor, int]] = []

    def before(gradient: Tensor) -> None:
        given.append((gradient, gradient._version))

    def after(gradient: Tensor) -> None:
        was, version = given.pop()
        if gradient is not was or gradient._version != version:
            changed.append(tensor)

    stack.callback(put_first(tensor.register_hook(before), tensor._backward_hooks).remove)
    stack.callback(tensor.register_hook(after).remove)


def _watch_accumulated(stack: contextlib.ExitStack, leaf: Tensor, changed: list[Tensor]) -> None:
    given: list[Mark] = []

    def before(_: Tensor) -> None:
        given.extend(marks([leaf.grad]))

    def after(_: Tensor) -> None:
        if marks([leaf.grad]) != [given.pop()]:
            changed.append(leaf)

    hooks = leaf._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    stack.callback(put_first(leaf.register_post_accumulate_grad_hook(before), hooks).remove)
    stack.callback(leaf.register_post_accumulate_grad_hook(after).remove)


def put_first(handle: RemovableHandle, registered: Any) -> RemovableHandle:
    """Let the hook of ``handle`` run before all others of its tensor, whose dictionary is ``registered``."""
    # torch has a public way to add a hook last only. Autograd runs hooks in the order in which they came into this
    # dictionary (move_to_end, of an ordered one, does not count), so each older one is taken out and put in again.
    for key in [key for key in registered if key != handle.id]:
        registered[key] = registered.pop(key)
    return handle
