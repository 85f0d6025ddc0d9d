"""What the operators of a step would ask of a CUDA device: kernels, host synchronizations, and large allocations.

It needs no GPU: a mode sees each operator that is dispatched, and a price says what torch's CUDA build launches for it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import geomprobe

PACKAGE, TORCH = (str(Path(each.__file__).parent) + os.sep for each in (geomprobe, torch))

# Operators after which the host has a value of the device: each waits for the stream.
WAITING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "_coalesce",
}
# Operators that launch nothing, beside those whose result is a view.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "set_data"),
    *("detach", "detach_", "alias", "lift_fresh", "view", "_unsafe_view", "split", "split_with_sizes", "unbind"),
    *("is_same_size", "is_pinned", "record_stream", "requires_grad_"),
}
# Operators of more than one kernel.
KERNELS = {"dot": 2, "cumsum": 2, "sort": 4, "native_layer_norm_backward": 2}
# aten/src/ATen/native/cuda/MultiTensorApply.cuh: tensors of a launch by the number of lists, blocks, elements of one.
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCKS, CHUNK = 320, 65536
JOINED = 128  # aten/src/ATen/native/cuda/Shape.cu: tensors that one kernel joins
# Tensor's methods that read a device without an operator of their own where the tensor is on the host, as it is here.
READING = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy}


class DeviceWork(TorchDispatchMode):
    """Prices each operator that is dispatched inside, as if the tensors were on a CUDA device.

    A tensor counts as the device's, unless the host is known to have made it: by a function that was given no device,
    or of other tensors of the host. Operators of the host's tensors cost nothing, and reading them waits for nothing.

    Args:
        large: from how many elements a new tensor's bytes are noted.

    Attributes:
        launches, waits: kernels and copies, and host synchronizations, by where in geomprobe they come from: file and
            line, empty for the training itself, and the operator.
        allocated: bytes of large new tensors by the same place.

    >>> with DeviceWork() as work:
    ...     product = (torch.ones(3, device="cpu") * 2).sum()
    >>> sum(work.launches.values()), sum(work.waits.values())
    (3, 0)
    >>> with DeviceWork() as work:
    ...     value = product.item()
    >>> sum(work.waits.values())
    1
    """

    def __init__(self, large: int = 2**20) -> None:
        super().__init__()
        self._large, self._of_host, self._places = large, WeakTensorKeyDictionary(), _Places(self)
        self._counts = False
        self.launches: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.allocated: Counter[tuple[str, str]] = Counter()

    def host(self, *tensors: Tensor) -> None:
        """Say that tensors would be on the host."""
        for tensor in tensors:
            self._of_host[tensor] = True

    def device(self, *tensors: Tensor) -> None:
        """Say that tensors would be on the device."""
        for tensor in tensors:
            self._of_host.pop(tensor, None)

    def host_steps(self, optimizer: Optimizer) -> None:
        """Say that the optimizer's counts of steps are on the host, as they are unless it is fused or capturable."""
        for group in optimizer.param_groups:
            if not (group.get("fused") or group.get("capturable")):
                states = (optimizer.state[p] for p in group["params"] if p in optimizer.state)
                self.host(*(state["step"] for state in states if isinstance(state.get("step"), Tensor)))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing of what the host does in here with its own tensors."""
        counts, self._counts = self._counts, False
        yield
        self._counts = counts

    def __enter__(self) -> DeviceWork:
        state = torch.get_rng_state

        def on_host() -> Tensor:
            self.host(found := state())
            return found

        self._patch = mock.patch.object(torch, "get_rng_state", on_host)  # which no mode sees
        self._patch.start()
        self._places.__enter__()
        self._counts = True
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._counts = False
        super().__exit__(*raised)
        self._places.__exit__(*raised)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        inputs, outputs = (_tensors(each) for each in ((args, kwargs), out))
        if name == "lift_fresh" or (inputs and all(t in self._of_host for t in inputs)):
            self.host(*outputs)
            return out
        indices = _tensors(args[1:]) if name.startswith(("index", "_index_put")) else []
        if name in WAITING or any(t in self._of_host for t in indices):
            self.add(name, waits=1)
        if name == "copy_" and (args[0] in self._of_host) != (args[1] in self._of_host):
            self.add(name, waits=not (len(args) > 2 and args[2]))
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if name in FREE or is_view or "::" in name:
            launches = 0
        else:
            launches = _launches(name, args, outputs)
        self.add(name, launches)
        if not any(each.alias_info for each in func._schema.returns):
            new = sum(t.numel() * t.element_size() for t in outputs if t.numel() >= self._large)
            self.add(name, allocated=new)
        return out

    def add(self, name: str, launches: int = 0, waits: int = 0, allocated: int = 0) -> None:
        """Count what the line of geomprobe that is running asks for; nothing outside of ``with``."""
        if not self._counts:
            return
        for counter, count in ((self.launches, launches), (self.waits, waits), (self.allocated, allocated)):
            if count:
                counter[_line(), name] += count


class _Places(TorchFunctionMode):
    """Tells a `DeviceWork` what Python says of devices, which operators on the host do not show."""

    def __init__(self, work: DeviceWork) -> None:
        super().__init__()
        self._work = work

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, of_host = kwargs or {}, self._work._of_host
        everything = [*args, *kwargs.values()]
        on_host = bool(args) and isinstance(args[0], Tensor) and args[0] in of_host
        if func in READING and not on_host:
            self._work.add(func.__name__, launches=1, waits=1)
        out = func(*args, **kwargs)
        if func in _device_constructors():
            if kwargs.get("device") is None:
                self._work.host(*_tensors(out))
            else:
                self._work.device(out)
                if func in (torch.tensor, torch.as_tensor, torch.asarray) and (on_host or not _tensors(args)):
                    self._work.add(func.__name__, launches=1, waits=1)  # made on the host, and moved
        elif func is torch.Tensor.new_tensor:
            self._work.device(out)
            self._work.add("new_tensor", launches=1, waits=1)
        elif func is torch.Tensor.to and on_host and any(isinstance(a, (torch.device, str)) for a in everything):
            self._work.device(out)
            self._work.add("to", launches=1, waits=not (kwargs.get("non_blocking") or any(a is True for a in args)))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _launches(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """The kernels of one operator that is not free."""
    lists = [each for each in args if isinstance(each, (list, tuple)) and each and isinstance(each[0], Tensor)]
    if name.startswith("_fused_"):
        return _of_lists([each for each in lists if any(t.dim() for t in each)] or lists)
    if name == "_foreach_copy_" and not _copies_fast(*lists[:2]):
        return sum(t.numel() > 0 for t in lists[0])
    if name.startswith("_foreach"):
        return _of_lists(lists) + (name == "_foreach_norm")  # which ends with one kernel for all
    if outputs and all(t.numel() == 0 for t in outputs):
        return 0
    if name in ("cat", "stack"):
        return math.ceil(len(lists[0]) / JOINED)
    return KERNELS.get(name, 1)


def _of_lists(lists: Sequence[Sequence[Tensor]]) -> int:
    """The launches of the fast way of an operator over lists of tensors."""
    limit = TENSORS.get(len(lists), 30)
    launches = tensors = blocks = 0
    for tensor in lists[0]:
        tensors += tensor.numel() > 0
        for _ in range(math.ceil(tensor.numel() / CHUNK)):
            blocks += 1
            if blocks == BLOCKS:
                launches, blocks, tensors = launches + 1, 0, 0
        if tensors == limit:
            launches, blocks, tensors = launches + 1, 0, 0
    return launches + (blocks > 0)


def _copies_fast(to: Sequence[Tensor], source: Sequence[Tensor]) -> bool:
    """ForeachBinaryOpList.cu: one dtype a list, the same sizes and strides, no holes."""
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false
    return (
        len({t.dtype for t in to}) == len({s.dtype for s in source}) == 1
        and all(t.shape == s.shape and t.stride() == s.stride() for t, s in zip(to, source, strict=True))
        and all(map(dense, itertools.chain(to, source)))
    )


def _line() -> str:
    """The line of geomprobe that calls torch: its file and number; empty where the training itself does."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((TORCH, __file__)):
        frame = frame.f_back
    path = frame.f_code.co_filename
    if not path.startswith(PACKAGE) or path.endswith("session.py"):  # which runs the training's own backward pass
        return ""
    return f"{path[len(PACKAGE) :]}:{frame.f_lineno}"
