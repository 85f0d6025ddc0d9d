"""Seal parts into one ordinary HDF5 file: every column derived, described and checksummed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from geomprobe.errors import RunError
from geomprobe.trace import schema
from geomprobe.trace.atomic_file import atomic_hdf5
from geomprobe.trace.certificate import Certificate
from geomprobe.trace.derive import Derived, sealed_columns
from geomprobe.trace.locate import Span, spans
from geomprobe.trace.stream.reader import TIMEOUT_S, Block, Header, begun_parts, stream_part
from geomprobe.trace.weights import copy_reference, write_reference

__all__ = ["seal_record", "seal_trace", "write_reference"]

_CHUNK_ROWS = 4096
_BLOCK_BYTES = 1 << 26
_PRINT_CHUNK_BYTES = 1 << 18


def seal_trace(
    parts: Sequence[Path],
    out: Path,
    *,
    status: str,
    num_parameters: int,
    manifest: Mapping[str, Any],
    certificate: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Make ``trace.h5`` of a replay's parts; until it is whole, `out` holds what it held before.

    Args:
        parts: the parts, whose step ranges must join without a gap from step 0; where two hold a step, they hold the
            same row.
        out: the file to make or replace.
        status: ``"complete"``, ``"incomplete"``, ``"diverged"`` or ``"uncertified"``.
        num_parameters: how many scalar parameters the weights have.
        manifest: the environment, kept as JSON.
        certificate: what the comparison found: the entries of a `Certificate`.
        num_steps: seal this many steps; all there are when None.
        timeout_s: how long reading one block of a part may take.

    Raises:
        RunError: parts are missing, damaged, unlike one another, or do not join.
        WriteFailed: the disk refused a write.

    >>> import tempfile
    >>> from geomprobe.trace.stream.writer import PartWriter, Table
    >>> run = Path(tempfile.mkdtemp())
    >>> table = Table("values", ("inner_products/g.g",), "float64")
    >>> with PartWriter(run / "part.h5", schema="geomprobe-trace", tables=[table], attributes={}) as part:
    ...     part.append({"values": np.array([[4.0]])})
    >>> seal_trace([run / "part.h5"], run / "trace.h5", status="complete", num_parameters=1, manifest={})
    >>> with h5py.File(run / "trace.h5") as file:
    ...     file["steps/grad_norm"][:].tolist(), file["steps/grad_norm"].attrs["units"]
    ([2.0], 'loss/weight')
    """
    joined = _joined(parts, schema.TRACE_SCHEMA, num_steps, timeout_s)
    raw = joined[0].part.tables[schema.VALUES].columns
    with atomic_hdf5(Path(out)) as file:
        _describe_file(file, schema.TRACE_SCHEMA, status, joined[-1].stop_step, num_parameters, manifest)
        paths = sealed_columns(raw)
        size = _block_rows(len(paths))
        columns = {path: _create_column(file, path, joined[-1].stop_step, size) for path in paths}
        for rows, block in _blocks(joined, size, timeout_s):
            values = np.ascontiguousarray(block[schema.VALUES].T)
            derived = Derived(block["step"], dict(zip(raw, values, strict=True)))
            for path, dataset in columns.items():
                dataset[rows] = derived[path]
        _link_final(file)
        _attach_steps(file, [*columns, *schema.FINAL_LINKS])
        if certificate is not None:
            Certificate.of(certificate).write(file)


def seal_record(
    parts: Sequence[Path],
    out: Path,
    *,
    status: str,
    num_parameters: int,
    manifest: Mapping[str, Any],
    references: Mapping[str, Path],
    ranks: Mapping[int, tuple[Sequence[Path], Mapping[str, Path]]] | None = None,
    num_steps: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Make ``record.h5`` of a recording's parts and references; until it is whole, `out` stays as it was.

    Args:
        parts, out, num_parameters, manifest, num_steps, timeout_s: as for `seal_trace`.
        status: ``"complete"``, ``"failed"`` or ``"incomplete"``.
        references: by name, the file that `write_reference` made.
        ranks: of a run of several processes, the parts and references of each but the first.

    Raises:
        RunError: parts or references are missing, damaged, unlike one another, or do not join.
        WriteFailed: the disk refused a write.
    """
    joined = _joined(parts, schema.RECORD_SCHEMA, num_steps, timeout_s)
    steps, tables = joined[-1].stop_step, joined[0].part.tables
    with atomic_hdf5(Path(out)) as file:
        _describe_file(file, schema.RECORD_SCHEMA, status, joined[-1].stop_step, num_parameters, manifest)
        names = tables[schema.STEPS].columns
        size = _block_rows(sum(len(table.columns) for table in tables.values()))
        columns = {name: _create_column(file, f"steps/{name}", steps, size) for name in ("step", *names)}
        _write_rows(file, joined, columns, references, size, timeout_s)
        _attach_steps(file, [f"steps/{name}" for name in columns])
        for rank, (own_parts, shards) in (ranks or {}).items():
            of_rank = _joined(own_parts, schema.RECORD_SCHEMA, steps, timeout_s)
            if of_rank[-1].stop_step != steps:
                found = of_rank[-1].stop_step
                raise RunError(f"{own_parts[0]} and its like hold {found} steps, and rank 0 has {steps}")
            group = file.create_group(f"{schema.RANKS}/{rank}")
            _write_rows(group, of_rank, {}, shards, size, timeout_s)


def _write_rows(
    group: Any,
    joined: list[Span],
    columns: Mapping[str, Any],
    references: Mapping[str, Path],
    size: int,
    timeout_s: float,
) -> None:
    """Write what one rank recorded: the columns of its steps, its fingerprints, its references or shards of them."""
    header = joined[0].part
    datasets = {**columns, **_create_fingerprints(group, header, joined[-1].stop_step)}
    datasets |= _create_sketch(group, header, joined[-1].stop_step)
    for rows, block in _blocks(joined, size, timeout_s):
        if columns:
            block |= zip(header.tables[schema.STEPS].columns, block[schema.STEPS].T, strict=True)
        for name, dataset in datasets.items():
            dataset[rows] = block[name]
    for name, path in references.items():
        copy_reference(path, group, name)


def _joined(parts: Sequence[Path], kind: str, stop: int | None, timeout_s: float) -> list[Span]:
    """The rows of the parts in the order of steps, each step once; refused where they are unlike or do not join."""
    headers = begun_parts(parts, timeout_s)
    if not headers:
        raise RunError("there are no parts to seal; nothing was streamed")
    for header in headers:
        if header.schema != kind or header.schema_version != schema.VERSIONS[kind]:
            found = f"{header.schema} version {header.schema_version}"
            raise RunError(f"{header.path} holds {found}, not {kind} version {schema.VERSIONS[kind]}")
        if header.tables != headers[0].tables:
            raise RunError(f"{headers[0].path} and {header.path} hold different columns; they are of two runs")
    pieces = spans(headers) or [Span(headers[0], 0, 0)]
    if pieces[0].first_step != 0:
        raise RunError(f"{pieces[0].part.path} begins at step {pieces[0].first_step}; the steps before are missing")
    joined: list[Span] = []
    for piece in pieces:
        step = joined[-1].stop_step if joined else 0
        if stop is not None and step >= stop and joined:
            break
        if piece.first_step > step:
            raise RunError(
                f"{joined[-1].part.path} and {piece.part.path} do not join: steps are missing from {step} to "
                f"{piece.first_step - 1}. Replay the segment that is missing, or go on with --resume"
            )
        last = piece.stop if stop is None else min(piece.stop, stop - piece.part.first_step)
        joined.append(Span(piece.part, piece.start, last))
    return joined


def _blocks(joined: list[Span], size: int, timeout_s: float) -> Iterator[tuple[slice, Block]]:
    """All rows of the parts in order, each block with the rows of the sealed file that it fills."""
    row = 0
    for span in joined:
        part = stream_part(span.part.path, start=span.start, stop=span.stop, block_rows=size, timeout_s=timeout_s)
        with part as (_, blocks):
            for block in blocks:
                rows = slice(row, row + len(block["step"]))
                yield rows, block
                row = rows.stop
        if row != span.stop_step:
            raise RunError(
                f"{span.part.path} is damaged from step {row} on; go on from there with --resume, or run the pass again"
            )


def _describe_file(
    file: Any, kind: str, status: str, num_steps: int, num_parameters: int, manifest: Mapping[str, Any]
) -> None:
    file.attrs.update(schema=kind, schema_version=schema.VERSIONS[kind], status=status, num_steps=num_steps)
    file.attrs.update(num_parameters=num_parameters, manifest=json.dumps(manifest))


def _block_rows(columns: int) -> int:
    """Rows that are sealed at a time, and of a column's chunk, so that each chunk is written once."""
    return max(64, min(_CHUNK_ROWS, _BLOCK_BYTES // (8 * columns)))


def _create_column(file: Any, path: str, rows: int, chunk_rows: int) -> Any:
    chunk = min(rows, chunk_rows)
    # A cache of one chunk does where each is written once; the default, for each of a thousand columns, adds up.
    cache = {"rdcc_nbytes": 8 * chunk, "rdcc_nslots": 1}
    # HDF5 has no chunks, and so no checksums, for nothing.
    checked = {"chunks": (chunk,), "fletcher32": True, **cache} if rows else {}
    dataset = file.create_dataset(path, (rows,), "float64", fillvalue=np.nan, **checked)
    dataset.attrs.update(schema.describe(path).attributes)
    return dataset


def _create_fingerprints(file: Any, header: Header, rows: int) -> dict[str, Any]:
    datasets = {}
    for name in (f"{schema.FINGERPRINTS}/{component}" for component in schema.COMPONENTS):
        names = header.tables[name].columns if name in header.tables else ()
        _write_names(file, f"{name}_names", names)
        shape = (rows, len(names))
        checked = {"chunks": _print_chunk(shape), "fletcher32": True} if all(shape) else {}
        datasets[name] = file.create_dataset(name, shape, "int64", **checked)
    return {name: dataset for name, dataset in datasets.items() if dataset.size}


def _create_sketch(file: Any, header: Header, rows: int) -> dict[str, Any]:
    if schema.SKETCH not in header.tables:
        return {}
    shape = rows, len(header.tables[schema.SKETCH].columns)
    checked = {"chunks": _print_chunk(shape), "fletcher32": True} if rows else {}
    dataset = file.create_dataset(f"{schema.SKETCH}/rows", shape, "float64", **checked)
    described: dict[str, Any] = json.loads(str(header.attributes["manifest"]))["sketch"]
    dataset.attrs.update({name: described[name] for name in ("size", "every", "seed")})
    dataset.attrs["layout"] = (
        "rows every*i to every*(i+1)-1, one after another, hold size numbers of the weights of step every*i, then size "
        "of its gradient, then zeros"
    )
    return {schema.SKETCH: dataset}


def _write_names(file: Any, path: str, names: Sequence[str]) -> None:
    # Of fixed length, because HDF5 keeps strings of variable length where no checksum reaches.
    encoded = [name.encode() for name in names]
    dtype = h5py.string_dtype("utf-8", max(map(len, encoded), default=1))
    file.create_dataset(path, data=np.array(encoded, dtype), fletcher32=bool(names) or None)


def _print_chunk(shape: tuple[int, int]) -> tuple[int, int]:
    return max(1, min(shape[0], _CHUNK_ROWS, _PRINT_CHUNK_BYTES // (8 * shape[1]))), shape[1]


def _link_final(file: Any) -> None:
    for path in schema.FINAL_LINKS:
        file[path] = file[schema.canonical(path)]


def _attach_steps(file: Any, paths: Sequence[str]) -> None:
    """Make ``step`` the dimension of every column, and name it in every group, where netCDF looks for it."""
    step = file["steps/step"]
    step.make_scale("step")
    for path in paths:
        if path != "steps/step" and path == schema.canonical(path):
            file[path].dims[0].attach_scale(step)
    groups = dict.fromkeys(path.rpartition("/")[0] for path in paths)
    for group in groups:
        if group != "steps":
            file[f"{group}/step"] = step
