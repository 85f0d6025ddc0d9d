"""The sketch of a run of several processes is that of its whole weights and gradient, wherever their parts are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.launches import STEPS, Training, start
from torch import nn
from torch.distributed.tensor import Shard

import geomprobe
from geomprobe.trace.record import Record, open_record
from geomprobe.trace.sketch import projected

RATE = 0.05


def plain_sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr)


def uneven() -> nn.Module:
    """Shards of five rows over two ranks, of one row (the second rank has none), and biases."""
    return nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)
    )


def in_columns(parameter: nn.Parameter) -> Shard:
    even = parameter.dim() > 1 and parameter.shape[1] % 2 == 0  # FSDP2 cuts rows alone unevenly
    return Shard(1 if even else 0)


def training(kind: str, **options: Any) -> Training:
    return Training(kind, model=uneven, double=True, optimizer=plain_sgd, **options)


def recorded(train: Training, run: Path, every: int) -> None:
    geomprobe.record(train, run, seed=0, sketch=16, sketch_every=every, reference_steps=[3, 4, 6]).close()


def alone(run: Path, every: int) -> Record:
    recorded(training("one process"), run, every)
    return open_record(run)


@pytest.mark.parametrize(
    ("kind", "options", "every"),
    [("DDP", {}, 1), ("FSDP2", {}, 1), ("FSDP2", {"wrapped": {"shard_placement_fn": in_columns}}, 3)],
    ids=["DDP", "FSDP2", "FSDP2 cut in columns"],
)
def test_two_processes_have_the_sketch_of_one(tmp_path: Path, kind: str, options: dict[str, Any], every: int):
    run = tmp_path / "run"
    assert start(2, recorded, tmp_path, training(kind, **options), run, every) == [(0, None)] * 2
    with open_record(run) as found, alone(tmp_path / "alone", every) as one:
        described, sketch = found.manifest["sketch"], found.sketch
        assert described["sharded"] == (kind != "DDP")
        assert sketch.steps.tolist() == list(range(0, STEPS - every + 1, every))
        # The same training, but for the rounding of its sums.
        np.testing.assert_allclose(sketch.weights(), one.sketch.weights(), rtol=0, atol=1e-12)
        np.testing.assert_allclose(sketch.gradients(), one.sketch.gradients(), rtol=0, atol=1e-12)
        np.testing.assert_allclose(sketch.cosine().value, one.sketch.cosine().value, atol=1e-10)
        # The very weights of this training, put together from its ranks.
        whole = found._whole_reference("step-6")
        weights = projected(described, [whole[name] for name in found.manifest["model"]["parameters"]])
        np.testing.assert_allclose(sketch.weights(6), weights, rtol=0, atol=0 if kind == "DDP" else 1e-14)
        moved = sketch.offsets("step-4")[sketch.steps == 3] / RATE
        np.testing.assert_allclose(moved, sketch.gradients()[sketch.steps == 3], rtol=0, atol=1e-11)
