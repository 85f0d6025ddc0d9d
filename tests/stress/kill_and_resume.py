"""Kill both passes at random moments, resume them, and compare what comes out with runs that nobody disturbed.

    python tests/stress/kill_and_resume.py                              100 trials: about 20 minutes on 2 cores
    python tests/stress/kill_and_resume.py --trials 3 --seed 7
    python tests/stress/kill_and_resume.py --trials 20 --processes 3 --parallel fsdp2

Each trial records a small training (killed_training.py, with 0, 1 or 2 workers and checkpoints at epochs or every few
steps) and sends SIGKILL at a random moment, one to three times, before it lets `record --resume` come to its end. Then
it does the same to `replay --resume`, and to `replay --segment I/3` with the segments in random order. Each record.h5
and trace.h5 must hold, in every dataset and attribute, the bits of the undisturbed one; the part of the manifest that
says on which host a process ran is left out. The exit code is 1 if any does not.

With several processes, either all are killed at that moment or one of them, and the others have to stop by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from stress import command_forks

TRAINING = Path(__file__).with_name("killed_training.py")
SEGMENTS = 3
TIMEOUT_S = 120
PATIENCE_S = 20  # for a process that dies before it has met the others
POLICIES = (("epoch", "32"), ("5steps", "4"), ("17steps", "32"))
ADDRESSES = {"DIMENSION_LIST", "REFERENCE_LIST"}  # attributes that hold places in the file


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed, and how long its passes took."""

    path: Path
    record_s: float
    replay_s: float


class Failed(Exception):
    """A command did what it should not have."""


class Bench:
    """A folder with the training in it, where commands run and are killed.

    Args:
        folder: the folder.
        luck: where the moments come from.
        processes: how many each pass has.
        parallel: how they train together.
    """

    def __init__(self, folder: Path, luck: random.Random, processes: int, parallel: str) -> None:
        self._folder, self._luck = folder, luck
        self._processes, self._parallel = processes, parallel
        self._out, self._err = folder / "out", folder / "err"
        self._wholes: dict[tuple[str, ...], Whole] = {}
        shutil.copy(TRAINING, folder)

    def trial(self, number: int) -> tuple[str, list[str]]:
        """Kill and resume both passes of a run.

        Returns:
            What was done, and in what the results differ from the undisturbed ones.

        Raises:
            Failed: a command ended otherwise than well.
        """
        every, keep = self._luck.choice(POLICIES)
        workers, run = str(self._luck.randrange(3)), self._folder / f"trial-{number}"
        whole = self._whole(workers, every, keep)
        recorded = self._through(self._recording(run, workers, every, keep, "--resume"), whole.record_s)
        differing = differences(run / "record.h5", whole.path / "record.h5")
        replayed = self._through(["replay", "--resume", str(run)], whole.replay_s)
        differing += differences(run / "trace.h5", whole.path / "trace.h5")
        (run / "trace.h5").unlink()
        pieces = []
        for i in self._luck.sample(range(1, SEGMENTS + 1), SEGMENTS):
            segment = f"{i}/{SEGMENTS}"
            moments = self._through(["replay", "--segment", segment, str(run)], whole.replay_s / SEGMENTS)
            pieces.append(f"{segment} {moments}")
        differing += differences(run / "trace.h5", whole.path / "trace.h5")
        shutil.rmtree(run)
        setting = f"workers {workers}, checkpoints every {every}, {keep} kept"
        killed = f"record killed at {recorded} s, replay at {replayed} s, segments {', '.join(pieces)} s"
        return f"{setting}; {killed}", differing

    def _through(self, argv: Sequence[str], duration_s: float) -> str:
        """Kill a command a few times and then let it come to its end; gives the moments, in seconds."""
        moments = [self._luck.uniform(0, 1.1 * duration_s) for _ in range(self._luck.randint(1, 3))]
        for moment in moments:
            processes = self._begin(argv)
            time.sleep(moment)
            hit = self._luck.choice((processes, [self._luck.choice(processes)]))
            for process in hit:
                os.kill(process, signal.SIGKILL)
            self._require_end(argv, processes, (-signal.SIGKILL, 0, 1))  # it may have been faster
        self._require_end(argv, self._begin(argv), (0,))
        return " ".join(f"{moment:.2f}" for moment in moments)

    def _whole(self, *setting: str) -> Whole:
        """The undisturbed run of a setting."""
        if setting not in self._wholes:
            path = self._folder / "-".join(("whole", *setting))
            times = [time.monotonic()]
            for argv in (self._recording(path, *setting), ["replay", str(path)]):
                self._require_end(argv, self._begin(argv), (0,))
                times.append(time.monotonic())
            self._wholes[setting] = Whole(path, times[1] - times[0], times[2] - times[1])
        return self._wholes[setting]

    def _begin(self, argv: Sequence[str]) -> list[int]:
        for file in (self._out, self._err):
            file.unlink(missing_ok=True)
        argv = ["-m", "geomprobe", argv[0], "--patience", str(PATIENCE_S), *argv[1:]]
        return [command_forks.begin(argv, self._folder, self._out, self._err, env) for env in _launch(self._processes)]

    def _require_end(self, argv: Sequence[str], processes: Sequence[int], codes: Sequence[int]) -> None:
        ended = [command_forks.ended(process, TIMEOUT_S) for process in processes]
        if not set(ended) <= set(codes):
            raise Failed(f"{' '.join(argv)} ended with {ended}: {self._err.read_text().strip()}")

    def _recording(self, run: Path, workers: str, every: str, keep: str, *options: str) -> list[str]:
        policy = ["--seed", "0", "--checkpoint-every", every, "--keep-checkpoints", keep]
        training = [TRAINING.name, "--workers", workers, "--parallel", self._parallel]
        return ["record", *options, *policy, "-o", str(run), *training]


def _launch(processes: int) -> list[dict[str, str]]:
    """What the environment of each of several processes says of the others, as torchrun has it."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared["WORLD_SIZE"] = str(processes)
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def differences(one: Path, other: Path) -> list[str]:
    """The datasets and attributes in which two HDF5 files differ by a bit."""
    a, b = _contents(one), _contents(other)
    return [f"{one.name}: {name}" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def _contents(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def visit(name: str, thing: Any) -> None:
        values = {f"{name}@{key}": value for key, value in thing.attrs.items() if key not in ADDRESSES}
        if isinstance(thing, h5py.Dataset):
            values[name] = thing[()]
        for key, value in values.items():
            array = np.asarray(value)
            raw = array.tolist() if array.dtype == object else array.tobytes()
            found[key] = str(array.dtype), array.shape, raw

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
        manifest = json.loads(file.attrs["manifest"])
    del found["@manifest"]
    return found | {f"manifest {name}": value for name, value in manifest.items() if name not in ("host", "hosts")}


def run(bench: Bench, trials: int) -> int:
    """Show trial by trial how each went; gives how many went wrong."""
    wrong = 0
    for number in range(trials):
        try:
            done, differing = bench.trial(number)
        except Failed as failure:
            done, differing = str(failure), ["it failed"]
        wrong += bool(differing)
        print(f"trial {number}: {done}: {'; '.join(differing[:5]) or 'equal'}", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    arguments = parser.parse_args()
    command_forks.prepare()
    folder = Path(tempfile.mkdtemp())  # TemporaryDirectory would be cleaned up by each fork that exits
    try:
        luck = random.Random(arguments.seed)
        wrong = run(Bench(folder, luck, arguments.processes, arguments.parallel), arguments.trials)
    finally:
        shutil.rmtree(folder)
    print(f"{arguments.trials - wrong} of {arguments.trials} equal")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
