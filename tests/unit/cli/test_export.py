"""geomprobe export as it is run."""

import argparse

import pytest
from support.sealed_runs import train, write_run

from geomprobe.cli import export
from geomprobe.errors import UsageError


def run(*argv):
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args([str(argument) for argument in argv]))


@pytest.fixture
def recorded(tmp_path):
    return write_run(tmp_path / "a", train(steps=12), status="diverged")


def test_it_names_what_it_wrote_and_what_comes_next(tmp_path, recorded, capsys):
    out = tmp_path / "trace.csv"
    assert run(recorded, "--format", "csv", "-o", out) == 0
    assert out.read_text().startswith("step,epoch,loss,lr,")
    said = capsys.readouterr()
    assert said.out == f"Wrote {out}: 17 columns of 12 steps\n"
    assert said.err == f"The trace is diverged.\nNext: geomprobe plot {recorded} -o a.png\n"


def test_tensorboard_is_what_comes_after_its_export(tmp_path, recorded, capsys):
    pytest.importorskip("tensorboard")
    run(recorded, "--format", "tensorboard", "-o", tmp_path / "logs")
    assert capsys.readouterr().err.endswith(f"Next: tensorboard --logdir {tmp_path / 'logs'}\n")


def test_force_is_what_overwrites(tmp_path, recorded):
    out = tmp_path / "trace.csv"
    out.write_text("hers")
    with pytest.raises(UsageError, match="--force overwrites it"):
        run(recorded, "--format", "csv", "-o", out)
    assert out.read_text() == "hers"
    run(recorded, "--format", "csv", "-o", out, "--force")
    assert out.read_text() != "hers"


@pytest.mark.parametrize("argv", [["-o", "x"], ["--format", "csv"], ["--format", "xls", "-o", "x"]])
def test_wrong_usage_exits_with_2(recorded, argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(recorded, *argv)
    assert stopped.value.code == 2
