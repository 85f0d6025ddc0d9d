"""Pass 1: train, and keep the final weights and what a replay needs.

Runs SCRIPT (or a module, with -m) with its arguments, as `python` would, and records the path of the
optimizers that step one model, whether or not the script calls geomprobe.attach. Everything lands in the folder
RUN.

    geomprobe record -o runs/a train.py --lr 0.1
    geomprobe record -o runs/a --seed 0 --reference-steps 100,200 -m project.train
    geomprobe record -o runs/a --resume train.py --lr 0.1
    geomprobe record -o runs/g --optimizer Generator gan.py
    geomprobe record -o runs/g --optimizer all gan.py        each path, into runs/g/optimizers/NAME

A checkpoint of the whole state is written at each epoch of `for epoch in probe.epochs(n)`. With --resume, a
recording that was cut off continues from its last checkpoint, and one that does not exist yet starts, so that a
queue can run the same line again and again. On SIGTERM a checkpoint is written after the present step, and the
exit code is 75.

Options of geomprobe come before the script; what follows it is the script's own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from geomprobe.cli import launch
from geomprobe.errors import RunError, UsageError
from geomprobe.passes.options import ALL, RecordOptions
from geomprobe.trace.printable import show
from geomprobe.trace.record import Record, open_record
from geomprobe.trace.schema import RECORD_FILE, STREAM_DIR


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.formatter_class = launch.CommandHelp
    parser.add_argument("-o", "--output", metavar="RUN", required=True, help="the run folder to make")
    launch.add_trust(parser)
    RecordOptions.add_arguments(parser)
    parser.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar="MODULE [ARGS...]",
        help="run a module instead of a script",
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT [ARGS...]", help="what to run")


def run(arguments: argparse.Namespace) -> int:
    """Record, and name what was written."""
    options = RecordOptions.of_arguments(arguments)
    command = arguments.module or arguments.script
    folder = Path(arguments.output).absolute()
    if options.optimizer == ALL:
        from geomprobe.cli import every_path

        if not command:
            raise UsageError("Name the script to record: geomprobe record -o RUN --optimizer all train.py [ARGS...]")
        kept = [*["--trust"] * arguments.trust, *["--debug"] * arguments.debug]
        return every_path.record(folder, options, [*kept, *["-m"] * bool(arguments.module), *command])
    if options.resume:
        launch.require_trust(folder, arguments.trust)
    if options.resume and _complete(folder):
        show(f"Nothing to do: {arguments.output}/{RECORD_FILE} is complete.")
        return 0
    if command:
        script = launch.described(command[0], command[1:], module=bool(arguments.module))
    elif options.resume:
        script = _begun(folder, arguments.output)
    else:
        raise UsageError("Name the script to record: geomprobe record -o RUN train.py [ARGS...]")
    launch.restart_with(launch.START_UP)

    from geomprobe.passes.api import run_record

    if not command:
        launch.announce("record", script)
    try:
        with run_record(launch.runner(script), folder, options, script) as recorded:
            if launch.first_rank():
                show(_account(recorded, arguments.output))
                show(f"Next: geomprobe replay {arguments.output}", file=sys.stderr)
    except launch.ScriptFailed as failure:
        raise launch.ScriptFailed(f"{failure} {_left_behind(folder, arguments.output)}") from failure
    return 0


def _account(recorded: Record, run: str) -> str:
    lines = [
        f"Wrote {run}/{RECORD_FILE}: {recorded.num_steps} steps of {recorded.num_parameters} parameters, "
        f"seed {recorded.manifest['seed']}, references: {', '.join(recorded.references)}."
    ]
    missed = recorded.manifest.get("missed_reference_steps")
    if missed:
        lines.append(f"Reference steps {missed} lie beyond the last step, {recorded.num_steps - 1}; not kept.")
    return "\n".join(lines)


def _complete(folder: Path) -> bool:
    if not (folder / RECORD_FILE).exists() or (folder / STREAM_DIR).exists():
        return False  # in the latter case a kill left something to clear
    with open_record(folder) as recorded:
        return recorded.status == "complete"


def _begun(folder: Path, run: str) -> dict[str, Any]:
    """The script of a recording that was cut off, as the script is now."""
    try:
        with open_record(folder) as begun:
            return launch.present(begun.manifest.get("script") or {}, run)
    except RunError as nothing:
        raise UsageError(
            f"{nothing}. Name the script to start with: geomprobe record -o {run} --resume train.py"
        ) from None


def _left_behind(folder: Path, run: str) -> str:
    if not (folder / RECORD_FILE).exists():
        return "It had not taken a step, so there is nothing in the record."
    return f"What was recorded before that is kept: geomprobe inspect {run}"
