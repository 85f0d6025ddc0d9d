"""Draw columns of one or several runs: RSI, EB and cosine, unless others are named.

The figure is like figure 2 of NWT. A line is the mean of each epoch. A band goes from the minimum of the epoch to its
maximum. A dashed line is the null model: a random walk of as many steps (NWT eq. 8). A trace without epochs is
drawn by windows of steps. Several runs share one panel. The title names every trace that is not certified. The suffix
of the file sets the format (png, pdf, svg). Needs matplotlib: pip install 'geomprobe[plot]'.

    geomprobe plot runs/a runs/b -o gamma.png --columns cosine,lolr --skip-last-epoch
    geomprobe plot runs/a -o rates.png --columns lr,lolr,clr                       (NWT figure 3, CG figure 4)
    geomprobe plot runs/a -o corridor.png --columns loss,hg_norm,relative_residual (CG figure 7)
    geomprobe plot runs/a runs/b -o occupancy.png --occupancy --smooth 25
    geomprobe plot runs/a -o estimate.png --sketch
    geomprobe plot runs/a -o horizon.png --columns horizon

Of a run that `record --optimizer all` made, all paths are drawn.
With --occupancy, the figure shows which share of the measured steps is below each threshold of the relative residual.
With --sketch, it shows gamma as the sketches of the recording estimate it, so no replay is needed. The column horizon
comes from the sketches too. It is a map of the cosine between each gradient and the way of the next h steps, and its
mean over the steps at each h. Both need a run that was recorded with --sketch.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from geomprobe.errors import UsageError
from geomprobe.report.curves import without_file
from geomprobe.report.output import refuse_existing
from geomprobe.report.plot import COLUMNS, figure, occupancy_figure, save
from geomprobe.report.sketch_figures import gamma_figure, horizon_figure
from geomprobe.trace.path_folders import path_folders
from geomprobe.trace.printable import show
from geomprobe.trace.reader import open_trace
from geomprobe.trace.record import open_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HORIZON = "horizon"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or trace files")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the figure to write")
    parser.add_argument(
        "--columns",
        type=lambda text: text.split(","),
        default=list(COLUMNS),
        metavar="A,B",
        help=f"columns of the trace, a panel each (default: {','.join(COLUMNS)}); or {_HORIZON}, alone",
    )
    parser.add_argument(
        "--skip-last-epoch", action="store_true", help="leave out the last epoch, where w is close to w*"
    )
    parser.add_argument("--no-null-model", action="store_true", help="leave out the random walk")
    parser.add_argument("--occupancy", action="store_true", help="draw the share of steps below each relative residual")
    parser.add_argument("--smooth", type=int, metavar="N", help="with --occupancy: first average over N measured steps")
    parser.add_argument("--sketch", action="store_true", help="draw gamma as the recording's sketches estimate it")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def run(arguments: argparse.Namespace) -> int:
    """Draw the figure and write it."""
    output: Path = arguments.output
    refuse_existing(output, arguments.force)
    save(_drawn(arguments), output)
    show(f"Wrote {output}")
    show(f"Next: geomprobe inspect {arguments.runs[0]}", file=sys.stderr)
    return 0


def _drawn(arguments: argparse.Namespace) -> Figure:
    shown = {"skip_last_epoch": arguments.skip_last_epoch, "with_null_model": not arguments.no_null_model}
    if arguments.sketch or _HORIZON in arguments.columns:
        return _of_sketches(arguments, shown)
    traces = [open_trace(run) for run in _runs(arguments)]
    if arguments.occupancy:
        return occupancy_figure(traces, arguments.smooth)
    return figure(traces, arguments.columns, **shown)


def _of_sketches(arguments: argparse.Namespace, shown: dict[str, bool]) -> Figure:
    with contextlib.ExitStack() as stack:
        records = [stack.enter_context(open_record(without_file(run))) for run in _runs(arguments)]
        if _HORIZON not in arguments.columns:
            return gamma_figure(records, **shown)
        if arguments.columns != [_HORIZON] or len(records) > 1:
            raise UsageError(
                f"the column {_HORIZON} is a figure of its own, of one run: name one run, and no other column"
            )
        return horizon_figure(records[0])


def _runs(arguments: argparse.Namespace) -> list[Path]:
    return [path for run in arguments.runs for path in path_folders(run).values() or [run]]
