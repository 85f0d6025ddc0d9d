"""The papers' experiments by figure: list them, run one, or rebuild the gallery of all of them.

    python scripts/experiments list
    python scripts/experiments run nwt-fig1-batch-size                 at the paper's scale, on its data under data/
    python scripts/experiments run nwt-fig1-batch-size --scale tiny    minutes on two cores, without a download
    python scripts/experiments gallery --scale tiny --jobs 2           all of them, and docs/gallery/papers.md

NWT is "No Wrong Turns", CG is "Corridor Geometry in Gradient-Based Optimization". Each training is recorded and
replayed by `python -m geomprobe`, has to be certified, and is made once, whatever figures it is in. What was stopped
goes on by the same line; what is finished is only drawn again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from catalog.catalog import EXPERIMENTS
from catalog.entry import SCALES, Elsewhere, Experiment
from catalog.runs import SCRIPTS, RunFailed, certified, make_all
from figures.style import save
from gallery import figure_of, page


def lines_of(experiment: Experiment, scale: str, root: Path) -> dict[str, list[Path]]:
    """The folders, finished or not, behind each line of a figure."""
    return {label: [root / run.name for run in runs] for label, runs in experiment.at(scale).items()}


def run(experiment: Experiment | Elsewhere, figure: Path, arguments: argparse.Namespace) -> None:
    """Make the runs that are missing, and draw.

    Raises:
        RunFailed: a run was not made, or is not certified; or another script failed.
    """
    figure.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(experiment, Elsewhere):
        draw_elsewhere(experiment, figure)
    else:
        runs = [run for of_line in experiment.at(arguments.scale).values() for run in of_line]
        make_all(runs, arguments.output, SCALES[arguments.scale], arguments.jobs)
        save(experiment.draw(lines_of(experiment, arguments.scale, arguments.output)), figure)
    print(f"Wrote {figure}", flush=True)


def draw_elsewhere(experiment: Elsewhere, figure: Path) -> None:
    script, *options = experiment.command
    with tempfile.TemporaryDirectory(dir=figure.parent) as folder:
        command = [sys.executable, str(SCRIPTS / script), *options, "-o", folder]
        code = subprocess.run(command, check=False).returncode
        if code:
            raise RunFailed(f"{experiment.name}: {script} ended with exit code {code}")
        (Path(folder) / experiment.figure).rename(figure)


def list_all(arguments: argparse.Namespace) -> int:
    """Each experiment's name, how many of its runs are there, and what the paper shows."""
    for name, experiment in EXPERIMENTS.items():
        made = "elsewhere"
        if isinstance(experiment, Experiment):
            lines = lines_of(experiment, arguments.scale, arguments.output).values()
            there = [certified(folder) for folders in lines for folder in folders]
            made = f"{sum(there)}/{len(there)} runs"
        print(f"{name:22} {made:>10}  {experiment.paper}")
    return 0


def run_one(arguments: argparse.Namespace) -> int:
    figure = arguments.figure or arguments.output / f"{arguments.experiment}.png"
    try:
        run(EXPERIMENTS[arguments.experiment], figure, arguments)
    except RunFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


def rebuild_gallery(arguments: argparse.Namespace) -> int:
    """Every experiment in turn; the page is written after each, so that a stopped gallery is there in part."""
    folder = arguments.page.parent
    failures = []
    for experiment in EXPERIMENTS.values():
        figure = folder / figure_of(experiment)
        there = isinstance(experiment, Elsewhere) and figure.exists()
        try:
            if not there:  # those from elsewhere take long to make, and belong to pages of their own
                run(experiment, figure, arguments)
        except RunFailed as failure:
            failures.append(str(failure))
        arguments.page.write_text(page(EXPERIMENTS.values(), arguments.scale, arguments.output, folder))
    print(f"Wrote {arguments.page}")
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    for name, verb in (("list", list_all), ("run", run_one), ("gallery", rebuild_gallery)):
        command = verbs.add_parser(
            name, help=(verb.__doc__ or "Make the runs of one, and draw it.").splitlines()[0]
        )
        command.set_defaults(verb=verb)
        command.add_argument("--scale", choices=SCALES, default="paper", help="default: paper")
        command.add_argument(
            "-o", "--output", type=Path, default=Path("runs/papers"), help="folder of the runs"
        )
        if name != "list":
            command.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
        if name == "run":
            command.add_argument("experiment", choices=EXPERIMENTS, metavar="EXPERIMENT")
            command.add_argument("--figure", type=Path, help="the PNG to draw (default: beside the runs)")
        if name == "gallery":
            default = SCRIPTS.parent / "docs" / "gallery" / "papers.md"
            command.add_argument("--page", type=Path, default=default, help="the figures lie beside it")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    try:
        code: int = arguments.verb(arguments)
    except KeyboardInterrupt:
        print("Stopped; the same line goes on.", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
