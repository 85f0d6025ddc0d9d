"""What of a step is compared between the passes: its RNG, batch, weights, optimizer, loss and buffers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.errors import UnsupportedTraining
from geomprobe.probe.events import Events
from geomprobe.probe.listeners import LossTracker
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.columns import Columns, by_table, column_names
from geomprobe.reproducibility.digest import TensorDigests, fold, host_digest, leaves, rng_digests

_LARGE = 2**20  # bytes

Layout = dict[str, tuple[str, ...]]  # component -> names of its columns


class StepInputs(Events):
    """What a step shows before its first backward pass: the random streams, the batch, and the model's inputs.

    It listens from before the probe is attached.
    """

    name = "inputs"

    def __init__(self) -> None:
        self._host_digests = self._device_digests = TensorDigests(torch.device("cpu"))
        self._on_host = True  # until a probe shows the training's device
        self._batch_came = False
        self.fetch_rng: dict[str, int] | None = None
        self.fetched_digest = 0
        self.digests: list[Tensor] = []

    def attached(self, probe: Probe) -> None:
        device = next(iter(probe.parameters.values())).device
        self._device_digests, self._on_host = TensorDigests(device), device.type == "cpu"

    def fetching(self) -> None:
        # The first batch of a step counts, and evaluation is no part of it.
        if self.fetch_rng is None and torch.is_grad_enabled():
            self.fetch_rng = rng_digests()

    def fetch_ended(self, came: bool) -> None:
        self._batch_came |= came and torch.is_grad_enabled()
        if not self._batch_came:
            self.fetch_rng = None

    def fetched(self, batch: Any) -> None:
        tensors, rest = leaves(batch)
        self.fetched_digest = fold(self.fetched_digest, host_digest(*rest))
        # A large batch on the host is left to the device that the model reads it on.
        limit = math.inf if self._on_host else _LARGE
        on_host = [t for t in tensors if t.device.type == "cpu" and t.numel() * t.element_size() <= limit]
        for digest in self._host_digests([[t] for t in on_host]).tolist():
            self.fetched_digest = fold(self.fetched_digest, digest)
        self._add([t for t in tensors if t.device.type != "cpu"])

    def entered(self, inputs: Any) -> None:
        tensors, rest = leaves(inputs)
        if self.fetched_digest and all(t.device.type == "cpu" for t in tensors):
            return  # the loader's batch, or computed from it
        self.fetched_digest = fold(self.fetched_digest, host_digest(*rest))
        self._add(tensors)

    def after_update(self) -> None:
        self.fetch_rng, self._batch_came, self.fetched_digest, self.digests = None, False, 0, []

    def state_dict(self) -> dict[str, Any]:
        return {
            "fetch_rng": self.fetch_rng,
            "batch_came": self._batch_came,
            "fetched": self.fetched_digest,
            "inputs": list(self.digests),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.fetch_rng, self._batch_came = state["fetch_rng"], state["batch_came"]
        self.fetched_digest, self.digests = state["fetched"], list(state["inputs"])

    def _add(self, tensors: Sequence[Tensor]) -> None:
        if tensors:
            self.digests.append(self._device_digests([[tensor] for tensor in tensors]))


class StepFingerprint:
    """Digests of all that makes a step what it is. Those of device tensors stay on the device.

    Args:
        probe: whose model, optimizer and random streams; their tensors fix the columns.
        inputs: of the step that is being made.
        losses: the same.

    Attributes:
        device: where the tensors are.
        columns: of a fingerprint, in their order; each component of `layout` is a table.
        layout: the names of the columns by component.
    """

    def __init__(self, probe: Probe, inputs: StepInputs, losses: LossTracker) -> None:
        self._probe, self._inputs, self._losses = probe, inputs, losses
        self.device = next(iter(probe.parameters.values())).device
        self._digests = TensorDigests(self.device)
        self._weights = probe.weights
        self._buffers = tuple(probe.buffers)
        self._streams = streams = tuple(rng_digests())
        self.columns = [
            Columns("rng fetch", "rng", tuple(f"fetch/{stream}" for stream in streams), "int64", False),
            Columns("rng step", "rng", tuple(f"step/{stream}" for stream in streams), "int64", False),
            Columns("fetched", "batch", ("fetched",), "int64", False),
            Columns("inputs", "batch", ("inputs",), "int64", True),
            Columns("weights", "weights", tuple(self._weights), "int64", True),
            Columns("optimizer", "optimizer", tuple(probe.parameters), "int64", True),
            Columns("tensor hyperparameters", "optimizer", ("tensor hyperparameters",), "int64", True),
            Columns("hyperparameters", "optimizer", ("hyperparameters",), "int64", False),
            Columns("loss digest", "loss", ("loss",), "int64", True),
            Columns("buffers", "buffers", self._buffers, "int64", True),
        ]
        self._on_device = [(each.name, len(each.columns)) for each in self.columns if each.on_device]
        self.layout: Layout = column_names(self.columns)

    def take(self) -> dict[str, Any]:
        """The fingerprint of the step that is being made, by the names of `columns`."""
        state, group_tensors, plain = _optimizer_state(self._probe)
        buffers = self._probe.buffers
        if tuple(buffers) != self._buffers:
            changed = sorted(set(buffers) ^ set(self._buffers)) or ["their order"]
            raise UnsupportedTraining(
                f"The model's buffers changed by step {self._probe.step}: {', '.join(changed)}. What is compared at "
                "each step is fixed when the first one is taken. Register all buffers before geomprobe.attach, or "
                "record the stages as separate runs."
            )
        groups = {
            "inputs": [self._inputs.digests],
            "weights": [[local(weight)] for weight in self._weights.values()],
            "optimizer": state,
            "tensor hyperparameters": [group_tensors],
            "loss digest": [[loss.reshape(-1) for loss in self._losses.values]],
            "buffers": [[local(buffer)] for buffer in buffers.values()],
        }
        digests = self._digests([group for name, _ in self._on_device for group in groups[name]])
        pieces = digests.split([width for _, width in self._on_device])
        fetch, now = self._inputs.fetch_rng or {}, rng_digests()
        return {
            "rng fetch": [fetch.get(stream, 0) for stream in self._streams],
            "rng step": [now.get(stream, 0) for stream in self._streams],
            "fetched": [self._inputs.fetched_digest],
            "hyperparameters": [host_digest(repr(plain).encode())],
            **{name: piece for (name, _), piece in zip(self._on_device, pieces, strict=True)},
        }

    def state(self) -> dict[str, list[int]]:
        """Digests of the random streams, weights, optimizer and buffers as they are now, by component."""
        row = self.take()
        values = {name: each.tolist() if isinstance(each, Tensor) else each for name, each in row.items()}
        found = {
            table: [value for each in group for value in values[each.name]]
            for table, group in by_table(self.columns).items()
        }
        return {"rng": values["rng step"]} | {name: found[name] for name in ("weights", "optimizer", "buffers")}

    def differs_from(self, state: Mapping[str, Sequence[int]]) -> tuple[str, str] | None:
        """The first component and tensor whose `state` is now another one; None where none is."""
        for component, digests in self.state().items():
            then = state.get(component, [])
            names = self.layout[component][-len(digests) :]
            for name, a, b in zip(names, digests, then, strict=False):
                if a != b:
                    return component, name
            if len(digests) != len(then):
                return component, "the number of entries"
        return None


def _optimizer_state(probe: Probe) -> tuple[list[list[Tensor]], list[Tensor], list[Any]]:
    """Tensors of each parameter's state; tensors among the hyperparameters; every plain value."""
    plain: list[Any] = []
    state: list[list[Tensor]] = []
    for parameter in probe.parameters.values():
        tensors, others = [], []
        for optimizer in probe.optimizers:
            for name, value in sorted(optimizer.state.get(parameter, {}).items()):
                if isinstance(value, Tensor):
                    tensors.append(local(value))
                else:
                    others.append((name, value))
        state.append(tensors)
        plain.append(others)
    of_groups: list[Tensor] = []
    if len(probe.optimizers) > 1:
        plain.append(("moves", probe.moving))
    for group in (group for optimizer in probe.optimizers for group in optimizer.param_groups):
        for name, value in sorted(group.items()):
            if isinstance(value, Tensor):
                of_groups.append(value)
            elif name != "params":
                plain.append((name, value))
    return state, of_groups, plain
