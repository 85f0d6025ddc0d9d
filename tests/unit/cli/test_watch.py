"""geomprobe watch as it is run: in a terminal, into a pipe, until the pass is sealed or Ctrl-C."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from support.live_writer import LiveWriter, append, open_part

from geomprobe.trace.seal import seal_trace

pytest.importorskip("rich")

MAIN = """
import argparse, sys
from geomprobe.cli import watch
parser = argparse.ArgumentParser()
watch.add_arguments(parser)
try:
    code = watch.run(parser.parse_args())
except Exception as error:
    sys.exit(f"{error} {error.exit_code}")
assert "torch" not in sys.modules
sys.exit(code)
"""


def command(*argv):
    return [sys.executable, "-c", MAIN, *map(str, argv)]


def piped(*argv):
    return subprocess.run(command(*argv), capture_output=True, text=True, timeout=60)


class Terminal:
    """The command in a terminal of its own, 80 by 24."""

    def __init__(self, *argv):
        self._side, other = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(
            command(*argv), stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
        )
        os.close(other)
        self.text = ""

    def until(self, pattern, timeout_s=30):
        """Read on until the text that came since the last time matches."""
        end, came = time.monotonic() + timeout_s, ""
        while not re.search(pattern, came):
            assert time.monotonic() < end, f"no {pattern} in {came!r}"
            if select.select([self._side], [], [], 0.5)[0]:
                try:
                    came += os.read(self._side, 65536).decode(errors="replace")
                except OSError:  # the process has ended
                    assert re.search(pattern, came), came
                    break
        self.text += came

    def wait(self):
        code = self.process.wait(timeout=30)
        os.close(self._side)
        return code


@pytest.fixture
def run(tmp_path):
    (tmp_path / "a" / "stream").mkdir(parents=True)
    return tmp_path / "a"


def test_in_a_terminal_it_lives_through_death_and_restart_and_ends_when_the_pass_is_sealed(run):
    with LiveWriter(run) as live:
        live.append(64)
        shown = Terminal(run, "--interval", "0.05")
        shown.until(r"running: .*(?s:.*)64 steps")
        live.append(64)
        shown.until("128 steps")
        live.kill()
        shown.until("stopped: nobody is writing")
    part = run / "stream" / "trace-00000000.h5"
    part.unlink()
    with LiveWriter(run) as live:
        live.append(100)
        shown.until("running: .*(?s:.*)100 steps")
        live.close()
    seal_trace([part], run / "trace.h5", status="complete", num_parameters=7, manifest={})
    part.unlink()
    shown.until(rf"over: complete(?s:.*)Next: geomprobe verify .*{run.name}")
    assert shown.wait() == 0


def test_ctrl_c_ends_it_with_0(run):
    with open_part(run / "stream" / "trace-00000000.h5", "trace", 0) as part:
        append(part, "trace", 0, 5)
        shown = Terminal(run, "--interval", "0.2")
        shown.until("5 steps")
        os.killpg(shown.process.pid, signal.SIGINT)
        assert shown.wait() == 0
    assert "Traceback" not in shown.text


def test_into_a_pipe_it_prints_one_view_and_the_rate_of_a_living_pass(run):
    with LiveWriter(run) as live:
        live.append(64)
        done = piped(run, "--interval", "0.2")
    assert (done.returncode, done.stderr) == (0, f"Next: geomprobe inspect {run}\n")
    assert done.stdout.count("64 steps, epoch 1, 0 steps/s") == 1
    assert "\x1b" not in done.stdout


def test_once_in_a_terminal_prints_one_view(run):
    with open_part(run / "stream" / "trace-00000000.h5", "trace", 0) as part:
        append(part, "trace", 0, 5)
    shown = Terminal(run, "--once")
    shown.until("Next: geomprobe inspect")
    assert shown.wait() == 0
    assert shown.text.count("5 steps") == 1


def test_wrong_usage_is_told(run, tmp_path):
    assert piped(run, "--interval", "0").stderr == "--interval 0: name a time in seconds, above 0 2\n"
    assert piped(run, "--interval", "nan").stderr.endswith("above 0 2\n")
    assert piped(tmp_path / "nowhere").stderr == f"{tmp_path / 'nowhere'} does not exist 1\n"
