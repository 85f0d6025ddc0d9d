"""The papers' experiments by figure: list them, run one, rebuild the gallery of all, or draw a figure of runs.

    python scripts/experiments list
    python scripts/experiments run nwt-fig1-batch-size                 at the paper's scale, on its data under data/
    python scripts/experiments run nwt-fig1-batch-size --scale tiny    minutes on two cores, without a download
    python scripts/experiments gallery --scale tiny --jobs 2           all of them, and docs/gallery/papers.md
    python scripts/experiments figure nwt fig1 runs/a runs/b -o gamma.png
    python scripts/experiments figure theory --only landscapes

NWT is "No Wrong Turns", CG is "Corridor Geometry in Gradient-Based Optimization". Each training is recorded and
replayed by `python -m geomprobe`, has to be certified, and is made once, even if several figures need it. The same
command continues what was stopped; it only draws again what is finished.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import clr
import held_out
import schedule
import torch
from catalog.catalog import EXPERIMENTS
from catalog.entry import SCALES, Elsewhere, Experiment, Lines
from catalog.runs import RunFailed, certified, make_all
from figures import cg, nwt, theory
from figures.drawing import lines_of_runs
from figures.style import save
from gallery import figure_of, page
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
GALLERY = HERE.parents[1] / "docs" / "gallery"

DRAWN_FROM_RUNS: Mapping[str, Mapping[str, Callable[[Lines], Figure]]] = {
    "nwt": nwt.FIGURES,
    "cg": cg.FIGURES,
}
"""By paper, the functions that draw a figure from run folders that the user names."""

ON_DIGITS = {"theory": theory, "clr": clr, "schedule": schedule, "held-out": held_out}
"""Modules whose ``draw_all`` makes its own runs in this process and draws them."""


def folders_by_line(experiment: Experiment, scale: str, root: Path) -> dict[str, list[Path]]:
    """The folders, finished or not, behind each line of a figure."""
    return {label: [root / run.name for run in runs] for label, runs in experiment.at(scale).items()}


def run(experiment: Experiment | Elsewhere, figure: Path, arguments: argparse.Namespace) -> None:
    """Make the runs that are missing, and draw.

    Raises:
        RunFailed: a run was not made, or is not certified; or the command of another figure failed.
    """
    figure.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(experiment, Elsewhere):
        draw_elsewhere(experiment, figure)
        return
    runs = [run for of_line in experiment.at(arguments.scale).values() for run in of_line]
    make_all(runs, arguments.output, SCALES[arguments.scale], arguments.jobs)
    save(experiment.draw(folders_by_line(experiment, arguments.scale, arguments.output)), figure)


def draw_elsewhere(experiment: Elsewhere, figure: Path) -> None:
    """Draw it by its own command, in a process of its own, so that its random streams and threads are its own."""
    with tempfile.TemporaryDirectory(dir=figure.parent) as folder:
        command = [sys.executable, str(HERE), *experiment.command, "-o", folder]
        code = subprocess.run(command, check=False).returncode
        if code:
            words = " ".join(experiment.command)
            raise RunFailed(f"{experiment.name}: python scripts/experiments {words} ended with exit code {code}")
        (Path(folder) / experiment.figure).rename(figure)
    print(f"Wrote {figure}", flush=True)


def list_all(arguments: argparse.Namespace) -> int:
    """Print each experiment's name, how many of its runs are finished, and what the paper shows."""
    for name, experiment in EXPERIMENTS.items():
        made = "elsewhere"
        if isinstance(experiment, Experiment):
            lines = folders_by_line(experiment, arguments.scale, arguments.output).values()
            finished = [certified(folder) for folders in lines for folder in folders]
            made = f"{sum(finished)}/{len(finished)} runs"
        print(f"{name:22} {made:>10}  {experiment.paper}")
    return 0


def run_one(arguments: argparse.Namespace) -> int:
    """Make the runs of one experiment, and draw it."""
    figure = arguments.figure or arguments.output / f"{arguments.experiment}.png"
    try:
        run(EXPERIMENTS[arguments.experiment], figure, arguments)
    except RunFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


def rebuild_gallery(arguments: argparse.Namespace) -> int:
    """Run every experiment in turn; the page is written after each, so that a stopped gallery has a page too."""
    folder = arguments.page.parent
    failures = []
    for experiment in EXPERIMENTS.values():
        figure = folder / figure_of(experiment)
        # Those from elsewhere take long to make, and belong to pages of their own: only missing ones are drawn.
        if not (isinstance(experiment, Elsewhere) and figure.exists()):
            try:
                run(experiment, figure, arguments)
            except RunFailed as failure:
                failures.append(str(failure))
        arguments.page.write_text(page(EXPERIMENTS.values(), arguments.scale, arguments.output, folder))
    print(f"Wrote {arguments.page}")
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


def draw_runs(arguments: argparse.Namespace) -> int:
    """Draw a figure of a paper from run folders."""
    lines = lines_of_runs(arguments.runs, seeds_together=arguments.paper == "cg")
    save(DRAWN_FROM_RUNS[arguments.paper][arguments.figure](lines), arguments.output)
    return 0


def draw_on_digits(arguments: argparse.Namespace) -> int:
    """Make the runs of a module on digits that are missing, draw its figures, and print its numbers."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    only = {"only": arguments.only} if arguments.module is theory else {}
    arguments.module.draw_all(arguments.output, arguments.runs, arguments.quick, **only)
    return 0


def parse(words: list[str] | None = None) -> argparse.Namespace:
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python scripts/experiments", description=__doc__, **form)
    verbs = parser.add_subparsers(required=True)
    for name, verb in (("list", list_all), ("run", run_one), ("gallery", rebuild_gallery)):
        command = verbs.add_parser(name, help=(verb.__doc__ or "").splitlines()[0])
        command.set_defaults(verb=verb)
        command.add_argument("--scale", choices=SCALES, default="paper", help="default: paper")
        command.add_argument("-o", "--output", type=Path, default=Path("runs/papers"), help="folder of the runs")
        if name != "list":
            command.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
        if name == "run":
            command.add_argument("experiment", choices=EXPERIMENTS, metavar="EXPERIMENT")
            command.add_argument("--figure", type=Path, help="the PNG to draw (default: beside the runs)")
        if name == "gallery":
            command.add_argument("--page", type=Path, default=GALLERY / "papers.md", help="the figures are beside it")

    figures = verbs.add_parser("figure", help="Draw figures of runs that you name, or of trainings on digits.")
    kinds = figures.add_subparsers(required=True)
    for paper, module in (("nwt", nwt), ("cg", cg)):
        command = kinds.add_parser(paper, description=module.__doc__, **form)
        command.set_defaults(verb=draw_runs, paper=paper)
        command.add_argument("figure", choices=DRAWN_FROM_RUNS[paper])
        command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
        command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="a PNG")
    for name, module in ON_DIGITS.items():
        command = kinds.add_parser(name, description=module.__doc__, **form)
        command.set_defaults(verb=draw_on_digits, module=module)
        command.add_argument("-o", "--output", type=Path, default=Path("docs/gallery"), help="folder of the figures")
        command.add_argument("--runs", type=Path, default=Path("runs") / name, help="folder of the runs")
        command.add_argument("--quick", action="store_true", help="tiny runs, to see that all works")
        if module is theory:
            names = list(theory.FIGURES)
            command.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Carry out a command line; gives the exit code."""
    arguments = parse(words)
    try:
        code: int = arguments.verb(arguments)
    except KeyboardInterrupt:
        print("Stopped; the same command continues.", file=sys.stderr)
        return 130
    return code
