"""Check a trace against the identities that any trace must satisfy.

Each column must fit the inner products that it was computed from, by another formula than
the one that computed it. cosine = rsi/eb, lolr = rsi/eb^2, |cosine| <= 1, distance > 0 before the end, and the status
must fit the certificate. For plain SGD, each distance must follow from the row before it (NWT eq. 4), and the last step
must have the right direction and length. Each check names its worst row and its tolerance, which follows from rounding.
Where the run was recorded with --sketch, the estimates may differ from what was measured by as much as chance allows.
Exits with 3 when an identity is broken. Of a run that `record --optimizer all` made, each path is checked.

    geomprobe verify runs/a
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from geomprobe.report.verify.verify import render, verify
from geomprobe.trace.path_folders import path_folders
from geomprobe.trace.printable import show
from geomprobe.trace.reader import open_trace

_BROKEN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a trace file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Verify and print; the exit code is 3 where an identity is broken."""
    paths = path_folders(arguments.run)
    results = {name: verify(open_trace(path)) for name, path in paths.items()} or {
        "": verify(open_trace(arguments.run))
    }
    if arguments.json:
        found: dict[str, Any] = {name: each.as_json() for name, each in results.items()}
        show(json.dumps({"optimizers": found} if paths else found[""], indent=2))
    else:
        show("\n\n".join(map(render, results.values())))
    if any(each.broken for each in results.values()):
        show(f"Next: geomprobe inspect {arguments.run}", file=sys.stderr)
        return _BROKEN
    show(f"Next: geomprobe plot {arguments.run} -o {arguments.run.stem}.png", file=sys.stderr)
    return 0
