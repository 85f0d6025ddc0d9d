"""Write the report of a run: one HTML page for a browser, for mail or for print.

The page first states whether the replay was the recorded run. Then it shows the figures of the papers by epoch (RSI,
EB, cosine, loLR, distance, and with Hg the near-corridors), the numbers, the commands that make the run again, its
files and its manifest. The page needs no other file, no network and no script. A run that failed, or whose passes
have not finished, is reported as it is. Every figure of a trace that is not certified carries its status. Needs
Jinja2, and matplotlib where there is a trace: pip install 'geomprobe[report]'.

    geomprobe report runs/a -o a.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from geomprobe.errors import RunError
from geomprobe.report.html.page import write
from geomprobe.trace.printable import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, a trace file or a record file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the HTML file to write")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def run(arguments: argparse.Namespace) -> int:
    """Write the page, and name what was written."""
    found = write(arguments.run, arguments.output, force=arguments.force)
    show(f"Wrote {arguments.output}: {found.headline}")
    if found.damage:  # the page shows what can be read
        raise RunError(found.damage)
    show(f"Next: open {arguments.output} in a browser", file=sys.stderr)
    return 0
