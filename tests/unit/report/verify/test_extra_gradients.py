"""verify holds the gradients beside the step's own to what follows from them and from the step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.sealed_runs import tamper
from torch import nn
from torch.nn import functional

import geomprobe
from geomprobe.report.verify.verify import verify


def train() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = geomprobe.attach(model, optimizer)
    x, y = torch.randn(8, 3), torch.arange(8) % 2

    def loss() -> torch.Tensor:
        return functional.cross_entropy(model(x[4:]), y[4:])

    probe.held_out(loss)
    for _ in probe.epochs(6):
        optimizer.zero_grad()
        probe.backward(functional.cross_entropy(model(x[:4]), y[:4]))
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = tmp_path_factory.mktemp("run")
    geomprobe.record(train, run, seed=0).close()
    geomprobe.replay(train, run, held_out_every=2, before_clipping=True)
    return (run / "trace.h5").read_bytes()


@pytest.fixture
def trace(measured: bytes, tmp_path: Path) -> Path:
    (tmp_path / "trace.h5").write_bytes(measured)
    return tmp_path / "trace.h5"


def broken(path: Path) -> set[str]:
    return {check.name for check in verify(geomprobe.open_trace(path)).broken}


def test_a_true_trace_holds_and_each_measured_row_is_checked(trace: Path) -> None:
    checks = {check.name: check for check in verify(geomprobe.open_trace(trace)).checks}
    assert broken(trace) == set()
    assert checks["held_out: d.d is the step's"].rows == 3
    assert checks["unclipped: d.d is the step's"].rows == 6
    assert not any(name.startswith("full_gradient") for name in checks)


@pytest.mark.parametrize("group", ["held_out", "unclipped"])
@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("rsi", "{} = f(inner products)"),
        ("inner_products/g.d", "{} = f(inner products)"),
        ("inner_products/d.d", "{}: d.d is the step's"),
    ],
)
def test_a_number_that_is_off_breaks_what_it_has_to_do_with(
    trace: Path, group: str, column: str, name: str
) -> None:
    tamper(trace, f"{group}/{column}", lambda value: value * 1.001, row=2)
    assert name.format(group) in broken(trace)


def test_a_cosine_above_one_is_no_cosine(trace: Path) -> None:
    for column in ("cosine", "inner_products/g.d"):
        tamper(trace, f"held_out/{column}", lambda value: np.sign(value) * 1e6, row=2)
    assert "held_out: |cosine| <= 1" in broken(trace)
