"""The papers' training scripts: their defaults, small runs that replay certified, and missing data."""

from __future__ import annotations

import hashlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import python2_pickle
from workloads.data import cifar10

import geomprobe

SCRIPTS = Path(__file__).parents[3] / "scripts/examples"

IMAGES = [
    "images.py",
    "--dataset",
    "digits",
    "--width",
    "0.0625",
    "--epochs",
    "2",
    "--batch-size",
    "256",
]
LANGUAGE = ["language.py", "--corpus", "stdlib", "--modules", "email", "json", "--vocabulary", "200"]
LANGUAGE += ["--features", "8", "--hidden", "8", "--layers", "2", "--train-words", "6000", "--epochs", "2"]
SEGMENTATION = ["segmentation.py", "--dataset", "digits", "--width", "0.0625", "--epochs", "2"]
SEGMENTATION += ["--patches", "30", "--held-out-patches", "10", "--patch-size", "32"]


def script(monkeypatch: pytest.MonkeyPatch, arguments: list[str], name: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / arguments[0]), *arguments[1:]])
    return runpy.run_path(str(SCRIPTS / arguments[0]), run_name=name)


@pytest.mark.parametrize(
    ("arguments", "paper"),
    [
        (
            ["images.py"],
            {"epochs": 190, "batch_size": 256, "lr": 1e-2, "weight_decay": 1e-6, "warmup": None},
        ),
        (
            ["images.py", "--dataset", "imagenet"],
            {"epochs": 180, "batch_size": 256, "lr": 0.1, "weight_decay": 1e-4, "warmup": 3},
        ),
        (["images.py", "--dataset", "imagenet", "--epochs", "90"], {"epochs": 90, "lr": 0.1}),
        (["images.py"], {"model": "resnet18", "width": 1, "optimizer": "momentum"}),
        (
            ["language.py"],
            {"epochs": 20, "batch_size": 32, "lr": 1e-4, "weight_decay": 1e-5, "optimizer": "adam"},
        ),
        (
            ["segmentation.py"],
            {
                "epochs": 26,
                "batch_size": 10,
                "lr": 0.01,
                "weight_decay": 1e-5,
                "patches": 10_000,
                "patch_size": 256,
            },
        ),
    ],
)
def test_defaults_are_the_papers(monkeypatch: pytest.MonkeyPatch, arguments: list[str], paper: dict[str, Any]) -> None:
    options = vars(script(monkeypatch, arguments, "imported")["parse"]())
    assert {name: options[name] for name in paper} == paper


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(IMAGES, marks=pytest.mark.slow),
        [*IMAGES, "--model", "medium-mlp"],
        pytest.param([*IMAGES, "--model", "vgg16", "--optimizer", "adam", "--no-augment"], marks=pytest.mark.slow),
        [*IMAGES, "--optimizer", "clr", "--max-lr", "1"],
        pytest.param([*IMAGES, "--optimizer", "sgd", "--warmup", "1"], marks=pytest.mark.slow),
        LANGUAGE,
        pytest.param([*LANGUAGE, "--model", "gpt", "--optimizer", "momentum"], marks=pytest.mark.slow),
        SEGMENTATION,
        pytest.param([*SEGMENTATION, "--model", "segnet"], marks=pytest.mark.slow),
    ],
    ids=lambda arguments: " ".join(a for a in arguments if not a.isdigit())[:80],
)
def test_a_small_training_replays_certified(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
) -> None:
    def train() -> None:
        script(monkeypatch, arguments, "__main__")

    trace = geomprobe.two_pass(train, tmp_path / "run", seed=0)
    assert trace.status == "complete"
    assert trace.num_steps >= 6
    assert np.isfinite(trace["hg_norm"]).all()
    assert sorted(set(trace["epoch"])) == [0, 1]
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == said[2:]
    assert all("held-out" in line for line in said)


def test_the_warm_up_reaches_the_greatest_rate_and_the_cosine_ends_near_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factor = script(monkeypatch, ["images.py"], "imported")["warmup_then_cosine"](30, 180)
    rates = [factor(step) for step in range(180)]
    assert rates[:3] == pytest.approx([1 / 30, 2 / 30, 3 / 30])
    assert rates[29] == rates[30] == max(rates) == 1
    assert rates[105] == pytest.approx(0.5)
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_segmentation_ends_with_an_epoch_at_a_tenth_of_rate_and_decay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trace = geomprobe.two_pass(lambda: script(monkeypatch, SEGMENTATION, "__main__") and None, tmp_path / "run", seed=0)
    last = trace["epoch"] == 1
    assert set(trace["lr"][~last]) == {0.01}
    assert trace["lr"][last] == pytest.approx(0.001)
    assert trace["groups/0/weight_decay"][last] == pytest.approx(1e-6)


def test_cifar_10_trains_from_its_own_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in cifar10.MD5:
        data = random.integers(256, size=(10, 3072), dtype=np.uint8)
        content = python2_pickle.dumps({b"labels": random.integers(10, size=10).tolist(), b"data": data})
        (folder / name).write_bytes(content)
        monkeypatch.setitem(cifar10.MD5, name, hashlib.md5(content).hexdigest())
    small = ["--width", "0.0625", "--epochs", "1", "--batch-size", "10", "--workers", "0"]
    script(monkeypatch, ["images.py", "--data", str(tmp_path), *small], "__main__")
    assert capsys.readouterr().out.startswith("epoch   1  loss ")


def geomprobe_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "geomprobe", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_missing_data_ends_a_recording_with_where_to_get_it_and_no_traceback(tmp_path: Path) -> None:
    done = geomprobe_command("record", "-o", "run", str(SCRIPTS / "images.py"), cwd=tmp_path)
    assert done.returncode == 2
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [[*IMAGES, "--workers", "2"], LANGUAGE, SEGMENTATION],
    ids=["images", "language", "segmentation"],
)
def test_the_command_line_records_and_replays_it(tmp_path: Path, arguments: list[str]) -> None:
    call = ["record", "-o", "run", "--seed", "0", str(SCRIPTS / arguments[0]), *arguments[1:]]
    recorded = geomprobe_command(*call, cwd=tmp_path)
    assert recorded.returncode == 0, recorded.stderr
    replayed = geomprobe_command("replay", "run", cwd=tmp_path)
    assert replayed.returncode == 0, replayed.stderr
    assert "certified" in replayed.stdout + replayed.stderr
    assert geomprobe_command("verify", "run", cwd=tmp_path).returncode == 0
