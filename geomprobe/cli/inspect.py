"""Say what a run holds, and whether its replay held.

Works on a run folder, finished or not, being written or cut off, and on a trace.h5 or record.h5 by
itself. Shows the status of both passes, the certificate (or the first difference), the script, the
optimizer, and a line for each column with its range.

    geomprobe inspect runs/a
    geomprobe inspect runs/a --json | jq .trace.certificate
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from geomprobe.report.summary import summarize
from geomprobe.report.summary_text import next_command, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, a trace file or a record file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Print the summary."""
    summary = summarize(arguments.run)
    print(json.dumps(summary, indent=2) if arguments.json else render(summary), flush=True)
    print(f"Next: {next_command(summary)}", file=sys.stderr)
    return 0
