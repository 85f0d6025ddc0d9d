"""Which layouts are found and which refused, and what happens where one rank fails or differs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ranks
from support.refused_layouts import REFUSED, WORLD
from support.shared_training import Net
from support.spread_cases import every_job

from geomprobe.distributed.layout import Layout
from geomprobe.errors import UnsupportedTraining, UsageError
from geomprobe.measure.measurement import Measurement
from geomprobe.measure.options import MeasureOptions

SAYS = {
    "unwrapped": "3 processes train, and neither DDP nor fully_shard averages the gradient of weight over them",
    "FSDP1": r"The model is wrapped in FullyShardedDataParallel \(FSDP1\)",
    "tensor parallel": "weight lies on .* tensor parallelism is not supported",
    "tensor parallel under FSDP2": "fully_shard over tensor parallelism is not supported",
    "pipeline": "which are 1 of the 3 processes",
    "partly sharded": r"0.weight is a DTensor and 1.weight a plain tensor \(2 and 2 in all\)",
    "outside DDP": r"the gradient of outside.weight over them \(it is outside the DDP module",
    "DDP over some": "DDP averages over 1 of the 3 processes",
    "stepping in backward": "module.weight is updated inside the backward pass",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.run(WORLD, every_job, Path(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_is_not_supported_is_refused_by_name(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        with pytest.raises(ValueError, match=SAYS[name]):
            raise ValueError(rank["refusals"].get(name, "accepted"))


def test_several_devices_in_one_process_are_refused() -> None:
    parameters = {"a": torch.ones(1), "b": torch.ones(1, device="meta")}
    with pytest.raises(UnsupportedTraining, match=r"several devices of one process \(a on cpu, b on meta\)"):
        Layout.of(None, parameters)


def test_uneven_inputs_are_refused_by_name(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["joined"].startswith("The training runs inside DDP's join()")


def test_gradients_of_each_rank_are_refused_where_no_rank_has_one() -> None:
    probe: Any = SimpleNamespace(model=None, parameters={"weight": torch.ones(1)})
    with pytest.raises(UsageError, match="laid out as FSDP2: only under DDP"):
        Measurement(probe, MeasureOptions(per_rank=True, curvature_every=0), Layout("FSDP2", world_size=2))


def test_the_layout_is_found_also_from_the_module_inside_its_wrapper(found: list[dict[str, Any]]) -> None:
    everything = (True, True)
    for rank in found:
        assert rank["layouts"] == {
            "inner": "DDP",
            "ddp": ("DDP", False, everything),
            "fsdp": ("FSDP2", True, (True,) * 5),
            "evaluated": ("FSDP2", list(dict(Net().named_parameters()))),
            "replicated": ("DTensor", False, everything),
        }


def test_a_replica_of_a_shard_counts_once(found: list[dict[str, Any]]) -> None:
    assert all(rank["replicas_apart"] for rank in found)


def test_replicated_dtensors_with_partial_gradients_are_measured_whole(found: list[dict[str, Any]]) -> None:
    for rank in found:
        numbers = rank["replicated_dtensors"]
        assert numbers["came"] == {"Partial"}
        assert numbers["plain"]
        assert numbers["step"] is None
        for name in ("loss", "products", "hg"):
            torch.testing.assert_close(*numbers[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["ddp marked", "ddp ctc", "fsdp marked", "fsdp ctc"])
def test_where_one_rank_has_no_hg_all_leave_it_out_and_train_on_as_before(
    found: list[dict[str, Any]], case: str
) -> None:
    for number, rank in enumerate(found):
        same, finite, missing = rank["blocked"][case]
        assert same
        assert finite == [True, True, False, False]
        assert ("rank 1" in missing) == (number != 1)
        assert ("Opaque" if "marked" in case else "ctc_loss") in missing


def test_a_wrong_closure_on_one_rank_stops_all_and_the_others_name_it(found: list[dict[str, Any]]) -> None:
    said = [rank["wrong_closure"] for rank in found]
    assert [name for name, _ in said] == ["ElsewhereFailed", "ClosureMismatch", "ElsewhereFailed"]
    assert said[0][1].startswith("This process stops because rank 1 failed: The closure returned another loss")


def test_gradients_that_no_one_averaged_have_no_global_hessian(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "gives no multiple of the mean of the processes' gradients" in rank["unaveraged"]


def test_a_parameter_that_only_some_ranks_use_is_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert list(rank["partly_used"]) == ["ddp, Hg", "ddp", "fsdp, Hg", "fsdp"]
        for said in rank["partly_used"].values():
            assert said.startswith("4 parameters got a gradient on some processes only: ")
            assert " on 2 of 3. " in said or " on 1 of 3. " in said


def test_a_step_that_one_rank_did_not_see_has_no_hg_on_any(found: list[dict[str, Any]]) -> None:
    assert [rank["half_seen"] for rank in found] == [[False, True]] * WORLD


@pytest.mark.parametrize(
    ("variant", "tolerance"),
    [("checkpointed", 1e-5), ("mixed", 0.05), ("tied", 1e-5), ("frozen", 1e-5), ("unused", 1e-5)],
)
def test_under_fsdp2_variants_of_models_keep_their_bits_and_have_their_hg(
    found: list[dict[str, Any]], variant: str, tolerance: float
) -> None:
    for rank in found:
        same, distance = rank["fsdp_variants"][variant]
        assert same
        assert distance < tolerance


def test_the_sharpness_of_a_named_loss_is_that_of_its_mean_over_the_ranks(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        for value, expected in rank["fixed_loss"].values():
            assert value == pytest.approx(expected, rel=2e-3)
