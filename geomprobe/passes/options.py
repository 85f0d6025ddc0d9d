"""What each pass is asked for: one dataclass a pass, from which everything that names an option is made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from geomprobe.distributed.ranks import PATIENCE_S
from geomprobe.errors import RunError, UsageError
from geomprobe.measure.option_fields import Options, option, parser, whole
from geomprobe.measure.options import MeasureOptions
from geomprobe.trace.json_values import LARGEST_SKETCH

ALL, FIRST = "all", "first"
"""Choices of an optimizer: each of them, by a pass for each; the one that steps first, whatever the others do."""


def interval(text: str) -> tuple[int, str]:
    """How often checkpoints are written, as a number and its unit; 0 for an epoch or never.

    >>> interval("500steps"), interval("never")
    ((500, 'steps'), (0, 'never'))
    """
    found = re.fullmatch(r"(\d+)(steps|min)", text)
    return (int(found[1]), found[2]) if found else (0, text)


def _reference(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    return name, path and str(Path(path).absolute())


def _joined(by: str) -> Any:
    return lambda values: by.join(map(str, values))


def _patience() -> Any:
    return option(
        PATIENCE_S,
        "of several processes: abort if no process has made progress for this many seconds",
        metavar="SECONDS",
        parse=parser(float, lambda seconds: 0 < seconds < math.inf, "is no number of seconds above 0"),
        text=lambda seconds: str(seconds).removesuffix(".0"),
        lasting=False,
    )


@dataclass(frozen=True, kw_only=True)
class RecordOptions(Options):
    """What a recording is asked for.

    >>> RecordOptions(ema=[0.9, 0.99], strict=False).argv()
    ['--no-strict', '--ema', '0.9,0.99']
    """

    PURPOSE = "record"

    seed: int | None = option(
        None,
        "seed of the generators of Python, NumPy and torch (default: drawn, and stored)",
        metavar="N",
        parse=whole(),
    )
    force: bool = option(False, "replace a run that is there", excludes="start", lasting=False)
    resume: bool = option(
        False,
        "continue a recording that was cut off, with its own options (the script may be left out); start where there "
        "is none, and do nothing where it is complete",
        excludes="start",
        lasting=False,
    )
    strict: bool = option(True, "use deterministic algorithms only")
    optimizer: str | None = option(
        None,
        "of a script without attach whose optimizers train different models, as a GAN's do: measure the one of this "
        "class, of the model of this class, or of this number, counted from 0 in the order in which they are made; "
        "first is the one that steps first, and all records each into RUN/optimizers/NAME, by a training for each",
        metavar="NAME|INDEX|first|all",
        parse=parser(str, bool, "is no class and no number"),
    )
    checkpoint_every: str = option(
        "epoch",
        "write a checkpoint at each epoch, after so many steps or minutes (500steps, 30min; these need "
        "probe.batches), or never",
        metavar="WHEN",
        parse=parser(
            str,
            lambda text: interval(text)[0] or text in ("epoch", "never"),
            "is not epoch, never, or a number of steps or minutes, such as 500steps or 30min",
        ),
    )
    keep_checkpoints: int | None = option(
        32,
        "keep at most N checkpoints, spread evenly over the run; all (in Python, None) keeps every one",
        metavar="N",
        parse=parser(
            lambda text: None if text == "all" else int(text),
            lambda count: count is None or count >= 2,  # the first and the latest are always kept
            "is no whole number of at least 2, and not 'all'",
        ),
        text=lambda count: "all" if count is None else str(count),
    )
    reference_steps: Collection[int] = option(
        (),
        "also keep the weights before these steps, as references step-N",
        metavar="N,N,...",
        parse=parser(
            lambda text: tuple(map(int, text.split(","))),
            lambda steps: min(steps) >= 0,
            "is no list of steps such as 100,200; steps are counted from 0",
        ),
        text=_joined(","),
    )
    ema: Sequence[float] = option(
        (),
        "also keep exponential moving averages of the weights with these decays, such as 0.999, as references ema-B",
        metavar="B,B,...",
        parse=parser(
            lambda text: tuple(map(float, text.split(","))),
            lambda decays: all(0 < decay < 1 for decay in decays),
            "is no list of decays such as 0.99,0.999; an exponential moving average has a decay between 0 and 1",
        ),
        text=_joined(","),
    )
    average: bool = option(False, "also keep the running average of the weights, as the reference average")
    sketch: int = option(
        0,
        "also keep K numbers of the weights and K of the gradient of each step, from which inner products between "
        "steps are estimated without a replay, such as 4096; 0 for none",
        metavar="K",
        parse=parser(
            int,
            lambda size: size == 0 or 2 <= size <= LARGEST_SKETCH,
            f"is neither 0 nor a whole number from 2 to {LARGEST_SKETCH}",
        ),
    )
    sketch_every: int = option(
        1, "keep the sketch of every N-th step only; it is written in N parts, one a step", metavar="N", parse=whole(1)
    )
    patience: float = _patience()

    def described(self) -> dict[str, Any]:
        """For the manifest, which has the seed and ``strict`` at its top."""
        return {name: value for name, value in super().described().items() if name not in ("seed", "strict")}


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(MeasureOptions):
    """What a replay is asked for: what it measures, against which weights, and which part of the run it does.

    >>> ReplayOptions(every=10, segment=(3, 4)).argv()
    ['--every', '10', '--segment', '3/4']
    """

    PURPOSE = "replay"

    references: Mapping[str, str | PathLike[str]] = option(
        {},
        "also measure against the weights in a file: a state_dict, or safetensors (may be repeated; in Python, a "
        "mapping from name to path)",
        metavar="NAME=PATH",
        parse=parser(_reference, all, "is not NAME=PATH, such as best=checkpoints/best.pt"),
        text=lambda item: f"{item[0]}={fspath(item[1])}",
        flag="--reference",
    )
    uncertified: bool = option(False, "continue where the replay differs, and mark every later row")
    force: bool = option(False, "replace an earlier trace", excludes="start", lasting=False)
    resume: bool = option(
        False,
        "continue a replay that was cut off, given the same options; start where there is none",
        excludes="start",
        lasting=False,
    )
    patience: float = _patience()
    segment: tuple[int, int] | None = option(
        None,
        "replay only the I-th of K pieces, while other processes replay the others, and continue where it was cut "
        "off; whichever ends last seals the trace",
        metavar="I/K",
        parse=parser(
            lambda text: tuple(map(int, text.split("/"))),
            lambda values: len(values) == 2 and 1 <= values[0] <= values[1],
            "is none of 1/K to K/K, such as 3/4",
        ),
        text=_joined("/"),
        excludes="split",
        lasting=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment and (self.force or self.resume):
            raise UsageError("a segment continues by itself where it was cut off: leave out --force and --resume")
        if self.uncertified and (self.segment or self.resume):
            raise UsageError(
                "an uncertified replay cannot continue from checkpoints, which are of the run that it differs from: "
                "replay the run whole"
            )


def require_same_options(begun: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a pass with other options than those it was started with.

    ``begun`` says what was started and how, such as ``"runs/a was recorded"``; ``then`` are the manifest's options.

    Raises:
        RunError: one of those in ``now`` differs.
    """
    for name, value in json.loads(json.dumps(now)).items():
        if value != then.get(name):
            raise RunError(
                f"{begun} with {name} = {then.get(name)}, and now it is {value}: one file cannot hold both. Give the "
                "same options as then, or start over with --force."
            )
