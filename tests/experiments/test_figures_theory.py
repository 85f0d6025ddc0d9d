"""The gallery's scripts draw every figure from runs that are certified, and the numbers on them are the theory's."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import matplotlib.image
import numpy as np
import pytest
import torch
from support.command_server import python
from support.paths import EXPERIMENTS, ROOT

import geomprobe

pytestmark = pytest.mark.slow  # a minute of small trainings

NAMES = [
    "landscapes",
    "descent_and_flow",
    "counterexamples",
    "random_walk",
    "loss_and_hg",
    "schedules",
    "occupancy",
]


class Gallery(NamedTuple):
    """What one call of `figure theory` left behind."""

    figures: Path
    runs: Path
    numbers: dict[str, float]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory")
    figures, runs = folder / "gallery", folder / "runs"
    words = ["figure", "theory", "--quick", "-o", figures, "--runs", runs]
    done = python(EXPERIMENTS, *words, timeout_s=300)
    assert done.code == 0, done.err
    numbers = re.findall(r"^    (.+): (\S+)$", done.out, re.MULTILINE)
    return Gallery(figures, runs, {name: float(value) for name, value in numbers})


def assert_drawn(path):
    """There is a picture in the file, in several colors, and no more of it than a repository should keep."""
    assert path.stat().st_size < 200_000
    picture = matplotlib.image.imread(path)[..., :3]
    height, width, _ = picture.shape
    inked = (picture < 0.95).any(-1)
    assert inked.mean() > 0.03
    for part in (inked[:, : width // 2], inked[:, width // 2 :], inked[: height // 2], inked[height // 2 :]):
        assert part.mean() > 0.02
    saturated = picture.max(-1) - picture.min(-1) > 0.2
    assert saturated.any()


@pytest.mark.parametrize("name", NAMES)
def test_each_figure_is_drawn(gallery, name):
    assert_drawn(gallery.figures / f"{name}.png")


def test_nothing_else_is_drawn(gallery):
    assert {path.name for path in gallery.figures.iterdir()} == {f"{name}.png" for name in NAMES}


@pytest.mark.parametrize("name", [*NAMES, "clr_sgd", "clr_values"])
def test_the_gallery_holds_each_figure_and_says_what_it_shows(name):
    folder = ROOT / "docs" / "gallery"
    assert_drawn(folder / f"{name}.png")
    assert f"({name}.png)" in (folder / "theory.md").read_text()


def test_lines_of_steepest_descent_are_straight_and_even_in_corridors_alone(gallery):
    assert gallery.numbers["bend_in_corridors"] < 1e-9
    assert gallery.numbers["bend_in_quadratic"] > 0.1


def test_descent_leaves_the_flow_in_second_order_and_its_leading_term_in_third(gallery):
    assert gallery.numbers["slope_of_gap"] == pytest.approx(2, abs=0.05)
    assert gallery.numbers["slope_of_remainder"] == pytest.approx(3, abs=0.05)
    assert gallery.numbers["gap_in_corridor"] < 1e-14


def test_the_distance_from_the_flow_is_that_of_the_closed_form():
    from figures.landscapes import BOWL, gaps

    h, rates, theta = 0.05, np.array([1.6, 0.3]), np.array([2.4, 2.0])
    away = (np.exp(-h * rates) - 1 + h * rates) * theta
    leading = (h * rates) ** 2 / 2 * theta
    expected = [np.linalg.norm(each) for each in (away, away - leading, leading)]
    np.testing.assert_allclose(gaps(BOWL, h), expected, rtol=1e-8)


def test_a_line_at_uneven_speed_counts_as_bent():
    from figures.landscapes import bend

    even = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None] * torch.tensor([3.0, 4.0])
    assert bend(even) < 1e-15
    assert bend(even**2) > 0.1


def test_random_walks_follow_eq_8(gallery):
    assert gallery.numbers["cosine_slope"] == pytest.approx(-0.5, abs=0.03)
    assert gallery.numbers["worst_error_of_median"] < 0.1


def test_eq_8_lies_within_the_spread_of_walks_and_the_measured_walk_near_it(gallery):
    from figures.style import QUICK
    from figures.traces import walk

    steps = QUICK.walk_steps
    left = steps - np.arange(steps)
    walks = np.stack([walk(QUICK, 0.1, seed)[2] for seed in range(QUICK.walks)])
    law = left**-0.5
    assert (walks.min(0) <= law * (1 + 1e-9)).all()
    assert (walks.max(0) >= law * (1 - 1e-9)).all()
    (run,) = gallery.runs.glob("walk-*")
    # The cosine's relative deviation is about sqrt(steps left / dimension), at most 0.045 here.
    np.testing.assert_allclose(geomprobe.open_trace(run)["cosine"], law, rtol=0.25)


def test_every_run_behind_the_figures_is_certified(gallery):
    runs = list(gallery.runs.iterdir())
    assert len(runs) == 8
    for run in runs:
        trace = geomprobe.open_trace(run)
        assert trace.status == "complete"
        assert trace.certificate["steps_equal"] == trace.num_steps > 0


def test_a_run_with_clr_takes_the_rate_that_its_trace_calls_clr(gallery):
    (run,) = gallery.runs.glob("digits-clr-noiseless-*")
    trace = geomprobe.open_trace(run)
    np.testing.assert_allclose(trace["lr"], trace["clr"], rtol=1e-5)
    assert np.isfinite(trace["relative_residual"]).all()


def test_one_figure_can_be_drawn_again_from_the_runs_that_are_there(gallery, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in gallery.runs.rglob("trace.h5")}
    again = tmp_path / "gallery"
    run_main("theory", "--quick", "--only", "counterexamples", "-o", again, "--runs", gallery.runs)
    assert [path.name for path in again.iterdir()] == ["counterexamples.png"]
    assert {path: path.stat().st_mtime_ns for path in gallery.runs.rglob("trace.h5")} == before


def run_main(*arguments):
    """Carry out a ``figure`` command in this process; what it wrote to standard output and error."""
    from command_line import main

    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        assert main(["figure", *map(str, arguments)]) == 0
    return output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clr")
    arguments = ["clr", "--quick", "-o", folder / "gallery", "--runs", folder / "runs"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, small models wait for each other's threads
    yield folder, arguments, run_main(*arguments)[0]
    torch.set_num_threads(threads)


def test_the_sweep_draws_its_figures_and_prints_a_row_for_each_method(sweep):
    folder, _, table = sweep
    for name in ("clr_sgd", "clr_values"):
        assert_drawn(folder / "gallery" / f"{name}.png")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| width")]
    assert [row[1] for row in rows] == ["SGD, rate 0.3", "CLR"]
    for row in rows:
        accuracy = float(row[5].split()[0])
        assert 15 < accuracy <= 100  # better than guessing one of ten


def test_the_sweep_makes_only_the_runs_that_are_missing_and_makes_them_the_same(sweep):
    folder, arguments, table = sweep
    runs = sorted((folder / "runs").iterdir())
    assert [path.suffix for path in runs] == [".json"] * 4
    kept = {path: path.read_text() for path in runs}
    runs[0].unlink()
    again, progress = run_main(*arguments)
    assert progress.split() == [runs[0].stem, "..."]
    assert again == table
    assert {path: path.read_text() for path in runs} == kept


def test_epochs_to_a_level_are_counted_from_one_and_a_dash_stands_for_never():
    from clr import reached

    assert reached(np.array([[3.0, 1.0, 0.5], [0.9, 2.0, 3.0], [4.0, 4.0, 4.0]]), 1.0) == "3, 1, –"
