"""A training over several processes that is cut off, and gone on with, in processes of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import geomprobe
from geomprobe.distributed import watchdog
from geomprobe.passes.checkpoint import restore as restart

STEPS, EPOCHS, BATCH = 12, 2, 4


class Resumable:
    """A classifier with state in buffers, random streams, optimizer and scheduler, in many small buckets."""

    def __init__(
        self, kind: str, at: tuple[int, int] | None = None, do: str = "", pace_s: float = 0.0, **ddp: Any
    ) -> None:
        self.kind, self.at, self.do, self.pace_s, self.ddp = kind, at, do, pace_s, ddp

    def __call__(self) -> None:
        torch.distributed.init_process_group("gloo")
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        samples = BATCH * size * STEPS // EPOCHS
        data = TensorDataset(torch.randn(samples, 5), torch.arange(samples) % 3)
        inner = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 7))
        model: nn.Module = nn.Sequential(inner, nn.Tanh(), nn.Linear(7, 3))
        if self.kind == "DDP":
            model = DistributedDataParallel(model, bucket_cap_mb=1e-4, **self.ddp)
        else:
            fully_shard(inner)
            fully_shard(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        sampler = DistributedSampler(data, size, rank)
        loader = DataLoader(data, BATCH, sampler=sampler)
        probe = geomprobe.attach(model, optimizer, scheduler=scheduler)
        for epoch in probe.epochs(EPOCHS):
            sampler.set_epoch(epoch)
            for x, y in probe.batches(loader):
                time.sleep(self.pace_s)
                if (rank, getattr(probe, "step", 0)) == self.at:
                    self._happens(model)
                optimizer.zero_grad()
                probe.backward(functional.cross_entropy(model(x), y))
                optimizer.step()
            scheduler.step()
            if self.do == "choose":
                probe.reference("best", if_lower=float(epoch != rank))  # the first epoch for rank 0, the last for 1
                if rank == 0:
                    probe.reference("of-one")
        torch.distributed.destroy_process_group()

    def _happens(self, model: nn.Module) -> None:
        if self.do == "die":
            os._exit(9)
        if self.do == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.do == "drift":
            with torch.no_grad():
                next(model.parameters()).mul_(1.001)


def recorded(training: Resumable, run: Path, options: dict[str, Any]) -> int:
    """The step that this process began at."""
    watchdog.BEAT_S = 0.05
    begun = []
    goal_reached = restart.Resumer.goal_reached

    def noted(self: Any) -> None:
        goal_reached(self)
        begun.append(self._probe.step)

    restart.Resumer.goal_reached = noted
    geomprobe.record(training, run, seed=0, **{"checkpoint_every": "2steps", **options}).close()
    return begun[0] if begun else 0


def recorded_cold(training: Resumable, run: Path, options: dict[str, Any]) -> None:
    """Goes on without bringing DDP's buckets to what they were."""
    restart.WarmUp = lambda *_: None
    recorded(training, run, options)


def replayed(training: Resumable, run: Path, options: dict[str, Any]) -> None:
    geomprobe.replay(training, run, **options)
