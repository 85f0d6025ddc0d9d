"""The state of a pass at a moment, while it is written: progress, rate, last values, curves."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError
from geomprobe.trace import schema
from geomprobe.trace.derive import Array, Derived
from geomprobe.trace.locate import find, spans
from geomprobe.trace.reader import open_trace
from geomprobe.trace.record import open_record
from geomprobe.trace.run_lock import Writer, present, writers
from geomprobe.trace.schema import TABLES, Kind
from geomprobe.trace.stream.reader import Block, Header
from geomprobe.trace.stream.tail import Following, parts

State = Literal["waiting", "starting", "running", "stopped", "unknown", "sealing", "sealed"]

_TRAINING = ("loss", "lr")
_GEOMETRY = ("grad_norm", "distance", "rsi", "eb", "cosine", "lolr", "clr", "relative_residual")
COLUMNS: dict[Kind, tuple[str, ...]] = {"record": _TRAINING, "trace": _TRAINING + _GEOMETRY}
CURVES: dict[Kind, tuple[str, ...]] = {"record": ("loss",), "trace": ("cosine", "relative_residual")}

SAME = schema.SAME.name
"""The column that is 0 in the rows of an uncertified replay from its first difference on."""

_ENDED = ("complete", "incomplete", "uncertified")  # with any other status a pass may still be resumed
_BUCKETS = 1024
_RATE_LOOKS = 10


class Last(NamedTuple):
    """The newest number of a column, and the step that it was measured at."""

    step: int
    value: float


@dataclass(frozen=True)
class Snapshot:
    """A pass at a moment.

    Attributes:
        path: the run.
        kind: which pass.
        state: ``"sealed"``; ``"sealing"``; ``"running"`` or, before the first row, ``"starting"``; ``"stopped"`` where
            no process writes; ``"unknown"`` where this machine cannot find that out; ``"waiting"`` for a replay.
        status: of a sealed pass, such as ``"complete"``.
        steps: how many steps are committed.
        total: how many steps there will be, where that is known.
        covered: for each stretch of committed rows, its first step and the step after its last.
        rate: steps a second over the last looks; None before two looks have found steps.
        age_s: seconds since the last write; None where there was none.
        writers: the processes that hold the run's locks.
        last: the newest number of each column.
        curves: for each column, steps and means [points] over stretches of steps.
        problems: which parts cannot be read, and why.
    """

    path: Path
    kind: Kind
    state: State
    status: str
    steps: int
    total: int | None
    covered: tuple[tuple[int, int], ...]
    rate: float | None
    age_s: float | None
    writers: tuple[Writer, ...]
    last: Mapping[str, Last]
    curves: Mapping[str, tuple[Array, Array]]
    problems: tuple[str, ...]

    @property
    def left_s(self) -> float | None:
        """Seconds until the last step at the present rate, where total and rate are known."""
        if self.total is None or not self.rate:
            return None
        return max(0, self.total - self.steps) / self.rate


class DownsampledCurve:
    """The mean of a column over stretches of steps, in memory that does not grow with their number.

    >>> curve = DownsampledCurve(buckets=2)
    >>> curve.add(np.arange(4), np.array([1.0, 3.0, 5.0, np.nan]))
    >>> [part.tolist() for part in curve.points()]
    [[0.5, 2.5], [2.0, 5.0]]
    """

    def __init__(self, buckets: int = _BUCKETS) -> None:
        self._width = 1
        self._sums = np.zeros(buckets)
        self._counts = np.zeros(buckets)

    def add(self, step: NDArray[np.int64], values: Array) -> None:
        """Add the values of some rows; those that are not finite are left out."""
        finite = np.isfinite(values)
        step, values = step[finite], values[finite]
        while len(step) and step.max() // self._width >= len(self._sums):
            self._width *= 2
            self._sums, self._counts = _halved(self._sums), _halved(self._counts)
        np.add.at(self._sums, step // self._width, values)
        np.add.at(self._counts, step // self._width, 1)

    def points(self) -> tuple[Array, Array]:
        """The middle step and the mean of each stretch that holds a number."""
        full = np.flatnonzero(self._counts)
        middle = full.astype(float) * self._width + (self._width - 1) / 2
        return middle, self._sums[full] / self._counts[full]


def _halved(buckets: Array) -> Array:
    pairs = buckets.reshape(-1, 2).sum(axis=1)
    return np.concatenate([pairs, np.zeros(len(buckets) - len(pairs))])


class _Seen:
    """The newest values and the curves of the rows that were read so far. `Following` calls `take` and `forget`."""

    def __init__(self, kind: Kind) -> None:
        self._kind: Kind = kind
        self.forget()

    def forget(self) -> None:
        self.last: dict[str, Last] = {}
        self.curves = {name: DownsampledCurve() for name in CURVES[self._kind]}

    def take(self, header: Header, block: Block) -> None:
        table = TABLES[self._kind]
        raw: dict[str, Array] = dict(zip(header.tables[table].columns, block[table].T, strict=True))
        if self._kind == "trace":
            derived = Derived(block["step"], raw)
            names = (name for name in _names("trace") if f"steps/{name}" in derived)
            raw = {name: derived[f"steps/{name}"] for name in names}
        self.add(block["step"], raw)

    def add(self, step: NDArray[np.int64], columns: Mapping[str, Array]) -> None:
        """Take rows, by column."""
        for name in (name for name in _names(self._kind) if name in columns):
            values = columns[name]
            measured = np.flatnonzero(~np.isnan(values))
            if len(measured):
                self.last[name] = Last(int(step[measured[-1]]), float(values[measured[-1]]))
            if name in self.curves:
                self.curves[name].add(step, values)


def _names(kind: Kind) -> tuple[str, ...]:
    return ("epoch", *COLUMNS[kind], SAME)


def _joined(stretches: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Stretches in the order of steps; those that touch become one."""
    joined: list[tuple[int, int]] = []
    for first, stop in stretches:
        if joined and joined[-1][1] == first:
            first = joined.pop()[0]
        joined.append((first, stop))
    return tuple(joined)


class Watch:
    """Looks at a run repeatedly; each look reads only the rows that are new.

    It writes nothing and takes no lock. Between two looks, a pass may start, die, be resumed, or be sealed.

    Args:
        path: the run folder.
        waits: of a run that is recorded and not replayed, show the replay that is about to start.
        clock: gives the time in seconds, for the rate.

    Raises:
        RunError: there is no run.
    """

    def __init__(self, path: Path, *, waits: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._waits, self._clock = Path(path), waits, clock
        self._stream = self._path / schema.STREAM_DIR
        if not self._path.is_dir():
            raise RunError(f"{path} is a file; name a run folder" if self._path.exists() else f"{path} does not exist")
        if not any(place.exists() for place in (self._sealed("record"), self._sealed("trace"), self._stream)):
            raise RunError(f"{path} is no run of geomprobe. Make one: geomprobe record -o {path} train.py")
        self._begin(self._latest())

    def look(self) -> Snapshot:
        """The pass as it is now; once it is sealed, the snapshot no longer changes."""
        status = self._status(self._kind)
        if not status and not parts(self._stream, self._kind) and self._latest() != self._kind:
            self._begin(self._latest())
            status = self._status(self._kind)
        holders = tuple(writers(self._stream))
        gone = all(holder.alive is False for holder in holders)
        if status in _ENDED or (status and gone):
            return self._snapshot("sealed", status, self._read_sealed(), holders)
        covered = self._read_parts()
        if not (status or covered) and self._status(self._kind):  # it was sealed while we looked
            return self.look()
        return self._snapshot(self._state(covered, holders), status, covered, holders)

    def _begin(self, kind: Kind) -> None:
        self._kind: Kind = kind
        self._seen = _Seen(kind)
        self._following = Following(self._stream, kind)
        self._looks: deque[tuple[float, int]] = deque(maxlen=_RATE_LOOKS)
        self._total: int | None = None

    def _latest(self) -> Kind:
        """The pass that is running, or that ran last."""
        if self._status("trace") or parts(self._stream, "trace"):
            return "trace"
        recorded = self._status("record") in _ENDED
        return "trace" if recorded and (self._waits or writers(self._stream)) else "record"

    def _sealed(self, kind: Kind) -> Path:
        return self._path / schema.FILES[schema.SCHEMAS[kind]]

    def _status(self, kind: Kind) -> str:
        """The status in a sealed file; empty where there is no file."""
        file = self._sealed(kind)
        try:
            return find(file, schema.SCHEMAS[kind]).status
        except RunError:
            if os.path.lexists(file):  # what a link leads to is refused when it is read
                raise
            return ""

    def _state(self, covered: tuple[tuple[int, int], ...], holders: tuple[Writer, ...]) -> State:
        if present(self._stream, f"{schema.SEALING_PREFIX}{self._kind}.json"):
            return "sealing"
        grew = len(self._looks) > 1 and self._looks[-1][1] > self._looks[-2][1]
        if grew or any(holder.alive for holder in holders):
            return "running" if covered else "starting"
        if any(holder.alive is None for holder in holders):
            return "unknown"
        return "stopped" if covered or holders or self._kind == "record" else "waiting"

    def _read_parts(self) -> tuple[tuple[int, int], ...]:
        headers = self._following.look(self._seen)
        covered = _joined((span.first_step, span.part.first_step + span.stop) for span in spans(headers))
        steps = sum(stop - first for first, stop in covered)
        if self._looks and steps < self._looks[-1][1]:  # the pass was started again
            self._looks.clear()
        if steps:  # the rate does not count the time before the first step
            self._looks.append((self._clock(), steps))
        return covered

    def _read_sealed(self) -> tuple[tuple[int, int], ...]:
        self._seen.forget()
        if self._kind == "trace":
            trace = open_trace(self._sealed("trace"))
            steps = trace.num_steps
            columns = {name: trace[name] for name in _names("trace") if name in trace}
            self._seen.add(np.arange(steps), columns)
        else:
            with open_record(self._sealed("record")) as record:
                steps = record.num_steps
                self._seen.add(np.arange(steps), record.steps)
        return ((0, steps),) if steps else ()

    def _snapshot(
        self, state: State, status: str, covered: tuple[tuple[int, int], ...], holders: tuple[Writer, ...]
    ) -> Snapshot:
        sealed = state == "sealed"
        return Snapshot(
            path=self._path,
            kind=self._kind,
            state=state,
            status=status if sealed else "",
            steps=sum(stop - first for first, stop in covered),
            total=self._find_total(),
            covered=covered,
            rate=None if sealed else self._rate(),
            age_s=None if sealed else self._age_s(),
            writers=holders,
            last=dict(self._seen.last),
            curves={name: curve.points() for name, curve in self._seen.curves.items()},
            problems=tuple(self._following.problems.values()),
        )

    def _find_total(self) -> int | None:
        """A replay has as many steps as its recording."""
        if self._total is None and self._kind == "trace" and self._sealed("record").exists():
            with open_record(self._sealed("record")) as record:
                self._total = record.num_steps
        return self._total

    def _rate(self) -> float | None:
        if len(self._looks) < 2:
            return None
        (then, before), (now, steps) = self._looks[0], self._looks[-1]
        return (steps - before) / (now - then) if now > then else None

    def _age_s(self) -> float | None:
        times = []
        for path in parts(self._stream, self._kind):
            try:
                times.append(path.stat().st_mtime)
            except FileNotFoundError:
                continue
        return max(0.0, time.time() - max(times)) if times else None
