"""Averages of the weights along the path, kept up to date while recording, to be references of the replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from geomprobe.errors import RunError, UsageError

RUNNING = "average"

_Update = Callable[[Any, Any, int], None]


class Averages:
    """Exponential moving averages of the weights, and their running average, one step at a time.

    With ``w_0`` the weights at construction and ``w_t`` those after update t, after T updates:

    - ``ema-BETA``: ``e_0 = w_0``, ``e_t = BETA e_(t-1) + (1 - BETA) w_t``, without bias correction,
      so ``e_T = BETA^T w_0 + (1 - BETA) sum_(t=1..T) BETA^(T-t) w_t`` (Polyak averaging as in
      ``torch.optim.swa_utils``);
    - ``average``: ``(w_1 + ... + w_T) / T``; before the first update, ``w_0``.

    Each average has its parameter's dtype, device and strides, except that those of bfloat16 and float16
    parameters are float32, because ``(1 - BETA) (w - e)`` would be rounded away; such parameters cost
    one float32 copy more, which all averages share. An update allocates nothing and draws no random number.

    What is kept is what an update's rounding left: in float32, an update of less than 6e-8 of a weight is lost,
    so ``ema-BETA`` follows offsets above ``6e-8 / (1 - BETA)`` of a weight, and ``average`` those above ``6e-8 T``.

    Args:
        parameters: by name, the tensors to follow; they are read at each update, never written.
        decays: BETA of each exponential moving average, between 0 and 1.
        running: keep the running average too.

    Raises:
        UsageError: a decay is not between 0 and 1.

    >>> weight = torch.tensor([4.0])
    >>> averages = Averages({"w": weight}, decays=[0.75], running=True)
    >>> for value in (8.0, 2.0):
    ...     weight[0] = value
    ...     averages.update()
    >>> averages.weights
    {'ema-0.75': {'w': tensor([4.2500])}, 'average': {'w': tensor([5.])}}
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], *, decays: Sequence[float] = (), running: bool = False
    ) -> None:
        for decay in decays:
            if not 0 < decay < 1:
                raise UsageError(
                    f"an exponential moving average has a decay between 0 and 1, such as 0.999; got {decay!r}"
                )
        self._names = list(parameters)
        self._parameters = list(parameters.values())  # themselves: a script may give them other storage
        self._sources = [
            torch.empty_like(p, dtype=torch.float32, requires_grad=False) if p.element_size() < 4 else p
            for p in self._parameters
        ]
        self._widen()
        updates: dict[str, _Update] = {f"ema-{decay!r}": get_ema_multi_avg_fn(decay) for decay in decays}
        self._updates = {**updates, RUNNING: get_swa_multi_avg_fn()} if running else updates
        self._averages = {name: [source.detach().clone() for source in self._sources] for name in self._updates}
        self._count = 0

    def update(self) -> None:
        """Take the present weights into every average, after each step of the optimizer."""
        self._widen()
        for name, update in self._updates.items():
            update(self._averages[name], self._sources, self._count)
        self._count += 1

    @property
    def weights(self) -> dict[str, dict[str, Tensor]]:
        """By reference name, then by parameter name: the averages themselves, which later updates move on."""
        return {name: dict(zip(self._names, tensors, strict=True)) for name, tensors in self._averages.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue bit for bit; as a module's, it holds the tensors, not copies."""
        return {"updates": self._count, "averages": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy back what `state_dict` gave, in place, bit for bit.

        Raises:
            RunError: it is of other averages, or of other parameters.
        """
        here, there = _layout(self.weights), _layout(state["averages"])
        if here != there:
            differs = min({entry[:2] for entry in here ^ there})
            raise RunError(
                f"the checkpoint's averages of the weights are not those kept now: {'/'.join(differs)} is in one only, "
                f"or has another shape or dtype ({len(there)} tensors there, {len(here)} here). "
                "Resume with the averages and the model that it was recorded with"
            )
        for name, tensors in self.weights.items():
            for parameter, tensor in tensors.items():
                tensor.copy_(state["averages"][name][parameter])
        self._count = int(state["updates"])

    @torch.no_grad()
    def _widen(self) -> None:
        for parameter, source in zip(self._parameters, self._sources, strict=True):
            if source is not parameter:
                source.copy_(parameter)


def _layout(averages: Mapping[str, Mapping[str, Tensor]]) -> set[tuple[Any, ...]]:
    return {
        (name, parameter, tuple(tensor.shape), tensor.dtype)
        for name, tensors in averages.items()
        for parameter, tensor in tensors.items()
    }
