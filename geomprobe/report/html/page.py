"""A run as one self-contained HTML page: the verdict, the figures, the numbers, and how to make it again.

This file gathers what the page shows. `templates/page.html` lays it out, and escapes all text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomprobe.corridor.detection import occupancy
from geomprobe.errors import UsageError
from geomprobe.report.corridors import THRESHOLDS
from geomprobe.report.curves import run_name
from geomprobe.report.html.figures import RESIDUAL, galleries, typeset
from geomprobe.report.output import refuse_existing, written_aside
from geomprobe.report.summary.summary import Summary, summarize
from geomprobe.report.summary.text import Verdict, absences, again, facts, next_command, verdict
from geomprobe.report.table import number, percent, size
from geomprobe.trace.printable import printable
from geomprobe.trace.reader import open_trace
from geomprobe.trace.schema import describe

if TYPE_CHECKING:
    from jinja2 import Template

    from geomprobe.trace.reader import Trace


def write(run: Path, output: Path, *, force: bool = False) -> Verdict:
    """Write the report of a run: one HTML file that needs no other, no network and no script.

    Args:
        run: a run folder, in whatever state it is, or a trace or record file.
        output: the file to make; the same run gives the same bytes.
        force: overwrite what is there.

    Returns:
        The verdict at the top of the page: whether the replay was the recorded run.

    Raises:
        UsageError: there is something at ``output`` and ``force`` is not set, Jinja2 is not installed, or there are
            figures to draw and matplotlib is not installed.
        RunError: there is nothing of geomprobe at ``run``, or ``output`` cannot be written; what was there before
            stays.
    """
    refuse_existing(output, force)
    template = _template()
    summary = summarize(run)
    found = verdict(summary)
    text = template.render(verdict=found, **_shown(summary))
    with written_aside(output) as aside:
        # A name on disk, or a string in JSON, may hold what is no character: the page shows "?" for it.
        aside.write_bytes(text.encode("utf-8", "replace"))
    return found


def _template() -> Template:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise UsageError("report needs Jinja2: pip install 'geomprobe[report]'") from error
    return Environment(
        loader=PackageLoader("geomprobe.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value, lines=True) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html")


def _shown(summary: Summary) -> dict[str, Any]:
    """All that the page shows beside the verdict, by the name that the template has for it."""
    manifest, entries = summary["manifest"], [each for each in (summary["trace"], summary["record"]) if each]
    trace = open_trace(Path(summary["path"])) if "status" in (summary["trace"] or {}) else None
    figures = {} if trace is None else galleries(trace)
    columns = next(each["columns"] for each in entries if "columns" in each)
    return {
        "title": run_name(Path(summary["path"])),
        "next_command": next_command(summary),
        "facts": facts(summary),
        "absences": absences(summary),
        "figures": figures,
        "shares": _shares(trace) if trace is not None and RESIDUAL in figures.get("corridors", ()) else [],
        "num_steps": 0 if trace is None else trace.num_steps,
        "measured": [_row(column) for column in columns if column["measured"]],
        "unmeasured": [column["name"] for column in columns if not column["measured"]],
        "again": again(summary),
        "script": {"kind": None, **(manifest.get("script") or {})},
        "files": [(name, size(count)) for name, count in summary["files"].items()],
        "manifests": _manifests(summary),
        "version": manifest.get("geomprobe"),
    }


def _shares(trace: Trace) -> list[tuple[str, str]]:
    """The share of measured steps below each threshold of the relative residual."""
    curve = occupancy(trace, THRESHOLDS)
    return [(number(t), percent(share)) for t, share in zip(curve.thresholds, curve.share, strict=True)]


def _row(column: Summary) -> list[str]:
    """First and last rows, range and mean of a column that holds numbers."""
    name = column["name"]
    keys = ("first", "last", "minimum", "maximum", "mean")
    numbers = ["–" if column[key] is None else number(column[key]) for key in keys]
    meaning = describe(name).long_name
    return [name, *numbers, str(column["missing"]), typeset(column["units"]), meaning]


def _manifests(summary: Summary) -> dict[str, str]:
    """What each pass wrote of itself, as JSON."""
    recorded = summary["record"] is not None and "error" not in summary["record"]
    found = {"the recording" if recorded else "the replay": summary["manifest"]}
    found |= {"the replay": summary["trace"].get("manifest")} if recorded and summary["trace"] else {}
    return {of: json.dumps(text, indent=2, ensure_ascii=False) for of, text in found.items() if text}
