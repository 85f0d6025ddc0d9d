"""The states of the global generators are taken without a draw, and put back."""

from __future__ import annotations

import random

import numpy as np
import torch

from geomprobe.reproducibility.rng import capture_rng, restore_rng
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
