"""What is built installs and runs: from another folder, and with a clone of the repository beside the user's script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.slow

TRAINING = """
import sys
import torch
import geomprobe

model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=float(sys.argv[1]))
probe = geomprobe.attach(model, optimizer)
for _ in range(5):
    optimizer.zero_grad()
    probe.backward((model(torch.randn(8, 3)) - 1).square().mean())
    optimizer.step()
print(geomprobe.__file__)
"""
NOT_OF_THE_SOURCE = shutil.ignore_patterns(".*", "runs", "data", "build", "dist", "*.egg-info", "__pycache__")


def run(*command: str | Path, folder: Path) -> str:
    """What a command prints, without what this process has on its import path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def environment(folder: Path, installed: str | Path, *options: str) -> Path:
    """The folder of the commands of a new environment that sees this one's packages, and has ``installed`` first."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder.parent)
    commands = folder / "bin"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(run(commands / "python", "-c", where, folder=folder).strip())
    others = [path for path in sys.path if path.endswith("site-packages")]
    (own / "others.pth").write_text("\n".join(others))  # as paths alone: their own .pth files are not followed
    pip = [
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--ignore-installed",
    ]
    run(commands / "python", *pip, *options, installed, folder=folder)
    return commands


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The repository's files, named as a clone is."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("home") / "geomprobe", ignore=NOT_OF_THE_SOURCE)


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> Path:
    """The folder of the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "-o", folder, source, folder=folder)
    return folder


def trains(commands: Path, folder: Path, package: Path) -> None:
    """Run a training script without a pass; the package that it imports lies in the folder ``package``."""
    (folder / "train.py").write_text(TRAINING)
    printed = run(commands / "python", "train.py", "0.1", folder=folder)
    assert Path(printed.strip()).is_relative_to(package)


def both_passes_hold(commands: Path, folder: Path, package: Path) -> None:
    """Train without a pass, then record, replay and verify with the commands of an environment."""
    trains(commands, folder, package)
    run(commands / "geomprobe", "record", "-o", "run", "--seed", "0", "train.py", "0.1", folder=folder)
    run(commands / "geomprobe", "replay", "run", folder=folder)
    inspected = run(commands / "python", "-m", "geomprobe", "inspect", "run", folder=folder)
    assert "5 of 5 steps equal, w_T bitwise equal" in inspected
    run(commands / "geomprobe", "verify", "run", folder=folder)


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"geomprobe"}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "geomprobe").rglob("*") if path.is_file()}
    expected = {name for name in files if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_sdist_builds_without_the_repository(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"} <= {p.name for p in unpacked.iterdir()}
    commands = environment(tmp_path / "env", sdist)
    (tmp_path / "work").mkdir()
    trains(commands, tmp_path / "work", tmp_path / "env")


def test_the_wheel_runs_both_passes_with_a_clone_beside_the_script(built, source, tmp_path):
    (wheel,) = built.glob("*.whl")
    commands = environment(tmp_path / "env", wheel)
    shutil.copytree(source, tmp_path / "work" / "geomprobe")
    both_passes_hold(commands, tmp_path / "work", tmp_path / "env")


def test_an_editable_install_runs_both_passes_with_its_clone_beside_the_script(source, tmp_path):
    clone = shutil.copytree(source, tmp_path / "work" / "geomprobe")
    commands = environment(tmp_path / "env", clone, "--editable")
    both_passes_hold(commands, tmp_path / "work", clone)
