"""Side computations that leave the run as it was, bit for bit: what each context manager here protects.

A replay runs the user's model and autograd for numbers that the training itself does not take: Hg, sharpness, a
held-out minibatch. Each such computation enters the managers for what it can touch. They nest in any order, run in the
thread that trains, and put everything back on an exception too. A pass also enters `muted` of
`geomprobe.probe.hooks.global_hooks` around a step's whole measurement, so that nothing inside is an event of the run.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RNGState:
    """The global generators' states: Python, NumPy, torch's CPU and, where initialized, each CUDA device."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: tuple[Tensor, ...]


def capture_rng() -> RNGState:
    """The state of every global generator, drawing nothing from any.

    >>> state = capture_rng(); first = random.random()
    >>> restore_rng(state); first == random.random()
    True
    """
    cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
    return RNGState(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)


def restore_rng(state: RNGState) -> None:
    """Set every global generator back to ``state``; see `capture_rng`."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.torch)
    if state.cuda:
        torch.cuda.set_rng_state_all(list(state.cuda))


@contextmanager
def keep_rng() -> Iterator[None]:
    """Put every global random generator back on leaving."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)


@contextmanager
def keep_state(module: nn.Module | None) -> Iterator[None]:
    """Put every random generator and every buffer of ``module`` back on leaving.

    A pass of autograd moves them where activation checkpointing runs a part of the forward pass again.
    """
    owners = list(module.modules()) if module is not None else []
    slots = [(owner._buffers, name, b) for owner in owners for name, b in owner._buffers.items()]
    buffers = {id(buffer): buffer for _, _, buffer in slots if buffer is not None}
    copies = {key: buffer.detach().clone() for key, buffer in buffers.items()}
    with keep_rng():
        try:
            yield
        finally:
            for slot, name, buffer in slots:
                slot[name] = buffer
            for key, buffer in buffers.items():
                # Through .data: a graph that saved the buffer must not see a new version of it.
                buffer.data.copy_(copies[key])


@contextmanager
def keep_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Put every ``.grad`` back on leaving. Inside all are None, so that they can be filled and zeroed."""
    kept = [(parameter, parameter.grad) for parameter in parameters]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def side_computation(module: nn.Module | None, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Put random generators, buffers, training modes and every ``.grad`` back on leaving: a user's loss may touch all.

    Inside, the gradients are None.
    """
    members = {*parameters, *(module.parameters() if module is not None else ())}
    modes = [(part, part.training) for part in (module.modules() if module is not None else ())]
    with keep_state(module), keep_gradients(members):
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training


@contextmanager
def silence_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Keep the leaves' own hooks from running: a hook that clips gradients would clip Hg as well.

    >>> w = torch.ones(1, requires_grad=True)
    >>> _ = w.register_hook(lambda g: 0 * g)
    >>> with silence_hooks([w]):
    ...     torch.autograd.grad(3 * w, w)
    (tensor([3.]),)
    """
    hooks = [leaf._backward_hooks for leaf in leaves if leaf._backward_hooks]
    kept = [dict(registered) for registered in hooks]
    # Emptied in place: autograd keeps a reference to this very dict.
    for registered in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, before in zip(hooks, kept, strict=True):
            registered.update(before)


@contextmanager
def move_weights(parameters: Sequence[Tensor], direction: Sequence[Tensor | None], step: float) -> Iterator[None]:
    """Move the weights by ``step`` times ``direction`` inside, for a loss that runs the user's own model.

    They move to other memory, and the old memory is never written: putting it back is exact, whatever happens inside.

    >>> w = torch.ones(1)
    >>> with move_weights([w], [torch.ones(1)], -0.5):
    ...     w
    tensor([0.5000])
    >>> w
    tensor([1.])
    """
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter, along in zip(parameters, direction, strict=True):
            if along is not None:
                parameter.data = torch.add(parameter.data, along, alpha=step)
        yield
    finally:
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.data = values
