"""Train a small GPT on the source of Python's standard library, on one process or many; see docs/distributed.md.

    python scripts/examples/distributed.py
    torchrun --nproc-per-node 4 scripts/examples/distributed.py --parallel fsdp2
    torchrun --nproc-per-node 4 -m geomprobe record -o runs/gpt scripts/examples/distributed.py --parallel fsdp2
    torchrun --nproc-per-node 4 -m geomprobe replay runs/gpt

It runs with NCCL where each process has a GPU, and with gloo on CPUs. The lines that name the probe are all that
geomprobe needs of a script.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import geomprobe

# The papers' models and data are beside the experiments.
sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))

from workloads import GPT, stdlib


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """The pieces of a text: so many words, and the word after each of them."""

    def __init__(self, text: Tensor, length: int) -> None:
        self.text, self.length = text, length

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        first = index * self.length
        piece = self.text[first : first + self.length + 1]
        return piece[:-1], piece[1:]


class LanguageModel(nn.Module):
    """A GPT and its loss: the mean cross-entropy of the next word, in nats. What comes in is [batch, time]."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, words: Tensor, following: Tensor) -> Tensor:
        return functional.cross_entropy(self.gpt(words.T).flatten(0, 1), following.T.flatten())


def join_the_others() -> tuple[torch.device, int, int]:
    """Meet the processes that torchrun started, if it did: this one's device and rank, and their number."""
    if "RANK" not in os.environ:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), 0, 1
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return device, dist.get_rank(), dist.get_world_size()


def spread(model: LanguageModel, parallel: str) -> nn.Module:
    """The model over all processes: a replica on each, or a shard of each tensor."""
    if not dist.is_initialized():
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model)
    for block in model.gpt.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


@torch.no_grad()
def held_out_loss(model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """The mean over the held-out text, of which each process takes its share."""
    model.eval()
    losses = [model(words.to(device), following.to(device)) for words, following in loader]
    mean = torch.stack(losses).mean()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    model.train()
    return mean.item()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--modules", nargs="+", default=["asyncio", "email", "json"], help="of the standard library")
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--context", type=int, default=32, help="words of a piece of text")
    parser.add_argument("--features", type=int, default=64, help="numbers per word")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=48, help="of all processes together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = parse()
    device, rank, world_size = join_the_others()
    torch.manual_seed(0)  # the same first weights everywhere
    corpus = stdlib(modules=options.modules, words=options.vocabulary)
    sizes = {"features": options.features, "layers": options.layers, "context": options.context}
    gpt = GPT(len(corpus.vocabulary), dropout=0.1, **sizes)
    model = spread(LanguageModel(gpt).to(device), options.parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    torch.manual_seed(1 + rank)  # another dropout on each

    data = Windows(corpus.train, options.context)
    sampler: DistributedSampler[Tensor] = DistributedSampler(data, world_size, rank, drop_last=True)
    loader = DataLoader(data, options.batch_size // world_size, sampler=sampler, drop_last=True)
    held_out = Windows(corpus.valid, options.context)
    held_out_loader = DataLoader(held_out, 64, sampler=DistributedSampler(held_out, world_size, rank, shuffle=False))

    probe = geomprobe.attach(model, optimizer)
    for epoch in probe.epochs(options.epochs):
        sampler.set_epoch(epoch)
        for words, following in probe.batches(loader):
            words, following = words.to(device), following.to(device)
            loss = model(words, following)
            optimizer.zero_grad()
            # The closure is for Hg alone: attention's fused kernels have no second derivative.
            probe.backward(loss, closure=partial(model, words, following))
            optimizer.step()
        mean = held_out_loss(model, held_out_loader, device)
        if rank == 0:
            print(f"epoch {epoch + 1:3d}  held-out loss {mean:.4f}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
