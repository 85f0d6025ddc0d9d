"""A snapshot of a pass as rich shows it in a terminal, in the width of the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import UsageError
from geomprobe.report.curves import WIDE, column_name
from geomprobe.report.table import number
from geomprobe.report.watch.snapshot import COLUMNS, SAME, Snapshot
from geomprobe.trace.derive import Array
from geomprobe.trace.printable import printable
from geomprobe.trace.run_lock import Writer

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

_PASSES = {"record": "recording (pass 1)", "trace": "replay (pass 2)"}
_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
_HEIGHT = 4
_LABELS = 10
_NAMED = 3

# Unicode has a character for every set of dots in a grid of four rows by two columns: the bit of each dot.
_BRAILLE, _BRAILLE_BITS = 0x2800, np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
# Without Unicode, a letter has one dot: the bits that make an asterisk of a blank.
_BLANK, _ASTERISK_BITS = ord(" "), np.array([[ord("*") - ord(" ")]])


def console() -> Console:
    """Standard output, as an object of rich.

    Raises:
        UsageError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise UsageError(
            "watch needs rich: pip install 'geomprobe[terminal]'. Without it, geomprobe inspect shows what has been "
            "written so far"
        ) from error
    return Console(highlight=False)


def render(snapshot: Snapshot) -> RenderableType:
    """The whole view: the pass, its progress, its last values, its curves."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.text import Text

    blocks: list[RenderableType] = [
        Text(printable(f"{snapshot.path}: {_PASSES[snapshot.kind]}"), style="bold"),
        Text(printable(_condition(snapshot)), style="" if snapshot.state in ("running", "sealed") else "yellow"),
    ]
    if snapshot.total:
        blocks.append(_Bar(snapshot.covered, snapshot.total))
    blocks.append(Text(_progress(snapshot)))
    blocks += [Text(printable(line), style="red") for line in _doubts(snapshot)]
    blocks.append(Columns([Text(value, no_wrap=True) for value in _values(snapshot)], padding=(0, 2)))
    for name, (x, y) in snapshot.curves.items():
        if len(x):
            blocks.append(_Chart(column_name(name), x, y))
    return Group(*blocks)


class Drawing(NamedTuple):
    """Lines of text, and the values that are drawn on their lowest and highest row of dots."""

    lines: list[str]
    low: float
    high: float


def draw(x: Array, y: Array, width: int, height: int, *, plain: bool = False) -> Drawing:
    """A curve as dots, two by four in a letter: the mean over each column of dots, from the lowest to the highest.

    Args:
        x: where the points are; the first and the last one are at the edges. At least one.
        y: their values, all finite.
        width: letters in a line.
        height: lines.
        plain: draw with asterisks, one in a letter, for terminals that know ASCII only.

    >>> print("\\n".join(draw(np.arange(8.0), np.arange(8.0), 4, 2).lines))
    ⠀⠀⡠⠊
    ⡠⠊⠀⠀
    >>> draw(np.array([0.0, 1.0]), np.array([2.0, 1.0]), 2, 2, plain=True)
    Drawing(lines=['* ', ' *'], low=1.0, high=2.0)
    """
    blank, bits = (_BLANK, _ASTERISK_BITS) if plain else (_BRAILLE, _BRAILLE_BITS)
    down, across = bits.shape
    place = _scaled(x, width * across)
    columns, index, counts = np.unique(place, return_inverse=True, return_counts=True)
    means = np.bincount(index, weights=y) / counts
    rows = height * down - 1 - _scaled(means, height * down)
    letters = np.full((height, width), blank)
    # Several dots may be in one letter: `|=` by index would keep only the last of them.
    np.bitwise_or.at(letters, (rows // down, columns // across), bits[rows % down, columns % across])
    return Drawing(["".join(map(chr, line)) for line in letters], float(means.min()), float(means.max()))


def _scaled(values: Array, count: int) -> NDArray[np.int64]:
    """Values as whole numbers from 0 for the lowest to ``count - 1`` for the highest."""
    low, high = values.min(), values.max()
    share = (values - low) / (high - low) if high > low else np.zeros(len(values))
    return np.rint(share * (count - 1)).astype(np.int64)


def duration(seconds: float) -> str:
    """A time in the two units that matter.

    >>> duration(0.26), duration(59.6), duration(200), duration(7_500), duration(200_000)
    ('0.3 s', '60 s', '3 min 20 s', '2 h 5 min', '2 d 7 h')
    """
    if seconds < 100:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    size, name, small, small_name = next(units for units in _UNITS if seconds >= units[0])
    return f"{int(seconds // size)} {name} {int(seconds % size // small)} {small_name}"


def _condition(snapshot: Snapshot) -> str:
    gone = _named([writer for writer in snapshot.writers if writer.alive is False])
    others = _named([writer for writer in snapshot.writers if writer.alive is not False])
    lost = f" ({gone} gone)" if gone else ""
    age = f", last row {duration(snapshot.age_s)} ago" if snapshot.age_s is not None else ""
    return {
        "sealed": f"over: {snapshot.status}",
        "sealing": "over, and being sealed",
        "waiting": "recorded; its replay has not begun",
        "starting": f"starting: {others}{lost}, no row yet",
        "running": f"running: {others or 'its process'}{lost}{age}",
        "stopped": f"stopped: nobody is writing{lost}{age}",
        "unknown": f"{others}{lost}, which cannot be seen from this machine{age}",
    }[snapshot.state]


def _named(writers: Sequence[Writer]) -> str:
    if len(writers) > _NAMED:
        return f"{len(writers)} processes"
    return ", ".join(f"process {writer.process} on {writer.host}" for writer in writers)


def _progress(snapshot: Snapshot) -> str:
    facts = [f"{snapshot.steps} steps"]
    if snapshot.total:
        share = 100 * snapshot.steps / snapshot.total
        facts = [f"{snapshot.steps} of {snapshot.total} steps ({share:.1f}%)"]
    if "epoch" in snapshot.last:
        facts.append(f"epoch {number(snapshot.last['epoch'].value)}")
    if snapshot.rate is not None:
        facts.append(f"{number(round(snapshot.rate, 1 if snapshot.rate < 100 else None))} steps/s")
    if snapshot.left_s is not None:
        facts.append(f"{duration(snapshot.left_s)} left")
    return ", ".join(facts)


def _doubts(snapshot: Snapshot) -> Iterator[str]:
    if SAME in snapshot.last and snapshot.last[SAME].value == 0:
        yield "UNCERTIFIED: this replay no longer equals its recording"
    yield from snapshot.problems


def _values(snapshot: Snapshot) -> Iterator[str]:
    """The newest number of each column, and its step where another column has a newer one."""
    newest = max((last.step for last in snapshot.last.values()), default=0)
    for name in COLUMNS[snapshot.kind]:
        if name in snapshot.last:
            last = snapshot.last[name]
            yield f"{name} {number(last.value)}{f' @{last.step}' if last.step < newest else ''}"


@dataclass(frozen=True)
class _Bar:
    """Which of all steps are there, from left to right; a letter is half-tone where some of its steps are missing."""

    covered: tuple[tuple[int, int], ...]
    total: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        edges = np.linspace(0, self.total, options.max_width + 1)
        there = np.zeros(options.max_width)
        for first, stop in self.covered:
            there += np.clip(np.minimum(edges[1:], stop) - np.maximum(edges[:-1], first), 0, None)
        share = there / np.diff(edges)
        none, some, full = ".-#" if options.ascii_only else "░▒█"
        yield Text("".join(full if part > 0.999 else some if part > 0 else none for part in share))


@dataclass(frozen=True)
class _Chart:
    """A curve over the steps so far, with its lowest and highest value at the left."""

    name: str
    x: Array
    y: Array

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        logarithmic = self.y.min() > 0 and self.y.max() > WIDE * self.y.min()
        name = self.name.replace("γ", "gamma") if options.ascii_only else self.name
        scale = " (log)" if logarithmic else ""
        yield Text(f"{name}{scale}, steps 0 to {int(self.x.max())}", style="bold", no_wrap=True)
        width = max(1, options.max_width - _LABELS - 1)
        y = np.log(self.y) if logarithmic else self.y
        lines, *ends = draw(self.x, y, width, _HEIGHT, plain=options.ascii_only)
        low, high = (number(float(np.exp(end)) if logarithmic else end) for end in ends)
        labels = [high, *[""] * (_HEIGHT - 2), low]
        for label, line in zip(labels, lines, strict=True):
            yield Text(f"{label:>{_LABELS}} {line}", no_wrap=True, overflow="crop")
