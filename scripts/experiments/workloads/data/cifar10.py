"""CIFAR-10 from its own pickle batches, unpickled so that nothing but arrays can come out."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workloads.data.files import DamagedData, Source
from workloads.data.images import Images, crops

SOURCE = Source(
    "CIFAR-10",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "Unpack it with 'tar -xzf cifar-10-python.tar.gz -C {root}', so that {root}/cifar-10-batches-py holds data_batch_1 "
    "to data_batch_5 and test_batch.",
)

MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""The published files' checksums, as torchvision has them."""

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""By channel; the numbers of NWT's code."""

PIXELS = 3 * 32 * 32


def cifar10(root: str | os.PathLike[str], *, train: bool, augment: bool = False, published: bool = True) -> Images:
    """CIFAR-10 (Krizhevsky 2009): 50,000 training or 10,000 test images of 32x32 pixels in 10 classes.

    Args:
        root: the folder that holds ``cifar-10-batches-py``.
        train: training images, else the test images.
        augment: random crops of the image with 4 zeros on each side, as NWT's code does; without flips.
        published: require that each file has the published MD5. Without, any batches of the format are read.

    Returns:
        Normalized images [3, 32, 32] with their labels, in the files' order.

    Raises:
        UsageError: a file is missing.
        DamagedData: a file is not the published one, is truncated, holds anything but arrays, or arrays of
            another shape.

    >>> cifar10("no/such/folder", train=True)
    Traceback (most recent call last):
    geomprobe.errors.UsageError: no/such/folder/cifar-10-batches-py/data_batch_1 is not there. CIFAR-10 is to be had ...
    """
    folder = Path(root) / "cifar-10-batches-py"
    names = [name for name in MD5 if name.startswith("data") == train]
    batches = [read_batch(SOURCE.require(folder / name, Path(root)), published) for name in names]
    images = torch.from_numpy(np.concatenate([images for images, _ in batches]))
    labels = torch.from_numpy(np.concatenate([labels for _, labels in batches]))
    return Images(images, labels, crops(32, 4, MEAN, STD, augment))


def read_batch(path: Path, published: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images uint8 [count, 3, 32, 32] and labels int64 [count] of one pickle batch.

    Args:
        path: such as ``data_batch_1``.
        published: require its published MD5.

    Raises:
        DamagedData: see `cifar10`.
    """
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if published and found != MD5[path.name]:
        raise DamagedData(
            f"{path}: its MD5 is {found}, the published file's is {MD5[path.name]}; it has {len(content):,} bytes. "
            f"Fetch it again from {SOURCE.url}."
        )
    try:
        batch = _OnlyArrays(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except KeyError as error:
        raise DamagedData(f"{path}: no {error.args[0]!r} in it; a CIFAR-10 batch has b'data' and b'labels'") from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise DamagedData(f"{path}: no CIFAR-10 batch, or a truncated one: {error or type(error).__name__}") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise DamagedData(f"{path}: data is {pixels.dtype} {list(pixels.shape)}, and should be uint8 [count, {PIXELS}]")
    if labels.shape != pixels.shape[:1] or not np.isin(labels, range(10)).all():
        raise DamagedData(
            f"{path}: labels are {labels.dtype} {list(labels.shape)}, and should be {len(pixels)} of 0 to 9"
        )
    return pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)


class _OnlyArrays(pickle.Unpickler):
    """Rebuilds NumPy's arrays and nothing else: a pickle could otherwise run any code."""

    # Python 2 wrote the published files. NumPy 2 moved the module, and Python 3 writes bytes by way of a codec.
    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, where only arrays belong")
        if name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]  # type: ignore[index]
        return super().find_class(module, name)
