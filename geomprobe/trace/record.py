"""Open a recording, sealed or still streaming: fingerprints by step, and the references' weights."""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError, UsageError
from geomprobe.trace import schema
from geomprobe.trace.blame import StateSteps
from geomprobe.trace.derive import Array
from geomprobe.trace.hdf5_errors import damage_named
from geomprobe.trace.locate import Source, Span, read_rows, read_settled, spans
from geomprobe.trace.sketch import Sketch, joined, projected
from geomprobe.trace.weights import read_reference, read_reference_file

Reference = dict[str, tuple[NDArray[Any], str]]


class NoSketch(RunError):
    """A recording was made without ``--sketch``."""


class Record(ABC):
    """What recording kept, one row a step; `open_record` makes it. A context manager: it holds its file open.

    Attributes:
        path: what was opened.
        status: ``"complete"``, ``"failed"`` or ``"incomplete"``.
        num_steps: steps recorded.
        num_parameters: scalar parameters of the model.
        manifest: the environment of the run.
        rank: of several processes, whose fingerprints it has.
    """

    def __init__(self, source: Source, num_steps: int, rank: int = 0) -> None:
        self.rank = rank
        self.path = source.path
        self.status = source.status
        self.num_steps = num_steps
        self.num_parameters = source.num_parameters
        self.manifest = source.manifest

    @abstractmethod
    def names(self, component: str) -> list[str]:
        """Names of the tensors or streams that a component's fingerprints cover; empty where it has none."""

    def fingerprints(self, component: str, start: int, stop: int) -> NDArray[np.int64]:
        """A component's fingerprints [stop - start, names] of the steps from ``start`` to before ``stop``.

        Only those rows are read; steps past the last recorded one are left out.

        Raises:
            RunError: the rows are damaged.
        """
        stop = min(stop, self.num_steps)
        if not self.names(component):
            return np.empty((max(0, stop - start), 0), np.int64)
        return self._rows(f"{schema.FINGERPRINTS}/{component}", start, stop)

    @property
    def state_steps(self) -> StateSteps:
        """The steps whose fingerprints hold digests of the optimizer's state."""
        return StateSteps.of(self.manifest)

    @property
    def final_state(self) -> int | None:
        """The digest of the optimizer's state after the last step; None where the recording has not come so far."""
        found = self.manifest.get("final_optimizer_state") or []
        return found[self.rank] if self.rank < len(found) else None

    @property
    @abstractmethod
    def steps(self) -> dict[str, Array]:
        """The columns ``step``, ``epoch``, ``loss`` and ``lr`` [num_steps]."""

    @property
    def references(self) -> list[str]:
        """Names of the references that were kept, the final iterate first."""
        return sorted(self._references(), key=lambda name: (name != schema.FINAL, name))

    def reference(self, name: str) -> Reference:
        """A reference's weights: by parameter name, the raw array and the name of its torch dtype.

        Raises:
            RunError: there is no such reference, or a stored bit has changed; the message names the parameter.
        """
        if name not in self.references:
            there = ", ".join(self.references) or "none"
            raise RunError(f"{self.path} ({self.status}) has no reference {name!r}; it has: {there}")
        return self._reference(name)

    @functools.cached_property
    def sketch(self) -> Sketch:
        """The sketches that ``record --sketch`` keeps, from which inner products between steps are estimated.

        Raises:
            NoSketch: there are none.
            RunError: they are damaged; or several processes have one each, and the record is not sealed yet.
        """
        described = self.manifest.get("sketch")
        if not described:
            raise NoSketch(f"{self.path} has no sketch: record it with --sketch 4096 (sketch=4096 in Python)")
        parameters = (self.manifest.get("model") or {}).get("parameters") or []
        missing = [name for name in ("size", "every", "seed", "shapes") if described.get(name) is None]
        if missing or len(parameters) != len(described["shapes"]):
            raise RunError(f"{self.path} is damaged: its manifest does not describe the sketch and the parameters")
        rows = self._sketch_rows(bool(described.get("sharded")))
        wanted = -(-2 * described["size"] // described["every"])
        if rows.shape[1:] != (wanted,):
            raise RunError(f"{self.path} is damaged: a row of its sketch should have {wanted} numbers")
        references = Projections(self, described, parameters)
        return Sketch(rows, described, references, self.num_steps if self.status == "complete" else None)

    def close(self) -> None:
        """Close the file; safe to call twice."""

    def _whole_reference(self, name: str) -> Reference:
        """A reference's weights as a whole, where each process has kept a shard of them."""
        return self.reference(name)

    @abstractmethod
    def _sketch_rows(self, sharded: bool) -> Array: ...
    @abstractmethod
    def _rows(self, path: str, start: int, stop: int) -> NDArray[Any]: ...
    @abstractmethod
    def _references(self) -> list[str]: ...
    @abstractmethod
    def _reference(self, name: str) -> Reference: ...

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Projections(Mapping[str, Array]):
    """The projections of a recording's references by name, each computed when it is first asked for."""

    def __init__(self, record: Record, described: Mapping[str, Any], parameters: Sequence[str]) -> None:
        self._record, self._described, self._parameters = record, described, parameters
        self._found: dict[str, Array] = {}
        self._names = record.references

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._found:
            with open_record(self._record.path) as record:  # ours may have been closed
                whole = record._whole_reference(name)
            if missing := [each for each in self._parameters if each not in whole]:
                raise RunError(f"{self._record.path} is damaged: its reference {name!r} lacks {missing[0]}")
            try:
                self._found[name] = projected(self._described, [whole[each] for each in self._parameters])
            except UsageError as error:
                raise RunError(
                    f"{self._record.path}: its reference {name!r} does not fit the sketch: {error}"
                ) from error
        return self._found[name]


def open_record(path: str | os.PathLike[str], rank: int = 0) -> Record:
    """Open a recording: ``record.h5`` where it is sealed, else the rows that it has committed so far.

    Args:
        path: a run folder, or a file. The writer may be alive, dead or done.
        rank: of a sealed run of several processes, whose fingerprints, and whose shards of the references.

    Raises:
        RunError: there is no recording; the message says what there is instead.

    >>> import tempfile
    >>> from geomprobe.trace.stream.writer import PartWriter, Table
    >>> path = Path(tempfile.mkdtemp()) / "part.h5"
    >>> tables = [Table("steps", ("epoch", "loss", "lr"), "float64"), Table("fingerprints/loss", ("loss",), "int64")]
    >>> with PartWriter(path, schema="geomprobe-record", tables=tables, attributes={}) as part:
    ...     part.append({"steps": np.array([[0.0, 2.5, 0.1]]), "fingerprints/loss": np.array([[77]])})
    >>> with open_record(path) as record:
    ...     record.status, record.steps["loss"].tolist(), record.fingerprints("loss", 0, 1).tolist()
    ('incomplete', [2.5], [[77]])
    """
    return read_settled(Path(path), schema.RECORD_SCHEMA, functools.partial(_open, rank=rank))


def _open(source: Source, rank: int) -> Record:
    return _Streaming(source) if source.file is None else _Sealed(source, source.file, rank)


class _Sealed(Record):
    """A sealed ``record.h5``, kept open: a replay asks for its rows block by block."""

    def __init__(self, source: Source, path: Path, rank: int) -> None:
        self._path = path
        with damage_named("the header", path):
            self._file: Any = h5py.File(path, "r")
            self._own: Any = self._file[f"{schema.RANKS}/{rank}"] if rank else self._file
            self._groups = set(self._file)
            self._prints = set(self._own[schema.FINGERPRINTS])
            super().__init__(source, source.facts["num_steps"], rank)

    def names(self, component: str) -> list[str]:
        if f"{component}_names" not in self._prints:
            return []
        path = f"{schema.FINGERPRINTS}/{component}_names"
        with damage_named(path, self._path):
            return list(self._own[path].asstr()[:])

    def _rows(self, path: str, start: int, stop: int) -> NDArray[Any]:
        with damage_named(path, self._path):
            return np.asarray(self._own[path][start:stop])

    @property
    def steps(self) -> dict[str, Array]:
        names = [column.name for column in schema.RECORD_COLUMNS]
        with damage_named("steps", self._path):
            return {name: self._file[f"steps/{name}"][:] for name in names}

    def _references(self) -> list[str]:
        if "references" not in self._groups:
            return []
        with damage_named("the list of references", self._path):
            return [schema.unescape(name) for name in self._file["references"]]

    def _reference(self, name: str) -> Reference:
        path = f"references/{schema.escape(name)}"
        with damage_named(path, self._path):
            # Replicated weights are kept once, by rank 0.
            return read_reference(self._own[path] if path in self._own else self._file[path])

    def _sketch_rows(self, sharded: bool) -> Array:
        ranks = self._file.get(schema.RANKS, ()) if sharded else ()
        found = [self._file, *(self._file[f"{schema.RANKS}/{rank}"] for rank in sorted(ranks, key=int))]
        with damage_named(schema.SKETCH, self._path):
            rows: Array = sum(group[f"{schema.SKETCH}/rows"][:] for group in found)
        return rows

    def _whole_reference(self, name: str) -> Reference:
        if not self.manifest["sketch"].get("sharded"):
            return self.reference(name)
        path = f"references/{schema.escape(name)}"
        places = [path, *(f"{schema.RANKS}/{rank}/{path}" for rank in sorted(self._file[schema.RANKS], key=int))]
        shapes = dict(zip(self.manifest["model"]["parameters"], self.manifest["sketch"]["shapes"], strict=True))
        with damage_named(path, self._path):
            shards = [read_reference(self._file[place]) for place in places]
            return {
                parameter: (joined([shard[parameter][0] for shard in shards], shape), shards[0][parameter][1])
                for parameter, shape in shapes.items()
            }

    def close(self) -> None:
        self._file.close()


class _Streaming(Record):
    """The parts of a recording that runs or was cut off, and the references it has taken so far."""

    def __init__(self, source: Source) -> None:
        self._spans = _contiguous(spans(source.parts))
        self._tables = source.parts[0].tables
        self._folder = source.parts[0].path.parent
        super().__init__(source, sum(span.stop - span.start for span in self._spans))

    def names(self, component: str) -> list[str]:
        table = self._tables.get(f"{schema.FINGERPRINTS}/{component}")
        return [] if table is None else list(table.columns)

    @property
    def steps(self) -> dict[str, Array]:
        names = self._tables[schema.STEPS].columns
        table = self._rows(schema.STEPS, 0, self.num_steps)
        return {"step": np.arange(self.num_steps, dtype=float), **dict(zip(names, table.T, strict=True))}

    def _references(self) -> list[str]:
        files = self._folder.glob(f"{schema.REFERENCE_PREFIX}*.h5")
        return [unquote(path.stem.removeprefix(schema.REFERENCE_PREFIX)) for path in files]

    def _reference(self, name: str) -> Reference:
        return read_reference_file(self._folder / schema.reference_file(name))

    def _sketch_rows(self, sharded: bool) -> Array:
        if sharded:
            raise RunError(
                f"{self.path} is not sealed: each process has the sketch of its shard. Record the run to the end"
            )
        return self._rows(schema.SKETCH, 0, self.num_steps)

    def _rows(self, path: str, start: int, stop: int) -> NDArray[Any]:
        found: NDArray[Any] = read_rows(self._spans, self._tables[path], start, stop)[1]
        if len(found) != max(0, stop - start):
            raise RunError(
                f"{self.path} is damaged: of steps {start} to {stop - 1} only {len(found)} can be read. "
                "Run the pass again"
            )
        return found


def _contiguous(found: list[Span]) -> list[Span]:
    """Spans from step 0 on up to the first gap; what a recording has behind one cannot be replayed."""
    step = 0
    whole = []
    for span in found:
        if span.first_step != step:
            break
        whole.append(span)
        step = span.stop_step
    return whole
