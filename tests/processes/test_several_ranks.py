"""Several optimizers under DDP give the rows of one process with the whole batch; under FSDP2 they are refused."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from support.launches import both_passes, recorded, start
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import geomprobe


@dataclass
class Hybrid:
    """Each process has its part of the batches; the second optimizer steps at every second one."""

    layout: str

    def __call__(self) -> None:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if size > 1:
            distributed.init_process_group("gloo")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        batches = torch.randn(4, 8, 3).double()
        trained: nn.Module = model
        if self.layout == "DDP" and size > 1:
            trained = nn.parallel.DistributedDataParallel(model)
        if self.layout == "FSDP2":
            fully_shard(model)
        first = torch.optim.SGD([p for p in model.parameters() if p.dim() == 2], lr=0.1, momentum=0.9)
        second = torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1], lr=0.01)
        geomprobe.attach(trained, [first, second])
        for t, batch in enumerate(batches):
            first.zero_grad()
            second.zero_grad()
            trained(batch.chunk(size)[rank]).square().mean().backward()
            first.step()
            if t % 2:
                second.step()
        if size > 1:
            distributed.destroy_process_group()


def test_several_optimizers_under_ddp_have_the_rows_of_one_process(tmp_path: Path) -> None:
    both_passes(2, Hybrid("DDP"), tmp_path / "two")
    two, one = geomprobe.open_trace(tmp_path / "two"), geomprobe.two_pass(Hybrid("DDP"), tmp_path / "one", seed=0)
    assert two.status == "complete"
    assert two["optimizer"].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    for column in ("optimizer", "loss", "lr", "grad_norm", "distance", "cosine", "hg_norm", "g_hg", "absent"):
        np.testing.assert_allclose(two[column], one[column], rtol=1e-6, err_msg=column)


def test_several_optimizers_under_fsdp2_are_refused(tmp_path: Path) -> None:
    found = start(2, recorded, tmp_path, Hybrid("FSDP2"), tmp_path / "run")
    assert [code for code, _ in found] == [1, 1]
    for _, (kind, text) in found:
        assert kind == "UnsupportedTraining"
        assert "Several optimizers step a model whose parameters FSDP2 spreads" in text
