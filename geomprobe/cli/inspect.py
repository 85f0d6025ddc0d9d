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
from pathlib import Path

from geomprobe.errors import RunError
from geomprobe.report import corridors
from geomprobe.report.summary.summary import damage, summarize
from geomprobe.report.summary.text import next_command, render
from geomprobe.trace.printable import show
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
    summary = summarize(arguments.run)
    show(json.dumps(summary, indent=2) if arguments.json else render(summary))
    if why := damage(summary):  # what can be read is shown all the same
        raise RunError(why)
    show(f"Next: {next_command(summary)}", file=sys.stderr)
    return 0


def _show_corridors(arguments: argparse.Namespace) -> int:
    trace = open_trace(arguments.run)
    found = corridors.summarize(trace, arguments.threshold, arguments.smooth)
    text = json.dumps(found, indent=2) if arguments.json else corridors.render(found, trace.num_steps)
    show(text)
    if trace.status != "complete":
        show(f"The trace is {trace.status}.", file=sys.stderr)
    show(f"Next: geomprobe plot {arguments.run} --occupancy -o occupancy.png", file=sys.stderr)
    return 0
