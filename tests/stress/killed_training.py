"""A training of a second that has everything in it that a checkpoint must keep: what kill_and_resume.py kills.

    python tests/stress/killed_training.py --workers 2

BatchNorm, dropout, Adam, a scheduler, shuffling, and an augmentation that draws from all three random generators,
in the process itself or in workers. Several processes, as torchrun starts them, train it together.
"""

import argparse
import os
import random

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import geomprobe


class Blobs(Dataset[tuple[Tensor, Tensor]]):
    """48 noisy points around 4 centers, flipped and moved as they are read."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(48) % 4
        self.points = torch.randn(4, 8, generator=generator)[self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sign = random.choice((-1, 1))
        return sign * self.points[index] + 0.3 * torch.randn(8) + float(np.random.rand()), self.labels[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    arguments = parser.parse_args()

    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    blobs, sampler = Blobs(), None
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
        model = together(model, arguments.parallel)
        sampler = DistributedSampler(blobs)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * arguments.epochs)
    loader = DataLoader(blobs, batch_size=4, sampler=sampler, shuffle=sampler is None, num_workers=arguments.workers)
    held_out = DataLoader(Blobs(), batch_size=48)

    probe = geomprobe.attach(model, optimizer, scheduler=scheduler)
    for epoch in probe.epochs(arguments.epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for points, labels in probe.batches(loader):
            optimizer.zero_grad()
            probe.backward(functional.cross_entropy(model(points), labels))
            optimizer.step()
        scheduler.step()
        model.eval()
        with torch.no_grad():
            loss = sum(functional.cross_entropy(model(points), labels).item() for points, labels in held_out)
        model.train()
        probe.reference("best", if_lower=loss)
    if sampler is not None:
        distributed.destroy_process_group()


def together(model: nn.Module, how: str) -> nn.Module:
    """The model as one of several that are trained as one; in small buckets, whose order counts."""
    if how == "ddp":
        return DistributedDataParallel(model, bucket_cap_mb=1e-3)
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


if __name__ == "__main__":
    main()
