"""Run the passes: record a training, replay it, or both in one process."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from geomprobe.distributed.ranks import here
from geomprobe.errors import UsageError
from geomprobe.measure.gradient_products import require_clipped
from geomprobe.measure.option_fields import Options
from geomprobe.passes import finalize
from geomprobe.passes.lease import (
    StepRange,
    acquire,
    begun_recording,
    locked_by_first,
    own_record,
    replayed_before,
    unfinished_recording,
)
from geomprobe.passes.options import ALL, RecordOptions, ReplayOptions, require_same_options
from geomprobe.passes.recording import recording
from geomprobe.passes.references.loaded import References
from geomprobe.passes.replaying import SegmentEnded, replaying
from geomprobe.probe.events import observing
from geomprobe.reproducibility.environment import function_script, require_same_start, start_manifest
from geomprobe.reproducibility.isolation import keep_rng
from geomprobe.reproducibility.seeding import draw_seed, seed_everything, strict_mode
from geomprobe.trace.reader import Trace, open_trace
from geomprobe.trace.record import Record, open_record
from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.stream.reader import end_readers

Train = Callable[[], Any]
RunPath = str | os.PathLike[str]
P = ParamSpec("P")
R = TypeVar("R")


def _takes(
    options: Callable[P, Options],
) -> Callable[[Callable[..., R]], Callable[Concatenate[Train, RunPath, P], R]]:
    """Declare that the ``**options`` of a function are the fields of a dataclass, so that none is written twice.

    mypy and editors read the types here; `help` and the documentation read the signature and docstring that it sets.
    """

    def declare(function: Callable[..., R]) -> Callable[Concatenate[Train, RunPath, P], R]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = inspect.signature(options).parameters.values()
        function.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
        if function.__doc__ is not None:  # python -OO
            start, _, rest = function.__doc__.partition("        **options:")
            entries = options.documented()  # type: ignore[attr-defined]
            function.__doc__ = f"{start}{entries}\n{rest.partition(chr(10))[2]}"
        return function

    return declare


@_takes(RecordOptions)
def record(train: Train, run: RunPath, **options: Any) -> Record:
    """Pass 1: call ``train()``, and keep its final weights and what a replay needs in ``run``.

    Args:
        train: builds the model and trains it; at each call, everything that it uses is built from scratch.
        run: the run folder.
        **options: the fields of `geomprobe.passes.options.RecordOptions`.

    Returns:
        The sealed record.

    Raises:
        UsageError: ``run`` holds something and ``force`` is not set, a pass is running already, or there is no such
            option.
        RunError: the recording to resume is damaged, was started with other options, or trains otherwise now.
        EnvironmentMismatch: the environment differs from the one it was started in, in a way that changes bits.
        UnsupportedTraining: the loop does something that cannot be measured; see the message.

    >>> import tempfile, torch, geomprobe
    >>> def train():
    ...     model = torch.nn.Linear(2, 1)
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         model(torch.randn(4, 2)).square().mean().backward()
    ...         optimizer.step()
    >>> folder = tempfile.mkdtemp()
    >>> record(train, folder, seed=0).num_steps
    3
    >>> replay(train, folder).certificate["steps_equal"]
    3
    """
    return run_record(train, run, RecordOptions.of(**options), function_script(train))


def run_record(train: Train, run: RunPath, options: RecordOptions, script: Mapping[str, Any]) -> Record:
    """Record ``train()``, as `record` does and `geomprobe record` too; ``script`` goes into the manifest."""
    target = RunFolder(run)
    if options.optimizer == ALL:
        raise UsageError("optimizer='all' is of the command line. Record a run for each optimizer, with one seed.")
    _require_startable(options.seed or 0)
    ranks = here(options.patience)
    lease = unfinished_recording(target) if options.resume else target.recording(options.force)
    with ranks.watched(), locked_by_first(ranks, lease) as left:
        if left or not options.resume:
            point = begun_recording(target, options.seed, ranks) if options.resume else None
            if point is not None:
                begun = point.manifest
                require_same_options(f"{target.path} was recorded", {**begun, **begun["recording"]}, options.asked())
                options = RecordOptions.parse(begun["recording"]["argv"])
            seed = ranks.broadcast("seed", draw_seed() if options.seed is None else options.seed)
            with _running(seed, options.strict):
                manifest = start_manifest(seed=seed, strict=options.strict, script=script) | ranks.described()
                if point is not None:
                    require_same_start(point.manifest, manifest, target.path, "go on")
                    manifest = point.manifest
                session = recording(target, manifest, replace(options, seed=seed), ranks, point)
                end_readers()
                with session.reporting():
                    train()
                    session.complete()
    return open_record(target.path)


@_takes(ReplayOptions)
def replay(train: Train, run: RunPath, **options: Any) -> Trace:
    """Pass 2: call ``train()`` again, compare every step with the recording, and measure it.

    Args:
        train: the function that was recorded.
        run: the run folder.
        **options: the fields of `geomprobe.passes.options.ReplayOptions`.

    Returns:
        The trace: sealed, or, after a segment that was not the last, what there is of it.

    Raises:
        UsageError: there is a trace and neither ``force`` nor ``resume`` is set, or there is no such option.
        RunError: ``run`` is no finished recording, or its reference is not finite.
        EnvironmentMismatch: the environment differs in a way that changes bits; nothing was replayed.
        ReplayDiverged: the replay was not the same run; what was measured before is kept.
    """
    return run_replay(train, run, ReplayOptions.of(**options), function_script(train))


def run_replay(train: Train, run: RunPath, options: ReplayOptions, script: Mapping[str, Any]) -> Trace:
    """Replay ``train()``, as `replay` does and `geomprobe replay` too; ``script`` is compared with the recording's."""
    target = RunFolder(run)
    ranks = here(options.patience)
    with ranks.watched(), contextlib.closing(own_record(target, ranks)) as recorded:
        seed, strict = recorded.manifest["seed"], recorded.manifest["strict"]
        with _running(seed, strict):
            manifest = start_manifest(seed=seed, strict=strict, script=script) | ranks.described()
            if not options.uncertified:
                require_same_start(recorded.manifest, manifest, target.path, "replay")
            manifest["sources"] = recorded.manifest.get("sources", {})
            files = {name: Path(path) for name, path in options.references.items()}
            weights = References(recorded, files)  # before an earlier trace is removed
            require_clipped(options, recorded.manifest)
            lease = acquire(target, recorded, options.force, options.resume, options.segment)
            with locked_by_first(ranks, lease) as claimed:
                if claimed is not None:
                    stretch = StepRange(*claimed)
                    begin = replayed_before(target, recorded, stretch, ranks)
                    session = replaying(target, recorded, weights, manifest, options, begin, stretch.stop, ranks)
                    end_readers()
                    with contextlib.suppress(SegmentEnded), session.reporting():
                        train()
                        session.complete()
                if options.segment is not None:
                    if ranks.first:
                        finalize.seal_whole(target, recorded.num_steps)
                    ranks.broadcast("segment over", True)
    return open_trace(target.path)


def two_pass(
    train: Train,
    run: RunPath,
    *,
    seed: int | None = None,
    force: bool = False,
    optimizer: str | None = None,
    **options: Any,
) -> Trace:
    """Record ``train()`` and replay it, in one process: for notebooks and tests.

    Args:
        train: builds the model and trains it; at each call, everything that it uses is built from scratch.
        run: the run folder.
        seed: of the generators of Python, NumPy and torch; drawn and stored when None.
        force: replace what is in ``run``.
        optimizer: as for `record`.
        **options: those of `replay`, and those that only `record` has, such as ``sketch``.

    Returns:
        The sealed trace.

    Raises:
        As `record` and `replay`.

    >>> import tempfile, torch, geomprobe
    >>> def train():
    ...     model = torch.nn.Linear(2, 1)
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ...     probe = geomprobe.attach(model, optimizer)
    ...     for epoch in probe.epochs(3):
    ...         optimizer.zero_grad()
    ...         probe.backward(model(torch.randn(4, 2)).square().mean())
    ...         optimizer.step()
    >>> two_pass(train, tempfile.mkdtemp(), seed=0)["cosine"][-1].round(5)
    np.float64(1.0)
    """
    of_replay = {each.name for each in fields(ReplayOptions)}
    of_record = {each.name for each in fields(RecordOptions)} - of_replay
    recorded = {name: options.pop(name) for name in of_record & options.keys()}
    asked = ReplayOptions.of(**options)  # before the recording, which may take long
    record(train, run, seed=seed, force=force, optimizer=optimizer, **recorded)
    return run_replay(train, run, asked, function_script(train))


@contextlib.contextmanager
def _running(seed: int, strict: bool) -> Iterator[None]:
    _require_startable(seed)
    with keep_rng(), strict_mode(strict):
        seed_everything(seed)
        yield


def _require_startable(seed: int) -> None:
    if observing() is not None:
        raise UsageError("A pass is running in this process already; a pass cannot run inside another.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed} is outside 0 .. {2**32 - 1}, the range that NumPy accepts.")
