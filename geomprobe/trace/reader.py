"""Open a trace, sealed or still streaming, as named NumPy columns."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError, UsageError
from geomprobe.trace import schema
from geomprobe.trace.absence import Absence, steps_of
from geomprobe.trace.derive import Array, Derived
from geomprobe.trace.hdf5_errors import damage_named
from geomprobe.trace.locate import Source, read_rows, read_settled, spans
from geomprobe.trace.path_folders import path_folder
from geomprobe.trace.record import open_record
from geomprobe.trace.sketch import Sketch


@dataclass(frozen=True)
class PerEpoch:
    """A column by epoch: arrays of one length, one entry an epoch, in the column's units.

    ``count`` says how many steps were measured; where none was, the numbers are NaN.
    """

    epoch: Array
    mean: Array
    minimum: Array
    maximum: Array
    count: NDArray[np.int64]


def group_statistics(
    values: Array, of_row: NDArray[np.intp], groups: int
) -> tuple[Array, Array, Array, NDArray[np.int64]]:
    """Mean, minimum, maximum and count of each group's numbers; a row of group -1, or that is NaN, does not count."""
    inside = (of_row >= 0) & ~np.isnan(values)
    of_row, values = of_row[inside], values[inside]
    count = np.bincount(of_row, minlength=groups)
    low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
    np.minimum.at(low, of_row, values)
    np.maximum.at(high, of_row, values)
    with np.errstate(all="ignore"):
        mean = np.bincount(of_row, weights=values, minlength=groups) / count
    low[count == 0] = high[count == 0] = np.nan
    return mean, low, high, count


class Trace:
    """What a replay measured, one row a step; `open_trace` makes it.

    Attributes:
        path: what was opened.
        status: ``"complete"``, ``"incomplete"``, ``"diverged"`` or ``"uncertified"``.
        num_steps: rows present.
        num_parameters: scalar parameters of the model.
        manifest: the environment of the run.
        certificate: the entries of a `Certificate`; empty where the replay did not end.

    >>> import tempfile
    >>> from geomprobe.trace.stream.writer import PartWriter, Table
    >>> path = Path(tempfile.mkdtemp()) / "part.h5"
    >>> table = Table("values", ("steps/epoch", "steps/loss"), "float64")
    >>> with PartWriter(path, schema="geomprobe-trace", tables=[table], attributes={}) as part:
    ...     part.append({"values": np.array([[0.0, 4.0], [0.0, 2.0], [1.0, 1.0]])})
    >>> trace = open_trace(path)
    >>> trace["loss"].tolist(), "cosine" in trace, trace.references
    ([4.0, 2.0, 1.0], True, ['final'])
    >>> trace.per_epoch("loss").mean.tolist()
    [3.0, 1.0]
    """

    def __init__(self, source: Source, certificate: dict[str, Any], columns: Mapping[str, Array]) -> None:
        self.path = source.path
        self.status = source.status
        self.num_parameters = source.num_parameters
        self.manifest = source.manifest
        self.certificate = certificate
        step = columns["steps/step"]
        if not ((step == np.trunc(step)) & (step >= 0) & (step < 1 << 53)).all():
            raise RunError(f"{self.path} is damaged: a step in it is no whole number. Restore it, or make it again")
        self.num_steps = len(step)
        self._final = source.facts.get("final", ())
        self._columns = columns

    @property
    def columns(self) -> list[str]:
        """Names of the columns of ``/steps``."""
        return [path.removeprefix("steps/") for path in self._columns if path.startswith("steps/")]

    @property
    def oracle_columns(self) -> list[str]:
        """Paths of the columns of gradients beside the step's own, of those that were asked for."""
        paths = (f"{group}/{column.name}" for group, columns in schema.ORACLES.items() for column in columns)
        return [path for path in paths if path in self]

    @property
    def references(self) -> list[str]:
        """Names of the references, the final iterate first."""
        return [schema.FINAL, *self._second("references")]

    @property
    def parameters(self) -> list[str]:
        """Names of the parameter tensors that have columns of their own; empty unless they were asked for."""
        return self._second("parameters")

    @functools.cached_property
    def sketch(self) -> Sketch:
        """The sketches that the run's recording has kept; see `geomprobe.trace.record.Record.sketch`.

        Raises:
            RunError: the recording is not beside this trace, or has none.
        """
        folder = self.path.parent if self.path.is_file() else self.path
        with open_record(folder) as record:
            return record.sketch

    @property
    def absences(self) -> dict[Absence, NDArray[np.int64]]:
        """Why numbers are left out that the replay was to measure: the steps at which each reason holds."""
        return steps_of(self["absent"]) if "absent" in self else {}

    def __getitem__(self, name: str) -> Array:
        """A column [num_steps]: a bare name is one of ``/steps``, anything else a path in the file.

        Raises:
            UnknownColumn: this trace has no such column; the message lists near matches.
        """
        if name not in self:
            raise self._unknown(name)
        return np.array(self._columns[_path(name)])

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _path(name) in self._columns

    def __repr__(self) -> str:
        return f"<Trace {self.path}: {self.status}, {self.num_steps} steps, {len(self.columns)} columns>"

    def per_epoch(self, name: str) -> PerEpoch:
        """Mean, minimum and maximum of a column over each epoch, as NWT's figures show them.

        NaN rows do not count, and rows whose epoch is unknown belong to none.

        Raises:
            UnknownColumn: this trace has no such column.
        """
        epoch = self["epoch"]
        epochs = np.unique(epoch[~np.isnan(epoch)])
        of_row = np.where(np.isnan(epoch), -1, np.searchsorted(epochs, epoch))
        return PerEpoch(epochs, *group_statistics(self[name], of_row, len(epochs)))

    def stored_final(self) -> dict[str, Array]:
        """The final iterate's columns under their second names, as a sealed file holds them; else none."""
        return self._columns.stored(self._final) if isinstance(self._columns, _SealedColumns) else {}

    def to_xarray(self) -> Any:
        """The columns of ``/steps`` as an ``xarray.Dataset`` over ``step``, with their attributes.

        Raises:
            UsageError: xarray is not installed.
        """
        try:
            xarray = importlib.import_module("xarray")
        except ImportError as error:
            raise UsageError("to_xarray needs xarray: pip install 'geomprobe[xarray]'") from error
        columns = {name: ("step", self[name], schema.describe(name).attributes) for name in self.columns}
        facts = {"status": self.status, "num_parameters": self.num_parameters, "schema": schema.TRACE_SCHEMA}
        return xarray.Dataset(columns, attrs=facts)

    def _second(self, group: str) -> list[str]:
        paths = (path.split("/") for path in self._columns if path.startswith(f"{group}/"))
        return [schema.unescape(name) for name in dict.fromkeys(path[1] for path in paths)]

    def _unknown(self, name: str) -> schema.UnknownColumn:
        paths = [path for path in self._columns if not path.startswith("steps/")]
        matches = schema.near(name, [*self.columns, *paths, *schema.FINAL_LINKS])
        hint = f"did you mean {', '.join(matches)}?" if matches else f"/steps has {', '.join(self.columns)}"
        return schema.UnknownColumn(f"{self.path} has no column {name!r}; {hint}")


def open_trace(path: str | os.PathLike[str], optimizer: str | None = None) -> Trace:
    """Open a trace: ``trace.h5`` where the replay is sealed, else the rows that it has committed so far.

    Args:
        path: a run folder, or a file. The writer may be alive, dead or done; nothing stays open.
        optimizer: of a run that ``record --optimizer all`` made, the name of the path to open.

    Raises:
        RunError: there is no trace; the message says what there is instead.

    >>> import tempfile
    >>> from geomprobe.trace.stream.writer import PartWriter, Table
    >>> run = Path(tempfile.mkdtemp())
    >>> (run / "stream").mkdir()
    >>> table = Table("values", ("inner_products/g.d", "inner_products/d.d"), "float64")
    >>> with PartWriter(run / "stream" / "a.h5", schema="geomprobe-trace", tables=[table], attributes={}) as part:
    ...     part.append({"values": np.array([[6.0, 4.0], [3.0, 1.0]])})
    >>> trace = open_trace(run)
    >>> trace.status, trace["rsi"].tolist(), trace["references/final/distance"].tolist()
    ('incomplete', [1.5, 3.0], [2.0, 1.0])
    """
    found = Path(path) if optimizer is None else path_folder(path, optimizer)
    return read_settled(found, schema.TRACE_SCHEMA, _read)


def _read(source: Source) -> Trace:
    if source.file is None:
        table = source.parts[0].tables[schema.VALUES]
        steps, values = read_rows(spans(source.parts), table)
        return Trace(source, {}, Derived(steps, dict(zip(table.columns, values.T, strict=True))))
    columns = _SealedColumns(source.file, source.facts["columns"])
    return Trace(source, source.facts["certificate"], columns)


class _SealedColumns(Mapping[str, Array]):
    """Columns of a sealed file by path, read at each look-up so that nothing stays open or in memory."""

    def __init__(self, path: Path, datasets: Iterable[str]) -> None:
        self._path = path
        self._paths = dict.fromkeys(datasets)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and schema.canonical(path) in self._paths

    def __getitem__(self, path: str) -> Array:
        path = schema.canonical(path)
        return self.stored([path])[path]

    def stored(self, paths: Iterable[str]) -> dict[str, Array]:
        """The datasets at paths of the file."""
        arrays = {}
        with h5py.File(self._path, "r") as file:
            for path in paths:
                with damage_named(path, self._path):
                    arrays[path] = file[path][:]
        return arrays


def _path(name: str) -> str:
    return schema.canonical(name.strip("/") if "/" in name else f"steps/{name}")
