"""Compare two sealed files down to the bit: every dataset, and every attribute, by whatever path."""

import json
from pathlib import Path

import h5py
import numpy as np

# Object references of HDF5's dimension scales: addresses in the file.
_ADDRESSES = {"DIMENSION_LIST", "REFERENCE_LIST"}


def contents(path: Path) -> dict[str, tuple]:
    """Everything in a file by path: type, shape and bytes."""
    found = {}

    def visit(name, thing):
        for key, value in thing.attrs.items():
            if key not in _ADDRESSES:
                found[f"{name}@{key}"] = _bits(value)
        if isinstance(thing, h5py.Dataset):
            found[name] = _bits(thing[()])

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    manifest = json.loads(found.pop("@manifest")[2])
    # Of the process that was there first, in a recording; of the last one, in a trace.
    found |= {f"manifest/{section}": value for section, value in manifest.items() if section != "host"}
    return found


def _bits(value):
    if isinstance(value, (str, bytes)):
        return "text", (), value
    array = np.asarray(value)
    return str(array.dtype), array.shape, array.tolist() if array.dtype == object else array.tobytes()


def assert_same(one: Path, other: Path) -> None:
    """Hold two files to be the same."""
    a, b = contents(one), contents(other)
    assert sorted(a) == sorted(b)
    assert [name for name in a if a[name] != b[name]] == []
