"""Several optimizers: the command's choice of one path, what is refused by name, and what wrappers are taken for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from support.command_server import run
from support.sealed_runs import tamper
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

import geomprobe
from geomprobe.errors import RunError, UnsupportedTraining, UsageError
from geomprobe.report.verify.plain_sgd import EQ4, LENGTH
from geomprobe.report.verify.verify import verify
from geomprobe.trace.record import open_record

GAN = """
import torch
from torch import nn

class Generator(nn.Linear):
    pass

class Critic(nn.Linear):
    pass

generator, critic = Generator(3, 2), Critic(2, 1)
optimizers = [torch.optim.SGD(each.parameters(), lr=rate) for each, rate in ((generator, 0.1), (critic, 0.02))]
for _ in range(3):
    optimizers[1].zero_grad()
    (critic(torch.randn(4, 2)) - critic(generator(torch.randn(4, 3)).detach())).mean().backward()
    optimizers[1].step()
    optimizers[0].zero_grad()
    (critic(generator(torch.randn(4, 3))) ** 2).mean().backward()
    optimizers[0].step()
"""


@pytest.mark.parametrize(
    ("choice", "rate", "count"),
    [
        pytest.param("Generator", 0.1, 8, marks=pytest.mark.slow),
        ("1", 0.02, 3),
    ],
)
def test_the_command_records_the_path_that_is_named_and_the_replay_takes_it(
    choice: str, rate: float, count: int, tmp_path: Path
) -> None:
    (tmp_path / "gan.py").write_text(GAN)
    recorded = run("record", "--seed", "0", "--optimizer", choice, "-o", "run", "gan.py", cwd=tmp_path)
    assert recorded.code == 0, recorded.err
    assert run("replay", "run", cwd=tmp_path).code == 0
    with open_record(tmp_path / "run") as record:
        assert record.manifest["recording"]["optimizer"] == choice
    trace = geomprobe.open_trace(tmp_path / "run")
    assert trace.num_parameters == count
    assert trace["lr"].tolist() == [rate] * 3
    assert "optimizer" not in trace
    assert np.isfinite(trace["loss"]).all()


def test_the_command_names_the_optimizers_where_none_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "gan.py").write_text(GAN)
    refused = run("record", "-o", "run", "gan.py", cwd=tmp_path)
    assert refused.code == 1
    for words in ("0: SGD with 2 tensors (8 values) of Generator", "1: SGD with 2 tensors (3 values) of Critic"):
        assert words in refused.err
    assert "--optimizer" in refused.err
    ambiguous = run("record", "--optimizer", "SGD", "-o", "again", "gan.py", cwd=tmp_path)
    assert ambiguous.code == 2
    assert "Choose one by its number" in ambiguous.err


HYBRID_GAN = GAN.replace(
    "for _ in",
    """optimizers[0] = torch.optim.SGD([generator.weight], lr=0.1)
bias = torch.optim.Adam([generator.bias])
for _ in""",
).replace("    optimizers[0].step()\n", "    optimizers[0].step()\n    bias.step()\n")


def columns(file: Path) -> dict[str, bytes]:
    """Every dataset of a trace, bit for bit."""
    found: dict[str, bytes] = {}
    with h5py.File(file) as trace:
        trace.visititems(lambda name, each: found.update({name: each[:].tobytes()} if hasattr(each, "dtype") else {}))
    return found


@pytest.fixture(scope="module")
def every_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``gan.py``, and all paths of it, recorded and replayed."""
    folder = tmp_path_factory.mktemp("paths")
    (folder / "gan.py").write_text(HYBRID_GAN)
    recorded = run("record", "--seed", "0", "--optimizer", "all", "-o", "run", "gan.py", cwd=folder)
    assert recorded.code == 0, recorded.err
    assert "2 paths, each a run by itself: Critic, Generator" in recorded.out
    replayed = run("replay", "run", "--per-parameter", cwd=folder)
    assert replayed.code == 0, replayed.err
    return folder


@pytest.mark.parametrize(("name", "rows"), [pytest.param("Critic", 3, marks=pytest.mark.slow), ("Generator", 6)])
def test_each_of_all_paths_is_what_its_name_alone_gives(name: str, rows: int, every_path: Path) -> None:
    assert run("record", "--seed", "0", "--optimizer", name, "-o", name, "gan.py", cwd=every_path).code == 0
    assert run("replay", name, "--per-parameter", cwd=every_path).code == 0
    alone, among = (columns(every_path / run / "trace.h5") for run in (name, f"run/optimizers/{name}"))
    assert among == alone
    assert "parameters/weight/g.g" in among
    trace = geomprobe.open_trace(every_path / "run", optimizer=name)
    assert (trace.num_steps, trace.status) == (rows, "complete")


def test_readers_name_the_paths(every_path: Path) -> None:
    inspected = run("inspect", "run", cwd=every_path)
    assert (inspected.code, inspected.out.count("complete, 6 steps")) == (0, 2)
    found = json.loads(run("inspect", "run", "--json", cwd=every_path).out)
    assert [each["trace"]["num_steps"] for each in found["optimizers"].values()] == [3, 6]
    verified = run("verify", "run", cwd=every_path)
    assert (verified.code, verified.out.count("checks held")) == (0, 2)
    assert set(json.loads(run("verify", "run", "--json", cwd=every_path).out)["optimizers"]) == {"Critic", "Generator"}
    assert run("plot", "run", "-o", "all.svg", cwd=every_path).code == 0
    exported = run("export", "run", "--format", "csv", "-o", "x.csv", cwd=every_path)
    assert exported.code == 1
    assert "holds the paths of 2 optimizers" in exported.err
    with pytest.raises(RunError, match="has no path 'Lion'; it has Critic, Generator"):
        geomprobe.open_trace(every_path / "run", "Lion")
    with pytest.raises(RunError, match="no paths of its own"):
        geomprobe.open_trace(every_path / "run/optimizers/Critic", "Critic")


def test_all_paths_are_replaced_only_by_force(every_path: Path) -> None:
    again = run("record", "--optimizer", "all", "-o", "run", "gan.py", cwd=every_path)
    assert again.code == 2
    assert "exists and is not empty" in again.err
    (every_path / "mine").mkdir()
    (every_path / "mine/notes").touch()
    mine = run("record", "--force", "--optimizer", "all", "-o", "mine", "gan.py", cwd=every_path)
    assert mine.code == 2
    assert "something else than paths" in mine.err
    (every_path / "other/optimizers/notes").mkdir(parents=True)
    (every_path / "other/optimizers/notes/mine").touch()
    other = run("record", "--force", "--optimizer", "all", "-o", "other", "gan.py", cwd=every_path)
    assert other.code == 2
    assert "is no run of geomprobe" in other.err
    assert (every_path / "other/optimizers/notes/mine").exists()
    inspected = run("inspect", "other", cwd=every_path)
    assert (inspected.code, inspected.out.split()[-3:]) == (0, ["notes", "no", "no"])


@pytest.mark.slow
def test_all_paths_that_were_cut_off_go_on(tmp_path: Path) -> None:
    stop = """    from pathlib import Path
    if Path("run/optimizers/Critic").exists() and not Path("stopped").exists():
        Path("stopped").touch()
        raise SystemExit(1)
"""
    (tmp_path / "gan.py").write_text(GAN.replace("range(3):\n", f"range(3):\n{stop}"))
    record = ("record", "--seed", "0", "--optimizer", "all", "-o", "run")
    assert run(*record, "gan.py", cwd=tmp_path).code == 1
    assert sorted(each.name for each in (tmp_path / "run/optimizers").iterdir()) == ["Critic", "being-recorded"]
    other = run(*record, "--resume", "--average", "gan.py", cwd=tmp_path)
    assert "was recorded with average = False, and now it is True" in other.err
    resumed = run(*record, "--resume", "gan.py", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    forced = run(*record, "--force", "gan.py", cwd=tmp_path)
    assert forced.code == 0, forced.err
    assert sorted(each.name for each in (tmp_path / "run/optimizers").iterdir()) == ["Critic", "Generator"]


def test_a_failed_recording_of_all_paths_has_its_own_exit_code(tmp_path: Path) -> None:
    (tmp_path / "gan.py").write_text(
        GAN.replace("optimizers = ", "import geomprobe\noptimizers = ", 1).replace(
            "for _ in", "geomprobe.attach(critic, optimizers[1])\nfor _ in"
        )
    )
    failed = run("record", "--optimizer", "all", "-o", "run", "gan.py", cwd=tmp_path)
    assert failed.code == 2
    assert "the script says by attach what is measured" in failed.err


@pytest.mark.slow
def test_optimizers_that_are_made_in_each_step_are_no_paths(tmp_path: Path) -> None:
    inner = """    x = nn.Parameter(torch.zeros(1))
    torch.optim.SGD([x], lr=0.1).step()
"""
    (tmp_path / "gan.py").write_text(GAN.replace("range(3):\n", f"range(40):\n{inner}"))
    failed = run("record", "--optimizer", "all", "-o", "run", "gan.py", cwd=tmp_path)
    assert failed.code == 1
    assert "optimizers step beside that of" in failed.err


def test_in_python_each_path_is_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is of the command line"):
        geomprobe.record(lambda: None, tmp_path / "run", optimizer="all")


class Wrapped(Optimizer):
    """An optimizer around an optimizer, as accelerate makes."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


def hybrid(steps: int = 2, wrap: Any = lambda optimizer: optimizer, twice: bool = False, clip: bool = False) -> Any:
    def train() -> None:
        model = nn.Linear(3, 1)
        first, second = torch.optim.SGD([model.weight], lr=0.1), torch.optim.Adam([model.bias])
        geomprobe.attach(model, [wrap(first), wrap(first if twice else second)])
        for _ in range(steps):
            model.zero_grad()
            mse_loss(model(torch.randn(4, 3)), torch.ones(4, 1)).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            first.step()
            second.step()

    return train


def test_wrappers_in_the_list_are_unwrapped(tmp_path: Path) -> None:
    trace = geomprobe.two_pass(hybrid(wrap=Wrapped), tmp_path / "run", seed=0)
    assert trace["optimizer"].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_an_optimizer_that_is_in_the_list_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in the list twice"):
        geomprobe.two_pass(hybrid(twice=True), tmp_path / "run")


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTraining, match="nothing to measure"):
        geomprobe.record(lambda: geomprobe.attach(nn.Linear(1, 1), []), tmp_path / "run")


def test_the_gradient_before_clipping_is_of_one_optimizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is only measured where there is one"):
        geomprobe.two_pass(hybrid(clip=True), tmp_path / "run", before_clipping=True)


def test_clipping_of_all_gradients_keeps_loss_and_hg(tmp_path: Path) -> None:
    trace = geomprobe.two_pass(hybrid(clip=True), tmp_path / "run", seed=0)
    assert np.isfinite(trace["loss"]).all()
    assert np.isfinite(trace["hg_norm"]).tolist() == [True, False] * 2


def test_each_tensors_products_are_of_the_optimizer_that_moves(tmp_path: Path) -> None:
    trace = geomprobe.two_pass(hybrid(), tmp_path / "run", seed=0, per_parameter=True)
    assert (trace["parameters/weight/g.g"] > 0).tolist() == [True, False] * 2
    assert (trace["parameters/bias/g.g"] > 0).tolist() == [False, True] * 2


def test_verify_checks_the_rows_that_plain_sgd_moves(tmp_path: Path) -> None:
    path = geomprobe.two_pass(hybrid(steps=6), tmp_path / "run", seed=0).path / "trace.h5"
    found = {check.name: check for check in verify(geomprobe.open_trace(path)).checks}
    assert not verify(geomprobe.open_trace(path)).broken
    assert found[EQ4].rows == 6  # of 12
    assert found[LENGTH].outcome == "SKIPPED"  # Adam takes the last one
    for column in ("groups/0/lr", "groups/moving/lr", "steps/lr"):
        tamper(path, column, lambda rate: 1.01 * rate, row=4)
    assert (EQ4, 4) in [(check.name, check.row) for check in verify(geomprobe.open_trace(path)).broken]


def test_verify_leaves_alone_the_rows_that_another_optimizer_moves(tmp_path: Path) -> None:
    path = geomprobe.two_pass(hybrid(steps=6), tmp_path / "run", seed=0).path / "trace.h5"
    for column in ("groups/1/lr", "groups/moving/lr", "steps/lr"):
        tamper(path, column, lambda rate: 1.01 * rate, row=5)
    assert EQ4 not in [check.name for check in verify(geomprobe.open_trace(path)).broken]


def test_a_second_attach_says_that_a_list_is_wanted(tmp_path: Path) -> None:
    def train() -> None:
        model = nn.Linear(3, 1)
        geomprobe.attach(model, torch.optim.SGD([model.weight], lr=0.1))
        geomprobe.attach(model, torch.optim.Adam([model.bias]))

    with pytest.raises(UsageError, match=r"attach\(model, \[first, second\]\)"):
        geomprobe.record(train, tmp_path / "run")
