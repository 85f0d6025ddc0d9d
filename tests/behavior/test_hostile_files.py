"""Run folders that somebody else made: every verb that reads one ends at once, in one line, and gives away nothing."""

from __future__ import annotations

import re
import signal
import struct
from pathlib import Path

import pytest
from support.hostile_runs import CASES, SECRET, VERBS, good_copy
from torch import nn, optim, randn

import geomprobe
from geomprobe.cli import main

LIMIT_S = 30
ACTING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")
INTERRUPTED = {"at": None}


def train() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    probe = geomprobe.attach(model, optimizer)
    for _ in probe.epochs(3):
        for x in probe.batches(list(randn(4, 5, 2))):
            optimizer.zero_grad()
            probe.backward(model(x).square().mean())
            optimizer.step()
        if INTERRUPTED["at"] is not None and probe.step > INTERRUPTED["at"]:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good runs, by name; see `support.hostile_runs.Case`."""
    folder = tmp_path_factory.mktemp("good")
    geomprobe.two_pass(train, folder / "whole", seed=0)
    geomprobe.record(train, folder / "replaying", seed=0).close()
    INTERRUPTED["at"] = 5
    for name, call in (
        ("recording", lambda path: geomprobe.record(train, path, seed=0)),
        ("replaying", lambda path: geomprobe.replay(train, path)),
    ):
        with pytest.raises(KeyboardInterrupt):
            call(folder / name)
    INTERRUPTED["at"] = None
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(struct.pack("<d", SECRET) * 1000)
    return tmp_path


def command(verb: str, run: Path, good: Path, out: Path) -> list[str]:
    """The shortest command line of a verb over a run; what it writes goes to the folder ``out``."""
    return [
        verb,
        str(run),
        *{
            "watch": ["--once", "--interval", "0.01"],
            "plot": ["-o", str(out / "x.png"), "--columns", "loss"],
            "report": ["-o", str(out / "x.html")],
            "diff": [str(good)],
            "export": ["-o", str(out / "x.csv"), "--format", "csv"],
        }.get(verb, []),
    ]


def outcome(verb: str, run: Path, good: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """The exit code of a verb, which must have ended in time, without a traceback, and with no byte of the secret."""

    def late(*_: object) -> None:
        raise TimeoutError

    out = place / f"out-{verb}"
    out.mkdir()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        code = main(command(verb, run, good, out))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    printed, told = capsys.readouterr()
    assert "Traceback" not in printed + told
    assert "fault of geomprobe" not in told
    assert not ACTING.search(printed.replace("\n", "") + told.replace("\n", ""))
    errors = [line for line in told.splitlines() if "error:" in line]
    assert len(errors) <= 1
    if code == 1:
        assert told == f"{errors[0]}\n"
        assert told.startswith(f"geomprobe {verb}: error: ")
        assert printed == "" or verb == "inspect"  # which shows what of the run can be read
        assert list(out.iterdir()) == []
    written = b"".join(path.read_bytes() for path in out.iterdir()) + (printed + told).encode()
    assert struct.pack("<d", SECRET) not in written
    assert str(SECRET)[:6].encode() not in written
    return code


QUICK = ("inspect", "verify", "export")


@pytest.mark.parametrize("verbs", [QUICK, pytest.param(VERBS, marks=pytest.mark.slow)], ids=["quick", "all"])
@pytest.mark.parametrize("name", CASES)
def test_each_verb_refuses_what_no_pass_wrote(name, verbs, runs, place, capsys):
    case = CASES[name]
    run = good_copy(runs / case.of, place / "run")
    case.spoil(run, place / "secret")
    found = {verb: outcome(verb, run, runs / "whole", place, capsys) for verb in verbs}
    expected = {verb: (0, 3) if verb in case.harmless.split() else (1,) for verb in verbs}
    assert {verb: code for verb, code in found.items() if code not in expected[verb]} == {}
