"""A checkpoint gives back, bit for bit, the whole state of a training: model, optimizer, RNG and all else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Embedded, Loop, Watch, bits, mlp, with_batch_norm
from torch import nn

from geomprobe import checkpoint
from geomprobe.determinism import RNGState, restore_rng, untouched_rng
from geomprobe.errors import RunError
from geomprobe.probe import Observer, Probe


class Nobody:
    """An observer that does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def trained(make: Callable[[], nn.Module], optimizer: Any, steps: int) -> Probe:
    """A probe on a model that took some steps with Adam, a scheduler and a scaler."""
    model = make()
    stepping = optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(stepping, 2, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7, growth_interval=2)
    observer: Observer = Nobody()  # type: ignore[assignment]
    probe = Probe(model, stepping, {"scheduler": scheduler, "scaler": scaler}, observer)
    for _ in range(steps):
        train_on(probe)
    return probe


def train_on(probe: Probe) -> None:
    assert probe.model is not None
    dtype = next(iter(probe.parameters.values())).dtype
    probe.optimizer.zero_grad()
    embedded = isinstance(probe.model, Embedded)
    x = torch.randint(0, 20, (4, 3)) if embedded else torch.randn(4, 6).to(dtype)
    loss = probe.model(x).float().square().mean() * (1 + random.random() + np.random.rand())
    scaler = probe.stateful["scaler"]
    scaler.scale(loss).backward()
    scaler.step(probe.optimizer)
    scaler.update()
    probe.stateful["scheduler"].step()


def state_of(probe: Probe) -> dict[str, str]:
    return bits({"model": probe.model, "optimizer": probe.optimizer, **probe.stateful})


def restore(state: dict[str, Any], probe: Probe) -> None:
    assert probe.model is not None
    probe.model.load_state_dict(state["model"])
    probe.optimizer.load_state_dict(state["optimizer"])
    for name, thing in probe.stateful.items():
        thing.load_state_dict(state["stateful"][name])
    rng = state["rng"]
    restore_rng(RNGState(rng["python"], rng["numpy"], rng["torch"], tuple(rng["cuda"])))


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1, amsgrad=True)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.fixture(autouse=True)
def _generators():
    with untouched_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(
    ("make", "optimizer"),
    [
        (with_batch_norm, adam),
        (mlp, momentum),
        (lambda: mlp().bfloat16(), adam),
        (lambda: mlp().double(), adam),
        (Embedded, lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
    ],
    ids=["BatchNorm", "momentum", "bfloat16", "float64", "sparse"],
)
def test_a_training_goes_on_from_a_checkpoint_to_the_same_bits(
    make: Any, optimizer: Any, tmp_path: Path
) -> None:
    probe = trained(make, optimizer, 3)
    random.gauss(0, 1)  # leaves a second normal in the generator's cache, and so do the next two
    np.random.randn()
    torch.randn(())
    saved = state_of(probe)
    path = checkpoint.save(tmp_path, probe)
    for _ in range(4):
        train_on(probe)
    ended = state_of(probe)
    assert ended != saved

    other = trained(make, optimizer, 3)  # of the same shapes, with other bits
    assert state_of(other) != saved
    restore(checkpoint.load(path, other), other)
    assert state_of(other) == saved
    for _ in range(4):
        train_on(other)
    assert state_of(other) == ended


def test_the_state_before_the_first_step_comes_back_though_the_optimizer_has_none_yet(tmp_path: Path) -> None:
    probe = trained(mlp, adam, 0)
    saved = state_of(probe)
    path = checkpoint.save(tmp_path, probe)
    train_on(probe)
    fresh = trained(mlp, adam, 0)
    restore(checkpoint.load(path, fresh), fresh)
    assert state_of(fresh) == saved


def test_saving_changes_nothing_and_draws_nothing(tmp_path: Path) -> None:
    probe = trained(with_batch_norm, adam, 2)
    before = state_of(probe)
    checkpoint.save(tmp_path, probe)
    assert state_of(probe) == before


def test_loading_changes_neither_the_probe_nor_the_generators(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, trained(with_batch_norm, adam, 2))
    other = trained(with_batch_norm, adam, 3)
    before = state_of(other)
    checkpoint.load(path, other)
    assert state_of(other) == before


def test_the_state_of_an_optimizer_is_never_left_out_in_silence(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, trained(mlp, adam, 2))
    with pytest.raises(RunError, match="Adam has not, so there is nothing to read it into"):
        checkpoint.load(path, trained(mlp, adam, 0))


def test_the_folder_is_named_by_the_step_and_whole(tmp_path: Path) -> None:
    probe = trained(mlp, adam, 2)
    assert probe.step == 2
    path = checkpoint.save(tmp_path, probe)
    assert path == tmp_path / "step-00000002" == checkpoint.folder(tmp_path, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_what_a_killed_save_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    probe = trained(mlp, adam, 2)
    half = tmp_path / "step-00000002.part"
    half.mkdir()
    (half / "rubbish").write_text("half")
    path = checkpoint.save(tmp_path, probe)
    assert not half.exists()
    assert "rubbish" not in {entry.name for entry in path.iterdir()}


def test_a_probe_without_a_model_keeps_its_parameters(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(3))
    observer: Observer = Nobody()  # type: ignore[assignment]
    probe = Probe(None, torch.optim.SGD([weight], lr=0.1), {}, observer)
    path, before = checkpoint.save(tmp_path, probe), weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    state = checkpoint.load(path, probe)
    assert torch.equal(state["model"]["group0.parameter0"], before)


def test_every_case_of_the_two_passes_can_be_saved(tmp_path: Path) -> None:
    class Saving(Watch):
        def attach(self, model: Any, optimizer: Any, **stateful: Any) -> Any:
            observer: Observer = Nobody()  # type: ignore[assignment]
            probe = Probe(model, optimizer, {k: v for k, v in stateful.items() if v is not None}, observer)
            checkpoint.save(tmp_path / str(len(list(tmp_path.iterdir()))), probe)
            return super().attach(model, optimizer)

    for case in CASES:
        Loop(case, Saving())
    assert len(list(tmp_path.iterdir())) == len(CASES)
