"""A trace in the formats of other tools: CSV, Parquet, TensorBoard."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import UsageError
from geomprobe.report.output import refuse_existing, write_errors, written_aside
from geomprobe.trace import schema
from geomprobe.trace.printable import printable
from geomprobe.trace.reader import Trace

Columns = Mapping[str, NDArray[Any]]

_BLOCK_ROWS = 1 << 16
_EVENTS = ".geomprobe"
"""The end of the name of an event file: by it, a later export finds its files among those of other programs."""


def export(trace: Trace, form: str, path: Path, *, force: bool = False) -> list[str]:
    """Write the columns of a trace, one row a step: those of ``/steps``, and those of each reference under its path.

    Args:
        trace: the trace, in whatever state it is.
        form: ``"csv"``, ``"parquet"`` or ``"tensorboard"``.
        path: the file to make; for TensorBoard, the log folder.
        force: overwrite what is there; in a log folder, an earlier export.

    Returns:
        The names of the columns written, ``step`` first.

    Raises:
        UsageError: there is something at ``path`` and ``force`` is not set, or the format needs a package that is
            not installed.
        RunError: ``path`` cannot be written; what was there before stays.

    >>> import tempfile
    >>> from geomprobe.trace.reader import open_trace
    >>> from geomprobe.trace.stream.writer import PartWriter, Table
    >>> folder = Path(tempfile.mkdtemp())
    >>> table = Table("values", ("steps/loss",), "float64")
    >>> with PartWriter(folder / "part.h5", schema="geomprobe-trace", tables=[table], attributes={}) as part:
    ...     part.append({"values": np.array([[0.1], [np.nan]])})
    >>> names = export(open_trace(folder / "part.h5"), "csv", folder / "trace.csv")
    >>> with open(folder / "trace.csv") as file:
    ...     [(row["step"], row["loss"]) for row in csv.DictReader(file)]
    [('0', '0.1'), ('1', '')]
    """
    found = _columns(trace)
    _FORMS[form](trace, found, Path(path), force)
    return list(found)


def _columns(trace: Trace) -> Columns:
    """By name: ``step`` as integers, the rest of ``/steps``, and the columns of other gradients and references."""
    names = [name for name in (*trace.columns, *trace.oracle_columns) if name != "step"]
    for reference in trace.references[1:]:
        paths = (f"references/{schema.escape(reference)}/{each.name}" for each in schema.REFERENCE_COLUMNS)
        names += [path for path in paths if path in trace]
    return {"step": trace["step"].astype(np.int64), **{name: trace[name] for name in names}}


def _csv(trace: Trace, found: Columns, path: Path, force: bool) -> None:
    """Each float as the shortest text that reads back bit for bit; an empty cell for NaN."""
    refuse_existing(path, force)
    with written_aside(path) as aside, open(aside, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(printable, found))  # paths of the schema: none begins as a formula of a spreadsheet does
        for start in range(0, trace.num_steps, _BLOCK_ROWS):
            block = {name: values[start : start + _BLOCK_ROWS] for name, values in found.items()}
            writer.writerows(zip(*map(_cells, block.values()), strict=True))


def _cells(values: NDArray[Any]) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _parquet(trace: Trace, found: Columns, path: Path, force: bool) -> None:
    """The same float64 bits, NaN included; the metadata of a field holds what its column means."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _missing("parquet", "pyarrow") from error
    refuse_existing(path, force)
    fields = [
        pyarrow.field(name, pyarrow.from_numpy_dtype(values.dtype), metadata=schema.describe(name).attributes)
        for name, values in found.items()
    ]
    table = pyarrow.table(list(found.values()), schema=pyarrow.schema(fields, metadata=_facts(trace, found)))
    with written_aside(path) as aside:
        pyarrow.parquet.write_table(table, aside)


def _facts(trace: Trace, found: Columns) -> dict[str, str]:
    """What the trace is, and the entry by which pandas makes ``step`` the index."""
    facts = {
        "schema": schema.TRACE_SCHEMA,
        "schema_version": schema.VERSIONS[schema.TRACE_SCHEMA],
        **{name: getattr(trace, name) for name in ("status", "num_parameters", "certificate", "manifest")},
    }
    described = [
        {"name": name, "field_name": name, "metadata": None}
        | dict.fromkeys(("pandas_type", "numpy_type"), str(values.dtype))
        for name, values in found.items()
    ]
    pandas = {"index_columns": ["step"], "column_indexes": [], "columns": described}
    return {"geomprobe": json.dumps(facts), "pandas": json.dumps(pandas)}


def _tensorboard(trace: Trace, found: Columns, path: Path, force: bool) -> None:
    """One scalar a column, with its meaning as description; TensorBoard stores float32."""
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise _missing("tensorboard", "tensorboard") from error
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; name a log folder for TensorBoard")
    if path.exists() and any(path.iterdir()) and not force:
        raise UsageError(f"{path} holds something already; --force replaces what was exported there")
    with write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        earlier = list(path.glob(f"*{_EVENTS}"))
        with TemporaryDirectory(dir=path, prefix=".") as aside:
            writer = EventFileWriter(aside, filename_suffix=_EVENTS)
            try:
                for event in _events(found):
                    writer.add_event(event)
            finally:
                writer.close()
            for file in Path(aside).iterdir():
                file.replace(path / file.name)
        for file in earlier:
            file.unlink()


def _events(found: Columns) -> Iterator[Any]:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    measured = {name: values for name, values in found.items() if name != "step"}
    now = time.time()
    plugin = SummaryMetadata.PluginData(plugin_name="scalars")
    first = {name: SummaryMetadata(summary_description=_description(name), plugin_data=plugin) for name in measured}
    rows = zip(*(values.tolist() for values in measured.values()), strict=True)
    for step, row in zip(found["step"].tolist(), rows, strict=True):
        values = [
            Summary.Value(tag=name, simple_value=value, metadata=first.pop(name, None))
            for name, value in zip(measured, row, strict=True)
            if value == value
        ]
        if values:
            yield Event(wall_time=now, step=step, summary=Summary(value=values))


def _description(name: str) -> str:
    column = schema.describe(name)
    return f"{column.long_name}, in {column.units}: `{column.formula}` ({column.source})"


def _missing(form: str, package: str) -> UsageError:
    return UsageError(f"export --format {form} needs {package}: pip install 'geomprobe[export]'")


_FORMS: dict[str, Callable[[Trace, Columns, Path, bool], None]] = {
    "csv": _csv,
    "parquet": _parquet,
    "tensorboard": _tensorboard,
}

FORMATS = tuple(_FORMS)
