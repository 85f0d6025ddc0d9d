"""Near-corridors as text and JSON, from a trace whose residuals are written by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from geomprobe.cli import main
from geomprobe.errors import UsageError
from geomprobe.report import corridors
from geomprobe.trace.reader import open_trace
from geomprobe.trace.stream.writer import PartWriter, Table

RESIDUALS = [0.5, 0.05, 0.04, 0.6, 0.03, np.nan, 0.02, 0.7]


@pytest.fixture
def trace_file(tmp_path):
    """G = (1), lr = 1: the relative residual of a row is ||HG||."""
    path = tmp_path / "part.h5"
    columns = ("groups/0/lr", "inner_products/g.g", "inner_products/Hg.Hg")
    rows = np.array([[1.0, 1.0, r**2] for r in RESIDUALS])
    table = Table("values", columns, "float64")
    with PartWriter(path, schema="geomprobe-trace", tables=[table], attributes={}) as part:
        part.append({"values": rows})
    return path


def test_stays_and_shares_are_those_of_the_residuals(trace_file):
    found = corridors.summarize(open_trace(trace_file), 0.1, None)
    assert found["measured"] == 7
    assert found["share"] == pytest.approx(4 / 7)
    assert [(s["entry"], s["exit"]) for s in found["stays"]] == [(1, 3), (4, 7)]
    assert found["lengths"] == {"median": 2.5, "longest": 3}
    assert dict(found["occupancy"])[0.05] == pytest.approx(3 / 7)


def test_text_shows_the_curve_and_the_longest_stay_first(trace_file):
    text = corridors.render(corridors.summarize(open_trace(trace_file), 0.1, None), len(RESIDUALS))
    assert "below 0.1: 57.1 % of the measured steps, 2 stays, median length 2.5, longest 3 of 8 steps" in text
    assert text.index("    4     7      3") < text.index("    1     3      2")


def test_smoothing_joins_stays(trace_file):
    assert len(corridors.summarize(open_trace(trace_file), 0.4, 3)["stays"]) == 1


def test_a_threshold_that_nothing_is_below_gives_no_stays(trace_file):
    text = corridors.render(corridors.summarize(open_trace(trace_file), 1e-6, None), len(RESIDUALS))
    assert "0 stays" in text


def test_inspect_prints_json(trace_file, capsys):
    assert main(["inspect", str(trace_file), "--corridors", "--json", "--threshold", "0.1"]) == 0
    assert json.loads(capsys.readouterr().out)["share"] == pytest.approx(4 / 7)


def test_plot_draws_the_occupancy(trace_file, tmp_path):
    assert main(["plot", str(trace_file), "--occupancy", "-o", str(tmp_path / "o.png")]) == 0
    assert (tmp_path / "o.png").stat().st_size > 5000


def test_a_negative_threshold_is_refused(trace_file):
    with pytest.raises(UsageError, match="must be positive"):
        corridors.summarize(open_trace(trace_file), -1.0, None)
