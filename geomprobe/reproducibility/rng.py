"""The states of the global random generators, taken and put back."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
    """Set every global generator back to ``state``; see :func:`capture_rng`."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.torch)
    if state.cuda:
        torch.cuda.set_rng_state_all(list(state.cuda))
