"""The page on absent numbers lists every reason, as the code has it."""

from __future__ import annotations

from support.paths import ROOT

from geomprobe.trace.absence import ABSENCES


def test_the_table_has_every_reason() -> None:
    text = (ROOT / "docs" / "right-or-absent.md").read_text()
    for absence in ABSENCES:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {absence.number} |")]
        assert f"| {absence.reason} | {absence.remedy} |" in row
