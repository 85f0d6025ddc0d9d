"""Lightning: a callback that puts the probe on the optimizer inside a Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from geomprobe.errors import UnsupportedTraining
from geomprobe.probe.inert import InertProbe
from geomprobe.probe.probe import Probe, attach


class GeomprobeCallback(Callback):
    """Attaches a probe to what a ``Trainer`` trains. Outside of ``geomprobe record`` and ``replay`` it does nothing.

    The loss is that on which Lightning calls backward, so it is divided by ``accumulate_grad_batches``. The batch is
    the one that ``training_step`` gets. Epochs are those of Lightning.

    Attributes:
        probe: the probe of the present or the last training; None before the first.

    Raises (when training starts):
        UnsupportedTraining: the module has several optimizers, or none.

    >>> import torch, lightning
    >>> class Regression(lightning.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(2, 1)
    ...     def training_step(self, batch, index):
    ...         return (self.layer(batch[0]) - batch[1]).square().mean()
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> def train():
    ...     data = torch.utils.data.TensorDataset(torch.randn(8, 2), torch.randn(8, 1))
    ...     trainer = lightning.Trainer(
    ...         max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False,
    ...         enable_progress_bar=False, enable_model_summary=False, callbacks=[GeomprobeCallback()])
    ...     trainer.fit(Regression(), torch.utils.data.DataLoader(data, 4))
    >>> import geomprobe, tempfile
    >>> geomprobe.two_pass(train, tempfile.mkdtemp(), seed=0)["epoch"].tolist()
    [0.0, 0.0, 1.0, 1.0]
    """

    def __init__(self) -> None:
        self.probe: Probe | InertProbe | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the probe: now there are optimizers, schedulers and the scaler of the precision plugin."""
        if len(trainer.optimizers) != 1:
            found = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            raise UnsupportedTraining(
                f"{type(pl_module).__name__}.configure_optimizers gives {len(found)} optimizers ({', '.join(found)}), "
                "and a trace is of one optimizer's path. Put all parameters into one optimizer's groups."
            )
        stateful = {f"scheduler-{i}": each.scheduler for i, each in enumerate(trainer.lr_scheduler_configs)}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.probe = attach(pl_module, trainer.optimizers[0], scaler=scaler, **stateful)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the probe the number of the epoch."""
        assert self.probe is not None
        self.probe.epoch = trainer.current_epoch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Give the probe the batch, of which it takes a fingerprint."""
        assert self.probe is not None
        self.probe.fetched(batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the probe: what Lightning does with the model after the training is no part of the run."""
        assert self.probe is not None
        self.probe.remove()
