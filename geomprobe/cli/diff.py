"""Compare two runs: manifests, fingerprints step by step, final weights, and trace columns.

Names every manifest entry that differs with both values; the first step at which the two recordings
part, with the component (batch, RNG, weights, ...) and the tensor; and how far each column of the traces
is apart. Exits with 0 when nothing differs and with 3 when something does.

    geomprobe diff runs/a runs/b
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from geomprobe.report.diff import diff, render
from geomprobe.trace.printable import show

_DIFFERENT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="a run folder, or a file of one")


def run(arguments: argparse.Namespace) -> int:
    """Print the differences, and say whether there are any."""
    result = diff(*arguments.runs)
    show(render(result))
    show(f"Next: geomprobe plot {result.paths[0]} {result.paths[1]} -o diff.png", file=sys.stderr)
    return 0 if result.equal else _DIFFERENT
