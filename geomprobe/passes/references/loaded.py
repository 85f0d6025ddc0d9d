"""The weights that a replay measures against: those of the recording, and those from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geomprobe.distributed.dtensor import local, own_part
from geomprobe.errors import EnvironmentMismatch, RunError, UsageError
from geomprobe.passes.references.weights_file import read_weights
from geomprobe.reproducibility.environment import file_digest
from geomprobe.trace.record import Record
from geomprobe.trace.schema import FINAL, REFERENCE_NAME

Weights = dict[str, Tensor]


class References:
    """Reference weights by name, on the host until they are put beside the parameters.

    Args:
        record: the recording.
        files: weights from elsewhere, by the name that their reference gets.

    Attributes:
        digests: SHA-256 of each file, by name.

    Raises:
        RunError: a reference has a value that is not finite, or a file has other weights.
        UsageError: a file has the name of one of them, or one that no reference can have.
    """

    def __init__(self, record: Record, files: Mapping[str, Path]) -> None:
        for name, path in files.items():
            if name in record.references or not REFERENCE_NAME.fullmatch(name):
                there = ", ".join(record.references)
                raise UsageError(
                    f"--reference {name}={path}: the recording has the references {there}, and another's name is made "
                    "of letters, digits, '.', '_' and '-'. Nothing was replayed."
                )
        self._record = record
        self._stored = {name: _finite(record, name) for name in record.references}
        self._files, self._elsewhere = files, {}
        if record.manifest.get("ranks", {}).get("kind", "DDP") == "DDP":  # else the recording holds shards
            self._elsewhere = _read(files, self._stored[FINAL])
        self.digests = {name: file_digest(path) for name, path in files.items()}

    def beside(self, parameters: Mapping[str, Tensor]) -> dict[str, Weights]:
        """Every reference where the parameters are, in their order and strides: both are read in memory order.

        Of sharded parameters it is this process's shards; every process must call this.

        Raises:
            EnvironmentMismatch: the recording's weights have other names or shapes.
        """
        own = {name: local(p) for name, p in parameters.items()}
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        for reference, weights in self._stored.items():
            then = {name: tuple(t.shape) for name, t in weights.items()}
            if shapes != then:
                name = next(iter(dict(shapes.items() ^ then.items())))
                raise EnvironmentMismatch(
                    f"{self._record.path} was recorded with {name} of shape {then.get(name)}, and here it has shape "
                    f"{shapes.get(name)}: there is no distance to its reference {reference!r}. Nothing was replayed."
                )
        elsewhere = {
            reference: {name: own_part(weights[name], p) for name, p in parameters.items()}
            for reference, weights in (self._elsewhere or _read(self._files, parameters)).items()
        }
        stored = self._stored | elsewhere
        self._stored = self._elsewhere = {}
        return {
            reference: {name: _beside(p, weights[name]) for name, p in own.items()}
            for reference, weights in stored.items()
        }


def from_numpy(array: NDArray[Any], dtype: str) -> Tensor:
    """The tensor, on the host, that the recording stored as a raw array; see `geomprobe.passes.references.kept`."""
    tensor = torch.from_numpy(np.array(array))
    wanted: torch.dtype = getattr(torch, dtype)
    return tensor if tensor.dtype == wanted else tensor.view(wanted)


def _read(files: Mapping[str, Path], like: Mapping[str, Tensor]) -> dict[str, Weights]:
    shapes = {name: tuple(tensor.shape) for name, tensor in like.items()}
    return {name: read_weights(path, shapes) for name, path in files.items()}


def _beside(parameter: Tensor, stored: Tensor) -> Tensor:
    # An average of bfloat16 weights is float32, and rounded it would be another point.
    dtype = torch.promote_types(parameter.dtype, stored.dtype)
    return torch.empty_like(parameter, dtype=dtype, requires_grad=False).copy_(stored)


def _finite(record: Record, name: str) -> Weights:
    weights = {parameter: from_numpy(*raw) for parameter, raw in record.reference(name).items()}
    for parameter, tensor in weights.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise RunError(
                f"Reference {name!r} of {record.path} is not finite: {bad} of {tensor.numel()} values of "
                f"{parameter} are NaN or infinite, so no distance to it exists. Nothing was replayed. The training "
                "diverged; `geomprobe inspect` shows from which step its loss did. Record a run that does not."
            )
    return weights
