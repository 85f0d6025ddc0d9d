"""The witness itself: what it calls wrong, and that it leaves a run as it was."""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from behavior.zoo.witness import (
    ALL_OF_LOSS,
    HG,
    LOSS,
    Loop,
    PlainWitness,
    Verdict,
    Witness,
    _judge,
    batches,
    elsewhere,
    examine,
    mlp,
    sgd,
    simple,
)


def quartic(x: Tensor) -> Tensor:
    return x.square().square().sum()


def loop_that_says(says: Callable[..., dict[str, Any]]) -> Loop:
    """A plain loop, whose truth is what ``says`` makes of the loss."""

    def run(witness: Witness) -> None:
        model, optimizer, probe = simple(witness)
        for epoch in probe.epochs(1):
            for x, y in batches(3):
                optimizer.zero_grad()
                probe.backward(nn.functional.mse_loss(model(x), y))
                witness.truth(**{"epoch": epoch, **says(lambda: nn.functional.mse_loss(model(x), y))})
                optimizer.step()

    return Loop("witness", "plain", "a plain loop", run)


def wrong_columns(verdict: Verdict) -> set[str]:
    return {line.partition("[")[0] for line in verdict.wrong}


@pytest.mark.parametrize(
    ("says", "wrong"),
    [
        (lambda loss: {"loss": loss}, set()),
        (lambda loss: {"loss": lambda: 1.001 * loss(), "changed": True}, ALL_OF_LOSS),
        (lambda loss: {"loss": lambda: loss() + 1e-6}, LOSS),
        (lambda loss: {"loss": loss, "hessian_of": lambda: 1.0001 * loss()}, HG),
        (lambda loss: {"loss": loss, "hessian": False}, HG),
        (lambda loss: {"loss": None}, ALL_OF_LOSS),
        (lambda loss: {"loss": loss, "epoch": 1}, {"epoch"}),
        (lambda loss: {"loss": loss, "epoch": np.nan}, {"epoch"}),
        (lambda loss: {"loss": loss, "lr": 0.1 + 1e-9}, {"lr"}),
        (
            lambda loss: {"loss": loss, "scale": 1 + 1e-6, "changed": True},
            {"grad_norm", "grad_dot_offset", "rsi", "eb", "lolr", "clr"},
        ),
    ],
)
def test_what_is_not_the_truth_is_wrong(says: Callable[..., dict[str, Any]], wrong: set[str], tmp_path: Path) -> None:
    assert wrong_columns(examine(loop_that_says(says), tmp_path / "run")) == wrong


def test_a_loss_that_the_gradient_is_not_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        examine(loop_that_says(lambda loss: {"loss": lambda: 2 * loss()}), tmp_path / "run")


NAN = np.nan


def judged(column: str, got: float, truth: float, may_lack: bool, reasons: list[set[str]] | None) -> Verdict:
    verdict = Verdict()
    _judge(verdict, column, np.array([got]), np.array([truth]), np.array([1e-9]), np.array([may_lack]), reasons)
    return verdict


@pytest.mark.parametrize(
    ("column", "got", "truth", "may_lack", "reasons", "ok"),
    [
        ("loss", 1.0, 1.0, False, [set()], True),
        ("loss", NAN, 1.0, False, [{"why"}], False),  # the loop does not say that it may be absent
        ("loss", NAN, 1.0, True, [{"why"}], True),
        ("loss", NAN, 1.0, True, [set()], False),
        ("loss", NAN, 1.0, True, None, True),
        ("loss", NAN, NAN, False, [{"why"}], True),
        ("loss", NAN, NAN, False, [set()], False),
        ("loss", 1.0, NAN, True, [set()], False),
        ("loss", 1.0, 1.0, True, [{"why"}], False),  # there, and said to be absent
        ("cosine", NAN, NAN, False, [set()], True),  # undefined at the final weights
        ("cosine", NAN, 1.0, False, [set()], False),
        ("loss", np.inf, 1.0, True, [set()], False),
    ],
)
def test_an_absent_cell_is_allowed_and_has_a_reason(
    column: str, got: float, truth: float, may_lack: bool, reasons: list[set[str]] | None, ok: bool
) -> None:
    assert (not judged(column, got, truth, may_lack, reasons).wrong) == ok


def test_hessian_gradient_is_that_of_a_quartic() -> None:
    w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
    witness = PlainWitness()
    witness.watch(None, torch.optim.SGD([w], lr=0.1))
    quartic(w).backward()
    witness.truth(lambda: quartic(w))
    (row,) = witness.rows
    at = w.detach().numpy()
    np.testing.assert_allclose(row.hg, 12 * at**2 * (4 * at**3), rtol=1e-9)


def test_truth_leaves_no_trace() -> None:
    model = nn.Sequential(mlp(3, 5), nn.BatchNorm1d(5).double(), nn.Dropout(0.5), mlp(5, 1))
    calls: list[Tensor] = []
    for p in model.parameters():
        p.register_hook(calls.append)
    witness = PlainWitness()
    witness.watch(model, sgd(model))
    x, _ = batches(1)[0]
    model(x).sum().backward()

    def state() -> list[Any]:
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        kept = [(t.data_ptr(), t._version, t.detach().clone()) for t in tensors]
        return [*((pointer, version) for pointer, version, _ in kept), *(t for *_, t in kept), torch.get_rng_state()]

    before, seen = state(), len(calls)
    witness.truth(lambda: model(x).sum(), changed=True)
    for a, b in zip(before, state(), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert len(calls) == seen == len(list(model.parameters()))


def test_elsewhere_is_the_loss_at_other_weights() -> None:
    model = mlp()
    x, _ = batches(1)[0]
    offsets = [torch.full_like(p, 0.1) for p in model.parameters()]
    there = elsewhere(model, offsets, lambda m: m(x).square().sum())
    value = there().item()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert value == pytest.approx(model(x).square().sum().item(), rel=1e-14)
