"""Draw columns of one or several runs: RSI, EB and cosine, unless others are named.

The figure is like figure 2 of NWT. A line is the mean of each epoch. A band goes from the minimum of the epoch to its
maximum. A dashed line is the null model: a random walk of as many steps (NWT eq. 8). A trace without epochs is
drawn by windows of steps. Several runs share one panel. The title names every trace that is not certified. The suffix
of the file sets the format (png, pdf, svg). Needs matplotlib: pip install 'geomprobe[plot]'.

    geomprobe plot runs/a runs/b -o gamma.png --columns cosine,lolr --skip-last-epoch
    geomprobe plot runs/a -o rates.png --columns lr,lolr,clr                       (NWT figure 3, CG figure 4)
    geomprobe plot runs/a -o corridor.png --columns loss,hg_norm,relative_residual (CG figure 7)
    geomprobe plot runs/a runs/b -o occupancy.png --occupancy --smooth 25

Of a run that `record --optimizer all` made, all paths are drawn.
With --occupancy, the figure shows which share of the measured steps is below each threshold of the relative residual.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from geomprobe.report.output import refuse_existing
from geomprobe.report.plot import COLUMNS, figure, occupancy_figure, save
from geomprobe.trace.path_folders import path_folders
from geomprobe.trace.printable import show
from geomprobe.trace.reader import open_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or trace files")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the figure to write")
    parser.add_argument(
        "--columns",
        type=lambda text: text.split(","),
        default=list(COLUMNS),
        metavar="A,B",
        help=f"columns of the trace, a panel each (default: {','.join(COLUMNS)})",
    )
    parser.add_argument(
        "--skip-last-epoch", action="store_true", help="leave out the last epoch, where w is close to w*"
    )
    parser.add_argument("--no-null-model", action="store_true", help="leave out the random walk")
    parser.add_argument("--occupancy", action="store_true", help="draw the share of steps below each relative residual")
    parser.add_argument("--smooth", type=int, metavar="N", help="with --occupancy: first average over N measured steps")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def run(arguments: argparse.Namespace) -> int:
    """Draw the figure and write it."""
    output: Path = arguments.output
    refuse_existing(output, arguments.force)
    traces = [open_trace(path) for run in arguments.runs for path in path_folders(run).values() or [run]]
    if arguments.occupancy:
        drawing = occupancy_figure(traces, arguments.smooth)
    else:
        drawing = figure(
            traces,
            arguments.columns,
            skip_last_epoch=arguments.skip_last_epoch,
            with_null_model=not arguments.no_null_model,
        )
    save(drawing, output)
    show(f"Wrote {output}")
    show(f"Next: geomprobe inspect {arguments.runs[0]}", file=sys.stderr)
    return 0
