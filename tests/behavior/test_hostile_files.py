"""Run folders that somebody else made: every verb that reads one ends at once, in one line, and gives away nothing."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support.hostile_runs import CASES, ESCAPE, SECRET, VERBS, good_copy
from support.paths import ROOT
from torch import nn, optim, randn

import geomprobe
from geomprobe.cli import main
from geomprobe.errors import RunError
from geomprobe.trace.stream import reader

LIMIT_S = 60  # for machines that are busy; a verb takes a second
ACTING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")
INTERRUPTED = {"at": None}


class Late(BaseException):
    """A verb has not ended; no Exception, so that the verb cannot take it for a fault of the file."""


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
        raise Late

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
        # Those show what of the run can be read.
        assert verb in ("inspect", "report") or (printed == "" and list(out.iterdir()) == [])
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


# Names on their way out


NAMES = ["$\\frac$", "_hidden", "$x", "a\x1b[2Jb", "=1+1", "<script>"]


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        *((verb, name) for verb in ("plot", "inspect", "export") for name in NAMES),
        *(pytest.param("report", name, marks=pytest.mark.slow) for name in NAMES),
    ],
)
def test_a_folder_of_any_name_is_shown_by_its_letters(verb, name, runs, place, capsys):
    assert outcome(verb, good_copy(runs / "whole", place / name), runs / "whole", place, capsys) == 0


def test_tex_is_not_used_for_names_where_the_users_settings_want_it(runs, place, capsys):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True}):
        assert outcome("plot", runs / "whole", runs / "whole", place, capsys) == 0


@pytest.mark.parametrize("verb", ["plot", "report", "export"])
@pytest.mark.parametrize("folder", ["/proc", "missing", "closed"])
def test_a_folder_that_takes_no_file_is_told_in_one_line(verb, folder, runs, place, capsys):
    out = Path("/proc") if folder == "/proc" else place / folder
    if folder == "closed":
        out.mkdir(mode=0o500)
        if os.access(out, os.W_OK):
            pytest.skip("root writes anywhere")
    assert main(command(verb, runs / "whole", runs / "whole", out)) == 1
    assert re.fullmatch(f"geomprobe {verb}: error: cannot write .*\n", capsys.readouterr().err)


# What is written to, and what is run


@pytest.mark.parametrize("make", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_lock_that_is_another_file_is_not_written_to(make, runs, place):
    run = good_copy(runs / "whole", place / "run")
    (run / "trace.h5").unlink()
    (run / "stream").mkdir()
    make(place / "secret", run / "stream" / "lock")
    before = (place / "secret").read_bytes()
    with pytest.raises(RunError, match=r"lock (is a symbolic link|has 2 names)"):
        geomprobe.replay(train, run)
    assert (place / "secret").read_bytes() == before


@pytest.mark.parametrize("name", ["stream", "checkpoints"])
def test_a_folder_of_a_run_that_leads_elsewhere_is_not_emptied(name, runs, place):
    run, thesis = good_copy(runs / "whole", place / "run"), place / "thesis"
    thesis.mkdir()
    (thesis / "record-00000000.h5").write_text("years of work")
    if (run / name).exists():
        shutil.rmtree(run / name)
    (run / name).symlink_to(thesis)
    for call in (geomprobe.replay, geomprobe.record):
        with pytest.raises(RunError, match="is no folder of its own"):
            call(train, run, force=True)
    assert (thesis / "record-00000000.h5").read_text() == "years of work"


def test_a_link_where_a_file_is_written_aside_is_not_followed(runs, place):
    run = good_copy(runs / "whole", place / "run")
    for path in (run / ".trace.h5.new", run / "stream" / ".sealing-trace.json.new"):
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(place / "secret")
    before = (place / "secret").read_bytes()
    assert geomprobe.replay(train, run, force=True).status == "complete"
    assert (place / "secret").read_bytes() == before


@pytest.mark.parametrize(
    "plan",
    [
        "{",
        "[]",
        "7",
        "{}",
        '{"status": "complete", "manifest": 1, "references": [], "certificate": null, "num_steps": null}',
        '{"status": "complete", "manifest": {}, "references": [], "certificate": null, "num_steps": null}',
        '{"status": "splendid", "manifest": {"model": {"num_parameters": 1}}, "references": [], "certificate": {}, '
        '"num_steps": null}',
    ],
)
def test_a_plan_of_a_sealing_that_no_pass_wrote_is_refused(plan, runs, place):
    run = good_copy(runs / "replaying", place / "run")
    (run / "stream" / "sealing-trace.json").write_text(plan)
    with pytest.raises(RunError, match="damaged"):
        geomprobe.replay(train, run, resume=True)


class Code:
    """What runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def described(folder: Path, **entries: object) -> None:
    """Change what a checkpoint says of itself, with digests that fit."""
    text = json.dumps({**json.loads(json.loads((folder / "geomprobe.json").read_text())["text"]), **entries})
    outer = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text}
    (folder / "geomprobe.json").write_text(json.dumps(outer))


def holding(contents):
    """Put other contents into a checkpoint, with a digest that fits."""

    def spoil(folder: Path, marker: Path) -> None:
        torch.save(contents(marker), folder / "state.pt")
        described(folder, sha256=hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest())

    return spoil


def fifo(name):
    def spoil(folder: Path, _: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def says(**entries):
    return lambda folder, _: described(folder, **entries)


def text(words):
    return lambda folder, _: (folder / "geomprobe.json").write_text(words)


BROKEN_SPARSE = {
    "__geomprobe__": "sparse",
    "layout": torch.sparse_coo,
    "shape": [2],
    "coalesced": True,
    "value": [torch.tensor([[10**9]]), torch.ones(1)],
}
DECEIVING = {
    "code": holding(Code),
    "code in a state": holding(lambda marker: {"training": {"model": Code(marker)}}),
    "a number": holding(lambda _: 7),
    "a text for the training": holding(lambda _: {"training": "x", "loops": {"streams": None, "loader": None}}),
    "a sparse tensor beyond its shape": holding(lambda _: {"training": BROKEN_SPARSE, "loops": BROKEN_SPARSE}),
    "a class that is not imported": holding(lambda _: {"loops": {"__geomprobe__": "Enum", "class": ["os", "system"]}}),
    "an array of 10^15 numbers": holding(
        lambda _: {"loops": {"__geomprobe__": "ndarray", "dtype": "<f8", "shape": [10**15], "value": None}}
    ),
    "digests that are a number": says(facts={"position": [0, 1], "digests": {"weights": 7}, "buckets": []}),
}
"""Checkpoints that are whole, and hold no state of this training."""
CHECKPOINTS = DECEIVING | {
    "state.pt is a FIFO": fifo("state.pt"),
    "geomprobe.json is a FIFO": fifo("geomprobe.json"),
    "geomprobe.json is no JSON": text("{"),
    "geomprobe.json is a list": text("[1]"),
    "geomprobe.json of a hundred thousand levels": text("[" * 100_000),
    "the facts are a list": says(facts=[1]),
    "no facts": says(facts={}),
    "a position of texts": says(facts={"position": ["x", "y"], "digests": {}, "buckets": []}),
    "a part that lies outside of the run": says(shared={"part": ["training"], "digest": "x", "checkpoint": "../../x"}),
    "a part without a place": says(shared={"part": []}),
}
UNREADABLE = [name for name in CHECKPOINTS if name not in DECEIVING]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_crafted_checkpoint_runs_nothing_and_is_refused_or_passed_over(name, runs, place, capsys):
    run, marker = good_copy(runs / "replaying", place / "run"), place / "marker"
    CHECKPOINTS[name](run / "checkpoints" / "step-00000004", marker)
    for odd in ("step-abc9", "step-00000000000000000000000000009"):
        (run / "checkpoints" / odd).mkdir()
        (run / "checkpoints" / odd / "geomprobe.json").write_text("{}")
    if name in UNREADABLE:
        assert geomprobe.replay(train, run, resume=True).status == "complete"
        assert "an earlier one is taken" in capsys.readouterr().err
    else:
        with pytest.raises(RunError, match="step-00000004"):
            geomprobe.replay(train, run, resume=True)
    assert not marker.exists()


def rewritten(run: Path, **script: object) -> Path:
    """Let a recording name another script."""
    with h5py.File(run / "record.h5", "r+") as file:
        manifest = json.loads(file.attrs["manifest"])
        environment = dict.fromkeys(("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG"))
        file.attrs["manifest"] = json.dumps({**manifest, "script": script, "environment": environment})
    return run


@pytest.fixture
def started(monkeypatch):
    """The environment that a replay would start again with, so that it need not."""
    for name, value in {"PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)


def test_a_replay_says_the_exact_command_before_it_runs_it(started, runs, place, capsys, monkeypatch):
    run = good_copy(runs / "whole", place / "run")
    argv = ["import os; os.abort()", "a\x1b[2J\nb"]
    rewritten(run, kind="module", path="timeit", argv=argv, cwd=str(place), root=str(place), sha256="x")
    seen: list[str] = []
    monkeypatch.setattr("geomprobe.passes.api.run_replay", lambda *_: seen.append(capsys.readouterr().err) or 1 / 0)
    assert main(["replay", str(run), "--force"]) == 1
    line = f"geomprobe replay: runs, in {place}: python -m timeit 'import os; os.abort()' 'a\\u001b[2J\\u000ab'\n"
    assert seen == [line]


@pytest.mark.parametrize("which", [".", "record.h5"])
def test_what_another_users_folder_names_is_run_only_where_she_is_trusted(
    which, started, runs, place, capsys, monkeypatch
):
    run = good_copy(runs / "whole", place / "run")
    rewritten(run, kind="script", path="gone.py", argv=[], cwd=str(place), root=str(place), sha256="x")
    if os.geteuid() == 0:
        os.chown(run / which, 65534, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 65534)
    for line in (["replay", str(run), "--force"], ["record", "-o", str(run), "--resume"]):
        if which == "." or os.geteuid() == 0:
            assert main(line) == 2
            assert "another user" in (told := capsys.readouterr().err)
            assert "add --trust" in told
    assert main(["replay", str(run), "--trust"]) == 2
    assert "gone.py: there is no such script" in capsys.readouterr().err


# Everything else: good files, changed at random


def odd_value(rng: random.Random) -> object:
    return rng.choice([-1, 0, 10**12, 2**63 - 1, float("nan"), "x", ESCAPE, "[]", "{", np.zeros(3), True, b"\xff\xfe"])


def changed_bytes(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(content))
        kind = rng.choice(["flip", "ones", "zeros", "copy", "number", "end"])
        if kind == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "end" and rng.random() < 0.3:
            del content[at + 1 :]
        else:
            start, size = rng.randrange(len(content)), rng.randrange(1, 64)
            new = {"ones": b"\xff" * 8, "zeros": bytes(size), "copy": bytes(content[start : start + size])}
            piece = new.get(kind, rng.randrange(1 << 32).to_bytes(4, "little"))[: len(content) - at]
            content[at : at + len(piece)] = piece
    path.write_bytes(content)


def changed_tree(path: Path, secret: Path, rng: random.Random) -> None:
    """One object or attribute of a file becomes another."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = rng.choice(names)
        kind = rng.choice(["attribute", "root", "gone", "link", "kind", "shape", "storage"])
        shape = getattr(file[name], "shape", (5,))
        if kind == "attribute":
            of = file[name].attrs
            of[rng.choice([*of, "x"])] = odd_value(rng)
        elif kind == "root":
            file.attrs[rng.choice(list(file.attrs))] = odd_value(rng)
        else:
            del file[name]
        if kind == "link":
            link = h5py.ExternalLink(str(secret), "/x"), h5py.SoftLink("/"), h5py.SoftLink(f"/{name}"), file["/"]
            file[name] = rng.choice(link)
        elif kind == "kind":
            types = ["f4", "i2", "c8", h5py.string_dtype(), h5py.vlen_dtype(int), h5py.ref_dtype, [("a", "f8")]]
            file.create_dataset(name, shape, rng.choice(types))
        elif kind == "shape":
            shapes = [(), (0,), (1,), (7, 7), (*shape, 1), (10**12,), (10**6, 10**6)]
            file.create_dataset(name, rng.choice(shapes), rng.choice(["f8", "i8"]))
        elif kind == "storage":
            file.create_dataset(name, shape, "f8", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


FAST = ("inspect", "verify", "export", "diff", "watch")


@pytest.mark.parametrize("cases", [range(10), pytest.param(range(10, 2040), marks=pytest.mark.slow)], ids=len)
def test_no_change_of_a_good_file_makes_a_verb_hang_or_raise_or_tell(cases, runs, place, capsys, monkeypatch):
    for name, limit in (("WORK_S", 1.0), ("TIMEOUT_S", 20.0)):
        monkeypatch.setattr(reader, name, limit)
    verbs = [*FAST] * 3 + ["plot", "report"] * (len(cases) > 40)  # those two take seconds
    ended = collections.Counter()
    for case in cases:
        rng, own = random.Random(case), place / str(case)
        own.mkdir()
        (own / "secret").write_bytes((place / "secret").read_bytes())
        run = good_copy(runs / rng.choice(["whole", "whole", "replaying", "recording"]), own / "run")
        path = rng.choice(sorted(run.rglob("*.h5")))
        if path.parent.name == "stream" or rng.random() < 0.5:
            changed_bytes(path, rng)
        else:
            changed_tree(path, own / "secret", rng)
        verb = rng.choice(verbs)
        code = outcome(verb, run, runs / "whole", own, capsys)
        assert code in (0, 1, 3), (case, verb)
        ended[verb, code] += 1
        shutil.rmtree(own)
    print(dict(ended))
    assert sum(count for (_, code), count in ended.items() if code == 1) > len(cases) // 4


def test_the_documents_state_what_is_tried():
    page = (ROOT / "docs" / "trace-format.md").read_text()
    harmless = [sum(verb in case.harmless.split() for case in CASES.values()) for verb in VERBS]
    assert f"The tests try {len(CASES)} crafted run folders" in page
    assert f"| refused | {' | '.join(str(len(CASES) - count) for count in harmless)} |" in page
    assert f"| shown, and nothing acts | {' | '.join(map(str, harmless))} |" in page
    assert f"| | {' | '.join(VERBS)} |" in page
