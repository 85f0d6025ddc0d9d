"""The terminal's view of a snapshot: fits its width, says what matters, in UTF-8 or ASCII."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from geomprobe.errors import UsageError
from geomprobe.report.watch.snapshot import Last, Snapshot
from geomprobe.report.watch.terminal import console, draw, render
from geomprobe.trace.run_lock import Writer

pytest.importorskip("rich")
from rich.console import Console

STEPS = np.arange(0.0, 600.0)
FACTS = {
    "path": Path("runs/a"),
    "kind": "trace",
    "state": "running",
    "status": "",
    "steps": 600,
    "total": 1000,
    "covered": ((0, 400), (500, 700)),
    "rate": 1234.4,
    "age_s": 0.25,
    "writers": (Writer(17, "desk", True),),
    "last": {
        "epoch": Last(699, 3.0),
        "loss": Last(699, 0.123456),
        "cosine": Last(699, -0.0312),
        "relative_residual": Last(690, 0.25),
    },
    "curves": {
        "cosine": (STEPS, np.sin(STEPS / 95.5)),
        "relative_residual": (STEPS[::10], np.exp(-STEPS[::10] / 60)),
    },
    "problems": (),
}


class Ascii(io.StringIO):
    encoding = "ascii"


def shown(width=80, file=None, **changes):
    file = io.StringIO() if file is None else file
    Console(file=file, width=width).print(render(Snapshot(**{**FACTS, **changes})))
    return file.getvalue()


def flat(text):
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 40, 20])
def test_no_line_is_wider_than_the_terminal(width):
    assert max(map(len, shown(width, problems=("x" * 50,)).splitlines())) <= width


@pytest.mark.parametrize("width", [80, 40])
def test_everything_that_matters_is_said(width):
    text = flat(shown(width))
    for piece in (
        "runs/a: replay (pass 2)",
        "running: process 17 on desk, last row 0.2 s ago",
        "600 of 1000 steps (60.0%), epoch 3, 1234 steps/s, 0.3 s left",
        "loss 0.1235",
        "cosine -0.0312",
        "relative_residual 0.25 @690",
        "cosine γ, steps 0 to 599",
        "relative residual (log), steps 0 to 590",
    ):
        assert piece in text
    assert "0.1235 @" not in text


def test_the_bar_shows_which_steps_are_there():
    assert shown(80, covered=((0, 400), (500, 705))).splitlines()[2] == "█" * 32 + "░" * 8 + "█" * 16 + "▒" + "░" * 23
    assert shown(10, covered=((0, 1000),), steps=1000).count("█") == 10
    assert "░" * 40 in shown(40, covered=(), steps=0)


@pytest.mark.parametrize("width", [80, 40])
def test_the_charts_have_the_shape_of_their_curves(width):
    lines = shown(width).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("cosine γ"))
    chart = [line[11:] for line in lines[start + 1 : start + 5]]
    dots = np.array([[ord(letter) - 0x2800 for letter in line] for line in chart])
    assert dots.shape == (4, width - 11)
    assert (dots >= 0).all()
    assert (dots < 256).all()
    quarter = (width - 11) // 4
    assert dots[0, quarter - 3 : quarter + 3].any()  # sin is highest after a quarter,
    assert dots[3, 3 * quarter - 3 : 3 * quarter + 3].any()  # lowest after three,
    assert not dots[2:, : width // 3].any()  # and above 0 in between
    assert float(lines[start + 1].split()[0]) == pytest.approx(1, abs=0.01)
    assert float(lines[start + 4].split()[0]) == pytest.approx(-1, abs=0.01)


def test_an_exponential_is_a_straight_line_over_the_logarithm():
    lines = shown(51, file=Ascii()).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("relative residual"))
    chart = [line[11:] for line in lines[start + 1 : start + 5]]
    assert ["*" in line[:5] for line in chart] == [True, False, False, False]
    assert ["*" in line[-5:] for line in chart] == [False, False, False, True]
    assert [line.count("*") for line in chart] == pytest.approx([7, 13, 13, 7], abs=2)


def test_a_terminal_that_knows_only_ascii_gets_only_that():
    text = shown(80, file=Ascii())
    assert text.isascii()
    assert "cosine gamma" in text
    assert "#" * 32 + "." * 8 in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "sealed", "status": "diverged", "rate": None}, "over: diverged"),
        ({"state": "sealing"}, "over, and being sealed"),
        (
            {"state": "starting", "last": {}, "curves": {}, "age_s": None},
            "starting: process 17 on desk, no row yet",
        ),
        ({"state": "running", "writers": ()}, "running: its process, last row"),
        (
            {"state": "stopped", "writers": (Writer(17, "desk", False),), "age_s": 7200.0},
            "stopped: nobody is writing (process 17 on desk gone), last row 2 h 0 min ago",
        ),
        ({"state": "stopped", "writers": (), "age_s": None}, "stopped: nobody is writing 600 of"),
        (
            {"writers": (Writer(17, "desk", True), Writer(18, "desk", False))},
            "running: process 17 on desk (process 18 on desk gone), last row",
        ),
        ({"writers": tuple(Writer(i, "desk", True) for i in range(8))}, "running: 8 processes, last row"),
        ({"state": "waiting", "writers": (), "last": {}, "curves": {}}, "recorded; its replay has not begun"),
        ({"state": "unknown"}, "process 17 on desk, which cannot be seen from this machine"),
    ],
)
def test_each_state_says_who_writes(changes, said):
    text = shown(100, **changes).splitlines()
    assert said in flat(" ".join(line for line in text if "░" not in line))


def test_a_recording_has_no_total_no_bar_and_no_time_left():
    text = shown(kind="record", total=None, curves={"loss": (STEPS, STEPS)}, last={"loss": Last(599, 2.0)})
    assert "recording (pass 1)" in text
    assert "600 steps, 1234 steps/s\n" in text
    assert "left" not in text
    assert "█" not in text


def test_a_rate_of_nothing_leaves_the_time_open():
    assert "0 steps/s\n" in shown(rate=0.0)


def test_what_is_not_certified_or_not_readable_is_told():
    text = flat(shown(last={"same": Last(3, 0.0)}, problems=("part.h5 is damaged",)))
    assert "UNCERTIFIED: this replay no longer equals its recording part.h5 is damaged" in text
    assert "UNCERTIFIED" not in shown(last={"same": Last(3, 1.0)})


def test_paths_with_brackets_are_no_markup():
    assert "runs/[red]a: replay" in shown(path=Path("runs/[red]a"))


def test_a_constant_curve_and_a_single_point_can_be_drawn():
    for x, y in ((STEPS, np.full(600, 2.5)), (STEPS[:1], np.array([0.5])), (STEPS, np.zeros(600))):
        assert "steps 0 to" in shown(curves={"cosine": (x, y)})


def test_dots_stand_where_the_values_are():
    """A line from corner to corner, read back from the letters' bits."""
    bits = {
        0x01: (0, 0),
        0x08: (0, 1),
        0x02: (1, 0),
        0x10: (1, 1),
        0x04: (2, 0),
        0x20: (2, 1),
        0x40: (3, 0),
        0x80: (3, 1),
    }
    x = np.arange(16.0)
    drawing = draw(x, 2 * x + 1, 8, 4)
    found = set()
    for i, line in enumerate(drawing.lines):
        for j, letter in enumerate(line):
            code = ord(letter) - 0x2800
            found |= {(4 * i + row, 2 * j + column) for bit, (row, column) in bits.items() if code & bit}
    assert found == {(15 - i, i) for i in range(16)}
    assert (drawing.low, drawing.high) == (1, 31)


def test_a_missing_rich_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(UsageError, match=r"pip install 'geomprobe\[terminal\]'"):
        console()
