"""geomprobe report as it is run."""

import argparse
import subprocess
import sys

import pytest
from support.sealed_runs import train, write_run

from geomprobe.cli import report
from geomprobe.errors import UsageError

pytest.importorskip("jinja2")


def run(*argv):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(argument) for argument in argv]))


@pytest.fixture
def recorded(tmp_path):
    return write_run(tmp_path / "a", train(steps=12), trace=False)


def test_it_names_what_it_wrote_and_what_it_says(tmp_path, recorded, capsys):
    out = tmp_path / "a.html"
    assert run(recorded, "-o", out) == 0
    said = capsys.readouterr()
    assert said.out == f"Wrote {out}: Recorded, not replayed\n"
    assert said.err == f"Next: open {out} in a browser\n"


def test_force_is_what_overwrites(tmp_path, recorded):
    out = tmp_path / "a.html"
    out.write_text("hers")
    with pytest.raises(UsageError, match="--force overwrites it"):
        run(recorded, "-o", out)
    run(recorded, "-o", out, "--force")
    assert out.read_text() != "hers"


def test_a_report_needs_no_torch(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "a", train(steps=12))
    code = (
        "import sys\nfrom pathlib import Path\nfrom geomprobe.report.html.page import write\n"
        f"write(Path({str(folder)!r}), Path({str(tmp_path / 'a.html')!r}))\n"
        "print(*({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.stdout.strip()) == ("", "")
