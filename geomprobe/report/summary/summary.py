"""What is in a run and whether its replay is proven, as JSON values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError
from geomprobe.trace.locate import NothingThere, kind_of
from geomprobe.trace.reader import Trace, open_trace
from geomprobe.trace.record import Record, open_record
from geomprobe.trace.schema import COMPONENTS, RECORD_SCHEMA, describe

Summary = dict[str, Any]


def summarize(path: Path) -> Summary:
    """What a run folder, a trace file or a record file holds, as JSON values.

    ``record`` and ``trace`` are each None where ``path`` is a file of the other kind. Where that pass left nothing that
    can be read, they hold ``error``, the reason, and ``damaged``, whether it is there. Columns' numbers are over their
    finite values; what does not exist is None.

    Raises:
        RunError: there is nothing of geomprobe at ``path``.
    """
    is_file = path.is_file()
    is_record = is_file and kind_of(path) == RECORD_SCHEMA
    record = None if is_file and not is_record else _read(_record, path)
    trace = None if is_record else _read(_trace, path)
    readable = [each for each in (record, trace) if each and "error" not in each]
    if not readable:
        raise RunError((record or trace or {})["error"])
    return {
        "path": str(path),
        "record": record,
        "trace": trace,
        "manifest": readable[0].pop("manifest"),
        "files": _files(path),
    }


def damage(summary: Summary) -> str:
    """What of a run is there and cannot be read; empty where nothing is."""
    passes = (summary["record"] or {}, summary["trace"] or {})
    return "; ".join(each["error"] for each in passes if each.get("damaged"))


def _read(read: Callable[[Path], Summary], path: Path) -> Summary:
    try:
        return read(path)
    except NothingThere as nothing:
        return {"error": str(nothing), "damaged": False}
    except RunError as error:
        return {"error": str(error), "damaged": True}


def _record(path: Path) -> Summary:
    with open_record(path) as record:
        steps = record.steps
        prints = {name: len(record.names(name)) for name in COMPONENTS if record.names(name)}
        columns = [_column(name, steps[name]) for name in steps]
        return {**_pass(record, steps["epoch"]), "fingerprints": prints, "columns": columns}


def _trace(path: Path) -> Summary:
    trace = open_trace(path)
    return {
        **_pass(trace, trace["epoch"]),
        "per_parameter": trace.parameters,
        "measure": trace.manifest.get("measure") or {},
        "certificate": trace.certificate,
        "absences": [
            {"reason": str(absence), "steps": len(steps), "first": int(steps[0])}
            for absence, steps in trace.absences.items()
        ],
        "columns": [_column(name, trace[name]) for name in (*trace.columns, *trace.oracle_columns)],
    }


def _pass(found: Record | Trace, epoch: NDArray[np.float64]) -> Summary:
    return {
        "path": str(found.path),
        "status": found.status,
        "num_steps": found.num_steps,
        "num_parameters": found.num_parameters,
        "num_epochs": len(np.unique(epoch[np.isfinite(epoch)])),
        "references": found.references,
        "manifest": found.manifest,
    }


def _column(name: str, values: NDArray[np.float64]) -> Summary:
    """A column's first and last rows, and the range and mean of its finite values."""
    finite = values[np.isfinite(values)]
    numbers = dict.fromkeys(("first", "last", "minimum", "maximum", "mean"), np.nan)
    if len(values):
        numbers |= {"first": values[0], "last": values[-1]}
    if len(finite):
        numbers |= {"minimum": finite.min(), "maximum": finite.max(), "mean": finite.mean()}
    stated = {key: float(value) if np.isfinite(value) else None for key, value in numbers.items()}
    described = {"name": name, "units": describe(name).units}
    return {**described, **stated, "missing": int(np.isnan(values).sum()), "measured": len(finite)}


def _files(path: Path) -> Mapping[str, int]:
    """Bytes of each file of the run; a folder of checkpoints counts as one."""
    if path.is_file():
        return {path.name: path.stat().st_size}
    sizes: dict[str, int] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.is_symlink():
            place = file.relative_to(path).parts
            name = f"{place[0]}/" if len(place) > 2 else "/".join(place)
            sizes[name] = sizes.get(name, 0) + file.stat().st_size
    return sizes
