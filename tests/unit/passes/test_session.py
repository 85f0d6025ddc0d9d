"""What a pass understands of a script that goes about things in its own way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import geomprobe
from geomprobe import ReplayDiverged
from geomprobe.distributed.ranks import Ranks
from geomprobe.passes.options import RecordOptions
from geomprobe.passes.recording import recording
from geomprobe.reproducibility.environment import start_manifest
from geomprobe.trace.run_folder import RunFolder


def test_a_scaled_loss_that_is_divided_afterwards_is_recorded_unscaled(tmp_path):
    losses: list[float] = []

    def train() -> None:
        losses.clear()
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(2):
                loss = model(torch.randn(4, 3)).square().mean()
                (scaler.scale(loss) / 2).backward()
                total += loss.item() / 2
            losses.append(total)
            scaler.step(optimizer)
            scaler.update()

    trace = geomprobe.two_pass(train, tmp_path / "run", seed=0)
    np.testing.assert_allclose(trace["loss"], losses, rtol=1e-6)
    np.testing.assert_allclose(trace["clr"], np.array(losses) / trace["grad_norm"] ** 2, rtol=1e-6)


def test_the_inputs_of_several_models_under_one_optimizer_are_compared_without_attach(tmp_path):
    changed = False

    def train() -> None:
        encoder, decoder = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.1)
        for step in range(5):
            x = torch.randn(4, 3)
            if changed and step == 3:
                x = x.flip(0)  # the mean over the batch is the same but for its rounding
            optimizer.zero_grad()
            decoder(encoder(x)).square().mean().backward()
            optimizer.step()

    geomprobe.record(train, tmp_path / "run", seed=0)
    changed = True
    with pytest.raises(ReplayDiverged) as caught:
        geomprobe.replay(train, tmp_path / "run")
    assert (caught.value.step, caught.value.component) == (3, "batch")


class Answering:
    """A store in which the other process has always said what this one says."""

    def __init__(self) -> None:
        self._said: dict[str, Any] = {}

    def set(self, key: str, value: str) -> None:
        self._said[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key.rpartition("/")[0] + "/0" in self._said for key in keys)

    def get(self, key: str) -> Any:
        return self._said[key.rpartition("/")[0] + "/0"]


@pytest.mark.parametrize("attach", [False, True])
def test_where_a_process_stands_is_known_at_each_stage_with_and_without_attach(tmp_path, attach):
    ranks = Ranks(0, 2, Answering())
    run = RunFolder(tmp_path / "run")
    run.stream.mkdir(parents=True)
    manifest = start_manifest(seed=0, strict=True, script={})
    session = recording(run, manifest, RecordOptions(checkpoint_every="never"), ranks)
    seen = []

    def look() -> None:
        seen.append(str(ranks.progress.look(0.0)).partition(", test_session.py")[0])

    with session.reporting():
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if attach:
            geomprobe.attach(model, optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 3)).square().mean()
            look()
            loss.backward()
            look()
            optimizer.step()
            look()
    session.close()
    assert seen == [
        place
        for step in range(4)
        for place in (
            f"at step {step}, in the forward pass",
            f"at step {step}, in the backward pass",
            f"before step {step + 1}",
        )
    ]
