"""Pass 2: run the recorded script again, compare every step, and measure before each update.

Refuses before the first step if the environment differs from the recording's in a way that changes bits,
and stops at the first step that differs (exit code 3). A replay that reaches the end leaves RUN/trace.h5
with a certificate that it was the same run.

    geomprobe replay runs/a
    geomprobe replay runs/a --every 10 --per-parameter

A long replay can be split at the recording's checkpoints, and ends in the same trace:

    geomprobe replay runs/a --jobs 4              four processes here, each on a GPU of its own where there are several
    geomprobe replay runs/a --segment 3/4         one of four, for a job array; whichever ends last seals the trace
    geomprobe replay runs/a --resume              goes on where a replay was cut off, or begins

Where a run cannot be repeated exactly, --uncertified goes on past the difference and marks every later row.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geomprobe.cli import launch
from geomprobe.errors import RunError, UsageError
from geomprobe.trace.certificate import Certificate
from geomprobe.trace.reader import Trace, open_trace
from geomprobe.trace.record import open_record
from geomprobe.trace.schema import TRACE_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("folder", metavar="RUN", help="a run folder that `geomprobe record` made")
    _add_cadences(parser)
    _add_details(parser)
    _add_ways(parser)


def _add_cadences(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how often."""
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="measure each N-th step (default: 1)"
    )
    curvature = parser.add_mutually_exclusive_group()
    curvature.add_argument(
        "--curvature-every",
        type=int,
        metavar="N",
        help="take Hg at each N-th step (default: at each measured one for which there is an exact route)",
    )
    curvature.add_argument(
        "--no-curvature", dest="curvature_every", action="store_const", const=0, help="leave Hg out"
    )
    parser.add_argument(
        "--finite-step",
        action="store_true",
        help="where Hg is taken, also the loss and gradient after a whole step on the same minibatch "
        "(needs probe.backward(loss, closure=...))",
    )
    parser.add_argument(
        "--sharpness-every",
        type=int,
        default=0,
        metavar="N",
        help="take the top eigenvalue of the Hessian at each N-th step (Lanczos: tens of products each)",
    )
    parser.add_argument(
        "--held-out-every",
        type=int,
        default=0,
        metavar="N",
        help="measure a minibatch that the update does not use at each N-th step (needs probe.held_out)",
    )
    parser.add_argument(
        "--full-gradient-every",
        type=int,
        default=0,
        metavar="N",
        help="measure the gradient over all samples at the end of each N-th epoch (needs probe.full_gradient_of)",
    )


def _add_details(parser: argparse.ArgumentParser) -> None:
    """What else is kept of each measured step."""
    parser.add_argument(
        "--per-parameter", action="store_true", help="keep the inner products of each parameter tensor too"
    )
    parser.add_argument(
        "--per-rank",
        action="store_true",
        help="under DDP, keep those of each rank's own gradient too, before the ranks' are averaged",
    )
    parser.add_argument(
        "--before-clipping",
        action="store_true",
        help="measure each step's gradient as it was before the script clipped it, too",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the inner products: seconds at the start, faster steps",
    )


def _add_ways(parser: argparse.ArgumentParser) -> None:
    """How the replay is gone about."""
    parser.add_argument(
        "--reference",
        type=_reference,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="also measure against the weights in a file: a state_dict, or safetensors (may be repeated)",
    )
    parser.add_argument("--uncertified", action="store_true", help="go on where the replay differs")
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--force", action="store_true", help="replace an earlier trace")
    there.add_argument(
        "--resume", action="store_true", help="go on with a replay that was cut off, given the same options"
    )
    split = parser.add_mutually_exclusive_group()
    split.add_argument(
        "--jobs", type=int, default=1, metavar="K", help="split into K processes on this machine"
    )
    split.add_argument(
        "--segment",
        type=_segment,
        metavar="I/K",
        help="replay only the I-th of K pieces, going on where it was cut off",
    )
    launch.add_patience(parser)


def run(arguments: argparse.Namespace) -> int:
    """Replay, and say what was written and whether it held."""
    _restart_early(arguments.folder)
    from geomprobe.cli import jobs as parallel
    from geomprobe.passes import finalize as sealing
    from geomprobe.passes import lease as claims
    from geomprobe.trace.run_folder import RunFolder

    _require_sense(arguments)
    run = RunFolder(arguments.folder)
    if launch.first_rank() and "trace" in sealing.finish(run):
        print(
            f"Wrote {arguments.folder}/{TRACE_FILE}: its replay was over, and only its sealing was cut off."
        )
        print(f"Next: geomprobe verify {arguments.folder}", file=sys.stderr)
        return 0
    over = arguments.resume and run.trace.exists() and not run.stream.exists()
    if over and open_trace(run.path).status == "complete":
        print(f"Nothing to do: {arguments.folder}/{TRACE_FILE} is complete.")
        return 0
    with contextlib.closing(claims.finished_record(run, launch.first_rank())) as recorded:
        manifest = recorded.manifest
        present = launch.present(manifest["script"], arguments.folder)
        launch.restart_with(_at_start_up(manifest))
        if (
            arguments.segment
            and (pieces := parallel.pieces(run, recorded, arguments.segment[1])) < arguments.segment[0]
        ):
            print(f"Nothing to do: the checkpoints of {arguments.folder} cut it into {pieces} segments only.")
            return 0
        if arguments.jobs != 1:
            parallel.replay(arguments, recorded)
            return _tell(open_trace(arguments.folder), arguments.folder)
    return _tell(_replayed(arguments, present), arguments.folder)


def _restart_early(folder: str) -> None:
    """Start again as the recording was started, before torch is imported for nothing."""
    with contextlib.suppress(RunError), open_record(folder) as recorded:
        if recorded.status == "complete":
            launch.restart_with(_at_start_up(recorded.manifest))


def _require_sense(arguments: argparse.Namespace) -> None:
    if arguments.every < 1:
        raise UsageError(f"--every {arguments.every}: N is at least 1")
    if arguments.jobs < 1:
        raise UsageError(f"--jobs {arguments.jobs}: K is at least 1")
    if arguments.jobs > 1 and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UsageError(
            f"--jobs {arguments.jobs}: it would start processes beside those of this launch. Start a launch for each "
            "segment instead, here or on other machines: torchrun ... -m geomprobe replay RUN --segment I/K"
        )
    if arguments.segment and (arguments.force or arguments.resume):
        raise UsageError("--segment goes on by itself where it was cut off; remove --force or --resume")
    if arguments.uncertified and (arguments.segment or arguments.resume or arguments.jobs > 1):
        raise UsageError(
            "--uncertified replays from the start, in one process: the checkpoints are of the run that it differs from"
        )


def _replayed(arguments: argparse.Namespace, script: Mapping[str, Any]) -> Trace:
    from geomprobe.passes import api as passes

    try:
        return passes.replay(
            launch.runner(script),
            Path(arguments.folder).absolute(),
            every=arguments.every,
            curvature_every=arguments.curvature_every,
            finite_step=arguments.finite_step,
            sharpness_every=arguments.sharpness_every,
            held_out_every=arguments.held_out_every,
            full_gradient_every=arguments.full_gradient_every,
            per_parameter=arguments.per_parameter,
            per_rank=arguments.per_rank,
            before_clipping=arguments.before_clipping,
            compiled=arguments.compile,
            references=dict(arguments.reference),
            uncertified=arguments.uncertified,
            force=arguments.force,
            resume=arguments.resume,
            segment=arguments.segment,
            patience=arguments.patience,
            script=script,
        )
    except launch.ScriptFailed as failure:
        kept = f"What was measured before that is kept: geomprobe inspect {arguments.folder}"
        raise launch.ScriptFailed(f"{failure} It did not when it was recorded. {kept}") from failure


def _tell(trace: Trace, run: str) -> int:
    """Say what a replay has come to; of several processes, one does."""
    if not launch.first_rank():
        return 0
    certificate = Certificate.of(trace.certificate)
    if trace.status == "incomplete":
        print(f"Wrote {trace.num_steps} steps of {run}/{TRACE_FILE}; other segments of it are still to come.")
        return 0
    if trace.status == "complete":
        verdict = f"{certificate.counts}, w_T bitwise equal: certified"
    else:
        verdict = f"{certificate.counts}: UNCERTIFIED, later rows are marked in the column `same`"
    print(f"Wrote {run}/{TRACE_FILE}: {verdict}.")
    print(f"Next: geomprobe verify {run}", file=sys.stderr)
    return 0


def _at_start_up(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What the recording had in its environment that acts only when a process starts."""
    recorded = {**manifest["environment"], "OMP_NUM_THREADS": manifest["host"].get("OMP_NUM_THREADS")}
    names = (*launch.START_UP, "OMP_NUM_THREADS")
    return {name: recorded[name] for name in names if recorded.get(name)}


def _reference(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, such as best=checkpoints/best.pt")
    return name, str(Path(path).absolute())


def _segment(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is none of 1/K to K/K, such as 3/4")
    return int(number), int(count)
