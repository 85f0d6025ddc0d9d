"""Hugging Face transformers: a callback that puts the probe on the optimizer inside a Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from geomprobe.probe.inert import InertProbe
from geomprobe.probe.probe import Probe, attach


class GeomprobeCallback(TrainerCallback):
    """Attaches a probe to what a ``Trainer`` trains. Outside of ``geomprobe record`` and ``replay`` it does nothing.

    The loss is that on which the Trainer calls backward, so it is divided under accumulation. The batch is the one that
    the model gets. Epochs are those of the Trainer.

    Attributes:
        probe: the probe of the present or the last training; None before the first.

    >>> GeomprobeCallback().probe is None
    True
    """

    def __init__(self) -> None:
        self.probe: Probe | InertProbe | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the probe: now there is an optimizer, inside accelerate's wrapper."""
        optimizer = kwargs["optimizer"]
        scaler = getattr(optimizer, "scaler", None)
        self.probe = attach(kwargs["model"], optimizer, scheduler=kwargs["lr_scheduler"], scaler=scaler)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the probe the number of the epoch, of which the Trainer counts fractions."""
        assert self.probe is not None
        self.probe.epoch = round(state.epoch or 0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the probe: what the Trainer does with the model after the training is no part of the run."""
        assert self.probe is not None
        self.probe.remove()
