"""Lightning: a callback that puts the probe on the optimizer inside a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from geomprobe.errors import UnsupportedTraining, UsageError
from geomprobe.probe.inert import InertProbe
from geomprobe.probe.parameters import described, holds
from geomprobe.probe.probe import Probe, attach


class GeomprobeCallback(Callback):
    """Attaches a probe to what a ``Trainer`` trains. Outside of ``geomprobe record`` and ``replay`` it does nothing.

    The loss is that on which Lightning calls backward, so it is divided by ``accumulate_grad_batches``. The batch is
    the one that ``training_step`` gets. Epochs are those of Lightning.

    Under manual optimization a module may have several optimizers. Those that train parts of the same submodule of it,
    such as ``self.net``, make one path, as in `geomprobe.attach`. Others, as a GAN's two, make different paths.

    Args:
        optimizer: of a module whose optimizers make several paths, the one whose path is measured: its number in what
            ``configure_optimizers`` gives, its class, or the name or class of the submodule that it trains. Several of
            these make one path.

    Attributes:
        probe: the probe of the present or the last training; None before the first.

    Raises (when training starts):
        UnsupportedTraining: the module has no optimizer, or several that make different paths, and none is chosen.
        UsageError: the choice is true of no optimizer, or of some on different paths.

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

    def __init__(self, optimizer: int | str | Sequence[int | str] | None = None) -> None:
        self.probe: Probe | InertProbe | None = None
        self._chosen = [optimizer] if isinstance(optimizer, (int, str)) else optimizer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the probe: now there are optimizers, schedulers and the scaler of the precision plugin."""
        model, optimizers = chosen_path(pl_module, trainer.optimizers, self._chosen)
        stateful = {f"scheduler-{i}": each.scheduler for i, each in enumerate(trainer.lr_scheduler_configs)}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.probe = attach(model, optimizers, scaler=scaler, **stateful)

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


def chosen_path(
    module: nn.Module, optimizers: Sequence[Optimizer], chosen: Sequence[int | str] | None = None
) -> tuple[nn.Module, list[Optimizer]]:
    """The model and the optimizers of the path to measure, of those that a module trains.

    Raises:
        UnsupportedTraining, UsageError: as for `GeomprobeCallback`.
    """
    trained = [_trained(module, each) for each in optimizers]
    listed = "; ".join(
        f"{i}: {described(each)}" + (f" of {', '.join(trained[i])}" if trained[i] else "")
        for i, each in enumerate(optimizers)
    )
    found = f"{type(module).__name__}.configure_optimizers gives {len(optimizers)} optimizers ({listed})"
    path = set(range(len(optimizers))) if chosen is None else set()
    for choice in chosen or ():
        named = {i for i, each in enumerate(optimizers) if choice in (i, type(each).__name__, *_names(trained[i]))}
        if not named or named - _path(min(named), trained):
            fits = "none" if not named else "some that train different submodules"
            raise UsageError(f"GeomprobeCallback(optimizer={choice!r}) is true of {fits}. {found}.")
        path |= _path(min(named), trained)
    if not path or (chosen is None and path != _path(0, trained)):
        raise UnsupportedTraining(
            f"{found}, and a trace is of one path. Name the one to measure: GeomprobeCallback(optimizer=0). Where "
            "several train one model, give a list of them."
        )
    if len(path) == len(optimizers):
        return module, list(optimizers)
    parts = {name: part for i in sorted(path) for name, part in trained[i].items()}
    model = next(iter(parts.values())) if len(parts) == 1 else nn.ModuleDict(parts)
    return model, [optimizers[i] for i in sorted(path)]


def _trained(module: nn.Module, optimizer: Optimizer) -> dict[str, nn.Module]:
    """The submodules, by name, of which an optimizer holds any parameter."""
    return {name: part for name, part in module.named_children() if any(holds(optimizer, part.parameters()))}


def _names(trained: dict[str, nn.Module]) -> list[str]:
    return [*trained, *(type(part).__name__ for part in trained.values())]


def _path(first: int, trained: Sequence[dict[str, nn.Module]]) -> set[int]:
    """The numbers of the optimizers that train, with each other, the submodules that one of them trains."""
    path, parts = {first}, set(trained[first])
    while near := {i for i, names in enumerate(trained) if parts & set(names)} - path:
        path |= near
        parts |= {name for i in near for name in trained[i]}
    return path
