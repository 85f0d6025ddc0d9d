"""What only reads runs works where torch cannot be imported at all, and loads nothing it does not need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.cases import PLAIN, Watch, train

import geomprobe
from geomprobe.cli import VERBS

HEAVY = ("torch", "torchvision", "matplotlib", "rich", "scipy", "sklearn", "xarray")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``whole``, ``recorded`` and ``live``, the last one still in its parts; and a torch that is broken."""
    folder = tmp_path_factory.mktemp("runs")

    def training() -> None:
        train(PLAIN, Watch())

    def dying() -> None:
        training()
        raise KeyboardInterrupt

    geomprobe.two_pass(training, folder / "whole", seed=0)
    (folder / "recorded").mkdir()
    shutil.copy(folder / "whole" / "record.h5", folder / "recorded")
    with pytest.raises(KeyboardInterrupt):
        geomprobe.record(dying, folder / "live", seed=0)
    assert list((folder / "live" / "stream").glob("record-*.h5"))
    broken = folder / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('torch was imported')")
    return folder


def python(code: str, runs: Path) -> subprocess.CompletedProcess[str]:
    """Run code where importing torch is an error, for every process that it may start as well."""
    path = os.pathsep.join(filter(None, [str(runs / "broken"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=runs,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def loaded(code: str, runs: Path) -> set[str]:
    """The heavy packages that are loaded after running code."""
    done = python(f"{code}\nimport sys\nprint(*(set(sys.modules) & {set(HEAVY)}), file=sys.stderr)", runs)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def test_the_package_itself_loads_nothing_at_all(runs: Path) -> None:
    assert loaded("import geomprobe, sys; assert not {'numpy', 'h5py'} & set(sys.modules)", runs) == set()


def test_a_trace_is_read_without_torch(runs: Path) -> None:
    code = "import geomprobe\nfor path in ('whole', 'whole/trace.h5'):\n"
    code += "    trace = geomprobe.open_trace(path); trace['cosine']; trace.per_epoch('rsi')"
    assert loaded(code, runs) == set()


REPORTS = [
    ["inspect", "whole"],
    ["inspect", "whole", "--json"],
    ["inspect", "recorded"],
    ["inspect", "live"],
    ["inspect", "whole/record.h5"],
    ["verify", "whole"],
    ["diff", "whole", "whole"],
]


def test_reports_are_made_without_torch(runs: Path) -> None:
    code = f"from geomprobe.cli import main\nfor command in {REPORTS}: assert main(command) == 0, command"
    assert loaded(code, runs) == set()


def test_help_needs_no_torch(runs: Path) -> None:
    code = "import contextlib\nfrom geomprobe.cli import main\n"
    code += f"for verb in {tuple(VERBS)}:\n    with contextlib.suppress(SystemExit): main([verb, '-h'])"
    assert loaded(code, runs) == set()


def test_wrong_usage_is_told_before_torch_is_loaded(runs: Path) -> None:
    code = "from geomprobe.cli import main; assert main(['record', '-o', 'new', 'missing.py']) == 2"
    assert loaded(code, runs) == set()


def test_the_check_would_notice(runs: Path) -> None:
    for code in (
        "import geomprobe.passes.api",
        "import geomprobe; geomprobe.attach",
        "import geomprobe.passes.checkpoint.store",
    ):
        assert "torch was imported" in python(code, runs).stderr
    rich = 'import sys, types; sys.modules["rich"] = types.ModuleType("rich")'
    assert loaded(rich, runs) == {"rich"}
