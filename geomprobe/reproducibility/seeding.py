"""Where a run's randomness begins: its seed, and torch's switches for deterministic algorithms."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (all devices).

    Args:
        seed: 0 to 2**32 - 1, the range that NumPy accepts.

    Raises:
        ValueError: for a seed outside that range.

    >>> seed_everything(3); first = torch.rand(1)
    >>> seed_everything(3); bool(first == torch.rand(1))
    True
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is outside 0 .. 4294967295, the range that NumPy accepts")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_in_use(seed: int) -> None:
    """Seed as `seed_everything` does, but only generators that exist: CUDA ones stay unseeded where CUDA is not in use.

    torch.manual_seed would leave a seed for CUDA's later start, which outlives `isolation.keep_rng`.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def draw_seed() -> int:
    """A fresh seed from the operating system, for a run that names none."""
    return int.from_bytes(os.urandom(4), "little")


@contextlib.contextmanager
def strict_mode(enabled: bool) -> Iterator[None]:
    """Deterministic algorithms while inside, and the caller's own settings afterwards.

    Filling uninitialized memory, which torch switches on with it, is left off: it costs a write per
    allocation, and a run that reads uninitialized memory is caught by the replay's comparison.

    >>> with strict_mode(True):
    ...     torch.are_deterministic_algorithms_enabled()
    True
    """
    if not enabled:
        yield
        return
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    before = torch.get_deterministic_debug_mode()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
