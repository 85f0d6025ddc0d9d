"""Replay a run in several processes of this machine, each of them a segment of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import FrameType
from typing import Any

from geomprobe.errors import GeomprobeError, ReplayDiverged, Stopped, UsageError
from geomprobe.measure.gradient_products import require_clipped
from geomprobe.passes import lease
from geomprobe.passes.checkpoint.resume_point import cuts, segments
from geomprobe.passes.options import ReplayOptions
from geomprobe.trace.printable import show
from geomprobe.trace.record import Record
from geomprobe.trace.run_folder import RunFolder

# Threads that wait sleep instead of spinning, so that several processes share the cores. No result changes by it.
_YIELDING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


class SegmentsFailed(GeomprobeError):
    """Some of the segments failed; what the others did is kept."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def require_sense(options: ReplayOptions, count: int) -> None:
    """Refuse what a replay in several processes cannot do, before anything starts."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UsageError(
            f"--jobs {count}: it would start processes beside those of this launch. Start a launch for each "
            "segment instead, here or on other machines: torchrun ... -m geomprobe replay RUN --segment I/K"
        )
    if options.per_rank:
        raise UsageError(
            f"--jobs {count} splits a run of one process, and --per-rank keeps the gradient of each process of a DDP "
            "training: leave one of them out. Nothing was replayed."
        )
    replace(options, segment=(1, count), force=False, resume=False)  # raises where there can be no segments


def replay(run: RunFolder, recorded: Record, options: ReplayOptions, count: int, further: Sequence[str] = ()) -> None:
    """Run a process for each of ``count`` segments to its end, and show what they print on standard error.

    ``further`` are arguments of the command, beside the options, that each of them gets.

    Raises:
        UsageError: there are no checkpoints to split the run at, or the options do not go together.
        SegmentsFailed: some failed.
        Stopped: SIGTERM came.
    """
    require_clipped(options, recorded.manifest)
    ranges = segments(_cuts(recorded, run), recorded.num_steps, count)
    if not lease.ready_for_segments(run, force=options.force, resume=options.resume):
        return
    steps = ", ".join(f"{first} to {stop - 1}" for first, stop in ranges)
    show(
        f"geomprobe: {len(ranges)} segments, of steps {steps}; `geomprobe watch {run.path}` shows how far they are",
        file=sys.stderr,
    )
    numbers = range(1, len(ranges) + 1)
    commands = [[*command(run.path, options, i, count), *further] for i in numbers]
    codes = _run(commands, [_share(recorded.manifest, i, len(ranges)) for i in range(len(ranges))])
    failed = {i: code for i, code in enumerate(codes, 1) if code}
    if {Stopped.exit_code, -signal.SIGTERM} & set(failed.values()):  # the latter before its replay had begun
        raise Stopped
    if failed:
        diverged = ReplayDiverged.exit_code in failed.values()
        worst = ReplayDiverged.exit_code if diverged else GeomprobeError.exit_code
        raise SegmentsFailed(_account(failed, ranges, run, count), worst)


def pieces(run: RunFolder, recorded: Record, count: int) -> int:
    """How many segments there are when ``count`` are asked for."""
    return len(segments(cuts(run, lease.world_size(recorded.manifest)), recorded.num_steps, count))


def _cuts(recorded: Record, run: RunFolder) -> list[int]:
    steps = cuts(run, lease.world_size(recorded.manifest))
    if len(steps) < 2:
        kept = recorded.manifest.get("recording", {})
        reason = "its loop over epochs is not `for epoch in probe.epochs(n)`, or has one epoch only"
        if "no_checkpoints" in kept:
            reason = kept["no_checkpoints"]
        elif kept.get("checkpoint_every") == "never":
            reason = "it was recorded with --checkpoint-every never"
        raise UsageError(
            f"{run.path} has no checkpoints to split it at, because {reason}. Replay it without --jobs, or record it "
            "again, perhaps with --checkpoint-every 500steps."
        )
    return steps


def command(run: str | os.PathLike[str], options: ReplayOptions, number: int, count: int) -> list[str]:
    """The command line that replays one segment, with the options of the whole replay.

    >>> command("runs/a", ReplayOptions(every=2, force=True), 1, 3)[1:]
    ['-m', 'geomprobe', 'replay', 'runs/a', '--every', '2', '--segment', '1/3']
    """
    own = replace(options, segment=(number, count), force=False, resume=False)
    return [sys.executable, "-m", "geomprobe", "replay", os.fspath(run), *own.argv()]


def _share(manifest: Mapping[str, Any], place: int, count: int) -> dict[str, str]:
    """The environment of one of several processes: a GPU of its own, and threads that wait without spinning."""
    environment = dict(os.environ)
    # The same devices in another order, so that everything looks as it did, and its first one is its own.
    devices = [str(i) for i in range(len(manifest["hardware"]["devices"]))]
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(devices)).split(",")
    if len(devices) > 1:
        place %= len(devices)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[place:] + devices[:place])
    # The number of threads is the recorded one: another would change bits.
    if count * manifest["flags"]["num_threads"] > (os.cpu_count() or 1):
        environment = {**_YIELDING, **environment}
    return environment


def _run(commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]) -> list[int]:
    processes: list[subprocess.Popen[str]] = []
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in processes:
            process.send_signal(number)

    # Ctrl-C in a terminal reaches the children by itself.
    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        for command, environment in zip(commands, environments, strict=True):
            processes.append(subprocess.Popen(command, env=environment, **output))
        if asked:  # some of them may have started after that
            pass_on(signal.SIGTERM, None)
        with ThreadPoolExecutor(len(processes)) as readers:
            for i, process in enumerate(processes, 1):
                readers.submit(_show, process.stdout, f"[{i}/{len(processes)}]")
            codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return codes


def _show(output: Any, name: str) -> None:
    with output:
        for line in output:
            print(name, line, end="", file=sys.stderr)


def _account(failed: Mapping[int, int], ranges: Sequence[tuple[int, int]], run: RunFolder, count: int) -> str:
    how = {ReplayDiverged.exit_code: "diverged", -signal.SIGKILL: "was killed"}
    what = [
        f"segment {i}/{count} (steps {ranges[i - 1][0]} to {ranges[i - 1][1] - 1}) "
        f"{how.get(code, f'ended with exit code {code}')}"
        for i, code in failed.items()
    ]
    return (
        f"{', '.join(what)}; see its lines above. What the others measured is kept. Once that is mended, "
        f"`geomprobe replay {run.path} --jobs {count} --resume` does only what is left."
    )
