"""A run's summary as text, and the command that takes the run further."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geomprobe.report.summary.facts import facts
from geomprobe.report.summary.summary import Summary
from geomprobe.report.table import number, size, table
from geomprobe.trace.certificate import Certificate
from geomprobe.trace.schema import RECORD_FILE, SEALING_PREFIX, STREAM_DIR, TRACE_FILE


def render(summary: Summary) -> str:
    """The summary as a page of text: the verdict first, then the run, its columns and its files."""
    blocks = [verdict(summary), _run(summary), _columns(summary), _files(summary["files"])]
    return "\n\n".join(block for block in blocks if block)


def verdict(summary: Summary) -> str:
    """What each pass left, and whether the replay held, in a few lines."""
    record, trace = summary["record"], summary["trace"]
    lines = [summary["path"]]
    if record is not None:
        lines.append(f"  record       {record.get('error') or _steps(record)}")
    if trace is not None:
        lines.append(f"  trace        {trace.get('error') or _steps(trace)}")
    if trace and "error" not in trace:
        first, *more = _certificate(trace)
        lines += [f"  certificate  {first}", *(f"               {line}" for line in more)]
    return "\n".join(lines)


def next_command(summary: Summary) -> str:
    """The command that takes this run further."""
    path, record, trace = Path(summary["path"]), summary["record"] or {}, summary["trace"] or {}
    if path.name in (RECORD_FILE, TRACE_FILE):
        path = path.parent
    if any((path / STREAM_DIR).glob(f"{SEALING_PREFIX}*")):
        return f"geomprobe replay {path}"  # which first finishes the sealing that was cut off
    status = trace.get("status")
    if status in ("complete", "uncertified"):
        return f"geomprobe verify {path}"
    if status == "diverged":
        return f"geomprobe replay {path} --force --uncertified"
    if status == "incomplete":
        return f"geomprobe replay {path} --resume"
    if record.get("status") == "complete":
        return f"geomprobe replay {path}"
    return f"geomprobe record -o {path} --resume"


def _steps(entry: Summary) -> str:
    epochs = f", {entry['num_epochs']} epochs" if entry["num_epochs"] else ""
    return f"{entry['status']}, {entry['num_steps']} steps{epochs}"


def _certificate(trace: Summary) -> list[str]:
    """The certificate line, loud where it is none."""
    if not trace["certificate"]:
        return ["none: the replay has not finished"]
    certificate = Certificate.of(trace["certificate"])
    line = f"{certificate.counts}, w_T {'bitwise' if certificate.final_weights_equal else 'NOT'} equal"
    if trace["status"] == "complete":
        return [line]
    loud = "UNCERTIFIED: what follows is of a run that is not the recorded one"
    first = certificate.first_difference
    return [
        loud if trace["status"] == "uncertified" else trace["status"].upper(),
        line,
        *([f"first difference: {first}"] if first else []),
    ]


def _run(summary: Summary) -> str:
    return "\n".join(["run", *(f"  {name:<12} {fact}" for name, fact in facts(summary).items())])


def _columns(summary: Summary) -> str:
    """One line a column that holds numbers; the names of those that do not, below."""
    columns = _of_trace_first(summary, "columns")
    header = ["column", "units", "first", "last", "min", "max", "mean", "NaN"]
    rows = [
        [c["name"], c["units"], *(_number(c[k]) for k in ("first", "last", "minimum", "maximum", "mean"))]
        + [str(c["missing"])]
        for c in columns
        if c["measured"]
    ]
    empty = ", ".join(c["name"] for c in columns if not c["measured"])
    text = table(header, rows, right=range(2, 8))
    return f"{text}\nnot measured: {empty}" if empty else text


def _of_trace_first(summary: Summary, key: str) -> Any:
    return next(each[key] for each in (summary["trace"], summary["record"]) if each and key in each)


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)


def _files(files: Mapping[str, int]) -> str:
    return table(["file", "size"], [[name, size(count)] for name, count in files.items()], right=[1])
