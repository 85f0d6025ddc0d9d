"""verify sees a column that is damaged, and one whose formula was wrong when the trace was written."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.sealed_runs import tamper
from torch import nn
from torch.nn import functional

import geomprobe
from geomprobe.report.verify.any_optimizer import IDENTITIES
from geomprobe.report.verify.check import Check
from geomprobe.report.verify.verify import verify
from geomprobe.trace import geometry, schema
from geomprobe.trace.seal import seal_trace
from geomprobe.trace.stream.writer import PartWriter, Table


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
def test_a_number_that_is_off_breaks_what_it_has_to_do_with(trace: Path, group: str, column: str, name: str) -> None:
    tamper(trace, f"{group}/{column}", lambda value: value * 1.001, row=2)
    assert name.format(group) in broken(trace)


def test_a_cosine_above_one_is_no_cosine(trace: Path) -> None:
    for column in ("cosine", "inner_products/g.d"):
        tamper(trace, f"held_out/{column}", lambda value: np.sign(value) * 1e6, row=2)
    assert "held_out: |cosine| <= 1" in broken(trace)


ROWS = 12
GROUPS = {
    "steps": schema.STEP_COLUMNS,
    "references/best": schema.REFERENCE_COLUMNS,
    "held_out": schema.ORACLES["held_out"],
}
DERIVED = [f"{group}/{column.name}" for group, columns in GROUPS.items() for column in columns if column.compute]
FORMULAS = ("grad_norm", "distance", "rsi", "eb", "cosine", "lolr", "clr", "corridor_residual", "flow_drift")


def raw_columns() -> dict[str, np.ndarray[Any, Any]]:
    """All that a pass streams, of random vectors."""
    rng = np.random.default_rng(0)
    w, g, hg, side = (rng.normal(size=(ROWS, 30)) for _ in range(4))
    raw = {"steps/epoch": np.zeros(ROWS), "steps/loss": rng.random(ROWS), "groups/0/lr": rng.random(ROWS)}
    raw["held_out/loss"] = rng.random(ROWS)

    def products(place: str, **pairs: tuple[Any, Any]) -> None:
        raw.update({f"{place}/{name.replace('_', '.')}": (a * b).sum(1) for name, (a, b) in pairs.items()})

    products("inner_products", g_g=(g, g), w_g=(w, g), w_w=(w, w), g_Hg=(g, hg), Hg_Hg=(hg, hg))
    for place in ("inner_products", "references/best/inner_products"):
        d = w - rng.normal(size=30)
        products(place, g_d=(g, d), w_d=(w, d), d_d=(d, d))
        if place == "inner_products":
            products("held_out/inner_products", g_g=(side, side), w_g=(w, side), g_d=(side, d), d_d=(d, d))
    return raw


def write(folder: Path) -> Path:
    """A trace of them, sealed as a replay's is."""
    raw = raw_columns()
    table = Table("values", tuple(raw), "float64")
    with PartWriter(folder / "part.h5", schema="geomprobe-trace", tables=[table], attributes={}) as part:
        part.append({"values": np.stack(list(raw.values()), axis=1)})
    seal_trace([folder / "part.h5"], folder / "t.h5", status="incomplete", num_parameters=30, manifest={})
    return folder / "t.h5"


def columns_check(path: Path, group: str) -> Check:
    """The check of a group's columns against the raw ones."""
    name = f"{group} = f(inner products)" if group in schema.ORACLES else "columns = f(inner products)"
    return next(each for each in verify(geomprobe.open_trace(path)).checks if each.name == name)


def wrong(*inputs: Any) -> Any:
    """Some other formula."""
    return 3 * inputs[0] + 0.25


def test_each_derived_column_has_an_identity_and_holds_it_where_its_formula_is_right(tmp_path: Path) -> None:
    assert {path.rpartition("/")[2] for path in DERIVED} == IDENTITIES.keys()
    path = write(tmp_path)
    for group in GROUPS:
        check = columns_check(path, group)
        assert (check.outcome, check.rows % ROWS) == ("PASS", 0)
        assert 0 < check.excess < 1


@pytest.mark.parametrize("path", DERIVED)
def test_a_column_that_was_written_by_a_wrong_formula_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    real: Callable[[str], schema.Column] = schema.describe

    def describe(asked: str) -> schema.Column:
        column = real(asked)
        return dataclasses.replace(column, compute=wrong) if asked == path else column

    with monkeypatch.context() as while_written:
        while_written.setattr(schema, "describe", describe)
        trace = write(tmp_path)
    check = columns_check(trace, path.rpartition("/")[0])
    assert (check.outcome, check.rows) != ("PASS", 0)
    assert check.outcome == "FAIL"
    assert check.note in (path, "steps", "best")


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_wrong_formula_in_geometry_is_found_though_verify_runs_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formula: str
) -> None:
    monkeypatch.setattr(getattr(geometry, formula), "__code__", wrong.__code__)
    assert columns_check(write(tmp_path), "steps").outcome == "FAIL"
