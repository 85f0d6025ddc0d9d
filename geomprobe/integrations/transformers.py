"""Hugging Face transformers: a callback that puts the probe on the optimizer inside a Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from geomprobe.probe.inert import InertProbe
from geomprobe.probe.probe import Probe, attach


class GeomprobeCallback(TrainerCallback):
    """Lets ``geomprobe record`` and ``replay`` see what a ``Trainer`` trains; otherwise it does nothing.

    The loss is seen where the Trainer calls backward on it, as it divides it under accumulation, the batch as the
    model gets it, and epochs as the Trainer counts them.

    Attributes:
        probe: the probe of the training that runs or ran last, None before the first.

    >>> GeomprobeCallback().probe is None
    True
    """

    def __init__(self) -> None:
        self.probe: Probe | InertProbe | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach: the optimizer is there now, inside accelerate's wrapper."""
        optimizer = kwargs["optimizer"]
        scaler = getattr(optimizer, "scaler", None)
        self.probe = attach(kwargs["model"], optimizer, scheduler=kwargs["lr_scheduler"], scaler=scaler)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name the epoch; the Trainer counts in fractions of one."""
        assert self.probe is not None
        self.probe.epoch = round(state.epoch or 0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the probe off: what the Trainer does with the model from here on is no part of the run."""
        assert self.probe is not None
        self.probe.remove()
