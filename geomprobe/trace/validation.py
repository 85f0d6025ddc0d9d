"""Whether a file of a run is what a pass writes, before any row is read: names, kinds, shapes, sizes, links, storage.

The child process that opens files calls this (`geomprobe.trace.stream.child`), since a damaged file can hang HDF5.
Nobody else opens a file that was not found good here. Each part of the tree that geomprobe knows is visited once. What
else is in a file is never touched.

A dataset must lie in the file as a whole: external storage, links to elsewhere and virtual datasets would make the
bytes of other files pass for columns, and a size that the file's own does not cover would fill the memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t, h5z

from geomprobe.errors import RunError
from geomprobe.trace import schema
from geomprobe.trace.certificate import Certificate
from geomprobe.trace.json_values import COUNT, STATUSES, manifest_of_text, require_form

_LARGEST_CHUNK = 1 << 24
_STORED_TYPES = re.compile(r"b?float(\d+)(?:_e\dm\d(?:fn|fnuz|u)*)?|u?int(\d+)|bool")
_RANK = re.compile(r"[1-9][0-9]{0,5}")
_LAYOUTS = (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED)


def part_header(file: Any, size: int) -> dict[str, Any]:
    """What a part says of itself, as the fields of `geomprobe.trace.stream.reader.Header`.

    Args:
        file: the open ``h5py.File``, which may be growing.
        size: bytes of the file.

    Raises:
        RunError: it is no part, or not whole.
    """
    tree = _Tree(file, size)
    header: dict[str, Any] = {"schema": tree.text("", "schema"), "schema_version": tree.count("", "schema_version")}
    header |= {"first_step": tree.count("", "first_step"), "tables": {}, "rows": 0}
    attributes = {name: tree.attribute("", name) for name in file.attrs if name not in (*header, "tables")}
    header["attributes"] = attributes
    if header["schema"] not in schema.FILES or header["schema_version"] != schema.VERSIONS[header["schema"]]:
        return header  # what is wrong with it, the reader says
    manifest_of_text(attributes.get("manifest", "{}"))
    for name in ("num_parameters", "started"):
        require_form(attributes.get(name, 0), COUNT, name)
    # The writer extends the tables first and the steps last. HDF5 keeps the lengths as they were when it first saw
    # them, so the steps come first here, or a row could be counted before its numbers are seen.
    tree.rows("step", "int64")
    header["rows"] = _committed(file["step"], header["first_step"], size)
    header["tables"] = _tables(tree, header["schema"])
    return header


def sealed_facts(file: Any, size: int, step_columns: Sequence[str]) -> dict[str, Any]:
    """What a sealed file says of itself: its attributes and, of a trace, its columns and its certificate.

    Args:
        file: the open ``h5py.File``.
        size: bytes of the file.
        step_columns: the names of the columns of ``/steps`` that the reader knows.

    Raises:
        RunError: it is not what a pass writes; the message names what is not.
    """
    tree = _Tree(file, size)
    found: dict[str, Any] = {"schema": tree.attribute("", "schema"), "part": tree.attribute("", "tables") is not None}
    found["schema_version"] = tree.attribute("", "schema_version")
    kind = found["schema"]
    if found["part"] or kind not in schema.FILES or found["schema_version"] != schema.VERSIONS[kind]:
        return found  # what is wrong with it, the reader says
    found["status"] = require_form(tree.text("", "status"), STATUSES[kind], "status")
    found["num_parameters"] = tree.count("", "num_parameters")
    found["manifest"] = manifest_of_text(tree.text("", "manifest"))
    found["num_steps"] = tree.length = tree.count("", "num_steps")
    return found | (_trace(tree, step_columns) if kind == schema.TRACE_SCHEMA else _record(tree))


def reference_names(file: Any, size: int) -> dict[str, Any]:
    """The parameters in a file of `geomprobe.trace.weights.write_reference`.

    Raises:
        RunError: it is not what that writes.
    """
    tree = _Tree(file, size)
    tree.reference("")
    return {"names": tree.members("")}


def _tables(tree: _Tree, kind: str) -> dict[str, Any]:
    """The tables of a part, by name."""
    tables: dict[str, Any] = json.loads(tree.text("", "tables"))
    require_form(tables, {}, "tables")
    for name, table in tables.items():
        require_form(table, dict, f"tables.{name}")
        require_form([table.get("columns"), table.get("dtype")], [([str], {"float64", "int64"})], f"tables.{name}")
        columns = table["columns"]
        if len(set(columns)) < len(columns):
            raise RunError(f"tables.{name} is damaged: it has a column twice")
        if columns:
            tree.table(f"tables/{name}", table["dtype"], len(columns))
    filled = [name for name, table in tables.items() if table["columns"]]
    tree.table("checks", "int64", 1 + len(filled))
    float_table = schema.VALUES if kind == schema.TRACE_SCHEMA else schema.STEPS
    found = tables.get(float_table, {"columns": [], "dtype": None})
    if found["dtype"] != "float64":
        raise RunError(f"tables is damaged: there is no {float_table}")
    if kind == schema.RECORD_SCHEMA and not {each.name for each in schema.RECORD_COLUMNS[1:]} <= {*found["columns"]}:
        raise RunError(f"tables.{float_table} is damaged: a column is missing")
    return tables


def _committed(step: Any, first_step: int, size: int) -> int:
    """How many rows from the first on are marked as committed; there cannot be more than the file has room for."""
    most, block = min(len(step), size // 8), 1 << 17
    for start in range(0, most, block):
        found = step[start : min(start + block, most)]
        wrong = np.flatnonzero(found != first_step + start + np.arange(len(found)))
        if len(wrong):
            return start + int(wrong[0])
    return most


def _trace(tree: _Tree, step_columns: Sequence[str]) -> dict[str, Any]:
    tree.column("steps/step")
    columns = [path for path in _trace_columns(tree, step_columns) if tree.column(path)]
    return {
        "columns": columns,
        "final": [path for path in schema.FINAL_LINKS if tree.exists(path) and tree.column(path)],
        "certificate": _certificate(tree),
    }


def _trace_columns(tree: _Tree, step_columns: Sequence[str]) -> Iterator[str]:
    """The paths of the columns that there are, in the order of reports; each is one that the schema knows."""
    steps = set(tree.members("steps"))
    yield from (f"steps/{name}" for name in step_columns if name in steps)
    for group in ("inner_products", *schema.ORACLES):
        yield from _columns_in(tree, group)
    for parent in ("groups", "references", "parameters", schema.RANKS):
        for name in tree.members(parent):
            if (parent, name) == ("references", schema.FINAL):
                continue
            if parent == "references":
                yield from (f"{parent}/{name}/{column.name}" for column in schema.REFERENCE_COLUMNS)
                yield from _columns_in(tree, f"{parent}/{name}/inner_products")
            else:
                yield from _columns_in(tree, f"{parent}/{name}")


def _columns_in(tree: _Tree, group: str) -> Iterator[str]:
    for name in tree.members(group):
        path = f"{group}/{name}"
        if name == "inner_products" and group != name:
            yield from (each for each in (f"{path}/{inner}" for inner in tree.members(path)) if schema.is_column(each))
        elif schema.is_column(path):
            yield path


def _certificate(tree: _Tree) -> dict[str, Any]:
    """The entries that `Certificate.write` put there, as JSON values; empty where there are none."""
    found = {name: tree.attribute("certificate", name) for name in Certificate.__dataclass_fields__}
    there = {name: value for name, value in found.items() if value is not None}
    there |= {name: json.loads(there[name]) for name in ("components", "first_difference") if name in there}
    Certificate.of(there)
    return there


def _record(tree: _Tree) -> dict[str, Any]:
    for column in schema.RECORD_COLUMNS:
        tree.column(f"steps/{column.name}")
    for place in ("", *(f"{schema.RANKS}/{rank}/" for rank in tree.members(schema.RANKS) if _RANK.fullmatch(rank))):
        _fingerprints(tree, f"{place}{schema.FINGERPRINTS}")
        if tree.exists(f"{place}{schema.SKETCH}/rows"):
            rows, _ = tree.shape(f"{place}{schema.SKETCH}/rows", "float64", 2)
            if rows != tree.length:
                raise RunError(f"{place}{schema.SKETCH}/rows has {rows} rows, and the file says {tree.length}")
        for name in tree.members(f"{place}references"):
            tree.reference(f"{place}references/{name}")
    return {}


def _fingerprints(tree: _Tree, group: str) -> None:
    for component in set(tree.members(group, required=True)) & set(schema.COMPONENTS):
        rows, columns = tree.shape(f"{group}/{component}", "int64", 2)
        (names,) = tree.shape(f"{group}/{component}_names", "", 1)
        if rows != tree.length or columns != names:
            raise RunError(f"{group}/{component} has {rows} rows of {columns} columns, and there are {names} names")


class _Tree:
    """An open file by paths, whose every look is safe; ``length`` is how many rows its columns have."""

    length = 0

    def __init__(self, file: Any, size: int) -> None:
        self._size = self._left = size
        self._found: dict[str, Any] = {"": h5g.open(file.id, b"/")}
        self._places: dict[str, int] = {}  # the same for each name of one dataset
        self._counted: set[int] = set()

    def exists(self, path: str) -> bool:
        """Whether there is something by this path."""
        return self._open(path) is not None

    def members(self, path: str, *, required: bool = False) -> list[str]:
        """The names in a group; none where it is not there."""
        group = self._open(path)
        if group is None and not required:
            return []
        if not isinstance(group, h5g.GroupID):
            self._refuse(path, "it is no group")
        return list(h5py.Group(group))

    def attribute(self, path: str, name: str) -> Any:
        """One text, number or truth value; None where there is none."""
        of = self._open(path)
        if of is None or not h5a.exists(of, name.encode()):
            return None
        found = h5a.open(of, name.encode())
        kinds = (h5t.STRING, h5t.INTEGER, h5t.FLOAT, h5t.ENUM)
        whole = found.get_space().get_simple_extent_type() == h5s.SCALAR and found.get_storage_size() <= self._size
        if not whole or found.get_type().get_class() not in kinds:
            self._refuse(path, f"its attribute {name} is no text and no number")
        value = h5py.AttributeManager(h5py.Group(of) if isinstance(of, h5g.GroupID) else h5py.Dataset(of))[name]
        value = value.item() if isinstance(value, np.generic) else value
        return value.decode(errors="replace") if isinstance(value, bytes) else value

    def text(self, path: str, name: str) -> str:
        """An attribute that must be text."""
        text: str = require_form(self.attribute(path, name), str, name)
        return text

    def count(self, path: str, name: str) -> int:
        """An attribute that must be a whole number, from 0 on."""
        count: int = require_form(self.attribute(path, name), COUNT, name)
        return count

    def column(self, path: str) -> bool:
        """Require a column of float64, of this file's length."""
        (rows,) = self.shape(path, "float64", 1)
        if rows != self.length:
            self._refuse(path, f"it has {rows} rows, and the file says {self.length}")
        return True

    def rows(self, path: str, dtype: str) -> None:
        """Require a growing column of a part."""
        self.shape(path, dtype, 1, growing=True)

    def table(self, path: str, dtype: str, columns: int) -> None:
        """Require a growing table of a part, of so many columns."""
        found = self.shape(path, dtype, 2, growing=True)[1]
        if found != columns:
            self._refuse(path, f"it has {found} columns, and should have {columns}")

    def reference(self, path: str) -> None:
        """Require the weights of a reference: a dataset of numbers for each parameter, with the name of their type."""
        for name in self.members(path, required=True):
            place = f"{path}/{name}".lstrip("/")
            self.shape(place, None)
            found = require_form(self.attribute(place, "torch_dtype"), str, f"{place}.torch_dtype")
            named = _STORED_TYPES.fullmatch(found)
            bits = int(next(filter(None, named.groups()), 8)) if named else 0
            if bits != 8 * self._open(place).dtype.itemsize:
                self._refuse(place, f"its type is {found}")

    def shape(self, path: str, dtype: str | None, ndim: int | None = None, *, growing: bool = False) -> Sequence[int]:
        """The shape of a dataset that lies in this file as a whole.

        Args:
            path: where it is.
            dtype: of its numbers; "" for text of fixed length, None for any numbers.
            ndim: its dimensions; None for any.
            growing: a part's, of which not every row may have been written.
        """
        found = self._open(path)
        if not isinstance(found, h5d.DatasetID):
            self._refuse(path, "it is no dataset" if found is not None else "it is missing")
        self._require_type(path, found.get_type(), dtype)
        if found.get_space().get_simple_extent_type() != h5s.SIMPLE or ndim not in (None, found.rank):
            self._refuse(path, "it has another number of dimensions")
        shape: tuple[int, ...] = found.shape
        self._require_storage(path, found, shape, growing)
        return shape

    def _require_type(self, path: str, kind: Any, dtype: str | None) -> None:
        if dtype == "":
            right = isinstance(kind, h5t.TypeStringID) and not kind.is_variable_str()
        elif dtype is None:
            right = isinstance(kind, (h5t.TypeFloatID, h5t.TypeIntegerID, h5t.TypeEnumID)) and kind.dtype.kind in "fiub"
        else:
            right = kind == h5t.py_create(np.dtype(dtype))
        if not right:
            self._refuse(path, "its values are of another type")

    def _require_storage(self, path: str, found: Any, shape: tuple[int, ...], growing: bool) -> None:
        made = found.get_create_plist()
        if made.get_layout() not in _LAYOUTS or made.get_external_count():
            self._refuse(path, "its values are not in this file")
        if any(made.get_filter(i)[0] != h5z.FILTER_FLETCHER32 for i in range(made.get_nfilters())):
            self._refuse(path, "it is compressed, or stored by another filter than checksums")
        width = found.get_type().get_size()
        if made.get_layout() == h5d.CHUNKED and math.prod(made.get_chunk()) * width > max(self._size, _LARGEST_CHUNK):
            self._refuse(path, "a chunk of it is larger than this file")
        if growing or self._places[path] in self._counted:
            return
        self._counted.add(self._places[path])
        stored = found.get_storage_size()
        self._left -= stored
        if math.prod(shape) * width > stored or self._left < 0:
            self._refuse(path, f"it says that it has the shape {shape}, for which this file is too small")

    def _open(self, path: str) -> Any:
        """The group or dataset by a path, each step of which is there and leads to nothing outside; else None."""
        if path in self._found:
            return self._found[path]
        parent, _, name = path.rpartition("/")
        group, found, link = self._open(parent), None, name.encode(errors="surrogateescape")
        if isinstance(group, h5g.GroupID) and group.links.exists(link):
            info = group.links.get_info(link)
            if info.type != h5l.TYPE_HARD:
                self._refuse(path, "it is a link")
            found, self._places[path] = h5o.open(group, link), info.u
        self._found[path] = found
        return found

    def _refuse(self, path: str, why: str) -> NoReturn:
        raise RunError(f"{path or 'its root'} is damaged: {why}")
