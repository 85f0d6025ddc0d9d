"""Show what is in a run, and whether its replay is certified.

Works on a run folder, finished or not, being written or cut off, and on a trace.h5 or record.h5 by
itself. Shows the status of both passes, the certificate (or the first difference), the script, the
optimizer, and a line for each column with its range.

    geomprobe inspect runs/a
    geomprobe inspect runs/a --json | jq .trace.certificate
    geomprobe inspect runs/a --corridors --threshold 0.05 --smooth 25

With --corridors it shows instead how much of training was spent in near-corridors (CG): the share of steps
whose relative residual is below each of several thresholds, and the stays below one of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geomprobe.errors import RunError
from geomprobe.report import corridors
from geomprobe.report.summary.summary import damage, summarize
from geomprobe.report.summary.text import next_command, render
from geomprobe.report.table import table
from geomprobe.trace.path_folders import path_folders
from geomprobe.trace.printable import printable, show
from geomprobe.trace.reader import open_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, a trace file or a record file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--corridors", action="store_true", help="show where the near-corridors are")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.1,
        help="with --corridors: relative residual below which a step is inside (default: 0.1)",
    )
    parser.add_argument(
        "--smooth",
        type=int,
        metavar="N",
        help="with --corridors: average over N measured steps first, against minibatch noise",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the summary."""
    if arguments.corridors:
        return _show_corridors(arguments)
    if paths := path_folders(arguments.run):
        return _show_paths(arguments, paths)
    summary = summarize(arguments.run)
    show(json.dumps(summary, indent=2) if arguments.json else render(summary))
    if why := damage(summary):  # what can be read is shown all the same
        raise RunError(why)
    show(f"Next: {next_command(summary)}", file=sys.stderr)
    return 0


def _show_paths(arguments: argparse.Namespace, paths: Mapping[str, Path]) -> int:
    """What each of several paths is, in a line; as JSON, the whole summary of each."""
    found = {name: _summary(path) for name, path in paths.items()}
    if arguments.json:
        show(json.dumps({"path": str(arguments.run), "optimizers": found}, indent=2))
    else:
        lines = [[name, *(_in_short(each[kind]) for kind in ("record", "trace"))] for name, each in found.items()]
        show(f"{printable(str(arguments.run))}: the paths of {len(paths)} optimizers, each a run by itself")
        show(table(["optimizer", "recorded", "measured"], lines))
    name, path = next(iter(paths.items()))
    show(f"Next: geomprobe inspect {path}, or in Python open_trace({str(arguments.run)!r}, {name!r})", file=sys.stderr)
    if why := "; ".join(filter(None, map(damage, found.values()))):
        raise RunError(why)
    return 0


def _summary(path: Path) -> dict[str, Any]:
    try:
        return summarize(path)
    except RunError as nothing:  # its recording has only begun
        neither = {"error": str(nothing), "damaged": False}
        return {"path": str(path), "record": neither, "trace": neither}


def _in_short(of_pass: Mapping[str, Any]) -> str:
    return "no" if "error" in of_pass else f"{of_pass['status']}, {of_pass['num_steps']} steps"


def _show_corridors(arguments: argparse.Namespace) -> int:
    trace = open_trace(arguments.run)
    found = corridors.summarize(trace, arguments.threshold, arguments.smooth)
    text = json.dumps(found, indent=2) if arguments.json else corridors.render(found, trace.num_steps)
    show(text)
    if trace.status != "complete":
        show(f"The trace is {trace.status}.", file=sys.stderr)
    show(f"Next: geomprobe plot {arguments.run} --occupancy -o occupancy.png", file=sys.stderr)
    return 0
