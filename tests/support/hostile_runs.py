"""Run folders that somebody crafted: each case spoils a good one in place.

A case names the run that it starts from, and the verbs that may end well on it, with the reason. All other verbs that
read a run must refuse it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from geomprobe.trace.schema import REFERENCE_COLUMNS, VERSIONS
from geomprobe.trace.stream.checksum import row_checksums

VERBS = ("inspect", "verify", "watch", "plot", "report", "diff", "export")
SECRET = 1234.56789
"""The number that a file beside the run holds; it must be in no output."""
ESCAPE = "\x1b]0;owned\x07\x9b2J\u202e$\\frac$<b>"
HUGE = 10**12

ALL = " ".join(VERBS)  # what is odd there is read by none, or only shown, with its letters escaped
_OF_RECORD = "verify plot export"  # they read trace.h5 alone
_OF_TRACE = "watch"  # it names the part that it cannot read, and shows the others


@dataclass(frozen=True)
class Case:
    """A way to spoil a run.

    Attributes:
        spoil: is given the run, and a file beside it that no verb may read.
        of: the good run: ``"whole"``, ``"replaying"``, whose trace is still in parts, or ``"recording"``, likewise.
        harmless: verbs that end with 0, because they do not read what is spoiled, or can show what is there.
    """

    spoil: Callable[[Path, Path], Any]
    of: str = "whole"
    harmless: str = ""


def _in(name: str, change: Callable[[Any, Path], Any]) -> Callable[[Path, Path], None]:
    """Spoil a sealed file of the run by a function of it, open."""

    def spoil(run: Path, secret: Path) -> None:
        with h5py.File(run / name, "r+") as file:
            change(file, secret)

    return spoil


def _trace(change: Callable[[Any, Path], Any]) -> Callable[[Path, Path], None]:
    return _in("trace.h5", change)


def _record(change: Callable[[Any, Path], Any]) -> Callable[[Path, Path], None]:
    return _in("record.h5", change)


def _instead(path: str, make: Callable[[Any, str, Any, Path], Any]) -> Callable[[Any, Path], None]:
    """Put something else in the place of a dataset; ``make`` is given the file, the path, the shape and the secret."""

    def change(file: Any, secret: Path) -> None:
        shape = file[path].shape
        del file[path]
        make(file, path, shape, secret)

    return change


def _external(file: Any, path: str, shape: Any, secret: Path) -> None:
    file.create_dataset(path, shape, "f8", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


def _external_fifo(file: Any, path: str, shape: Any, secret: Path) -> None:
    os.mkfifo(secret.with_name("fifo"))
    file.create_dataset(path, shape, "f8", external=[(str(secret.with_name("fifo")), 0, h5py.h5f.UNLIMITED)])


def _external_link(file: Any, path: str, shape: Any, secret: Path) -> None:
    other = secret.with_name("other.h5")
    with h5py.File(other, "w") as foreign:
        foreign["x"] = np.full(shape, SECRET)
    file[path] = h5py.ExternalLink(str(other), "/x")


def _link_to_fifo(file: Any, path: str, shape: Any, secret: Path) -> None:
    os.mkfifo(secret.with_name("fifo"))
    file[path] = h5py.ExternalLink(str(secret.with_name("fifo")), "/x")


def _virtual(file: Any, path: str, shape: Any, secret: Path) -> None:
    other = secret.with_name("other.h5")
    with h5py.File(other, "w") as foreign:
        foreign["x"] = np.full(shape, SECRET)
    layout = h5py.VirtualLayout(shape, "f8")
    layout[:] = h5py.VirtualSource(str(other), "x", shape)
    file.create_virtual_dataset(path, layout)


def _data(make: Callable[[Any], Any], **options: Any) -> Callable[[Any, str, Any, Path], None]:
    return lambda file, path, shape, _: file.create_dataset(path, data=make(shape), **options)


def _attribute(name: str, value: Any) -> Callable[[Any, Path], None]:
    def change(file: Any, _: Path) -> None:
        file.attrs[name] = value

    return change


def _manifest(**entries: Any) -> Callable[[Any, Path], None]:
    def change(file: Any, _: Path) -> None:
        file.attrs["manifest"] = json.dumps({**json.loads(file.attrs["manifest"]), **entries})

    return change


def _certificate(**entries: Any) -> Callable[[Any, Path], None]:
    return lambda file, _: file["certificate"].attrs.update(entries)


def _values(path: str, change: Callable[[Any], None]) -> Callable[[Any, Path], None]:
    def apply(file: Any, _: Path) -> None:
        values = file[path][...]
        change(values)
        file[path][...] = values

    return apply


def _set(row: Any, value: float) -> Callable[[Any], None]:
    return lambda values: values.__setitem__(row, value)


def _loop(path: str, to: str) -> Callable[[Any, Path], None]:
    def change(file: Any, _: Path) -> None:
        file.require_group(path.rpartition("/")[0] or "/")
        file[path] = file[to]

    return change


def _many_rows(chunks: tuple[int, ...] | None) -> Callable[[Path, Path], None]:
    """A file that says that it has a million million rows."""

    def spoil(run: Path, _: Path) -> None:
        with h5py.File(run / "trace.h5", "r+") as file:
            for name in list(file["steps"]):
                del file["steps"][name]
                file.create_dataset(f"steps/{name}", (HUGE,), "f8", chunks=chunks)
            file.attrs["num_steps"] = HUGE

    return spoil


def _odd_reference(file: Any, _: Path) -> None:
    for name in (column.name for column in REFERENCE_COLUMNS):
        file[f"references/{ESCAPE}/{name}"] = file[f"steps/{name}"][...]


def _place(name: str, make: Callable[[Path, Path], Any]) -> Callable[[Path, Path], None]:
    """Put something else in the place of a file of the run."""

    def spoil(run: Path, secret: Path) -> None:
        path = run / name
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        path.parent.mkdir(exist_ok=True)
        make(path, secret)

    return spoil


def _socket(path: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            listening.bind(path.name)
        finally:
            os.chdir(here)


def _fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def _link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def _device(path: Path, _: Path) -> None:
    path.symlink_to("/dev/zero")


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def spoil(run: Path, _: Path) -> None:
        (run / "trace.h5").write_bytes(change((run / "trace.h5").read_bytes()))

    return spoil


def write_part(path: Path, kind: str = "geomprobe-trace", rows: int = 5, **changes: Any) -> None:
    """A part of a pass, closed, that is good but for the changes.

    ``attributes`` are further ones, ``columns`` those of its float table, and ``edit`` is given the open file.
    """
    trace = kind == "geomprobe-trace"
    columns = changes.get("columns", ["steps/loss", "inner_products/g.g"] if trace else ["epoch", "loss", "lr"])
    table = changes.get("table", "values" if trace else "steps")
    step, values = np.arange(rows), np.arange(1.0, 1.0 + rows * len(columns)).reshape(rows, -1)
    checks = np.stack([step, row_checksums(step, values)], axis=1)
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs.update(schema=kind, schema_version=VERSIONS[kind], first_step=0, manifest="{}", num_parameters=1)
        file.attrs["tables"] = json.dumps({table: {"columns": columns, "dtype": "float64"}})
        file.create_dataset(f"tables/{table}", data=values, maxshape=(None, len(columns)), chunks=(64, len(columns)))
        file.create_dataset("checks", data=checks, maxshape=(None, 2), chunks=(64, 2))
        file.create_dataset("step", data=step, maxshape=(None,), chunks=(64,))
        file.attrs.update(changes.get("attributes", {}))
        changes.get("edit", lambda file: None)(file)


def _part(**changes: Any) -> Callable[[Path, Path], None]:
    """Spoil the one part of a run that is being replayed."""

    def spoil(run: Path, secret: Path) -> None:
        edit = changes.get("edit")
        given = {**changes, **({"edit": lambda file: edit(file, secret)} if edit else {})}
        write_part(run / "stream" / "trace-00000000.h5", **given)

    return spoil


def _external_table(file: Any, secret: Path) -> None:
    del file["tables/values"]
    external = [(str(secret), 0, h5py.h5f.UNLIMITED)]
    file.create_dataset("tables/values", (5, 2), "f8", external=external)


def _long_part(file: Any, _: Path) -> None:
    for name in ("step", "checks", "tables/values"):
        file[name].resize(HUGE, axis=0)


def _no_checks(file: Any, _: Path) -> None:
    del file["checks"]


TRACES = {
    "a column in external storage": Case(_trace(_instead("steps/cosine", _external))),
    "a column in external storage in a FIFO": Case(_trace(_instead("steps/cosine", _external_fifo))),
    "an inner product in external storage": Case(_trace(_instead("inner_products/g.d", _external))),
    "the final iterate's second name in external storage": Case(_trace(_instead("references/final/rsi", _external))),
    "a column behind an external link": Case(_trace(_instead("steps/cosine", _external_link))),
    "a column behind an external link to a FIFO": Case(_trace(_instead("steps/cosine", _link_to_fifo))),
    "a column behind a soft link": Case(
        _trace(_instead("steps/rsi", lambda file, path, *_: file.__setitem__(path, h5py.SoftLink("/steps/loss"))))
    ),
    "a soft link to nowhere": Case(
        _trace(_instead("steps/rsi", lambda file, path, *_: file.__setitem__(path, h5py.SoftLink("/nowhere"))))
    ),
    "a virtual column": Case(_trace(_instead("steps/cosine", _virtual))),
    "a group for a column": Case(_trace(_instead("steps/cosine", lambda file, path, *_: file.create_group(path)))),
    "a column that is longer": Case(_trace(_instead("steps/cosine", _data(lambda shape: np.zeros(shape[0] + 1))))),
    "a column that is shorter": Case(_trace(_instead("steps/cosine", _data(lambda shape: np.zeros(2))))),
    "a column of two dimensions": Case(_trace(_instead("steps/cosine", _data(lambda shape: np.zeros((*shape, 2)))))),
    "a column that is one number": Case(_trace(_instead("steps/cosine", _data(lambda shape: 1.0)))),
    "a column of float32": Case(_trace(_instead("steps/cosine", _data(lambda shape: np.zeros(shape, "f4"))))),
    "a column of strings": Case(
        _trace(_instead("steps/cosine", _data(lambda shape: ["x"] * shape[0], dtype=h5py.string_dtype())))
    ),
    "a column of pairs": Case(
        _trace(_instead("steps/cosine", _data(lambda shape: np.zeros(shape, [("a", "f8"), ("b", "f8")]))))
    ),
    "a column of complex numbers": Case(_trace(_instead("steps/cosine", _data(lambda shape: np.zeros(shape, "c16"))))),
    "a column of object references": Case(
        _trace(
            _instead(
                "steps/cosine", lambda file, path, shape, _: file.create_dataset(path, shape, dtype=h5py.ref_dtype)
            )
        )
    ),
    "a column of lists": Case(
        _trace(
            _instead(
                "steps/cosine",
                lambda file, path, shape, _: file.create_dataset(path, shape, dtype=h5py.vlen_dtype(np.float64)),
            )
        )
    ),
    "a column that is compressed": Case(
        _trace(_instead("steps/cosine", _data(lambda shape: np.zeros(shape), compression="gzip")))
    ),
    "a column of which no byte was written": Case(
        _trace(_instead("steps/cosine", lambda file, path, shape, _: file.create_dataset(path, shape, "f8")))
    ),
    "a dataset for /steps": Case(
        _trace(lambda file, _: (file.__delitem__("steps"), file.create_dataset("steps", data=np.zeros(3))))
    ),
    "no /steps": Case(_trace(lambda file, _: file.__delitem__("steps"))),
    "no column step": Case(_trace(lambda file, _: file.__delitem__("steps/step"))),
    "a reference that is the whole file": Case(_trace(_loop("references/loop", "/"))),
    "a parameter that is the whole file": Case(_trace(_loop("parameters/loop", "/")), harmless=ALL),
    "steps that hold themselves": Case(_trace(_loop("steps/loop", "/steps")), harmless=ALL),
    "10^12 rows in chunks": Case(_many_rows((4096,))),
    "10^12 rows in one piece": Case(_many_rows(None)),
    "a chunk that is larger than the file": Case(
        _trace(
            _instead(
                "steps/cosine",
                lambda file, path, shape, _: file.create_dataset(
                    path, shape, "f8", maxshape=(None,), chunks=(1 << 28,)
                ),
            )
        )
    ),
    "an attribute of many numbers": Case(_trace(_attribute("status", np.zeros(5000)))),
    "a manifest of pairs": Case(_trace(_attribute("manifest", np.zeros((), [("a", "f8"), ("b", "f8")])))),
    "a manifest that is no JSON": Case(_trace(_attribute("manifest", "{"))),
    "a manifest that is a list": Case(_trace(_attribute("manifest", "[]"))),
    "a manifest that is a number": Case(_trace(_attribute("manifest", 7))),
    "a manifest of a hundred thousand levels": Case(_trace(_attribute("manifest", "[" * 50_000 + "]" * 50_000))),
    "a manifest of a hundred levels": Case(_trace(_attribute("manifest", '{"x": ' * 100 + "1" + "}" * 100))),
    "measure is a list": Case(_trace(_manifest(measure=[1]))),
    "measured at each 0th step": Case(_trace(_manifest(measure={"every": 0}))),
    "measured at each NaN-th step": Case(_trace(_manifest(measure={"every": float("nan")}))),
    "parameter groups that are texts": Case(_trace(_manifest(optimizer={"class": "SGD", "groups": ["x"]}))),
    "momentum 1": Case(
        _trace(_manifest(optimizer={"class": "SGD", "groups": [{"lr": 0.1, "momentum": 1}]})),
        harmless=ALL,
    ),
    "10^12 processes": Case(_trace(_manifest(ranks={"world_size": HUGE}))),
    "arguments that are numbers": Case(_trace(_manifest(script={"kind": "script", "path": "x", "argv": [1]}))),
    "NaN steps": Case(_trace(_attribute("num_steps", float("nan")))),
    "-1 steps": Case(_trace(_attribute("num_steps", -1))),
    "3.5 steps": Case(_trace(_attribute("num_steps", 3.5))),
    "-1 parameters": Case(_trace(_attribute("num_parameters", -1))),
    "2^63-1 parameters": Case(_trace(_attribute("num_parameters", 2**63 - 1))),
    "a status that is none": Case(_trace(_attribute("status", "splendid"))),
    "a status with an escape sequence": Case(_trace(_attribute("status", ESCAPE))),
    "a schema version that is NaN": Case(_trace(_attribute("schema_version", float("nan")))),
    "a certificate of -1 steps": Case(_trace(_certificate(steps_equal=-1))),
    "a certificate whose first difference is no place": Case(_trace(_certificate(first_difference="{}"))),
    "a certificate of components that are a number": Case(_trace(_certificate(components=7))),
    "a reference whose name acts in a terminal": Case(_trace(_odd_reference), harmless=ALL),
    "a model whose name acts in a terminal": Case(
        _trace(_manifest(model={"class": ESCAPE + "\n\n", "dtype": "float32"})), harmless=ALL
    ),
    "a step that is NaN": Case(_trace(_values("steps/step", _set(3, np.nan)))),
    "a step of 10^300": Case(_trace(_values("steps/step", _set(3, 1e300)))),
    "an epoch of 10^300": Case(_trace(_values("steps/epoch", _set(3, 1e300))), harmless=ALL),
    "a loss that is infinite": Case(_trace(_values("steps/loss", _set(slice(2, 9), np.inf))), harmless=ALL),
    "a negative distance": Case(_trace(_values("steps/distance", _set(slice(2, 9), -1.0))), harmless=ALL),
    "trace.h5 is a FIFO": Case(_place("trace.h5", _fifo)),
    "trace.h5 is a socket": Case(_place("trace.h5", _socket)),
    "trace.h5 is a link to a device": Case(_place("trace.h5", _device)),
    "trace.h5 is a link to another file": Case(_place("trace.h5", _link)),
    "trace.h5 is a folder": Case(_place("trace.h5", lambda path, _: path.mkdir())),
    "trace.h5 is a link to itself": Case(_place("trace.h5", lambda path, _: path.symlink_to(path))),
    "trace.h5 is empty": Case(_place("trace.h5", lambda path, _: path.touch())),
    "trace.h5 is text": Case(_place("trace.h5", lambda path, _: path.write_text(ESCAPE * 10))),
    "trace.h5 lost its end": Case(_bytes(lambda content: content[: len(content) // 2])),
    "trace.h5 is zero behind its beginning": Case(_bytes(lambda content: content[:512] + bytes(len(content) - 512))),
}
RECORDS = {
    "fingerprints in external storage": Case(_record(_instead("fingerprints/loss", _external)), harmless=_OF_RECORD),
    "names of fingerprints of any length": Case(
        _record(_instead("fingerprints/loss_names", _data(lambda shape: ["x"] * shape[0], dtype=h5py.string_dtype()))),
        harmless=_OF_RECORD,
    ),
    "a group for fingerprints": Case(
        _record(_instead("fingerprints/loss", lambda file, path, *_: file.create_group(path))), harmless=_OF_RECORD
    ),
    "no fingerprints": Case(_record(lambda file, _: file.__delitem__("fingerprints")), harmless=_OF_RECORD),
    "weights behind an external link": Case(
        _record(_instead("references/final/0.weight", _external_link)), harmless=_OF_RECORD
    ),
    "weights of a type that is none": Case(
        _record(lambda file, _: file["references/final/0.weight"].attrs.__setitem__("torch_dtype", "load")),
        harmless=_OF_RECORD,
    ),
    "a recording of NaN steps": Case(_record(_attribute("num_steps", float("nan"))), harmless=_OF_RECORD),
    "a recording whose manifest is a list": Case(_record(_attribute("manifest", "[1]")), harmless=_OF_RECORD),
    "record.h5 is a FIFO": Case(_place("record.h5", _fifo), harmless=_OF_RECORD),
    "record.h5 is a link to another file": Case(_place("record.h5", _link), harmless=_OF_RECORD),
}
STREAMS = {
    "the lock is a FIFO": Case(_place("stream/lock", _fifo), "replaying", ALL),
    "a part is a FIFO": Case(_place("stream/trace-00000000.h5", _fifo), "replaying", _OF_TRACE),
    "a part without values": Case(_part(table="numbers"), "replaying", _OF_TRACE),
    "a part with a column twice": Case(_part(columns=["steps/loss", "steps/loss"]), "replaying", _OF_TRACE),
    "a part with a column that is derived": Case(_part(columns=["steps/loss", "steps/cosine"]), "replaying", _OF_TRACE),
    "a part in external storage": Case(_part(edit=_external_table), "replaying", _OF_TRACE),
    "a part of 10^12 rows, of which five are there": Case(_part(edit=_long_part), "replaying", ALL),
    "a part without checksums": Case(_part(edit=_no_checks), "replaying", _OF_TRACE),
    "a part whose tables are a list": Case(_part(attributes={"tables": "[1]"}), "replaying", _OF_TRACE),
    "a part that begins at step -1": Case(_part(attributes={"first_step": -1}), "replaying", _OF_TRACE),
    "a part whose manifest is no object": Case(_part(attributes={"manifest": "7"}), "replaying", _OF_TRACE),
}
CASES = TRACES | RECORDS | STREAMS


def good_copy(of: Path, to: Path) -> Path:
    """A run to spoil."""
    shutil.copytree(of, to)
    return to
