"""The command line of inspect, verify, plot and diff: outputs, exit codes, errors, and no torch."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from support.sealed_runs import certificate, tamper, train, write_run

import geomprobe
from geomprobe import cli
from geomprobe.cli import VERBS, build_parser, main
from geomprobe.errors import ReplayDiverged

NO_TORCH = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch was imported")
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def history():
    return train(steps=60)


@pytest.fixture
def run(tmp_path, history):
    return write_run(tmp_path / "a", history)


@pytest.fixture
def broken(tmp_path, history):
    path = write_run(tmp_path / "broken", history)
    tamper(path / "trace.h5", "steps/cosine", lambda x: x * 1.01, row=9)
    return path


def test_verify_exits_with_0_where_everything_holds_and_leads_to_plot(run, capsys):
    assert main(["verify", str(run)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "all 15 checks held"
    assert err == f"Next: geomprobe plot {run} -o a.png\n"


def test_verify_exits_with_3_where_an_identity_is_broken(broken, capsys):
    assert main(["verify", str(broken)]) == 3
    out, err = capsys.readouterr()
    assert re.search(r"cosine = rsi / eb .* 9  FAIL", out)
    assert err == f"Next: geomprobe inspect {broken}\n"


@pytest.mark.parametrize(("verb", "key"), [("verify", "checks"), ("inspect", "trace")])
def test_json_is_all_that_goes_to_standard_output(run, capsys, verb, key):
    assert main([verb, str(run), "--json"]) == 0
    assert key in json.loads(capsys.readouterr().out)


def test_inspect_prints_the_certificate(run, capsys):
    assert main(["inspect", str(run)]) == 0
    out, err = capsys.readouterr()
    assert "60 of 60 steps equal, w_T bitwise equal" in out
    assert err == f"Next: geomprobe verify {run}\n"


def test_diff_exits_with_0_for_equal_runs_and_3_for_others(tmp_path, history, run, capsys):
    same = write_run(tmp_path / "b", history)
    other = write_run(tmp_path / "c", train(steps=60, seed=1))
    assert main(["diff", str(run), str(same)]) == 0
    assert main(["diff", str(run), str(other)]) == 3
    assert "first difference at step 0" in capsys.readouterr().out


def test_plot_writes_the_file_and_names_it(tmp_path, run, capsys):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "gamma.png"
    assert main(["plot", str(run), "-o", str(figure), "--columns", "cosine,lolr", "--skip-last-epoch"]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert out == f"Wrote {figure}\n"
    assert err == f"Next: geomprobe inspect {run}\n"


def test_plot_overwrites_nothing_without_force(tmp_path, run, capsys):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "gamma.svg"
    figure.write_text("hers")
    assert main(["plot", str(run), "-o", str(figure)]) == 2
    assert "--force overwrites it" in capsys.readouterr().err
    assert figure.read_text() == "hers"
    assert main(["plot", str(run), "-o", str(figure), "--force", "--columns", "cosine"]) == 0
    assert figure.read_text() != "hers"


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_an_error_is_one_line_without_a_traceback_unless_asked_for(tmp_path, capsys, verb):
    missing = str(tmp_path / "nowhere")
    assert main([verb, missing]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"geomprobe {verb}: error: {missing} does not exist\n")
    assert main([verb, missing, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_divergence_exits_with_3(monkeypatch, capsys):
    def diverge(arguments):
        raise ReplayDiverged("step 7: rng", step=7, component="rng", tensor="torch")

    monkeypatch.setattr("geomprobe.cli.inspect.run", diverge)
    assert main(["inspect", "x"]) == 3
    assert capsys.readouterr().err == "geomprobe inspect: error: step 7: rng\n"


def test_an_interrupt_exits_as_shells_count_it(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("geomprobe.cli.inspect.run", interrupt)
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "geomprobe inspect: interrupted\n"


@pytest.mark.parametrize("argv", [[], ["dance"], ["plot", "runs/a"], ["diff", "runs/a"], ["verify", "runs/a", "--js"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: geomprobe" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"geomprobe {geomprobe.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verbs_help_is_its_module_docstring_and_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "-h"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert str(getattr(cli, verb).__doc__).strip() in out
    assert f"    geomprobe {verb} " in out
    assert "--debug" in out


def test_the_list_of_verbs_gives_each_docstrings_first_line():
    text = re.sub(r"\s+", " ", build_parser().format_help())
    for verb in VERBS:
        assert str(getattr(cli, verb).__doc__).partition("\n")[0] in text


def subprocess_run(code, *argv, **options):
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120, **options)


def test_the_reports_run_without_torch(tmp_path, run):
    code = NO_TORCH + (
        "from geomprobe.cli import main\n"
        "run = sys.argv[1]\n"
        "codes = [main(argv) for argv in (['inspect', run], ['verify', run], ['diff', run, run])]\n"
        "import geomprobe.report.plot, geomprobe.trace.reader\n"
        "assert 'torch' not in sys.modules\n"
        "print('codes', codes)\n"
    )
    done = subprocess_run(code, str(run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("codes [0, 0, 0]\n")


def test_the_test_for_torch_would_notice_torch():
    done = subprocess_run(NO_TORCH + "import geomprobe.probe.probe")
    assert "torch was imported" in done.stderr


def test_a_reader_that_goes_away_leaves_no_complaint(run):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "geomprobe", "inspect", str(run)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writing)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_an_uncertified_run_says_so_in_every_report(tmp_path, history, capsys):
    said = certificate(60, equal=20, weights_equal=False)
    run = str(write_run(tmp_path / "u", history, status="uncertified", cert=said, same=np.arange(60) < 20))
    for verb in ("inspect", "verify"):
        assert main([verb, run]) == 0
        assert "UNCERTIFIED" in capsys.readouterr().out
