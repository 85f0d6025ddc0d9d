"""Keep the weights of a reference point, one checksummed dataset a parameter, and read them back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError
from geomprobe.trace.atomic_file import atomic_hdf5
from geomprobe.trace.hdf5_errors import damage_named
from geomprobe.trace.schema import escape, unescape
from geomprobe.trace.stream.reader import checked

_CHUNK_BYTES = 1 << 20


def write_reference(path: Path, arrays: Mapping[str, tuple[NDArray[Any], str]]) -> None:
    """Write a reference as a closed, synced HDF5 file, replacing the one there at once and whole.

    Args:
        path: the file; `seal_record` copies it into the record later.
        arrays: by parameter name, the raw array and the name of its torch dtype (bfloat16 comes as uint16).

    Raises:
        WriteFailed: the disk refused a write; what `path` held before is untouched.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "reference-final.h5"
    >>> write_reference(path, {"fc.weight": (np.ones((2, 3), np.float32), "float32")})
    >>> with h5py.File(path) as file:
    ...     file["fc.weight"].shape, file["fc.weight"].fletcher32
    ((2, 3), True)
    """
    with atomic_hdf5(Path(path)) as file:
        for name, (array, dtype) in arrays.items():
            # Only chunks carry checksums, and a scalar has none: it is kept as a vector of one.
            stored = array.reshape(1) if array.ndim == 0 else array
            checked = {"chunks": chunk_shape(stored.shape, stored.itemsize), "fletcher32": True}
            dataset = file.create_dataset(escape(name), data=stored, **(checked if stored.size else {}))
            dataset.attrs["torch_dtype"] = dtype
            if array.ndim == 0:
                dataset.attrs["scalar"] = True
            # Here a full disk is an error; in the dataset's own clean-up it would be a crash.
            dataset.flush()


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Chunks of about 1 MiB that are runs of memory: whole in the last axes, one in the first.

    >>> chunk_shape((512, 512, 3, 3), 4), chunk_shape((11_000_000,), 4)
    ((56, 512, 3, 3), (262144,))
    """
    left = _CHUNK_BYTES // itemsize
    chunk: list[int] = []
    for size in reversed(shape):
        chunk.insert(0, max(1, min(size, left)))
        left //= chunk[0]
    return tuple(chunk)


def copy_reference(source: Path, file: Any, name: str) -> None:
    """Copy the file that `write_reference` made into the record being sealed, as ``/references/NAME/``.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        checked(source, "reference")
    except FileNotFoundError as error:
        raise RunError(f"reference {name!r} is missing: {source} does not exist. Record the run again") from error
    with h5py.File(source, "r") as reference:
        reference.copy(reference["/"], file, f"references/{escape(name)}")


def read_reference_file(path: Path) -> dict[str, tuple[NDArray[Any], str]]:
    """The arrays in a file that `write_reference` made, and the names of their torch dtypes.

    Raises:
        RunError: it is no such file, or damaged.
        FileNotFoundError: it is not there.
    """
    checked(path, "reference")
    with h5py.File(path, "r") as file:
        return read_reference(file)


def read_reference(group: Any) -> dict[str, tuple[NDArray[Any], str]]:
    """The arrays of a reference and the names of their torch dtypes, each checksum verified.

    Args:
        group: the open ``h5py.Group`` that holds one dataset a parameter.

    Raises:
        RunError: a dataset is damaged; the message names it.
    """
    arrays = {}
    for component in group:
        name = unescape(component)
        with damage_named(f"{name!r} of {group.name}", Path(group.file.filename)):
            dataset = group[component]
            array = np.asarray(dataset[()])
            whole = array.reshape(()) if dataset.attrs.get("scalar", False) else array
            arrays[name] = (whole, str(dataset.attrs["torch_dtype"]))
    return arrays
