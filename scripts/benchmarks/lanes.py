"""What the benchmarks share: trainings that take turns step by step, passes for them, peak memory, and the numbers.

Whatever slows the machine then slows all lanes alike, so their ratios are steady where their times are not.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import geomprobe
from geomprobe.distributed.ranks import here
from geomprobe.passes.lease import own_record
from geomprobe.passes.options import RecordOptions, ReplayOptions
from geomprobe.passes.recording import recording as recording_session
from geomprobe.passes.references.loaded import References
from geomprobe.passes.replaying import replaying as replaying_session
from geomprobe.passes.session import Session
from geomprobe.reproducibility.environment import start_manifest
from geomprobe.reproducibility.seeding import seed_everything as seed_everything
from geomprobe.reproducibility.seeding import strict_mode as strict_mode
from geomprobe.trace.run_folder import RunFolder

SCRIPTS = Path(__file__).resolve().parents[1]
# The examples' models and the papers' workloads; in front, since another package may have the name of an example.
sys.path[:0] = [str(SCRIPTS / "examples"), str(SCRIPTS / "experiments")]


def recording(run: Path, checkpoint_every: str = "epoch") -> Session:
    """Pass 1 of a lane, into a new run folder."""
    ranks, folder = here(), RunFolder(run)
    manifest = start_manifest(seed=0, strict=True, script={}) | ranks.described()
    folder.stream.mkdir(parents=True, exist_ok=True)
    return recording_session(folder, manifest, RecordOptions(checkpoint_every=checkpoint_every), ranks)


def replaying(run: Path, train: Callable[[], Iterator[None]], **measure: Any) -> Session:
    """Pass 2 of a lane, over a run that is recorded first; ``measure`` are the options of `geomprobe.replay`."""
    geomprobe.record(lambda: [None for _ in train()], run, seed=0).close()
    ranks, folder = here(), RunFolder(run)
    manifest = start_manifest(seed=0, strict=True, script={}) | ranks.described()
    recorded = own_record(folder, ranks)
    folder.stream.mkdir(parents=True, exist_ok=True)
    options = ReplayOptions(**measure)
    return replaying_session(folder, recorded, References(recorded, {}), manifest, options, ranks=ranks)


def reporting(session: Session | None) -> contextlib.AbstractContextManager[None]:
    """Let the training inside report to a pass; entered for each step, since only one pass at a time can listen."""
    return contextlib.nullcontext() if session is None else session.reporting()


class Lane:
    """A training that takes one step a call, and the pass that it reports to, if any."""

    def __init__(self, training: Iterator[None], session: Session | None = None) -> None:
        self._training, self._session = training, session

    def __call__(self) -> None:
        with reporting(self._session):
            next(self._training)

    def finish(self) -> None:
        """Let the training end, and complete its pass, which raises if a replay was not the same run."""
        with reporting(self._session):
            next(self._training, None)
        if self._session is not None:
            self._session.complete()


def take_turns(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int,
    *,
    before: Callable[[], object] | None = None,
    after: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call of each way, a call a round, each round beginning with another way.

    Args:
        ways: by name, what is called: a `Lane`, or any function.
        rounds: that are measured.
        warm_up: rounds before them that are not.
        before: called before each call, outside of its time.
        after: called after each call, within its time.
    """
    names = list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if before is not None:
                before()
            began = time.perf_counter()
            ways[name]()
            if after is not None:
                after()
            times[name].append(time.perf_counter() - began)
    return {name: seconds[warm_up:] for name, seconds in times.items()}


def typical(values: Sequence[float], every: int = 1) -> float:
    """The median; where each ``every``-th value is of another kind, the mean of both medians by their numbers.

    >>> typical([8.0, 1.0, 1.0, 1.0, 8.0, 1.0, 1.0, 1.0], every=4)
    2.75
    """
    others = [value for i, value in enumerate(values) if i % every]
    special = statistics.median(values[::every])
    return (special + (every - 1) * statistics.median(others)) / every if others else special


def ratio(seconds: Sequence[float], other: Sequence[float], every: int = 1) -> float:
    """How much longer a way takes than another: `typical` of the ratios of the rounds."""
    return typical([a / b for a, b in zip(seconds, other, strict=True)], every)


def alone(script: str, *words: str, launcher: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Any:
    """Run a script in a process of its own; gives what it prints last, read as JSON."""
    command = [sys.executable, *launcher, script, *words]
    package = str(Path(geomprobe.__file__).parents[1])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": package, **(env or {})}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def print_peak(way: Callable[[], object], warm_up: int, steps: int) -> None:
    """Print the peak memory of ``steps`` calls, after some that import and set up. For a process of its own."""
    for _ in range(warm_up):
        way()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    for _ in range(steps):
        way()
    print(json.dumps(peak_memory()))


def peak_memory() -> int:
    """Peak resident bytes of this process alone; getrusage's includes those of the one that started it."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def machine() -> str:
    """What the times were taken on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    name = platform.processor() or platform.machine()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {name}, {device}"
