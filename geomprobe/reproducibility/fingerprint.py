"""What of a step is compared between the passes: RNG, batch, weights, gradient, optimizer, loss and buffers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.errors import UnsupportedTraining
from geomprobe.kernels.fused_read import FusedRead, Reading
from geomprobe.kernels.tensor_digests import TensorDigests
from geomprobe.probe.events import Events
from geomprobe.probe.listeners import LossTracker
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.columns import Columns, by_table, column_names
from geomprobe.reproducibility.digest import fold, host_digest, leaves, rng_digests
from geomprobe.reproducibility.step_reader import StepReader
from geomprobe.trace.blame import STATE_STEPS

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

    The optimizer's state is as large as the weights, or larger, so it is read at some steps only.

    Args:
        probe: whose model, optimizer and random streams; their tensors fix the columns.
        inputs: of the step that is being made.
        losses: the same.

    Attributes:
        device: where the tensors are.
        columns: of a fingerprint, in their order; each component of `layout` is a table.
        layout: the names of the columns by component.
        state_steps: the steps at which the optimizer's state is read; in all other rows its digests are 0.
        reader: reads the weights and the gradients.
    """

    def __init__(self, probe: Probe, inputs: StepInputs, losses: LossTracker) -> None:
        self._probe, self._inputs, self._losses = probe, inputs, losses
        self.device = next(iter(probe.parameters.values())).device
        self._digests = TensorDigests(self.device)
        self.state_steps = STATE_STEPS
        weights, measured = probe.weights, list(probe.parameters.values())
        places = {id(p): i for i, p in enumerate(measured)}
        others = [weight for weight in weights.values() if id(weight) not in places]
        places |= {id(weight): len(measured) + i for i, weight in enumerate(others)}
        order = [places[id(weight)] for weight in weights.values()]
        self._order = torch.tensor(order, device=self.device) if order != sorted(order) else None
        self.reader = StepReader(measured, others)
        self._buffers = tuple(probe.buffers)
        self._read: FusedRead | None = None  # for buffers of these shapes
        self._shapes: list[torch.Size] = []
        self._streams = streams = tuple(rng_digests())
        self._hyperparameters = sorted({name for group in _groups(probe) for name in group} - {"params"})
        self._texts: list[str] = []  # of the hyperparameters, and their digests
        self._of_texts: list[int] = []
        moving = ["moving optimizer"] * (len(probe.optimizers) > 1)
        hyperparameters = *self._hyperparameters, "other hyperparameters", *moving
        parameters = tuple(probe.parameters)
        self.columns = [
            Columns("rng fetch", "rng", tuple(f"fetch/{stream}" for stream in streams), "int64", False),
            Columns("rng step", "rng", tuple(f"step/{stream}" for stream in streams), "int64", False),
            Columns("fetched", "batch", ("fetched",), "int64", False),
            Columns("inputs", "batch", ("inputs",), "int64", True),
            Columns("weights", "weights", tuple(weights), "int64", True),
            Columns("hyperparameters", "hyperparameters", hyperparameters, "int64", False),
            Columns("tensor hyperparameters", "hyperparameters", ("tensor lr", "other tensors"), "int64", True),
            Columns("optimizer", "optimizer", parameters, "int64", True),
            Columns("plain state", "optimizer", ("plain state",), "int64", False),
            Columns("loss digest", "loss", ("loss",), "int64", True),
            Columns("buffers", "buffers", self._buffers, "int64", True),
            Columns("gradients", "gradient", parameters, "int64", True),
        ]
        self._on_device = [
            (each.name, len(each.columns))
            for each in self.columns
            if each.on_device and each.name not in ("weights", "gradients", "buffers")
        ]
        self.layout: Layout = column_names(self.columns)

    def take(self, reading: Reading, grad_scale: Tensor | None = None) -> dict[str, Any]:
        """The fingerprint of the step that is being made, by the names of `columns`.

        Args:
            reading: what `reader` has found, of the gradients as the optimizer has them.
            grad_scale: what they are multiplied by, under a GradScaler with a fused optimizer.
        """
        return self._row(reading, grad_scale, self.state_steps.taken(self._probe.step))

    def state(self) -> dict[str, list[int]]:
        """Digests of the random streams, weights, optimizer and buffers as they are now, by component."""
        row = self._row(self.reader.look(), None, with_state=True)
        values = {name: each.tolist() if isinstance(each, Tensor) else each for name, each in row.items()}
        found = {
            table: [value for each in group for value in values[each.name]]
            for table, group in by_table(self.columns).items()
        }
        compared = "weights", "hyperparameters", "optimizer", "buffers"
        return {"rng": values["rng step"]} | {name: found[name] for name in compared}

    def optimizer_state(self) -> int:
        """One digest of the optimizer's whole state as it is now."""
        state, plain = _optimizer_state(self._probe)
        return host_digest(repr((self._digests(state).tolist(), plain)).encode())

    def _row(self, reading: Reading, grad_scale: Tensor | None, with_state: bool) -> dict[str, Any]:
        probe = self._probe
        buffers = probe.buffers
        if tuple(buffers) != self._buffers:
            changed = sorted(set(buffers) ^ set(self._buffers)) or ["their order"]
            raise UnsupportedTraining(
                f"The model's buffers changed by step {probe.step}: {', '.join(changed)}. What is compared at "
                "each step is fixed when the first one is taken. Register all buffers before geomprobe.attach, or "
                "record the stages as separate runs."
            )
        state, plain_state = _optimizer_state(probe) if with_state else ([[] for _ in probe.parameters], None)
        groups = {
            "inputs": [self._inputs.digests],
            "tensor hyperparameters": _tensor_hyperparameters(probe, grad_scale),
            "optimizer": state,
            "loss digest": [[loss.reshape(-1) for loss in self._losses.values]],
        }
        digests = self._digests([group for name, _ in self._on_device for group in groups[name]])
        pieces = digests.split([width for _, width in self._on_device])
        fetch, now = self._inputs.fetch_rng or {}, rng_digests()
        return {
            "rng fetch": [fetch.get(stream, 0) for stream in self._streams],
            "rng step": [now.get(stream, 0) for stream in self._streams],
            "fetched": [self._inputs.fetched_digest],
            "hyperparameters": self._plain_hyperparameters(),
            "plain state": [0 if plain_state is None else host_digest(repr(plain_state).encode())],
            "weights": reading.weights if self._order is None else reading.weights[self._order],
            "gradients": reading.gradients,
            "buffers": self._of_buffers([local(buffer).detach() for buffer in buffers.values()]),
            **{name: piece for (name, _), piece in zip(self._on_device, pieces, strict=True)},
        }

    def _of_buffers(self, buffers: Sequence[Tensor]) -> Tensor:
        if not buffers:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        shapes = [buffer.shape for buffer in buffers]
        if self._read is None or shapes != self._shapes:
            self._read, self._shapes = FusedRead(buffers), shapes
        return self._read.look(buffers)[0].to(self.device, non_blocking=True)

    def _plain_hyperparameters(self) -> list[int]:
        """A digest for each name of a hyperparameter, over all groups; what is no tensor."""
        values: dict[str, list[Any]] = {name: [] for name in (*self._hyperparameters, "other hyperparameters")}
        for number, group in enumerate(_groups(self._probe)):
            for name, value in sorted(group.items()):
                if name != "params" and not isinstance(value, Tensor):
                    values[name if name in values else "other hyperparameters"].append((number, name, value))
        if len(self._probe.optimizers) > 1:
            values["moving optimizer"] = [self._probe.moving]
        texts = [repr(each) for each in values.values()]
        if texts != self._texts:  # they nearly always stay
            self._texts, self._of_texts = texts, [host_digest(text.encode()) for text in texts]
        return self._of_texts

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


class FinalState(Events):
    """Digests the optimizer's state at the end of the script, or where the script takes the probe off.

    Attributes:
        digest: None before that.
    """

    def __init__(self, fingerprint: StepFingerprint) -> None:
        self._fingerprint = fingerprint
        self.digest: int | None = None

    def detached(self) -> None:
        if self.digest is None:
            self.digest = self._fingerprint.optimizer_state()

    def complete(self) -> None:
        self.detached()


def _optimizer_state(probe: Probe) -> tuple[list[list[Tensor]], list[Any]]:
    """The tensors of each parameter's state, and what of it is no tensor."""
    state: list[list[Tensor]] = []
    plain: list[Any] = []
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
    return state, plain


def _tensor_hyperparameters(probe: Probe, grad_scale: Tensor | None) -> list[list[Tensor]]:
    """The learning rates that are tensors; all other tensors among the hyperparameters."""
    rates: list[Tensor] = []
    others = [] if grad_scale is None else [grad_scale]
    for group in _groups(probe):
        for name, value in sorted(group.items()):
            if isinstance(value, Tensor):
                (rates if name == "lr" else others).append(value)
    return [rates, others]


def _groups(probe: Probe) -> list[dict[str, Any]]:
    return [group for optimizer in probe.optimizers for group in optimizer.param_groups]
