"""Stream a pass's rows into a part: a SWMR HDF5 file that any kill leaves readable.

A part holds 2-D tables of one dtype each, ``checks`` (a checksum a row for each table that has columns) and
the 1-D dataset ``step``, which is written last: row i counts once ``step[i] == first_step + i``. The root
attribute ``tables`` (JSON) lists names, columns and dtypes.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import h5py
import numpy as np

from geomprobe.errors import RunError, UsageError
from geomprobe.trace.hdf5_errors import WriteFailed, abandon, reason
from geomprobe.trace.schema import TRACE_SCHEMA, VERSIONS, check_raw
from geomprobe.trace.stream.checksum import row_checksums

__all__ = ["PartWriter", "Table", "WriteFailed"]


@dataclass(frozen=True)
class Table:
    """A 2-D table [rows, columns] of a part: its name, its column names and its dtype.

    >>> Table("steps", ("epoch", "loss", "lr"), "float64").columns[1]
    'loss'
    """

    name: str
    columns: tuple[str, ...]
    dtype: Literal["float64", "int64"]


def chunk_rows(columns: int) -> int:
    """Rows of a chunk: one block of 64 rows where that is about 64 KiB, and never more than 1 MiB.

    A flush writes every chunk that it touches as a whole, so small chunks make small appends cheap;
    a file of a million rows wants few chunks.

    >>> chunk_rows(1), chunk_rows(40), chunk_rows(500), chunk_rows(10_000)
    (1024, 204, 64, 13)
    """
    return max(1, min(1024, max(64, 8192 // columns), 131_072 // columns))


class PartWriter:
    """Append rows to a new part; what `append` returned from is safe from a kill of this process.

    Args:
        path: the file to make; it must not exist.
        schema: ``"geomprobe-trace"`` or ``"geomprobe-record"``.
        tables: the tables, fixed from here on.
        attributes: root attributes, such as ``manifest`` (JSON text) and ``num_parameters``.
        first_step: the step of row 0.

    Raises:
        RunError: the file exists, or its folder does not.
        WriteFailed: the file could not be written; every later `append` raises the same.
        UnknownColumn: a trace part was to hold a column that the schema lacks.

    >>> import tempfile
    >>> from geomprobe.trace.stream.reader import read_part
    >>> path = Path(tempfile.mkdtemp()) / "part.h5"
    >>> table = Table("values", ("steps/loss", "inner_products/g.g"), "float64")
    >>> with PartWriter(path, schema="geomprobe-trace", tables=[table], attributes={}) as writer:
    ...     writer.append({"values": np.array([[2.0, 4.0], [1.0, 3.0]])})
    >>> read_part(path).rows
    2
    """

    def __init__(
        self,
        path: Path,
        *,
        schema: str,
        tables: Sequence[Table],
        attributes: Mapping[str, str | int | float],
        first_step: int = 0,
    ) -> None:
        self.path = Path(path)
        self.rows = 0
        self._first_step = first_step
        self._tables = tuple(tables)
        self._failure: WriteFailed | None = None
        if schema == TRACE_SCHEMA:
            for column in (name for table in tables for name in table.columns):
                check_raw(column)
        layout = {table.name: {"columns": table.columns, "dtype": table.dtype} for table in tables}
        self._file = self._create()
        # Called by `close`, and at exit. Every committed row is in the file already, and HDF5's own close would write
        # once more, which on a full disk ends in a crash.
        self._release = weakref.finalize(self, abandon, self._file)
        try:
            own = {"schema": schema, "schema_version": VERSIONS[schema], "first_step": first_step}
            self._file.attrs.update({**attributes, **own, "tables": json.dumps(layout)})
            self._datasets = {
                table.name: self._dataset(f"tables/{table.name}", len(table.columns), table.dtype)
                for table in tables
                if table.columns
            }
            self._checks = self._dataset("checks", 1 + len(self._datasets), "int64")
            # The fill value must never look like a committed step.
            self._step = self._file.create_dataset(
                "step", (0,), "int64", maxshape=(None,), chunks=(chunk_rows(1),), fillvalue=-1
            )
            self._file.swmr_mode = True
        except (OSError, RuntimeError) as error:
            raise self._broken(error) from error

    def append(self, blocks: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Append k rows to every table and commit them.

        Args:
            blocks: by table name, an array [k, columns] of exactly the table's dtype.

        Raises:
            UsageError: a table is missing or unknown, or a block has the wrong shape or dtype.
            WriteFailed: the file could not be written; rows appended before are safe.
        """
        if self._failure is not None:
            raise self._failure
        if not self._file:
            raise UsageError(f"{self.path} was closed after {self.rows} rows; nothing can be appended to it")
        start, stop = self.rows, self.rows + self._count(blocks)
        if start == stop:
            return
        step = np.arange(start, stop, dtype=np.int64) + self._first_step
        try:
            for name, dataset in self._datasets.items():
                _extend(dataset, start, stop, blocks[name])
            sums = [row_checksums(step, blocks[name]) for name in self._datasets]
            _extend(self._checks, start, stop, np.stack([step, *sums], axis=1))
            _extend(self._step, start, stop, step)
        except (OSError, RuntimeError) as error:
            raise self._broken(error) from error
        self.rows = stop

    @property
    def next_step(self) -> int:
        """The step of the row that would be appended next."""
        return self._first_step + self.rows

    def close(self) -> None:
        """Let go of the file without another write; safe to call twice, after a failure, and on a full disk."""
        self._release()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _create(self) -> Any:
        try:
            return h5py.File(self.path, "x", libver="latest")
        except FileExistsError as error:
            raise RunError(f"{self.path} exists, and another pass may be writing it; choose a new name") from error
        except FileNotFoundError as error:
            raise RunError(f"{self.path.parent} is no folder; make it before a part is opened in it") from error
        except OSError as error:
            raise WriteFailed(f"cannot create {self.path}: {reason(error)}. Choose another disk") from error

    def _dataset(self, path: str, width: int, dtype: str) -> Any:
        fill = np.nan if dtype == "float64" else 0
        chunks = (chunk_rows(width), width)
        return self._file.create_dataset(path, (0, width), dtype, maxshape=(None, width), chunks=chunks, fillvalue=fill)

    def _count(self, blocks: Mapping[str, np.ndarray[Any, Any]]) -> int:
        names = {table.name for table in self._tables}
        if set(blocks) != names:
            raise UsageError(f"{self.path} has the tables {sorted(names)}; blocks came for {sorted(blocks)}")
        counts = set()
        for table in self._tables:
            block = blocks[table.name]
            width = len(table.columns)
            if block.ndim != 2 or block.shape[1] != width or block.dtype != np.dtype(table.dtype):
                raise UsageError(
                    f"table {table.name!r} of {self.path} takes {table.dtype} blocks of shape [k, {width}]; "
                    f"got {block.dtype} of shape {list(block.shape)}"
                )
            counts.add(block.shape[0])
        if len(counts) > 1:
            raise UsageError(f"blocks for {self.path} have different numbers of rows: {sorted(counts)}")
        return counts.pop() if counts else 0

    def _broken(self, error: Exception) -> WriteFailed:
        self._release()
        self._failure = WriteFailed(
            f"cannot write {self.path}: {reason(error)}. {self.rows} rows were committed, are safe and stay "
            "readable. Free space on that disk (or raise the quota) and run the pass again"
        )
        return self._failure


def _extend(dataset: Any, start: int, stop: int, block: np.ndarray[Any, Any]) -> None:
    dataset.resize(stop, axis=0)
    dataset[start:stop] = block
    dataset.flush()
