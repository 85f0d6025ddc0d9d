"""Two runs' differences as text."""

from __future__ import annotations

import json
from typing import Any

from geomprobe.report.diff import INFORMATIVE, RunDifference
from geomprobe.report.table import number, table

_WIDTH = 40


def render(result: RunDifference) -> str:
    """The differences by kind, and the verdict in the last line."""
    blocks = [
        f"{result.paths[0]} against {result.paths[1]}",
        _manifest(result),
        _record(result),
        _columns(result),
        "\n".join(f"note: {note}" for note in result.notes),
        f"the runs {'are equal' if result.equal else 'differ'}",
    ]
    return "\n\n".join(block for block in blocks if block)


def _manifest(result: RunDifference) -> str:
    if not result.manifest:
        return "manifest: equal"
    rows = [[name, _value(a), _value(b)] for name, a, b in result.manifest]
    informative = any(name.partition(".")[0] == INFORMATIVE for name, _, _ in result.manifest)
    note = (
        f"\n  ({INFORMATIVE} says where a run was made, and makes no two runs different)"
        if informative
        else ""
    )
    head = f"manifest: {len(rows)} {'entry differs' if len(rows) == 1 else 'entries differ'}"
    return f"{head}\n{table(['  entry', *result.paths], [[f'  {r[0]}', *r[1:]] for r in rows])}{note}"


def _value(value: Any) -> str:
    text = "-" if value is None else json.dumps(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def _record(result: RunDifference) -> str:
    if result.steps is None:
        return ""
    if result.first is None:
        lines = [f"fingerprints: {result.steps_equal} of {result.steps_equal} steps equal"]
    else:
        step, component, tensor = result.first
        lines = [
            f"fingerprints: first difference at step {step}: {component}, {tensor} "
            f"({result.steps_equal} of {max(result.steps)} steps equal before it)"
        ]
    for name, unlike in result.references.items():
        weights = "w_T" if name == "final" else f"reference {name}"
        said = f"differs in {len(unlike)} tensors, first {unlike[0]}" if unlike else "bitwise equal"
        lines.append(f"{weights}: {said}")
    return "\n".join(lines)


def _columns(result: RunDifference) -> str:
    if result.columns_compared is None:
        return ""
    if not result.columns:
        return f"trace: {result.columns_compared} columns equal"
    header = ["  column", "rows", "max difference", "relative", "at row"]
    rows = [
        [f"  {c.name}", str(c.rows), number(c.largest, 3), number(c.largest_relative, 3), str(c.row)]
        for c in result.columns
    ]
    head = f"trace: {len(rows)} of {result.columns_compared} columns differ"
    return f"{head}\n{table(header, rows, right=range(1, 5))}"
