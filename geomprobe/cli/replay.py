"""Pass 2: run the recorded script again, compare every step, and measure before each update.

Refuses before the first step if the environment differs from the recording's in a way that changes bits,
and stops at the first step that differs (exit code 3). A replay that reaches the end leaves RUN/trace.h5
with a certificate that it was the same run.

    geomprobe replay runs/a
    geomprobe replay runs/a --every 10 --per-parameter

Where a run cannot be repeated exactly, --uncertified goes on past the difference and marks every later row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from geomprobe.errors import UsageError
from geomprobe.trace.schema import TRACE_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("folder", metavar="RUN", help="a run folder that `geomprobe record` made")
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
        "--per-parameter", action="store_true", help="keep the inner products of each parameter tensor too"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the inner products: seconds at the start, faster steps",
    )
    parser.add_argument("--uncertified", action="store_true", help="go on where the replay differs")
    parser.add_argument("--force", action="store_true", help="replace an earlier trace")


def run(arguments: argparse.Namespace) -> int:
    """Replay, and say what was written and whether it held."""
    from geomprobe import passes, sealing
    from geomprobe.cli import launch
    from geomprobe.run import Run

    if arguments.every < 1:
        raise UsageError(f"--every {arguments.every}: N is at least 1")
    if "trace" in sealing.finish(Run(arguments.folder)):
        print(
            f"Wrote {arguments.folder}/{TRACE_FILE}: its replay was over, and only its sealing was cut off."
        )
        print(f"Next: geomprobe verify {arguments.folder}", file=sys.stderr)
        return 0
    with closing(passes.finished_record(Run(arguments.folder))) as recorded:
        script, environment = recorded.manifest["script"], recorded.manifest["environment"]
    known = {name: environment[name] for name in launch.START_UP if environment.get(name)}
    launch.restart_with(known)
    present = _present(script, arguments.folder)
    try:
        trace = passes.replay(
            launch.runner(present),
            Path(arguments.folder).absolute(),
            every=arguments.every,
            curvature_every=arguments.curvature_every,
            finite_step=arguments.finite_step,
            sharpness_every=arguments.sharpness_every,
            per_parameter=arguments.per_parameter,
            compiled=arguments.compile,
            uncertified=arguments.uncertified,
            force=arguments.force,
            script=present,
        )
    except launch.ScriptFailed as failure:
        kept = f"What was measured before that is kept: geomprobe inspect {arguments.folder}"
        raise launch.ScriptFailed(f"{failure} It did not when it was recorded. {kept}") from failure
    held = trace.certificate
    compared = f"{held['steps_equal']} of {held['steps_recorded']} steps equal"
    if trace.status == "complete":
        verdict = f"{compared}, w_T bitwise equal: certified"
    else:
        verdict = f"{compared}: UNCERTIFIED, later rows are marked in the column `same`"
    print(f"Wrote {arguments.folder}/{TRACE_FILE}: {verdict}.")
    print(f"Next: geomprobe verify {arguments.folder}", file=sys.stderr)
    return 0


def _present(script: Mapping[str, Any], run: str) -> dict[str, Any]:
    """The recorded script as it is now."""
    from geomprobe.cli import launch

    if script["kind"] == "function":
        raise UsageError(
            f"{run} was recorded by geomprobe.record({script['path']}, ...) in Python, so there is no script to "
            "run. Replay it in Python too: geomprobe.replay(train, ...)."
        )
    cwd = Path(script["cwd"])
    if not cwd.is_dir():
        raise UsageError(f"{run} was recorded in {cwd}, which is gone. Restore it; nothing was replayed.")
    return launch.described(script["path"], script["argv"], module=script["kind"] == "module", cwd=cwd)
