"""Pass 2: run the recorded script again, compare every step, and measure before each update.

Refuses before the first step if the environment differs from the recording's in a way that changes bits,
and stops at the first step that differs (exit code 3). A replay that reaches the end leaves RUN/trace.h5
with a certificate that it was the same run.

    geomprobe replay runs/a
    geomprobe replay runs/a --every 10 --per-parameter

Where `record --optimizer all` has recorded several paths, each of them is replayed.

A long replay can be split at the recording's checkpoints, and ends in the same trace:

    geomprobe replay runs/a --jobs 4              four processes here, each on a GPU of its own where there are several
    geomprobe replay runs/a --segment 3/4         one of four, for a job array; whichever ends last seals the trace
    geomprobe replay runs/a --resume              continues where a replay was cut off, or starts

Where a run cannot be repeated exactly, --uncertified continues past the difference and marks every later row.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geomprobe.cli import launch
from geomprobe.errors import RunError
from geomprobe.measure.option_fields import whole
from geomprobe.passes.options import ReplayOptions
from geomprobe.trace.certificate import Certificate
from geomprobe.trace.path_folders import path_folders
from geomprobe.trace.printable import show
from geomprobe.trace.reader import Trace, open_trace
from geomprobe.trace.record import open_record
from geomprobe.trace.schema import TRACE_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("folder", metavar="RUN", help="a run folder that `geomprobe record` made")
    launch.add_trust(parser)
    groups = ReplayOptions.add_arguments(parser)
    groups["split"].add_argument(
        "--jobs",
        type=whole(1),
        default=1,
        metavar="K",
        help="split the replay into K processes on this machine",
    )


def run(arguments: argparse.Namespace) -> int:
    """Replay, and print what was written and whether the replay was the recorded run."""
    options = ReplayOptions.of_arguments(arguments)
    folder, count = arguments.folder, arguments.jobs
    if path_folders(folder):
        from geomprobe.cli import every_path

        kept = [*["--trust"] * arguments.trust, *["--debug"] * arguments.debug]
        return every_path.replay(Path(folder), options, [*kept, *(["--jobs", str(count)] if count > 1 else [])])
    launch.require_trust(folder, arguments.trust)
    _restart_early(folder)
    from geomprobe.cli import jobs
    from geomprobe.passes import finalize, lease
    from geomprobe.trace.run_folder import RunFolder

    if count > 1:
        jobs.require_sense(options, count)
    run = RunFolder(folder)
    if launch.first_rank() and "trace" in finalize.finish(run):
        show(f"Wrote {folder}/{TRACE_FILE}: its replay was over, and only its sealing was cut off.")
        show(f"Next: geomprobe verify {folder}", file=sys.stderr)
        return 0
    over = options.resume and run.trace.exists() and not run.stream.exists()
    if over and open_trace(run.path).status == "complete":
        show(f"Nothing to do: {folder}/{TRACE_FILE} is complete.")
        return 0
    with contextlib.closing(lease.finished_record(run, launch.first_rank())) as recorded:
        script = launch.present(recorded.manifest["script"], folder)
        launch.restart_with(_at_start_up(recorded.manifest))
        if options.segment:
            number, asked = options.segment
            if (pieces := jobs.pieces(run, recorded, asked)) < number:
                show(f"Nothing to do: the checkpoints of {folder} cut it into {pieces} segments only.")
                return 0
        if count > 1:
            kept = [*["--trust"] * arguments.trust, *["--debug"] * arguments.debug]
            jobs.replay(run, recorded, options, count, kept)
            return _report(open_trace(folder), folder)
    launch.announce("replay", script)
    return _report(_replayed(folder, options, script), folder)


def _restart_early(folder: str) -> None:
    """Start again as the recording was started, before torch is imported for nothing."""
    with contextlib.suppress(RunError), open_record(folder) as recorded:
        if recorded.status == "complete":
            launch.restart_with(_at_start_up(recorded.manifest))


def _replayed(folder: str, options: ReplayOptions, script: Mapping[str, Any]) -> Trace:
    from geomprobe.passes.api import run_replay

    try:
        return run_replay(launch.runner(script), Path(folder).absolute(), options, script)
    except launch.ScriptFailed as failure:
        kept = f"What was measured before that is kept: geomprobe inspect {folder}"
        raise launch.ScriptFailed(f"{failure} It did not when it was recorded. {kept}") from failure


def _report(trace: Trace, run: str) -> int:
    """Print how the replay ended; of several processes, the first does."""
    if not launch.first_rank():
        return 0
    certificate = Certificate.of(trace.certificate)
    if trace.status == "incomplete":
        show(f"Wrote {trace.num_steps} steps of {run}/{TRACE_FILE}; other segments of it are still to come.")
        return 0
    if trace.status == "complete":
        verdict = f"{certificate.counts}, w_T bitwise equal: certified"
    else:
        verdict = f"{certificate.counts}: UNCERTIFIED, later rows are marked in the column `same`"
    show(f"Wrote {run}/{TRACE_FILE}: {verdict}.")
    if not trace.manifest.get("strict", True):
        came = "all of them came out" if trace.status == "complete" else "not all of them came out"
        show(f"It was recorded with --no-strict, so some operations may have no deterministic form: {came} the same.")
    show(f"Next: geomprobe verify {run}", file=sys.stderr)
    return 0


def _at_start_up(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What the recording had in its environment that acts only when a process starts."""
    host, environment = (manifest.get(name) or {} for name in ("host", "environment"))
    recorded = {**environment, "OMP_NUM_THREADS": host.get("OMP_NUM_THREADS")}
    names = (*launch.START_UP, "OMP_NUM_THREADS")
    return {name: recorded[name] for name in names if recorded.get(name)}
