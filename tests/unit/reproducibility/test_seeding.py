"""Seeds fix every generator; strict flags are set and put back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from geomprobe.reproducibility.isolation import keep_rng
from geomprobe.reproducibility.seeding import draw_seed, seed_everything, seed_in_use, strict_mode


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


@pytest.fixture(autouse=True)
def _unchanged():
    """Whatever a test does to flags and generators is undone after it."""
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with keep_rng():
        yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def test_a_seed_fixes_all_three_generators() -> None:
    seed_everything(5)
    first = draws()
    seed_everything(5)
    assert draws() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_refuses_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"{seed} is outside 0 .. 4294967295"):
        seed_everything(seed)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_ends_of_the_range_are_seeds(seed: int) -> None:
    seed_everything(seed)


def test_drawn_seeds_differ_and_draw_from_no_generator() -> None:
    seed_everything(1)
    expected = draws()
    seed_everything(1)
    assert len({draw_seed() for _ in range(5)}) == 5
    assert draws() == expected


def test_seeding_what_is_in_use_leaves_no_seed_for_a_device_that_is_not() -> None:
    seed_everything(4)
    later = list(torch.cuda._queued_calls)
    first = draws()
    seed_in_use(4)
    assert draws() == first
    assert torch.cuda._queued_calls == later


def state_of_flags() -> tuple[object, ...]:
    return (
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("own", [False, True])
def test_strict_mode_puts_the_callers_flags_back(mode: int, own: bool) -> None:
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = own
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = own, not own
    before = state_of_flags()
    with strict_mode(True):
        assert state_of_flags() == (2, False, True, False)
    assert state_of_flags() == before


def test_strict_mode_puts_flags_back_after_an_error() -> None:
    before = state_of_flags()

    def fail() -> None:
        with strict_mode(True):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert state_of_flags() == before


def test_relaxed_mode_leaves_the_flags_alone() -> None:
    before = state_of_flags()
    with strict_mode(False):
        assert state_of_flags() == before


def test_strict_mode_refuses_an_operation_without_a_deterministic_form() -> None:
    with strict_mode(True), pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(3).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]), accumulate=False)
