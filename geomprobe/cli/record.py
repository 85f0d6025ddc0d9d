"""Pass 1: train, and keep the final weights and what a replay needs.

Runs SCRIPT (or a module, with -m) with its arguments, as `python` would, and records the path of its one
optimizer, whether or not the script calls geomprobe.attach. Everything lands in the folder RUN.

    geomprobe record -o runs/a train.py --lr 0.1
    geomprobe record -o runs/a --seed 0 --reference-steps 100,200 -m project.train
    geomprobe record -o runs/a --resume train.py --lr 0.1

The whole state is kept at each epoch of `for epoch in probe.epochs(n)`. With --resume, a recording that was cut
off goes on from there, and one that is not there begins, so that a queue can run the same line again and again.
On SIGTERM the state is kept after the present step, and the exit code is 75.

Options of geomprobe come before the script; what follows it is the script's own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from geomprobe.cli import launch
from geomprobe.errors import RunError, UsageError
from geomprobe.trace.record import Record, open_record
from geomprobe.trace.schema import RECORD_FILE, STREAM_DIR


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("-o", "--output", metavar="RUN", required=True, help="the run folder to make")
    parser.add_argument("--seed", type=int, help="for Python, NumPy and torch (default: drawn, and stored)")
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--force", action="store_true", help="replace a run that is there")
    there.add_argument(
        "--resume",
        action="store_true",
        help="go on with a recording that was cut off, with its own options (the script may be left out)",
    )
    parser.add_argument(
        "--strict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="enforce deterministic algorithms (default: yes; --no-strict is stored in the manifest)",
    )
    _add_kept(parser)
    launch.add_patience(parser)
    parser.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar="MODULE",
        help="run a module instead of a script",
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT [ARGS...]", help="what to run")


def _add_kept(parser: argparse.ArgumentParser) -> None:
    """What is kept on the way."""
    parser.add_argument(
        "--checkpoint-every",
        default="epoch",
        metavar="WHEN",
        help="epoch (default), a number of steps or minutes (500steps, 30min; these need probe.batches), or never",
    )
    parser.add_argument(
        "--keep-checkpoints",
        type=_count,
        default=32,
        metavar="N",
        help="keep at most N, spread evenly over the run (default: 32), or all",
    )
    parser.add_argument(
        "--reference-steps",
        type=_steps,
        default=(),
        metavar="N,N,...",
        help="also keep the weights before these steps, as further references",
    )
    parser.add_argument(
        "--ema",
        type=_decays,
        default=(),
        metavar="B,B,...",
        help="also keep exponential moving averages of the weights, such as 0.999, as references ema-B",
    )
    parser.add_argument(
        "--average", action="store_true", help="also keep the running average of the weights, as a reference"
    )


def run(arguments: argparse.Namespace) -> int:
    """Record, and say what was written."""
    command = arguments.module or arguments.script
    folder = Path(arguments.output).absolute()
    if arguments.resume and _complete(folder):
        print(f"Nothing to do: {arguments.output}/{RECORD_FILE} is complete.")
        return 0
    if command:
        script = launch.described(command[0], command[1:], module=bool(arguments.module))
    elif arguments.resume:
        script = _begun(folder, arguments.output)
    else:
        raise UsageError("Name the script to record: geomprobe record -o RUN train.py [ARGS...]")
    launch.restart_with(launch.START_UP)

    from geomprobe.passes import api as passes

    try:
        with passes.record(
            launch.runner(script),
            folder,
            seed=arguments.seed,
            strict=arguments.strict,
            force=arguments.force,
            resume=arguments.resume,
            checkpoint_every=arguments.checkpoint_every,
            keep_checkpoints=arguments.keep_checkpoints,
            reference_steps=arguments.reference_steps,
            ema=arguments.ema,
            average=arguments.average,
            patience=arguments.patience,
            script=script,
        ) as recorded:
            if launch.first_rank():
                print(_account(recorded, arguments.output))
                print(f"Next: geomprobe replay {arguments.output}", file=sys.stderr)
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
        lines.append(
            f"Reference steps {missed} lie beyond the last step, {recorded.num_steps - 1}; not kept."
        )
    return "\n".join(lines)


def _complete(folder: Path) -> bool:
    if (
        not (folder / RECORD_FILE).exists() or (folder / STREAM_DIR).exists()
    ):  # a kill left something to clear
        return False
    with open_record(folder) as recorded:
        return recorded.status == "complete"


def _begun(folder: Path, run: str) -> dict[str, Any]:
    """The script of a recording that is to go on, as it is now."""
    try:
        with open_record(folder) as begun:
            return launch.present(begun.manifest["script"], run)
    except RunError as nothing:
        raise UsageError(
            f"{nothing}. Name the script to begin with: geomprobe record -o {run} --resume train.py"
        ) from None


def _left_behind(folder: Path, run: str) -> str:
    if not (folder / RECORD_FILE).exists():
        return "It had not taken a step, so there is nothing in the record."
    return f"What was recorded before that is kept: geomprobe inspect {run}"


def _decays(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of decays such as 0.99,0.999") from None


def _count(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, and not 'all'") from None


def _steps(text: str) -> tuple[int, ...]:
    try:
        steps = tuple(int(item) for item in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of steps such as 100,200") from None
    if min(steps) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: steps are counted from 0")
    return steps
