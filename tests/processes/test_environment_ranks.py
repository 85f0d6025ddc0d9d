"""What of several processes moves bits is in the manifest, and a pass that finds it changed names it."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launches import Training, both_passes, recorded, replayed, start
from torch import Tensor, nn

import geomprobe
from geomprobe import open_trace
from geomprobe.distributed import manifest as across_ranks
from geomprobe.errors import EnvironmentMismatch, UnsupportedTraining
from geomprobe.trace.record import open_record


@pytest.fixture(scope="module")
def ddp_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(tmp_path_factory.mktemp("ddp")) / "run"
    assert [code for code, _ in start(2, recorded, run.parent, Training("DDP"), run)] == [0, 0]
    return run


def refused(size: int, job: Callable[..., Any], folder: Path, *arguments: Any) -> list[str]:
    """What each process says of why it does not begin."""
    said = []
    for code, result in start(size, job, folder, *arguments):
        assert code == 1
        said.append(": ".join(result))
    return said


def test_the_manifest_says_how_gradients_are_summed(ddp_run: Path) -> None:
    with open_record(ddp_run) as record:
        found = record.manifest["ranks"]
        assert len(set(record.manifest["hosts"])) == 1
    assert found == {
        "world_size": 2,
        "kind": "DDP",
        "backend": "gloo",
        "nccl": None,
        "devices": ["cpu", "cpu"],
        "values": [36, 36],
        "ddp": [
            {
                "buckets": "144",  # bytes of 36 values
                "bucket_cap_bytes": 25 * 1024 * 1024,
                "static_graph": False,
                "find_unused_parameters": False,
                "gradient_as_bucket_view": False,
                "comm_hook": None,
            }
        ],
    }


@pytest.mark.slow
def test_the_manifest_says_how_parameters_are_sharded(tmp_path: Path) -> None:
    both_passes(3, Training("FSDP2"), tmp_path / "run")
    found = open_trace(tmp_path / "run").manifest["ranks"]
    assert found["meshes"] == [[[3], []]]
    assert found["values"] == [9 + 3 + 7 + 1, 9 + 3, 3 + 1]  # shards of 7x3, 7, 1x7 and 1 values
    assert found["fsdp"] == [{"class": "Sequential", "values": 36, "param_dtype": "None", "reduce_dtype": "None"}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapped", "says"),
    [
        ({"static_graph": True}, "ranks.ddp[0].static_graph = False, but here it is True"),
        ({"bucket_cap_mb": 1e-4}, "ranks.ddp[0].bucket_cap_bytes = 26214400, but here it is 104"),
    ],
)
def test_other_buckets_are_refused_by_name(tmp_path: Path, ddp_run: Path, wrapped: Any, says: str) -> None:
    run = Path(shutil.copytree(ddp_run, tmp_path / "run"))
    for text in refused(2, replayed, tmp_path, Training("DDP", wrapped=wrapped), run, {}):
        assert text.startswith("EnvironmentMismatch: ")
        assert f"was recorded with {says}, which can change bits: nothing was replayed." in text
    assert not (run / "trace.h5").exists()


def elsewhere(run: Path) -> None:
    """A replay with the second rank on another kind of device."""
    if os.environ["RANK"] == "1":
        across_ranks._device = lambda device: "cuda:0 (NVIDIA A100)"
    replayed(Training("DDP"), run, {})


@pytest.mark.slow
def test_another_map_of_ranks_to_devices_is_refused_by_name(tmp_path: Path, ddp_run: Path) -> None:
    run = Path(shutil.copytree(ddp_run, tmp_path / "run"))
    for text in refused(2, elsewhere, tmp_path, run):
        assert "ranks.devices[1] = 'cpu', but here it is 'cuda:0 (NVIDIA A100)'" in text


def train() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["NCCL_ALGO", "NCCL_PROTO", "NCCL_MAX_NCHANNELS", "NCCL_NVLS_ENABLE"])
def test_nccl_settings_that_changed_between_the_passes_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    geomprobe.record(train, tmp_path / "run", seed=0).close()
    monkeypatch.setenv(name, "2")
    with pytest.raises(EnvironmentMismatch, match=f"recorded with environment.{name} = '1', but here it is '2'"):
        geomprobe.replay(train, tmp_path / "run")


# Trainings that are refused


class Either(nn.Module):
    """Two heads, of which rank 0 uses one and the others the other."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[int(os.environ["RANK"] != "0")](x)


@pytest.mark.slow
def test_a_parameter_that_only_some_ranks_use_is_refused_by_a_replay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = Training("FSDP2", model=Either)
    assert [code for code, _ in start(2, recorded, tmp_path, training, run)] == [0, 0]
    for text in refused(2, replayed, tmp_path, training, run, {}):
        assert text.startswith("UnsupportedTraining: ")
        assert "parameters got a gradient on some processes only: heads.0.weight on 1 of 2" in text


def stepping_in_backward() -> None:
    """As in PyTorch's tutorial: an optimizer a parameter, which steps as soon as the gradient is there."""
    model = nn.Linear(2, 1)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(optimizer: torch.optim.Optimizer, _: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    for parameter, optimizer in optimizers.items():
        parameter.register_post_accumulate_grad_hook(functools.partial(step, optimizer))
    model(torch.ones(1, 2)).sum().backward()


def test_an_optimizer_for_each_parameter_within_the_backward_pass_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTraining, match="Two optimizers step in this run"):
        geomprobe.record(stepping_in_backward, tmp_path / "run", seed=0)
