"""The experiments that the papers do not have run at a tiny size, and make their figures and tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from support.paths import EXPERIMENTS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "figure", "rows"),
    [("schedule", "schedule.png", 5), ("held-out", "held_out.png", 4)],
)
def test_a_quick_run_draws_its_figure_prints_a_table_and_is_not_made_twice(
    tmp_path: Path, name: str, figure: str, rows: int
) -> None:
    line = [sys.executable, str(EXPERIMENTS), "figure", name, "--quick", "-o", "gallery", "--runs", "runs"]
    first = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sum(row.startswith("| ") for row in first.stdout.splitlines()) == rows + 1
    assert matplotlib.image.imread(tmp_path / "gallery" / figure).std() > 0
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    again = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
