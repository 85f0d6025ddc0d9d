"""Write a trace for other tools: as CSV, Parquet, or TensorBoard scalars.

There is one row a step. Its columns are those of /steps, and those of every other reference under their paths.
In CSV, a value that was not measured is an empty cell, and every float reads back bit for bit (in older versions of
pandas, with float_precision="round_trip"). Parquet has `step` as its index, and the units, formula and source of a
column as the metadata of its field. TensorBoard stores single precision, and PATH is its log folder. Parquet and
TensorBoard need packages of their own: pip install 'geomprobe[export]'.

    geomprobe export runs/a --format csv -o trace.csv
    geomprobe export runs/a --format parquet -o trace.parquet
    geomprobe export runs/a --format tensorboard -o logs/a
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from geomprobe.report.export import FORMATS, export
from geomprobe.trace.printable import show
from geomprobe.trace.reader import open_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a trace file")
    parser.add_argument("--format", choices=FORMATS, required=True, help="what to write")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="the file to write; for TensorBoard, the log folder",
    )
    parser.add_argument("--force", action="store_true", help="overwrite PATH")


def run(arguments: argparse.Namespace) -> int:
    """Write the trace, and name what was written."""
    trace = open_trace(arguments.run)
    columns = export(trace, arguments.format, arguments.output, force=arguments.force)
    show(f"Wrote {arguments.output}: {len(columns)} columns of {trace.num_steps} steps")
    if trace.status != "complete":
        show(f"The trace is {trace.status}.", file=sys.stderr)
    show(f"Next: {_next(arguments)}", file=sys.stderr)
    return 0


def _next(arguments: argparse.Namespace) -> str:
    if arguments.format == "tensorboard":
        return f"tensorboard --logdir {arguments.output}"
    return f"geomprobe plot {arguments.run} -o {arguments.run.name}.png"
