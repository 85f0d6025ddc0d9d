"""A sealing that is cut off loses nothing: the next command finishes it."""

from __future__ import annotations

import os
import signal

import h5py
import numpy as np
import pytest
import torch
from stress.command_forks import ENVIRONMENT
from support.command_server import python

import geomprobe
from geomprobe.cli import main
from geomprobe.passes import finalize as sealing
from geomprobe.report.summary.summary import summarize
from geomprobe.report.summary.text import next_command

KILLED = """
import os, signal, sys
import geomprobe
from unit.passes import test_finalize
from geomprobe.passes import finalize as sealing
run, kind = sys.argv[1:]
if kind == "trace":
    geomprobe.record(test_finalize.train, run, seed=0)
setattr(sealing, f"seal_{kind}", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
geomprobe.replay(test_finalize.train, run) if kind == "trace" else geomprobe.record(test_finalize.train, run, seed=0)
"""


def train() -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(70):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()


def killed_while_sealing(run, kind: str) -> None:
    here = {name: os.environ.get(name) for name in ENVIRONMENT}  # as the replay in this process has it
    done = python("-c", KILLED, run, kind, env=here)
    assert done.code == -signal.SIGKILL, done.err


def columns(path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        found: dict[str, np.ndarray] = {}
        file.visititems(lambda name, item: found.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    geomprobe.two_pass(train, run, seed=0)
    return run


def test_a_record_whose_sealing_was_killed_is_sealed_by_its_replay(tmp_path, undisturbed):
    run = tmp_path / "run"
    killed_while_sealing(run, "record")
    assert not (run / "record.h5").exists()
    trace = geomprobe.replay(train, run)
    assert trace.certificate["steps_equal"] == 70
    np.testing.assert_equal(columns(run / "record.h5"), columns(undisturbed / "record.h5"))
    assert not (run / "stream").exists()


def test_a_trace_whose_sealing_was_killed_is_sealed_without_another_replay(tmp_path, undisturbed, capsys):
    run = tmp_path / "run"
    killed_while_sealing(run, "trace")
    assert geomprobe.open_trace(run).status == "incomplete"
    assert next_command(summarize(run)) == f"geomprobe replay {run}"
    assert main(["replay", str(run)]) == 0
    assert "only its sealing was cut off" in capsys.readouterr().out
    assert geomprobe.open_trace(run).certificate["final_weights_equal"]
    np.testing.assert_equal(columns(run / "trace.h5"), columns(undisturbed / "trace.h5"))


def test_a_sealing_that_the_disk_refuses_can_be_taken_up_again(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sealing, "seal_record", refuse)
        with pytest.raises(OSError, match="no space"):
            geomprobe.record(train, tmp_path / "run", seed=0)
    assert geomprobe.replay(train, tmp_path / "run").status == "complete"
