"""Draw RSI, EB and cosine (or any columns) of one or several runs.

As NWT's figure 2: a line for the epoch mean, a band from epoch minimum to epoch maximum, and a dashed
line for the null model, a random walk of as many steps (NWT eq. 8). Traces without epochs are drawn by
windows of steps. Several runs are laid over one another. A trace that is not certified says so in the
title. The file's suffix picks the format (png, pdf, svg). Needs matplotlib: pip install 'geomprobe[plot]'.

    geomprobe plot runs/a runs/b -o gamma.png --columns cosine,lolr --skip-last-epoch
    geomprobe plot runs/a -o rates.png --columns lr,lolr,clr                       (NWT figure 3, CG figure 4)
    geomprobe plot runs/a -o corridor.png --columns loss,hg_norm,relative_residual (CG figure 7)
    geomprobe plot runs/a runs/b -o occupancy.png --occupancy --smooth 25

With --occupancy it draws how much of training was spent below each threshold of the relative residual.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from geomprobe.report.output import refuse_existing
from geomprobe.report.plot import COLUMNS, figure, occupancy_figure, save
from geomprobe.trace.reader import open_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or trace files")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the figure to write"
    )
    parser.add_argument(
        "--columns",
        type=lambda text: text.split(","),
        default=list(COLUMNS),
        metavar="A,B",
        help=f"columns of the trace, a panel each (default: {','.join(COLUMNS)})",
    )
    parser.add_argument(
        "--skip-last-epoch", action="store_true", help="leave out the last epoch, where w nears w*"
    )
    parser.add_argument("--no-null-model", action="store_true", help="leave out the random walk")
    parser.add_argument("--occupancy", action="store_true", help="draw the occupancy of near-corridors")
    parser.add_argument(
        "--smooth", type=int, metavar="N", help="with --occupancy: average over N measured steps first"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def run(arguments: argparse.Namespace) -> int:
    """Draw the figure and write it."""
    output: Path = arguments.output
    refuse_existing(output, arguments.force)
    traces = [open_trace(run) for run in arguments.runs]
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
    print(f"Wrote {output}")
    print(f"Next: geomprobe inspect {arguments.runs[0]}", file=sys.stderr)
    return 0
