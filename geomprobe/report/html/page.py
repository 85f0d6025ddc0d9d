"""A run as one self-contained HTML page: the verdict, the figures, the numbers, and how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from geomprobe.corridor.detection import occupancy
from geomprobe.errors import RunError, UsageError
from geomprobe.report.corridors import THRESHOLDS
from geomprobe.report.html.elements import Markup, listed, page, section, table, tag, typeset
from geomprobe.report.html.figures import (
    RESIDUAL,
    column_figures,
    occupancy_curve,
    percent,
    reference_figures,
    shown,
)
from geomprobe.report.summary.commands import again
from geomprobe.report.summary.facts import facts
from geomprobe.report.summary.summary import Summary, summarize
from geomprobe.report.summary.text import next_command
from geomprobe.report.summary.verdict import Verdict, verdict
from geomprobe.report.table import number, size
from geomprobe.trace.reader import open_trace
from geomprobe.trace.schema import RECORD_FILE, TRACE_FILE, describe

if TYPE_CHECKING:
    from geomprobe.trace.reader import Trace

_GEOMETRY = ("rsi", "eb", "cosine", "lolr", "distance")
_CORRIDORS = (RESIDUAL, "clr", "sharpness", "secant_residual", "linear_decrease_gap")
_TRAINING = ("loss", "lr", "grad_norm")


def write(run: Path, output: Path, *, force: bool = False) -> Verdict:
    """Write the report of a run: one HTML file that needs no other, no network and no script.

    Args:
        run: a run folder, in whatever state it is, or a trace or record file.
        output: the file to make; the same run gives the same bytes.
        force: overwrite what is there.

    Returns:
        What the page says first: whether the replay was the recorded run.

    Raises:
        UsageError: there is something at ``output`` and ``force`` is not set, or there are figures to draw and
            matplotlib is not installed.
        RunError: there is nothing of geomprobe at ``run``, or ``output`` cannot be written; what was there before
            stays.

    >>> import tempfile
    >>> import numpy as np
    >>> from geomprobe.trace.stream.writer import PartWriter, Table
    >>> folder = Path(tempfile.mkdtemp())
    >>> tables = [Table("values", ("steps/loss",), "float64")]
    >>> with PartWriter(folder / "part.h5", schema="geomprobe-trace", tables=tables, attributes={}) as part:
    ...     part.append({"values": np.array([[np.nan]])})
    >>> write(folder / "part.h5", folder / "report.html").headline
    'The replay has not finished'
    >>> "<h1>part</h1>" in (folder / "report.html").read_text()
    True
    """
    if output.is_dir():
        raise UsageError(f"{output} is a folder; name a file")
    if output.exists() and not force:
        raise UsageError(f"{output} exists; --force overwrites it")
    summary = summarize(run)
    found = verdict(summary)
    _put(output, _page(summary, found))
    return found


def _put(output: Path, text: str) -> None:
    """Write aside and rename, so that the name never shows half a page."""
    aside = output.with_name(f".{output.name}.new")
    try:
        # A name on disk, or a string in JSON, may hold what is no character: it is shown as "?".
        aside.write_bytes(text.encode("utf-8", "replace"))
        aside.replace(output)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {output}: {error.strerror or error}. What was there before is untouched"
        ) from error


def _page(summary: Summary, found: Verdict) -> str:
    title = _name(summary)
    trace = open_trace(Path(summary["path"])) if "status" in (summary["trace"] or {}) else None
    parts = {
        "run": ("The run", listed(facts(summary))),
        **({} if trace is None else _drawn(trace)),
        "numbers": ("Numbers", _numbers(summary)),
        "again": ("To make it again", _again(summary)),
        "files": ("Files", _files(summary["files"])),
        "manifest": ("Manifest", _manifests(summary)),
    }
    sections = {name: section(name, heading, body) for name, (heading, body) in parts.items()}
    links = [tag("li", tag("a", parts[name][0], href=f"#{name}")) for name, body in sections.items() if body]
    head = tag(
        "header",
        tag("p", "geomprobe report", class_="of"),
        tag("h1", title),
        _verdict(found, summary),
        tag("nav", tag("ul", *links), aria_label="Contents"),
    )
    said = f"{title}: {found.headline}"
    return page(said, head, tag("main", *sections.values()), tag("footer", _footer(summary)))


def _name(summary: Summary) -> str:
    path = Path(summary["path"]).absolute()
    if path.name in (RECORD_FILE, TRACE_FILE):
        return path.parent.name
    return path.stem if path.is_file() else path.name


def _verdict(found: Verdict, summary: Summary) -> Markup:
    following = tag("p", "Next: ", tag("code", next_command(summary)))
    passes = listed(found.passes)
    head = tag("h2", found.headline)
    said = [tag("p", line) for line in found.lines]
    return tag(
        "section", head, *said, passes, following, class_=f"verdict {found.mark}", aria_label="Verdict"
    )


def _drawn(trace: Trace) -> dict[str, tuple[str, Markup]]:
    return {
        "geometry": ("Geometry of the path", column_figures(trace, _GEOMETRY)),
        "references": ("Against every reference", reference_figures(trace)),
        "corridors": ("Near-corridors", _corridors(trace)),
        "training": ("Training", column_figures(trace, _TRAINING)),
    }


def _corridors(trace: Trace) -> Markup:
    """What Hg tells, where the replay took it; CLR needs the loss alone."""
    if not shown(trace, [RESIDUAL]):
        note = "Hg was not taken, so there is no relative residual."
        return Markup(tag("p", note) + column_figures(trace, _CORRIDORS)) if trace.num_steps else Markup()
    curve = occupancy(trace, THRESHOLDS)
    rows = [[number(t), percent(share)] for t, share in zip(curve.thresholds, curve.share, strict=True)]
    shares = table("Share of measured steps by relative residual", ["below", "share"], rows, right=[1])
    return Markup(column_figures(trace, _CORRIDORS, occupancy_curve(trace)) + shares)


def _numbers(summary: Summary) -> Markup:
    """First and last rows, range and mean of each column that holds numbers."""
    columns = next(
        each["columns"] for each in (summary["trace"], summary["record"]) if each and "columns" in each
    )
    keys = ("first", "last", "minimum", "maximum", "mean")
    rows = [
        [c["name"], *(_number(c[key]) for key in keys), str(c["missing"]), typeset(c["units"])]
        + [describe(c["name"] if "/" in c["name"] else f"steps/{c['name']}").long_name]
        for c in columns
        if c["measured"]
    ]
    empty = ", ".join(c["name"] for c in columns if not c["measured"])
    note = tag("p", f"Not measured: {empty}") if empty else Markup()
    if not rows:
        return note
    header = ["column", "first", "last", "min", "max", "mean", "NaN", "units", "meaning"]
    return Markup(table("Over the finite values of each column", header, rows, right=range(1, 7)) + note)


def _number(value: float | None) -> str:
    return "–" if value is None else number(value)


def _again(summary: Summary) -> Markup:
    lines = again(summary)
    if lines:
        return tag("pre", tag("code", "\n".join(lines)), tabindex=0)
    script = summary["manifest"].get("script") or {}
    if script.get("kind") != "function":
        return Markup()
    return tag("p", f"Recorded in Python: geomprobe.two_pass({script.get('path')}, ...)")


def _files(files: Mapping[str, int]) -> Markup:
    if not files:
        return Markup()
    rows = [[name, size(count)] for name, count in files.items()]
    return table("Files of the run", ["file", "size"], rows, right=[1])


def _manifests(summary: Summary) -> Markup:
    """What each pass said of itself, folded away."""
    of_trace = (summary["trace"] or {}).get("manifest")
    recorded = summary["record"] is not None and "error" not in summary["record"]
    first = "the recording" if recorded else "the replay"
    return Markup(_manifest(first, summary["manifest"]) + _manifest("the replay", of_trace))


def _manifest(of: str, manifest: Mapping[str, object] | None) -> Markup:
    if not manifest:
        return Markup()
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    return tag("details", tag("summary", f"Manifest of {of}"), tag("pre", tag("code", text), tabindex=0))


def _footer(summary: Summary) -> Markup:
    version = summary["manifest"].get("geomprobe")
    by = f"Recorded with geomprobe {version}. " if version else ""
    return tag(
        "p",
        f"{by}G is the gradient before a step, d = w − w* the offset to the reference (the final weights, unless "
        "another is named), HG the Hessian's product with the gradient, E the loss. NWT: No Wrong Turns: The Simple "
        "Geometry of Neural Networks Optimization Paths (Guille-Escuret et al.). CG: Corridor Geometry in "
        "Gradient-Based Optimization (Dherin and Rosca).",
    )
