"""A checkpoint gives back, bit for bit, the whole state of a training: model, optimizer, RNG and all else."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cases import CASES, Embedded, Loop, Watch, bits, mlp, with_batch_norm
from torch import nn

from geomprobe.errors import RunError
from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.passes.checkpoint.training_state import capture, restore
from geomprobe.probe.events import Observer
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.isolation import keep_rng


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
    probe = Probe(model, [stepping], {"scheduler": scheduler, "scaler": scaler}, observer)
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


def save(checkpoints: Path, probe: Probe) -> Path:
    state = capture(probe, [])
    return checkpoint.write(checkpoints, probe.step, {"training": state}, {})


def load(path: Path, probe: Probe) -> None:
    state = checkpoint.read(path)["training"]
    restore(probe, [], state)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1, amsgrad=True)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.fixture(autouse=True)
def _generators():
    with keep_rng():
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
def test_a_training_goes_on_from_a_checkpoint_to_the_same_bits(make: Any, optimizer: Any, tmp_path: Path) -> None:
    probe = trained(make, optimizer, 3)
    random.gauss(0, 1)  # leaves a second normal in the generator's cache, and so do the next two
    np.random.randn()
    torch.randn(())
    saved = state_of(probe)
    path = save(tmp_path, probe)
    for _ in range(4):
        train_on(probe)
    ended = state_of(probe)
    assert ended != saved

    other = trained(make, optimizer, 3)  # of the same shapes, with other bits
    assert state_of(other) != saved
    load(path, other)
    assert state_of(other) == saved
    for _ in range(4):
        train_on(other)
    assert state_of(other) == ended


def test_the_state_before_the_first_step_comes_back_though_the_optimizer_has_none_yet(tmp_path: Path) -> None:
    probe = trained(mlp, adam, 0)
    saved = state_of(probe)
    path = save(tmp_path, probe)
    train_on(probe)
    fresh = trained(mlp, adam, 0)
    load(path, fresh)
    assert state_of(fresh) == saved


def test_saving_changes_nothing_and_draws_nothing(tmp_path: Path) -> None:
    probe = trained(with_batch_norm, adam, 2)
    before = state_of(probe)
    save(tmp_path, probe)
    assert state_of(probe) == before


def test_a_process_whose_optimizer_has_not_stepped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    probe = trained(lambda: mlp().bfloat16(), adam, 3)
    state = probe.optimizer.state[next(iter(probe.parameters.values()))]
    state["exp_avg"] = state["exp_avg"].float()  # load_state_dict would cast it down
    path, saved = save(tmp_path, probe), state_of(probe)
    fresh = trained(lambda: mlp().bfloat16(), adam, 0)
    load(path, fresh)
    assert state_of(fresh) == saved


def test_what_no_state_dict_holds_comes_back_too(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = with_batch_norm()
        model.register_buffer("calls", torch.zeros(2), persistent=False)
        return model.to(memory_format=torch.channels_last)

    probe, other = trained(make, momentum, 2), trained(make, momentum, 0)
    assert probe.model is not None
    assert other.model is not None
    first = next(iter(probe.parameters))
    probe.parameters[first].requires_grad_(False)
    probe.model.get_buffer("calls").add_(3)
    probe.model.get_submodule("1").eval()
    wide = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    probe.optimizer.state[probe.parameters[first]]["wide"] = wide
    load(save(tmp_path, probe), other)
    assert other.model.get_buffer("calls").tolist() == [3, 3]
    assert not other.model.get_submodule("1").training
    assert not other.parameters[first].requires_grad
    for name, parameter in probe.parameters.items():
        assert parameter.grad is not None
        back = other.parameters[name].grad
        assert back is not None
        assert torch.equal(back, parameter.grad)
    back = other.optimizer.state[other.parameters[first]]["wide"]
    assert torch.equal(back, wide)
    assert back.stride() == wide.stride()


def test_another_model_is_refused_and_untouched(tmp_path: Path) -> None:
    path = save(tmp_path, trained(mlp, adam, 2))
    other = trained(with_batch_norm, adam, 0)
    before = state_of(other)
    with pytest.raises(RunError, match="not in both"):
        load(path, other)
    assert state_of(other) == before


def test_a_changed_bit_in_any_file_is_found_and_the_file_named(tmp_path: Path) -> None:
    path = save(tmp_path, trained(mlp, adam, 2))
    checkpoint.verify(path)
    luck = random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for _ in range(8):
            at = luck.randrange(len(whole))
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << luck.randrange(8)]) + whole[at + 1 :])
            with pytest.raises(RunError, match=f"damaged: {file.name}"):
                checkpoint.verify(path)
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(RunError, match=f"damaged: {file.name}"):
            checkpoint.verify(path)
        file.unlink()
        with pytest.raises(RunError, match=file.name):
            checkpoint.verify(path)
        file.write_bytes(whole)
    checkpoint.verify(path)


def test_the_writer_keeps_the_state_as_it_was_and_thins_what_lies_closest(tmp_path: Path) -> None:
    probe = trained(mlp, momentum, 0)
    writer = checkpoint.Writer(tmp_path, 4)
    states = {}
    for step in range(8):
        probe.step = step
        states[step] = state_of(probe)
        state = capture(probe, [])
        writer.submit(step, {"training": state}, {"step": step})
        train_on(probe)  # while it is being written
    writer.close()
    kept = checkpoint.saved(tmp_path)
    assert kept[0] == 0
    assert kept[-1] == 7
    assert len(kept) == 4
    for step in kept:
        assert checkpoint.verify(checkpoint.folder(tmp_path, step)) == {"step": step}
        load(checkpoint.folder(tmp_path, step), probe)
        assert state_of(probe) == states[step]


def test_what_the_writer_could_not_write_is_told_at_the_next_occasion(tmp_path: Path) -> None:
    file = tmp_path / "checkpoints"
    file.write_text("in the way")
    writer = checkpoint.Writer(file, None)
    writer.submit(0, {"weight": torch.ones(2)}, {})
    with pytest.raises(RunError, match=r"cannot write .*step-00000000"):
        writer.close()


def test_the_folder_is_named_by_the_step_and_whole(tmp_path: Path) -> None:
    probe = trained(mlp, adam, 2)
    assert probe.step == 2
    path = save(tmp_path, probe)
    assert path == tmp_path / "step-00000002" == checkpoint.folder(tmp_path, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_what_a_killed_save_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    probe = trained(mlp, adam, 2)
    half = tmp_path / "step-00000002.part"
    half.mkdir()
    (half / "rubbish").write_text("half")
    path = save(tmp_path, probe)
    assert not half.exists()
    assert "rubbish" not in {entry.name for entry in path.iterdir()}


def test_a_probe_without_a_model_keeps_its_parameters(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(3))
    observer: Observer = Nobody()  # type: ignore[assignment]
    probe = Probe(None, [torch.optim.SGD([weight], lr=0.1)], {}, observer)
    path, before = save(tmp_path, probe), weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    load(path, probe)
    assert torch.equal(weight, before)


def test_every_case_of_the_two_passes_can_be_saved(tmp_path: Path) -> None:
    class Saving(Watch):
        def attach(self, model: Any, optimizer: Any, **stateful: Any) -> Any:
            observer: Observer = Nobody()  # type: ignore[assignment]
            probe = Probe(model, [optimizer], {k: v for k, v in stateful.items() if v is not None}, observer)
            save(tmp_path / str(len(list(tmp_path.iterdir()))), probe)
            return super().attach(model, optimizer)

    for case in CASES:
        Loop(case, Saving())
    assert len(list(tmp_path.iterdir())) == len(CASES)


def rewritten(path: Path, **changed: Any) -> None:
    """Change what a checkpoint says of itself, with the digest that fits."""
    text = json.loads((path / checkpoint.FACTS).read_text())["text"]
    text = json.dumps({**json.loads(text), **changed})
    digest = hashlib.sha256(text.encode()).hexdigest()
    (path / checkpoint.FACTS).write_text(json.dumps({"sha256": digest, "text": text}))


class Code:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def test_pickled_code_is_never_run_though_its_digest_is_right(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 1, {"a": 1}, {})
    for save in (torch.save, lambda thing, file: file.write_bytes(pickle.dumps(thing, 2))):
        save({"a": Code(tmp_path / "ran")}, path / checkpoint.STATE)
        with pytest.raises(RunError, match=r"damaged: state\.pt is not what was written"):
            checkpoint.read(path)
        rewritten(path, sha256=hashlib.sha256((path / checkpoint.STATE).read_bytes()).hexdigest())
        with pytest.raises(RunError, match="no pickled code is run"):
            checkpoint.read(path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_an_older_format_is_refused_with_words(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 1, {"a": 1}, {})
    text = json.dumps({"facts": {}, "files": {"state.pt": "0"}, "alike": {"at": None}})
    digest = hashlib.sha256(text.encode()).hexdigest()
    (path / checkpoint.FACTS).write_text(json.dumps({"sha256": digest, "text": text}))
    for use in (checkpoint.read, checkpoint.verify, checkpoint.facts):
        with pytest.raises(RunError, match=r"older geomprobe.*record again"):
            use(path)


class InTurn:
    """Ranks of one process: rank 0 says, and the other hears."""

    def __init__(self, first: bool, told: dict[str, Any]) -> None:
        self.first, self._told = first, told

    def broadcast(self, name: str, value: Any = None) -> Any:
        return self._told.setdefault(name, value)


def two_ranks(folder: Path, of_second: float = 1.0) -> tuple[Path, Path]:
    """Checkpoints of two processes, of which the second may have other weights."""
    told: dict[str, Any] = {}
    paths = []
    for rank, where in enumerate((folder, folder / "rank-0001")):
        shared = checkpoint.SharedByFirst(InTurn(rank == 0, told), folder)  # type: ignore[arg-type]
        weights = {"w": torch.full((1000,), of_second if rank else 1.0)}
        contents = {"training": {"replicated": weights, "own": torch.full((3,), float(rank))}}
        paths.append(checkpoint.write(where, 4, contents, {}, shared))
    return paths[0], paths[1]


def test_what_two_processes_share_is_written_once_and_read_by_both(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path)
    states = [checkpoint.read(path)["training"] for path in (first, second)]
    assert [state["replicated"]["w"][0].item() for state in states] == [1, 1]
    assert [state["own"][0].item() for state in states] == [0, 1]
    assert (second / checkpoint.STATE).stat().st_size + 3000 < (first / checkpoint.STATE).stat().st_size


def test_what_differs_is_written_by_both(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path, of_second=2.0)
    checkpoint.remove(tmp_path, 4)
    assert not first.exists()
    assert checkpoint.read(second)["training"]["replicated"]["w"][0] == 2


@pytest.mark.parametrize("other", ["itself", "circle", "another state"])
def test_a_checkpoint_that_leads_to_no_whole_one_is_damaged(tmp_path: Path, other: str) -> None:
    first, second = two_ranks(tmp_path)
    digest = json.loads(json.loads((second / checkpoint.FACTS).read_text())["text"])["shared"]["digest"]
    shared = {"part": ["training", "replicated"], "digest": digest}
    if other == "itself":
        rewritten(second, shared={**shared, "checkpoint": second.name})
    elif other == "circle":
        rewritten(first, shared={**shared, "checkpoint": f"rank-0001/{second.name}"})
    else:
        rewritten(first, shared={**shared, "digest": "0", "checkpoint": None})
    for use in (checkpoint.read, checkpoint.verify):
        with pytest.raises(RunError, match="does not hold what it left out"):
            use(second)


def test_an_object_whose_state_cannot_be_kept_is_named_when_the_checkpoint_is_taken(tmp_path: Path) -> None:
    class Sampler:
        def state_dict(self) -> dict[str, Any]:
            return {"order": [Sampler()]}

    probe = trained(mlp, adam, 0)
    probe.stateful["sampler"] = Sampler()
    writer = checkpoint.Writer(tmp_path, None)
    with pytest.raises(RunError, match=r"state_dict of 'sampler'.*Sampler at \['order'\]\[0\]"):
        writer.submit(0, {"training": capture(probe, [])}, {})
    writer.close()
    assert checkpoint.saved(tmp_path) == []
