"""The manifest names what moves bits; a mismatch of environments is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.command_server import python

from geomprobe.errors import EnvironmentMismatch
from geomprobe.reproducibility.environment import (
    BIT_CHANGING_VARIABLES,
    changed_sources,
    first_mismatch,
    flags,
    require_same,
    source_digests,
    start_manifest,
)
from geomprobe.reproducibility.seeding import strict_mode

SCRIPT = {"kind": "script", "path": "train.py", "argv": [], "cwd": "/", "root": "/", "sha256": "0"}


def test_flags_tell_each_switch_that_moves_bits() -> None:
    before = flags()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        torch.set_default_dtype(torch.float64)
        torch.backends.mkldnn.enabled = False
        torch.set_flush_denormal(True)
        with strict_mode(True):
            changed = {name for name, value in flags().items() if value != before[name]}
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.backends.mkldnn.enabled = True
        torch.set_flush_denormal(False)
    expected = {"num_threads", "default_dtype", "mkldnn", "deterministic_algorithms", "cudnn_deterministic"}
    assert changed - {"flush_denormal"} == expected  # some processors cannot flush
    assert flags() == before


def test_the_manifest_is_plain_json_and_names_what_moves_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    manifest = start_manifest(seed=3, strict=True, script=SCRIPT)
    assert json.loads(json.dumps(manifest)) == manifest
    assert set(manifest["environment"]) == set(BIT_CHANGING_VARIABLES)
    assert manifest["environment"]["MKL_CBWR"] == "COMPATIBLE"
    assert manifest["environment"]["ONEDNN_MAX_CPU_ISA"] is None
    assert manifest["software"]["torch"] == torch.__version__
    assert (manifest["seed"], manifest["strict"], manifest["script"]) == (3, True, SCRIPT)


@pytest.mark.parametrize(
    ("recorded", "present", "found"),
    [
        ({"seed": 1}, {"seed": 1}, None),
        ({"seed": 1}, {"seed": 2}, ("seed", 1, 2)),
        ({"seed": 1}, {}, ("seed", 1, None)),
        ({}, {"seed": 1}, ("seed", None, 1)),
        ({}, {}, None),
        ({"flags": {"a": 1, "b": 2}}, {"flags": {"a": 1, "b": 3}}, ("flags.b", 2, 3)),
        ({"flags": {"a": 1}}, {"flags": {"a": 1, "b": 3}}, ("flags.b", None, 3)),
        ({"flags": {"a": 1, "b": 3}}, {"flags": {"a": 1}}, ("flags.b", 3, None)),
        ({"flags": {"a": [1, {"x": 2}]}}, {"flags": {"a": [1, {"x": 3}]}}, ("flags.a[1].x", 2, 3)),
        ({"flags": {"a": [1]}}, {"flags": {"a": [1, 2]}}, ("flags.a", [1], [1, 2])),
        ({"flags": {"a": 1}}, {"flags": None}, ("flags", {"a": 1}, None)),
        ({"seed": 1, "flags": 2}, {"seed": 3, "flags": 4}, ("seed", 1, 3)),
        ({"host": 1}, {"host": 2}, None),
    ],
)
def test_the_first_mismatch_is_named_with_both_values(recorded, present, found) -> None:
    assert first_mismatch(recorded, present, ("seed", "flags")) == found


def test_a_refusal_names_the_entry_both_values_and_the_way_out() -> None:
    both = ({"flags": {"num_threads": 2}}, {"flags": {"num_threads": 4}})
    with pytest.raises(EnvironmentMismatch) as refused:
        require_same(*both, ("flags",), Path("runs/a"))
    for part in ("runs/a", "flags.num_threads", "2", "4", "nothing was replayed", "geomprobe record"):
        assert part in str(refused.value)
    require_same(both[0], both[0], ("flags",), Path("runs/a"))


def test_sources_are_the_modules_beside_the_script_and_a_change_is_told(tmp_path: Path) -> None:
    (tmp_path / "library" / "site-packages").mkdir(parents=True)
    names = ("own.py", "other.py", "library/site-packages/installed.py")
    for name in names:
        (tmp_path / name).write_text("value = 1\n")
    code = (
        "import sys, json; from pathlib import Path; from geomprobe.reproducibility.environment import source_digests;"
        f"sys.path += [{str(tmp_path)!r}, {str(tmp_path / 'library/site-packages')!r}];"
        f"import own, installed; print(json.dumps(source_digests(Path({str(tmp_path)!r}))))"
    )
    digests = json.loads(python("-c", code).out)
    assert set(digests) == {"own.py"}
    assert changed_sources(digests, tmp_path) == []
    (tmp_path / "own.py").write_text("value = 2\n")
    assert changed_sources(digests, tmp_path) == ["own.py"]
    (tmp_path / "own.py").unlink()
    assert changed_sources(digests, tmp_path) == ["own.py"]


def test_geomprobes_own_modules_are_no_sources_of_the_script() -> None:
    import geomprobe

    assert source_digests(Path(geomprobe.__file__).parents[1] / "geomprobe") == {}
