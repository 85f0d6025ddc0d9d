"""record and replay as commands: what they print, what they leave, and how they exit when something is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.command_server import run, start

import geomprobe
from geomprobe.errors import RunError
from geomprobe.trace.reader import open_trace
from geomprobe.trace.record import open_record

STEPS = 70
LONG_STEPS = 2000  # too many for a small disk

# An unmodified script; what it does otherwise than when it was recorded comes from the environment.
SCRIPT = """
import os
import random
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

other = os.environ.get("OTHER")
if other == "seed":
    torch.manual_seed(7)
if other == "crash":
    torch.nn.Linear(3, "four")
if other == "threads":
    torch.set_num_threads(3)
features, labels = torch.randn(40, 3), torch.randn(40, 1)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.06 if other == "lr" else 0.05, momentum=0.9)
step = 0
for epoch in range(14):
    for x, y in DataLoader(TensorDataset(features, labels), 8, shuffle=True):
        if step == 66 and other == "give up":
            raise RuntimeError("the disk of the data is gone")
        if step == 66 and other == "draw":
            random.random()
        if step == 66 and other == "augmentation":
            x = x * 1.001
        if step == 66 and other == "buffer":
            model[1].running_var[0] *= 1 + 2**-22
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        step += 1
print("trained with", *sys.argv[1:])
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A run of the script, recorded in ``run`` and replayed in none; tests leave its record alone."""
    folder = tmp_path_factory.mktemp("once")
    (folder / "train.py").write_text(SCRIPT)
    assert run("record", "--seed", 1, "-o", "run", "train.py", cwd=folder).code == 0
    return folder


def failed(result, code, *words):
    """The command exited with ``code`` and said ``words`` on standard error, without a traceback of its own."""
    assert result.code == code, result.err
    for word in words:
        assert str(word) in result.err
    assert "geomprobe/cli" not in result.err
    return result


def script(folder, text, name="train.py"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


TRAINING = """
import torch
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def step():
    optimizer.zero_grad()
    loss = model(torch.randn(4, 3)).square().mean()
    loss.backward()
    optimizer.step()
    return loss
"""


# What holds


def test_an_unmodified_script_is_recorded_and_replayed_by_commands_of_their_own_processes(folder):
    def command(*argv):
        env = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
        env |= {"PYTHONPATH": str(Path(geomprobe.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "geomprobe", *argv]
        return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, check=False)

    recorded = command("record", "--seed", "1", "-o", "run", "train.py", "--lr", "0.1")
    assert (recorded.returncode, recorded.stderr) == (0, "Next: geomprobe replay run\n")
    wrote = f"Wrote run/record.h5: {STEPS} steps of 29 parameters, seed 1, references: final."
    assert recorded.stdout == f"trained with --lr 0.1\n{wrote}\n"
    replayed = command("replay", "run")
    said = f"geomprobe replay: runs, in {folder}: python {folder / 'train.py'} --lr 0.1\n"
    assert (replayed.returncode, replayed.stderr) == (0, f"{said}Next: geomprobe verify run\n")
    wrote = f"Wrote run/trace.h5: {STEPS} of {STEPS} steps equal, w_T bitwise equal: certified."
    assert replayed.stdout == f"trained with --lr 0.1\n{wrote}\n"
    assert open_trace(folder / "run").manifest["environment"]["PYTHONHASHSEED"] == "0"


def test_a_module_is_recorded_and_replayed(folder):
    script(folder, "", "package/__init__.py")
    script(folder, f"{TRAINING}\nimport sys\nfor _ in range(int(sys.argv[1])): step()", "package/train.py")
    assert run("record", "-o", "run", "-m", "package.train", "9", cwd=folder).code == 0
    assert "9 of 9 steps equal" in run("replay", "run", cwd=folder).out


def test_a_run_may_be_replayed_from_another_folder(once, tmp_path):
    result = run("replay", once / "run", "--force", cwd=tmp_path)
    assert f"{STEPS} of {STEPS} steps equal" in result.out


# A replay that is not the same run

DIFFERENCES = {
    "draw": (3, f"at step 66 of {STEPS}: first the rng (step/python)", "random numbers"),
    "seed": (3, f"at step 0 of {STEPS}: first the rng (fetch/torch)", "All 0 steps before it were equal"),
    "augmentation": (3, f"at step 66 of {STEPS}: first the batch (inputs)", "augmentation changed"),
    "buffer": (3, f"at step 66 of {STEPS}: first the buffers (1.running_var)", "running statistics"),
    "threads": (1, "recorded with flags.num_threads = 1, but here it is 3", "nothing was replayed"),
    "lr": (1, "recorded with optimizer.groups[0].lr = 0.05, but here it is 0.06", "nothing was replayed"),
}


@pytest.mark.parametrize("other", DIFFERENCES)
def test_a_replay_that_differs_says_where_and_in_what(once, other):
    code, *words = DIFFERENCES[other]
    result = failed(run("replay", "run", "--force", cwd=once, env={"OTHER": other}), code, *words)
    if code == 3:
        assert f"`geomprobe inspect {once / 'run'}` shows" in result.err
        inspected = run("inspect", "run", cwd=once)
        assert (inspected.code, "diverged" in inspected.out) == (0, True)
        assert open_trace(once / "run").num_steps == (0 if other == "seed" else 66)


@pytest.mark.parametrize(("other", "rows"), [("crash", 0), ("give up", 66)])
def test_a_script_that_fails_in_its_replay_alone_leaves_what_was_measured(once, other, rows):
    (once / "run" / "trace.h5").unlink(missing_ok=True)
    result = run("replay", "run", "--force", cwd=once, env={"OTHER": other})
    failed(result, 1, "train.py raised", "Traceback", "It did not when it was recorded", "geomprobe inspect run")
    if rows:
        assert (open_trace(once / "run").status, open_trace(once / "run").num_steps) == ("incomplete", rows)
    assert run("replay", "run", "--force", cwd=once).code == 0


def test_debug_shows_where_in_geomprobe_an_error_came_from(once):
    result = run("replay", "run", "--force", "--debug", cwd=once, env={"OTHER": "seed"})
    assert (result.code, "Traceback" in result.err) == (3, True)


# A script that ends in its own way


def test_a_script_that_raises_is_shown_and_what_it_did_is_kept(folder):
    script(folder, f"{TRAINING}\nfor _ in range(5): step()\nraise KeyError('no such layer')")
    result = failed(
        run("record", "-o", "run", "train.py", cwd=folder),
        1,
        f'  File "{folder / "train.py"}", line 13, in <module>',
        "KeyError: 'no such layer'",
        "train.py raised KeyError: 'no such layer'",
        "What was recorded before that is kept: geomprobe inspect run",
    )
    assert result.err.count("Traceback") == 1
    assert "runpy" not in result.err
    with open_record(folder / "run") as left:
        assert (left.status, left.num_steps, left.references) == ("failed", 5, [])
    inspected = run("inspect", "run", cwd=folder)
    assert (inspected.code, "failed" in inspected.out) == (0, True)
    failed(run("replay", "run", cwd=folder), 1, "its script failed after 5 steps", "geomprobe record --force")


def test_a_script_that_raises_before_a_step_says_that_nothing_is_kept(folder):
    script(folder, "raise KeyError('no such layer')")
    words = "KeyError: 'no such layer'", "It had not taken a step, so there is nothing in the record."
    failed(run("record", "-o", "run", "train.py", cwd=folder), 1, *words)


@pytest.mark.parametrize(("stop", "said"), [("3", "3"), ("'out of data'", "'out of data'")])
def test_a_script_that_exits_with_a_code_has_failed(folder, stop, said):
    script(folder, f"{TRAINING}\nimport sys\nstep()\nsys.exit({stop})")
    failed(run("record", "-o", "run", "train.py", cwd=folder), 1, f"train.py exited with {said}.")
    assert open_record(folder / "run").status == "failed"


def test_a_script_that_exits_with_0_is_done(folder):
    script(folder, f"{TRAINING}\nimport sys\nstep()\nsys.exit(0)")
    assert run("record", "-o", "run", "train.py", cwd=folder).code == 0
    assert run("replay", "run", cwd=folder).code == 0


def test_a_script_that_does_not_train_is_told(folder):
    script(folder, "print('usage: train.py DATA')")
    result = failed(run("record", "-o", "run", "train.py", cwd=folder), 1, "No optimizer stepped")
    assert result.out == "usage: train.py DATA\n"


def test_an_operation_without_a_deterministic_form_points_at_no_strict(folder):
    script(
        folder,
        f"{TRAINING}\nfor _ in range(3):\n    step()\n    torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))",
    )
    words = "line 14, in <module>", "RuntimeError: put_ does not have a deterministic implementation"
    failed(run("record", "-o", "run", "train.py", cwd=folder), 1, *words, "`geomprobe record --no-strict`")
    assert run("record", "-o", "run", "--force", "--no-strict", "train.py", cwd=folder).code == 0
    assert "3 of 3 steps equal" in run("replay", "run", cwd=folder).out


# What changed since


def test_a_script_that_changed_is_not_replayed(folder):
    assert run("record", "-o", "run", "train.py", cwd=folder).code == 0
    script(folder, SCRIPT.replace("0.05", "0.07"))
    words = folder / "train.py", "changed since", "nothing was replayed", "Restore the recorded version"
    failed(run("replay", "run", cwd=folder), 1, *words)


@pytest.mark.parametrize("change", ["rewrite", "remove"])
def test_a_module_of_the_script_that_changed_is_not_replayed(folder, change):
    helper = script(folder, "RATE = 0.05", "helper.py")
    script(folder, f"import helper\n{TRAINING}\nstep()")
    assert run("record", "-o", "run", "train.py", cwd=folder).code == 0
    if change == "rewrite":
        helper.write_text("RATE = 0.06")
    else:
        helper.unlink()
    failed(run("replay", "run", cwd=folder), 1, "helper.py changed since", "nothing was replayed")


def test_a_script_that_is_gone_is_named(folder):
    assert run("record", "-o", "run", "train.py", cwd=folder).code == 0
    (folder / "train.py").unlink()
    failed(run("replay", "run", cwd=folder), 2, folder / "train.py", "there is no such script")


def test_a_folder_that_is_gone_is_named(folder):
    work = script(folder, TRAINING + "\nstep()", "work/train.py").parent
    assert run("record", "-o", folder / "run", "train.py", cwd=work).code == 0
    work.rename(folder / "elsewhere")
    words = f"was recorded in {work}, which is gone", "nothing was replayed"
    failed(run("replay", "run", cwd=folder), 2, *words)


def test_what_was_recorded_in_python_is_replayed_in_python(tmp_path):
    def train():
        exec(TRAINING + "\nstep()", {})

    geomprobe.record(train, tmp_path / "run", seed=0)
    words = "was recorded by geomprobe.record(", "train, ...) in Python", "geomprobe.replay(train, ...)"
    failed(run("replay", "run", cwd=tmp_path), 2, *words)


# The command line itself

USAGE = {
    "no script": (["record", "-o", "new"], "Name the script to record"),
    "a script that is missing": (["record", "-o", "new", "nope.py"], "nope.py: there is no such script"),
    "a folder as script": (["record", "-o", "new", "."], "there is no such script"),
    "no folder": (["record", "train.py"], "-o/--output"),
    "a seed below 0": (
        ["record", "-o", "new", "--seed", "-1", "train.py"],
        "seed -1 is outside 0 .. 4294967295",
    ),
    "a seed in words": (
        ["record", "-o", "new", "--seed", "lucky", "train.py"],
        "argument --seed: 'lucky' is no whole number",
    ),
    "reference steps in words": (
        ["record", "-o", "new", "--reference-steps", "abc", "train.py"],
        "'abc' is no list of steps such as 100,200",
    ),
    "a reference step below 0": (
        ["record", "-o", "new", "--reference-steps", "4,-1", "train.py"],
        "'4,-1' is no list of steps such as 100,200; steps are counted from 0",
    ),
    "a run that exists": (
        ["record", "-o", "run", "train.py"],
        "exists and is not empty: nothing was recorded",
    ),
    "every 0th step": (
        ["replay", "run", "--every", "0"],
        "argument --every: '0' is no whole number of at least 1",
    ),
    "every step in words": (
        ["replay", "run", "--every", "some"],
        "argument --every: 'some' is no whole number",
    ),
    "an unknown option": (["replay", "run", "--fast"], "unrecognized arguments: --fast"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_exits_with_2_and_starts_nothing(once, case):
    argv, said = USAGE[case]
    result = failed(run(*argv, cwd=once), 2, said)
    assert "trained" not in result.out
    assert not (once / "new").exists()


def test_reference_steps_beyond_the_end_are_told(folder):
    result = run("record", "-o", "run", "--reference-steps", "5,70,1000", "train.py", cwd=folder)
    assert result.code == 0
    assert "references: final, step-5." in result.out
    assert f"Reference steps [70, 1000] lie beyond the last step, {STEPS - 1}; not kept." in result.out


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is no run of geomprobe"),
        (lambda path: path.write_text("text"), "is no HDF5 file"),
    ],
)
def test_what_is_no_run_is_not_replayed(tmp_path, prepare, said):
    prepare(tmp_path / "run")
    failed(run("replay", "run", cwd=tmp_path), 1, said)


# Two at once, and interruptions

ENDLESS = f"{TRAINING}\nimport time\nfor _ in range(100_000):\n    step()\n    time.sleep(1e-3)"


def wait_for_rows(folder):
    """Until a pass that streams has committed rows."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with open_record(folder / "run") as streaming:
                if streaming.num_steps:
                    return
        except RunError:
            time.sleep(0.05)
    raise TimeoutError("no row in 30 s")


def test_the_second_of_two_recordings_is_told_of_the_first(folder):
    script(folder, ENDLESS)
    first = start("record", "-o", "run", "train.py", cwd=folder)
    try:
        wait_for_rows(folder)
        words = folder / "run", f"is being written by another process (process {first.pid} on"
        failed(run("record", "--force", "-o", "run", "train.py", cwd=folder), 1, *words)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_an_interrupted_recording_is_unfinished_and_readable(folder, number, code):
    script(folder, ENDLESS)
    recording = start("record", "--seed", 0, "-o", "run", "train.py", cwd=folder)
    wait_for_rows(folder)
    os.kill(recording.pid, number)
    result = recording.wait()
    assert result.code == code
    said = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped as asked; --resume goes on from here"}
    assert result.err == f"geomprobe record: {said[number]}\n"
    with open_record(folder / "run") as left:
        assert left.status == "incomplete"
        rows = left.steps["loss"]
    script(folder, f"{TRAINING}\nfor _ in range({len(rows)}): step()")
    failed(run("replay", "run", cwd=folder), 1, f"it is unfinished ({len(rows)} steps so far)")
    assert json.loads(run("inspect", "run", "--json", cwd=folder).out)["record"]["status"] == "incomplete"
    assert run("record", "--seed", 0, "--force", "-o", "run", "train.py", cwd=folder).code == 0
    with open_record(folder / "run") as whole:
        np.testing.assert_array_equal(whole.steps["loss"], rows)


def test_an_interrupted_replay_is_unfinished_and_readable(folder):
    script(
        folder,
        f"{TRAINING}\nimport os, time\nfor _ in range(500):\n    step()\n    time.sleep(float(os.environ['NAP']))",
    )
    assert run("record", "-o", "run", "train.py", cwd=folder, env={"NAP": "0"}).code == 0
    replaying = start("replay", "run", cwd=folder, env={"NAP": "0.01"})
    deadline = time.monotonic() + 30
    while not list((folder / "run").glob("stream/trace-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    os.kill(replaying.pid, signal.SIGINT)
    assert replaying.wait().code == 130
    left = open_trace(folder / "run")
    assert left.status == "incomplete"
    assert 0 < left.num_steps < 500
    failed(
        run("replay", "run", cwd=folder),
        2,
        "stream/trace-00000000.h5 exists: nothing was replayed",
        "--force",
    )
    assert run("replay", "run", "--force", cwd=folder, env={"NAP": "0"}).code == 0
    whole = open_trace(folder / "run")
    np.testing.assert_array_equal(whole["distance"][: left.num_steps], left["distance"])


# A disk that fills up


def test_a_file_that_may_not_grow_is_told_and_what_it_holds_is_kept(folder, long_record):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (450_000, 450_000))"
    script(folder, f"{TRAINING}\nimport resource\n{limit}\nfor _ in range({LONG_STEPS}): step()")
    words = "File too large", "safe and stay readable"
    failed(run("record", "--seed", 0, "-o", "run", "train.py", cwd=folder), 1, *words)
    with open_record(folder / "run") as left, open_record(long_record / "run") as whole:
        assert 0 < left.num_steps < LONG_STEPS
        np.testing.assert_array_equal(left.steps["loss"], whole.steps["loss"][: left.num_steps])


@pytest.fixture
def disk(tmp_path):
    """A disk of four megabytes, and a function that leaves so many bytes of it free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")

    def leave(free):
        space = os.statvfs(disk)
        (disk / "ballast").write_bytes(bytes(space.f_bavail * space.f_frsize - free))

    yield disk, leave
    subprocess.run(["umount", "-l", disk], check=True)


LONG = f"{TRAINING}\nfor _ in range({LONG_STEPS}): step()"


@pytest.fixture(scope="module")
def long_record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    script(folder, LONG)
    assert run("record", "--seed", 0, "-o", "run", "train.py", cwd=folder).code == 0
    return folder


@pytest.mark.parametrize("swallow", [False, True])
def test_a_disk_that_fills_up_while_recording_ends_it_with_what_was_kept(disk, folder, long_record, swallow):
    disk, leave = disk
    leave(520_000)
    body = "    try: step()\n    except Exception: pass" if swallow else "    step()"
    script(folder, f"{TRAINING}\nfor _ in range({LONG_STEPS}):\n{body}")
    result = failed(
        run("record", "--seed", 0, "-o", disk / "run", "train.py", cwd=folder),
        1,
        "No space left on device",
        "safe and stay readable",
        "Free space on that disk",
    )
    with open_record(disk / "run") as left, open_record(long_record / "run") as whole:
        assert left.status == "incomplete"
        assert 0 < left.num_steps < LONG_STEPS
        assert f"{left.num_steps} rows were committed" in result.err
        for component in ("rng", "weights", "optimizer", "loss"):
            rows = left.fingerprints(component, 0, left.num_steps)
            np.testing.assert_array_equal(rows, whole.fingerprints(component, 0, left.num_steps))
    assert run("inspect", disk / "run", cwd=folder).code == 0
    (disk / "ballast").unlink()
    script(folder, f"{TRAINING}\nfor _ in range(100): step()")
    assert run("record", "--force", "-o", disk / "run", "train.py", cwd=folder).code == 0


@pytest.mark.parametrize("free", [0, 12_000, 40_000])
def test_a_disk_that_is_full_before_the_first_row_is_told(disk, folder, free):
    disk, leave = disk
    leave(free)
    script(folder, LONG)
    result = failed(run("record", "-o", disk / "run", "train.py", cwd=folder), 1, "No space left on device")
    assert "train.py raised" not in result.err


def test_a_disk_that_fills_up_while_replaying_ends_it_with_what_was_kept(disk, long_record):
    disk, leave = disk
    (disk / "run").mkdir()
    (disk / "run" / "record.h5").write_bytes((long_record / "run" / "record.h5").read_bytes())
    leave(200_000)
    words = "No space left on device", "safe and stay readable"
    failed(run("replay", "--no-curvature", disk / "run", cwd=long_record), 1, *words)
    left = open_trace(disk / "run")
    assert left.status == "incomplete"
    assert 0 < left.num_steps < LONG_STEPS
    assert run("replay", "run", "--force", "--no-curvature", cwd=long_record).code == 0
    whole = open_trace(long_record / "run")
    np.testing.assert_array_equal(left["distance"], whole["distance"][: left.num_steps])
