"""What a figure draws: mean, minimum and maximum of a column by epoch or by window of steps, and the null model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import UsageError
from geomprobe.trace import geometry
from geomprobe.trace.printable import printable
from geomprobe.trace.reader import Trace, group_statistics
from geomprobe.trace.record import Record
from geomprobe.trace.schema import RECORD_FILE, TRACE_FILE

Array = NDArray[np.float64]

WINDOWS = 50
"""How many windows of steps a trace without epochs is cut into."""
WIDE = 20
"""Ratio of largest to smallest value from which a curve is drawn on a logarithmic axis."""
_NAMES = {"rsi": "RSI", "eb": "EB", "cosine": "cosine γ", "lolr": "loLR", "clr": "CLR"}


@dataclass(frozen=True)
class Groups:
    """The rows that are drawn as one point.

    Attributes:
        axis: ``"epoch"`` or ``"step"``.
        x: where each group is drawn, [groups].
        of_row: the group of each row, [T]; -1 for a row of no group.
    """

    axis: str
    x: Array
    of_row: NDArray[np.intp]

    def curve(self, values: Array) -> Curve:
        """Mean, minimum and maximum of each group's numbers (all [groups], NaN where it has none)."""
        finite = np.where(np.isfinite(values), values, np.nan)
        return Curve(self.x, *group_statistics(finite, self.of_row, len(self.x))[:3])


@dataclass(frozen=True)
class Curve:
    """A line with a band: arrays of one length, ``low <= mean <= high``."""

    x: Array
    mean: Array
    low: Array
    high: Array


def groups(trace: Trace, *, skip_last_epoch: bool = False) -> Groups:
    """A trace's rows by epoch; by window of steps where it has fewer than two epochs.

    Raises:
        UsageError: ``skip_last_epoch`` of a trace without two epochs.
    """
    epoch = trace["epoch"] if "epoch" in trace else np.full(trace.num_steps, np.nan)
    epochs = np.unique(epoch[np.isfinite(epoch)])
    if len(epochs) >= 2:
        kept = epochs[:-1] if skip_last_epoch else epochs
        index = np.searchsorted(kept, epoch)
        known = np.isin(epoch, kept)
        return Groups("epoch", kept, np.where(known, index, -1))
    if skip_last_epoch:
        raise UsageError(f"{trace.path} has no two epochs, so its last cannot be left out; drop --skip-last-epoch")
    width = max(1, -(-trace.num_steps // WINDOWS))
    window = np.arange(trace.num_steps) // width
    x = np.asarray((np.unique(window) + 0.5) * width - 0.5, np.float64)
    return Groups("step", x, window)


def null_model(trace: Trace, column: str) -> Array | None:
    """The value of a column for a random walk at each row [T] (NWT eq. 8); None where there is no formula.

    A walk of T orthogonal steps ``lr G`` of one length has ``G.d = lr ||G||^2`` and
    ``||d||^2 = (T - t) lr^2 ||G||^2``, hence ``cosine = (T - t)^(-1/2)``, ``RSI = 1 / (lr (T - t))``,
    ``EB = 1 / (lr (T - t)^(1/2))``, ``loLR = lr``. The scale of the last three is the run's mean learning
    rate, divided by ``1 - momentum`` since each gradient acts that many times over; they need SGD, whose
    steps are gradients times a rate. T must be known: an unfinished trace has no null model.
    """
    num_steps = trace.certificate.get("steps_recorded")
    if num_steps is None:
        return None
    left = float(num_steps) - trace["step"]
    cosine = geometry.random_walk_cosine(left)
    if column == "cosine":
        return cosine
    rate = _rate(trace)
    if rate is None:
        return None
    scaled = {"rsi": cosine**2 / rate, "eb": cosine / rate, "lolr": np.full(len(left), rate)}
    return scaled.get(column)


def _rate(trace: Trace) -> float | None:
    optimizer = trace.manifest.get("optimizer") or {}
    lr = trace["lr"][trace["lr"] > 0] if "lr" in trace else np.array([])
    if optimizer.get("class") != "SGD" or not len(lr):
        return None
    momentum = (optimizer.get("groups") or [{}])[0].get("momentum", 0)
    if not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
        return None
    return float(lr.mean()) / (1 - momentum)


def column_name(column: str) -> str:
    """A column's name as figures show it.

    >>> column_name("rsi"), column_name("grad_norm")
    ('RSI', 'grad norm')
    """
    return _NAMES.get(column, column.replace("_", " "))


def run_name(path: Path) -> str:
    """The name of a run's folder, for the folder or a file in it; of a file elsewhere, its own name.

    >>> run_name(Path("runs/a")), run_name(Path("runs/a/trace.h5"))
    ('a', 'a')
    """
    path = without_file(path.absolute())
    return path.stem if path.is_file() else path.name


def without_file(path: Path) -> Path:
    """The folder of a run, for it or for its sealed files; any other path as it is."""
    return path.parent if path.name in (RECORD_FILE, TRACE_FILE) else path


def labels(traces: Sequence[Trace | Record]) -> list[str]:
    """A short name for each run: that of its folder, and the settings and script options in which these runs differ."""
    names = [run_name(trace.path) for trace in traces]
    if len(set(names)) < len(names):
        names = [str(without_file(trace.path)) for trace in traces]
    settings = _differing([_settings(trace.manifest) for trace in traces])
    if len({Path(_script(trace).get("path", "")).name for trace in traces}) == 1:
        asked = _differing([_arguments(_script(trace).get("argv", [])) for trace in traces])
        # Where both have a name, the setting wins: it is the value that the run had in the end.
        settings = [{**given, **found} for given, found in zip(asked, settings, strict=True)]
    texts = [", ".join(f"{key} {value}".rstrip() for key, value in each.items()) for each in settings]
    return [printable(f"{name} ({text})" if text else name) for name, text in zip(names, texts, strict=True)]


def _differing(settings: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of each, the entries that are not the same in all."""
    keys = dict.fromkeys(key for each in settings for key in each)
    kept = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    return [{key: each[key] for key in kept if key in each} for each in settings]


def _settings(manifest: dict[str, Any]) -> dict[str, str]:
    optimizer = manifest.get("optimizer") or {}
    group = (optimizer.get("groups") or [{}])[0]
    found = {
        "model": (manifest.get("model") or {}).get("class"),
        "optimizer": optimizer.get("class"),
        "lr": group.get("lr"),
        "momentum": group.get("momentum"),
        "weight decay": group.get("weight_decay"),
        "seed": manifest.get("seed"),
    }
    return {key: _short(str(value)) for key, value in found.items() if value is not None}


def _script(trace: Trace | Record) -> dict[str, Any]:
    return trace.manifest.get("script") or {}


def _arguments(argv: Sequence[str]) -> dict[str, str]:
    """The options of a command line: ``--batch-size 64`` gives ``batch size: 64``; the value of a flag is empty."""
    found: dict[str, str] = {}
    name = None
    for word in argv:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            name = name.replace("-", " ").replace("_", " ")
            found[name] = _short(value)
        elif name is not None:
            found[name] = f"{found[name]} {_short(word)}".lstrip()
    return found


def _short(text: str) -> str:
    """A number in six digits, which are enough to distinguish runs; other text as it is."""
    try:
        return f"{float(text):g}"
    except ValueError:
        return text
