"""Every model trains, replays certified, and has an Hg, in strict deterministic mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import workloads
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from workloads.data.digit_scenes import CLASSES

import geomprobe

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: workloads.resnet(18, width=1 / 16),
    "ResNet-50": lambda: workloads.resnet(50, width=1 / 16),
    "Medium-MLP": lambda: workloads.medium_mlp(inputs=192, width=1 / 256),
    "VGG-16": lambda: workloads.vgg(16, width=1 / 32, image_size=8),
    "Transformer": lambda: workloads.WordTransformer(50, features=8, heads=2, hidden=8, layers=2, dropout=0.1),
    "GPT": lambda: workloads.GPT(50, features=8, heads=2, context=8, dropout=0.1),
    "UNet": lambda: workloads.UNet(CLASSES, width=1 / 16),
    "SegNet": lambda: workloads.SegNet(CLASSES, width=1 / 32),
}


def batches(
    name: str,
) -> list[tuple[Tensor, Tensor]] | DataLoader[tuple[Tensor, Tensor]]:
    if name in ("Transformer", "GPT"):
        words = workloads.stdlib(modules=["json"], words=50).train[:200]
        return workloads.segments(workloads.columns(words, 4), 8)[:4]
    if name in ("UNet", "SegNet"):
        tiles = workloads.digit_scenes(train=True)
        return DataLoader(workloads.Patches(tiles, count=12, size=32), batch_size=4)
    data = torch.utils.data.Subset(workloads.digits(train=True, augment=True), range(64))
    return DataLoader(data, batch_size=16, shuffle=True)


@pytest.mark.parametrize("name", MODELS)
def test_a_training_replays_certified_with_curvature(name: str, tmp_path: Path) -> None:
    axis = 1 if name in ("UNet", "SegNet") else -1

    def train() -> None:
        model = MODELS[name]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        probe = geomprobe.attach(model, optimizer)
        for _ in probe.epochs(1):
            for inputs, labels in probe.batches(batches(name)):

                def loss(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
                    logits = model(inputs).movedim(axis, -1).flatten(0, -2)
                    return functional.cross_entropy(logits, labels.flatten())

                optimizer.zero_grad()
                # Attention's fused kernels have no second derivative: Hg is taken from a second evaluation.
                probe.backward(loss(), closure=loss if name in ("Transformer", "GPT") else None)
                optimizer.step()

    trace = geomprobe.two_pass(train, tmp_path / "run", seed=0)
    assert trace.status == "complete"
    assert trace.num_steps >= 3
    assert trace.certificate["steps_equal"] == trace.num_steps
    for column in ("cosine", "hg_norm", "clr"):
        assert np.isfinite(trace[column]).all(), column
    assert trace["loss"][0] > 0
