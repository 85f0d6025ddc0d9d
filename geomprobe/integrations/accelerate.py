"""Hugging Face accelerate: `attach` on what an Accelerator has prepared."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from geomprobe.probe.inert import InertProbe
from geomprobe.probe.probe import Probe
from geomprobe.probe.probe import attach as attach_to


def attach(accelerator: Accelerator, model: nn.Module, optimizer: Any, **stateful: Any) -> Probe | InertProbe:
    """`geomprobe.attach` on the model and the optimizer that ``accelerator.prepare`` returned.

    The loop keeps its ``accelerator.backward(loss)``, from which the probe gets the loss.

    Args:
        accelerator: the accelerator; its scaler, if it has one, is the scaler of the training.
        model, optimizer: as ``prepare`` returned them.
        **stateful: as for `geomprobe.attach`, prepared or not.

    Returns:
        The probe.

    Raises:
        As `geomprobe.attach`.

    >>> import torch
    >>> accelerator, model = Accelerator(cpu=True), nn.Linear(2, 1)
    >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> attach(accelerator, model, optimizer).active
    False
    """
    own = {"scaler": accelerator.scaler, "loaders": _Iterations(accelerator)}
    return attach_to(accelerator.unwrap_model(model), optimizer, **own, **stateful)


class _Iterations:
    """The number of passes over each prepared loader, as state: it sets the seed of an epoch's order."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, list[int]]:
        return {"iterations": [loader.iteration for loader in self._accelerator._dataloaders]}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        for loader, iteration in zip(self._accelerator._dataloaders, state["iterations"], strict=True):
            loader.iteration = iteration
