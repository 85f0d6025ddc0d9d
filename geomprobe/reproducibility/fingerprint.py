"""What of a step is compared between the passes: its RNG, batch, weights, optimizer, loss and buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.probe.hooks.grad_scaler import unscaled
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.digest import TensorDigests, fold, host_digest, leaves, rng_digests

_LARGE = 2**20  # bytes: a batch above this on the host is not digested there if the model reads it on a GPU
_ODD = 0x5851F42D4C957F2D  # an odd multiplier: chaining digests of a step's batches keeps their order

Layout = dict[str, tuple[str, ...]]  # component -> names of its columns


class Pending(NamedTuple):
    """What has been seen of a step before its first backward pass: see `StepFingerprint`."""

    fetch_rng: dict[str, int] | None
    batch_came: bool
    fetched: int
    inputs: tuple[Tensor, ...]


class StepFingerprint:
    """Collects what a step shows until the update, then gives its fingerprint.

    The fingerprint's columns are fixed when a probe is bound. TensorDigests of device tensors stay on the device;
    those of host state are integers.
    """

    def __init__(self) -> None:
        self._probe: Probe | None = None
        self._host_digests = TensorDigests(torch.device("cpu"))
        self._fetch_rng: dict[str, int] | None = None
        self._batch_came = False
        self._fetched = 0
        self._inputs: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._loss_scale: Tensor | None = None

    def bind(self, probe: Probe) -> None:
        """Fix the columns: the tensors of the probe's model and optimizer, and the RNG streams there are."""
        self._probe = probe
        parameters = probe.parameters
        self.device = next(iter(parameters.values())).device
        self._digests = TensorDigests(self.device)
        self._input_digests = TensorDigests(self.device)
        self._weights = probe.weights
        self._streams = tuple(rng_digests())
        self.layout: Layout = {
            "rng": tuple(f"{when}/{stream}" for when in ("fetch", "step") for stream in self._streams),
            "batch": ("fetched", "inputs"),
            "weights": tuple(self._weights),
            "optimizer": (*parameters, "hyperparameters"),
            "loss": ("loss",),
            "buffers": tuple(probe.buffers),
        }

    def fetching(self) -> None:
        """The loader is about to be asked for a batch; the first that comes in a step counts."""
        if self._fetch_rng is None and torch.is_grad_enabled():  # evaluation is not part of the step
            self._fetch_rng = rng_digests()

    def fetch_ended(self, came: bool) -> None:
        """The loader has given a batch, or was at its end."""
        self._batch_came |= came and torch.is_grad_enabled()
        if not self._batch_came:
            self._fetch_rng = None

    def fetched(self, batch: Any) -> None:
        """A batch has come from the loader."""
        tensors, rest = leaves(batch)
        self._fetched = fold(self._fetched, host_digest(*rest))
        on_host = [t for t in tensors if t.device.type == "cpu" and not self._left_to_the_device(t)]
        for digest in self._host_digests([[t] for t in on_host]).tolist():
            self._fetched = fold(self._fetched, digest)
        self._add_inputs([t for t in tensors if t.device.type != "cpu"])

    def entered(self, inputs: Any) -> None:
        """The model is about to run on ``inputs``."""
        tensors, rest = leaves(inputs)
        if self._fetched and all(t.device.type == "cpu" for t in tensors):
            return  # the loader's batch, or computed from it
        self._fetched = fold(self._fetched, host_digest(*rest))
        self._add_inputs(tensors)

    def loss_seen(self, loss: Tensor) -> None:
        """``backward`` is called on ``loss``, whole or in part."""
        value, scale = unscaled(loss)
        self._losses.append(value.detach())
        self._loss_scale = scale

    def gradients_dropped(self) -> None:
        """The gradients collected so far are thrown away, and their losses with them."""
        self._losses.clear()

    @property
    def loss(self) -> Tensor:
        """The step's loss, summed over accumulation; float64, NaN where none was seen or it is no scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for loss in self._losses:
            total += loss.to(total) if loss.numel() == 1 else torch.nan
        return total if self._losses else total + torch.nan

    def take(self) -> tuple[Tensor, list[int]]:
        """The step's fingerprint, in device and host columns, and a clean slate for the next step.

        Returns:
            An int64 tensor (weights, parameters' optimizer state, tensor-valued hyperparameters, inputs, loss,
            buffers) and a list (RNG at fetch, RNG now, fetched batch, hyperparameters).
        """
        digests, host = self._look()
        self.go_on_from(Pending(None, False, 0, ()))
        return digests, host

    @property
    def settled(self) -> bool:
        """Whether no backward pass has been seen since the last update, so that nothing waits to be measured."""
        return not self._losses

    @property
    def pending(self) -> Pending:
        """What of the next step has been seen; for a checkpoint, where it is `settled`."""
        return Pending(self._fetch_rng, self._batch_came, self._fetched, tuple(self._inputs))

    def go_on_from(self, pending: Pending) -> None:
        """Forget what has been seen, but for what is ``pending``."""
        self._fetch_rng, self._batch_came, self._fetched = (
            pending.fetch_rng,
            pending.batch_came,
            pending.fetched,
        )
        self._inputs, self._losses = list(pending.inputs), []

    def state(self) -> dict[str, list[int]]:
        """Digests of the random streams, weights, optimizer and buffers as they are now, by component."""
        digests, host = self._look()
        rows = self.assemble(digests.cpu().numpy()[None], np.array([host], np.int64))
        now = rows["rng"][:, len(self._streams) :]
        return {"rng": now[0].tolist()} | {
            component: rows[component][0].tolist() for component in ("weights", "optimizer", "buffers")
        }

    def _look(self) -> tuple[Tensor, list[int]]:
        """The fingerprint of what has been seen so far."""
        assert self._probe is not None
        state, group_tensors, plain = _optimizer_state(self._probe)
        buffers = [[local(buffer)] for buffer in self._probe.buffers.values()]
        weights = [[local(weight)] for weight in self._weights.values()]
        small = [group_tensors, self._inputs, [loss.reshape(-1) for loss in self._losses]]
        digests = self._digests([*weights, *state, *small, *buffers])
        fetch, now = self._fetch_rng or {}, rng_digests()
        host = [streams.get(name, 0) for streams in (fetch, now) for name in self._streams]
        host += [self._fetched, host_digest(repr(plain).encode())]
        return digests, host

    @property
    def device_columns(self) -> int:
        """How many int64 values of a step's fingerprint lie on the device: what `take` returns first."""
        layout = self.layout
        return len(layout["weights"]) + len(layout["optimizer"]) + 2 + len(layout["buffers"])

    def assemble(self, device: NDArray[np.int64], host: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Blocks of :meth:`take`'s rows as one array [steps, columns] per component."""
        weights, parameters = len(self.layout["weights"]), len(self.layout["optimizer"]) - 1
        streams = 2 * len(self._streams)
        after = weights + parameters
        tensors_of_groups, inputs, loss = (device[:, after + i : after + i + 1] for i in range(3))
        plain = host[:, streams + 1 : streams + 2]
        return {
            "rng": host[:, :streams],
            "batch": np.hstack([host[:, streams : streams + 1], inputs]),
            "weights": device[:, :weights],
            "optimizer": np.hstack([device[:, weights:after], plain ^ tensors_of_groups]),
            "loss": loss,
            "buffers": device[:, after + 3 :],
        }

    def _left_to_the_device(self, tensor: Tensor) -> bool:
        on_gpu = self._probe is not None and self.device.type != "cpu"
        return on_gpu and tensor.numel() * tensor.element_size() > _LARGE

    def _add_inputs(self, tensors: Sequence[Tensor]) -> None:
        digests = self._input_digests if self._probe is not None else self._host_digests
        if tensors:
            self._inputs.append(digests([[tensor] for tensor in tensors]))


def _optimizer_state(probe: Probe) -> tuple[list[list[Tensor]], list[Tensor], list[Any]]:
    """Tensors of each parameter's state; tensors among the hyperparameters; every plain value."""
    plain: list[Any] = []
    state: list[list[Tensor]] = []
    for parameter in probe.parameters.values():
        entries: Mapping[str, Any] = probe.optimizer.state.get(parameter, {})
        state.append([local(entries[name]) for name in sorted(entries) if isinstance(entries[name], Tensor)])
        plain.append([(name, v) for name, v in sorted(entries.items()) if not isinstance(v, Tensor)])
    tensors: list[Tensor] = []
    for group in probe.optimizer.param_groups:
        for name, value in sorted(group.items()):
            if name != "params":
                tensors += [value] if isinstance(value, Tensor) else []
                plain += [] if isinstance(value, Tensor) else [(name, value)]
    return state, tensors, plain
