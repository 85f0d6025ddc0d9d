"""Any state as plain containers and tensors, which ``torch.load`` reads without running code, and back.

What torch's own list of allowed types leaves out (NumPy arrays, deques, enums, ...) becomes a dict with a tag.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from geomprobe.distributed.dtensor import is_dtensor, to_local
from geomprobe.errors import RunError

_TAG = "__geomprobe__"  # the key whose value is the name of what a dict stands for
_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_IMMUTABLE = (*_ATOMS, torch.dtype, torch.device, torch.Size)
_MAPPINGS = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
_COLLECTIONS: dict[str, Callable[[Any], Any]] = {kind.__name__: kind for kind in (set, frozenset, bytearray)}
_FACTORIES = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict, set)}
_LONGEST = 2000  # bits of an int that torch.load reads without running code


class HostTensor(NamedTuple):
    """A tensor of which a checkpoint keeps the values only: they come back on the CPU, wherever it lies."""

    tensor: Tensor


class StateOf(NamedTuple):
    """A state with its owner, which an error names where something in it cannot be kept."""

    owner: str
    state: Any


def encode(contents: Any) -> Any:
    """A copy of a nest that consists of plain containers, plain values and tensors on the CPU.

    It shares no memory with what it is given, so that the training can continue at once. `HostTensor` and `StateOf`
    mark some of its contents.

    Raises:
        RunError: something in it cannot be kept; the message names the owner, the path in its state, and the type.

    >>> decode(encode({"order": {3, 1}, "at": (0, None)}))
    {'order': {1, 3}, 'at': (0, None)}
    """
    try:
        return _Encoder().plain(contents, ())
    except RecursionError as error:
        raise RunError(
            "the training's state cannot be kept: a container in it holds itself. Does an object given to attach have "
            "such a state_dict? Leave that container out of it."
        ) from error


def decode(value: Any) -> Any:
    """What `encode` was given, with its tensors on their devices, but for each `HostTensor`.

    Raises:
        RunError: it needs a class that this process has not imported.
    """
    if isinstance(value, dict):
        return _untagged(value) if _TAG in value else {key: decode(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(decode(item) for item in value)
    return value


class _Encoder:
    """One call of `encode`."""

    def __init__(self) -> None:
        self._owner = ""
        self._copies: dict[int, Any] = {}  # by id, so that a tensor that occurs twice is kept, and comes back, once

    def plain(self, value: Any, path: tuple[Any, ...]) -> Any:
        kind = type(value)
        if kind is int and value.bit_length() > _LONGEST:
            return {_TAG: "int", "value": hex(value)}
        if kind in _IMMUTABLE:
            return value
        spread = sys.modules.get("torch.distributed.tensor")
        if spread is not None and isinstance(value, (spread.Placement, spread.DeviceMesh)):
            return value  # on torch's own list
        if kind is HostTensor:
            return _on_host(value.tensor)
        if kind is StateOf:
            before, self._owner = self._owner, value.owner
            state = self.plain(value.state, ())
            self._owner = before
            return state
        if kind in (list, tuple):
            return kind(self.plain(item, (*path, i)) for i, item in enumerate(value))
        if kind is dict and _TAG not in value and all(type(key) in _ATOMS for key in value):
            return {key: self.plain(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, Tensor):
            if id(value) not in self._copies:
                self._copies[id(value)] = self._tensor(value, path)
            return self._copies[id(value)]
        return {_TAG: kind.__name__, **self._tagged(value, path)}

    def _tagged(self, value: Any, path: tuple[Any, ...]) -> dict[str, Any]:
        """What a value of a type with a tag consists of; a subclass is no such type, since it may hold more."""
        kind = type(value)
        if kind in _MAPPINGS.values() or (kind is defaultdict and _factory(value) is not None):
            items = [[self.plain(key, path), self.plain(item, (*path, key))] for key, item in value.items()]
            return {"value": items} | ({"factory": _factory(value)} if kind is defaultdict else {})
        if kind in _COLLECTIONS.values():
            return {"value": [self.plain(item, path) for item in value]}
        if kind is deque:
            return {"value": [self.plain(item, path) for item in value], "maxlen": value.maxlen}
        if (kind is np.ndarray or isinstance(value, np.generic)) and not value.dtype.hasobject:
            array = np.asarray(value)
            raw = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.size else None
            described = self.plain(np.lib.format.dtype_to_descr(array.dtype), path)
            of = {"dtype": described, "shape": list(array.shape), "value": raw}
            return of | ({_TAG: "generic"} if kind is not np.ndarray else {})
        if kind is torch.Generator:
            return {"device": str(value.device), "value": value.get_state()}
        if isinstance(value, Enum) and _imported(*_name(kind)) is kind:
            return {_TAG: "Enum", "class": _name(kind), "value": self.plain(value.value, path)}
        if isinstance(value, tuple) and hasattr(value, "_fields") and _imported(*_name(kind)) is kind:
            items = [self.plain(item, (*path, name)) for name, item in zip(value._fields, value, strict=True)]
            return {_TAG: "namedtuple", "class": _name(kind), "value": items}
        raise self._refusal(value, path)

    def _tensor(self, tensor: Tensor, path: tuple[Any, ...]) -> Any:
        if is_dtensor(tensor):
            # Its mesh and placements are on torch's list of allowed types wherever there are DTensors.
            shape, stride = list(tensor.shape), list(tensor.stride())
            spread = {"mesh": tensor.device_mesh, "placements": tensor.placements}  # type: ignore[attr-defined]
            local = self._tensor(to_local(tensor), path)
            return {_TAG: "DTensor", **spread, "shape": shape, "stride": stride, "value": local}
        if type(tensor) not in (Tensor, nn.Parameter):
            raise self._refusal(tensor, path)
        values = _on_host(tensor)
        of: dict[str, Any] = {}
        if tensor.device.type != "cpu":
            of["device"] = str(tensor.device)
        if tensor.requires_grad:
            of["requires_grad"] = True
        if isinstance(tensor, nn.Parameter):
            of["parameter"] = True
        return {_TAG: "Tensor", "value": values, **of} if of else values

    def _refusal(self, value: Any, path: tuple[Any, ...]) -> RunError:
        keys = "".join(f"[{key!r}]" for key in path)
        kind = ".".join(_name(type(value)))
        return RunError(
            f"the training's state cannot be kept: {self._owner or 'it'} holds a {kind} at {keys or 'its top'}, and a "
            "checkpoint holds only tensors, NumPy arrays, numbers, strings and containers of these, since reading it "
            "is to run no code. Take it out of the state_dict, put plain values there in its place, or leave the "
            "object out of attach."
        )


def _on_host(tensor: Tensor) -> Any:
    """A copy of a tensor's values on the CPU; of a sparse one, its parts, which torch would warn of."""
    tensor = tensor.detach()
    if tensor.layout == torch.strided:
        return tensor.to("cpu", copy=True)
    if tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    coalesced = tensor.layout == torch.sparse_coo and tensor.is_coalesced()
    of = {"layout": tensor.layout, "shape": list(tensor.shape), "coalesced": coalesced}
    return {_TAG: "sparse", **of, "value": [part.to("cpu", copy=True) for part in parts]}


def _untagged(entry: dict[str, Any]) -> Any:
    kind, value = entry[_TAG], decode(entry["value"])
    if kind in _MAPPINGS:
        return _MAPPINGS[kind](dict(value) if kind == "Counter" else value)
    if kind in _COLLECTIONS:
        return _COLLECTIONS[kind](value)
    if kind == "int":
        return int(value, 16)
    if kind == "defaultdict":
        return defaultdict(_FACTORIES.get(entry["factory"]), value)
    if kind == "deque":
        return deque(value, entry["maxlen"])
    if kind in ("ndarray", "generic"):
        dtype = np.lib.format.descr_to_dtype(decode(entry["dtype"]))
        raw = bytearray() if value is None else bytearray(value.numpy().tobytes())
        array = np.frombuffer(raw, dtype).reshape(entry["shape"]) if raw else np.empty(entry["shape"], dtype)
        return array[()] if kind == "generic" else array
    if kind == "Generator":
        generator = torch.Generator(entry["device"])
        generator.set_state(value)
        return generator
    if kind == "sparse":
        layout, shape = entry["layout"], entry["shape"]
        if layout == torch.sparse_coo:
            coalesced = entry["coalesced"]
            indices, values = value
            return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=coalesced, check_invariants=True)
        compressed, plain, values = value
        return torch.sparse_compressed_tensor(compressed, plain, values, shape, layout=layout, check_invariants=True)
    if kind == "Tensor":
        tensor = value.to(entry.get("device", "cpu"))
        if entry.get("parameter"):
            return nn.Parameter(tensor, entry.get("requires_grad", False))
        return tensor.requires_grad_(entry.get("requires_grad", False))
    if kind == "DTensor":
        from torch.distributed.tensor import DTensor

        shape, stride = torch.Size(entry["shape"]), tuple(entry["stride"])
        mesh, placements = entry["mesh"], entry["placements"]
        return DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=stride)
    found = _imported(*entry.get("class", (kind, "")))
    if kind == "Enum" and isinstance(found, type) and issubclass(found, Enum):
        return found(value)
    if kind == "namedtuple" and isinstance(found, type) and issubclass(found, tuple):
        return found(*value)
    raise RunError(
        f"the checkpoint needs {'.'.join(entry.get('class', (kind,)))}, which this process does not have. Import it "
        "before the loop over epochs, as the script did when the run began."
    )


def _factory(value: defaultdict[Any, Any]) -> str | None:
    """The name of what makes a defaultdict's values; "" for nothing, None for what cannot be named."""
    if value.default_factory is None:
        return ""
    return next((name for name, kind in _FACTORIES.items() if kind is value.default_factory), None)


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _imported(module: str, name: str) -> Any:
    """A class by its name, in a module that is there already: reading a checkpoint imports nothing."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    return found
