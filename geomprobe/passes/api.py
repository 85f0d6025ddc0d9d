"""Run the passes: record a training, replay it, or both in one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from geomprobe.distributed.ranks import PATIENCE_S, Ranks, here
from geomprobe.errors import UsageError
from geomprobe.measure.before_clipping import require_clipped
from geomprobe.measure.options import MeasureOptions
from geomprobe.passes import finalize as sealing
from geomprobe.passes.checkpoint.resume_point import ResumePoint
from geomprobe.passes.checkpoint.retention import RecordOptions, RetentionPolicy
from geomprobe.passes.lease import (
    StepRange,
    acquire,
    begun_recording,
    held_by_first,
    own_record,
    replayed_before,
    unfinished_recording,
)
from geomprobe.passes.recording import recording
from geomprobe.passes.references.loaded import References
from geomprobe.passes.replaying import SegmentEnded, replaying
from geomprobe.probe.events import observing
from geomprobe.reproducibility.environment import (
    draw_seed,
    function_script,
    seed_everything,
    start_manifest,
    strict_mode,
    untouched_rng,
)
from geomprobe.reproducibility.environment_check import require_same_start
from geomprobe.trace.reader import Trace, open_trace
from geomprobe.trace.record import Record, open_record
from geomprobe.trace.run_folder import RunFolder

Train = Callable[[], Any]
RunPath = str | os.PathLike[str]


def record(
    train: Train,
    run: RunPath,
    *,
    seed: int | None = None,
    strict: bool = True,
    force: bool = False,
    resume: bool = False,
    reference_steps: Collection[int] = (),
    ema: Collection[float] = (),
    average: bool = False,
    checkpoint_every: str = "epoch",
    keep_checkpoints: int | None = 32,
    patience: float = PATIENCE_S,
    script: Mapping[str, Any] | None = None,
) -> Record:
    """Pass 1: call ``train()``, and keep its final weights and what a replay needs in ``run``.

    Args:
        train: builds the model and trains it; whatever it needs it makes anew at each call.
        run: the run folder.
        seed: for Python, NumPy and torch; drawn and stored when None.
        strict: enforce deterministic algorithms while training.
        force: replace what is in ``run``.
        resume: go on with a recording that was cut off, with the options it was begun with, from its last checkpoint;
            begin where there is none, and do nothing where it is complete.
        reference_steps: also keep the weights before these steps, as references ``step-N``.
        ema: also keep exponential moving averages of the weights with these decays, as references ``ema-DECAY``.
        average: also keep the running average of the weights, as the reference ``average``.
        checkpoint_every: ``"epoch"``, ``"500steps"``, ``"30min"`` or ``"never"``.
        keep_checkpoints: how many at most, spread evenly over the run; None for all.
        patience: seconds that processes which stand still for one of them wait before all stop.
        script: what is run, for the manifest; described from ``train`` when None.

    Returns:
        The sealed record.

    Raises:
        UsageError: ``run`` holds something and ``force`` is not set, or a pass is running already.
        RunError: the recording to go on with is damaged, or what it does now is not what it did.
        EnvironmentMismatch: the environment differs from the one it was begun in, in a way that changes bits.
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
    target = RunFolder(run)
    _require_startable(0 if seed is None else seed)
    script = function_script(train) if script is None else script
    keeping = RetentionPolicy(checkpoint_every, keep_checkpoints)
    options = RecordOptions(tuple(reference_steps), tuple(ema), average, keeping)
    ranks = here(patience)
    held = unfinished_recording(target) if resume else target.recording(force)
    with ranks.watched(), held_by_first(ranks, held) as left:
        begun = going_on = None
        if resume and left:
            begun, going_on = begun_recording(target, seed, ranks)
        if begun is not None:
            seed, strict, options = begun["seed"], begun["strict"], RecordOptions.of(begun["recording"])
        if left or not resume:
            seed = ranks.said_by_first("seed", draw_seed() if seed is None else seed)
            _record(train, target, seed, strict, script, options, ranks, going_on)
    return open_record(target.path)


def _record(
    train: Train,
    target: RunFolder,
    seed: int,
    strict: bool,
    script: Mapping[str, Any],
    options: RecordOptions,
    ranks: Ranks,
    going_on: ResumePoint | None = None,
) -> None:
    with _running(seed, strict):
        manifest = start_manifest(seed=seed, strict=strict, script=script) | ranks.described()
        if going_on is not None:
            require_same_start(going_on.manifest, manifest, target.path, "go on")
            manifest = going_on.manifest
        session = recording(target, manifest, options, ranks, going_on)
        with session.reporting():
            train()
            session.complete()


def replay(
    train: Train,
    run: RunPath,
    *,
    every: int = 1,
    curvature_every: int | None = None,
    finite_step: bool = False,
    sharpness_every: int = 0,
    held_out_every: int = 0,
    full_gradient_every: int = 0,
    per_parameter: bool = False,
    per_rank: bool = False,
    before_clipping: bool = False,
    compiled: bool = False,
    references: Mapping[str, RunPath] | None = None,
    uncertified: bool = False,
    force: bool = False,
    resume: bool = False,
    segment: tuple[int, int] | None = None,
    patience: float = PATIENCE_S,
    script: Mapping[str, Any] | None = None,
) -> Trace:
    """Pass 2: call ``train()`` again, compare every step with the recording, and measure it.

    Args:
        train: the function that was recorded.
        run: the run folder.
        every: measure each N-th step; every step is compared.
        curvature_every: take Hg at each N-th step, of those that are measured; 0 for never. None means at
            each one where Hg has an exact route, and to leave it out, and say so, where it has none.
        finite_step: where Hg is taken, also measure ``secant_residual`` and ``linear_decrease_gap``: the loss
            and its gradient on the same minibatch after a whole step. Needs ``probe.backward(loss, closure=...)``.
        sharpness_every: take the Hessian's top eigenvalue at each N-th measured step; 0 for never.
        held_out_every: measure the gradient of a minibatch that the update does not use, named by `Probe.held_out`, at
            each N-th step; 0 for never.
        full_gradient_every: measure the gradient over all samples, named by `Probe.full_gradient_of`, before the first
            step and at the end of each N-th epoch; 0 for never. It stands in the row of the step that follows.
        per_parameter: keep the inner products of each parameter tensor too.
        per_rank: under DDP, keep those of each rank's own gradient too, before the ranks' are averaged.
        before_clipping: also measure each step's gradient as it was before the script clipped it.
        compiled: compile the inner products (seconds at the start, faster steps).
        references: further weights to measure against, by name: files with a state_dict or safetensors.
        uncertified: go on where the replay differs, marking every later row.
        force: replace an earlier trace.
        resume: go on with a replay that was cut off, with the same options; begin where there is none.
        segment: ``(i, k)``: replay only the i-th of k pieces, i from 1, beside other processes that replay the others.
            It goes on where it was cut off, and whichever ends last seals the trace.
        patience: seconds that processes which stand still for one of them wait before all stop.
        script: what is run, to compare with the recording; described from ``train`` when None.

    Returns:
        The trace: sealed, or, after a segment that was not the last, what there is of it.

    Raises:
        RunError: ``run`` is no finished recording, or its reference is not finite.
        EnvironmentMismatch: the environment differs in a way that changes bits; nothing was replayed.
        ReplayDiverged: the replay was not the same run; what was measured before is kept.
    """
    target = RunFolder(run)
    script = function_script(train) if script is None else script
    if uncertified and (resume or segment is not None):
        raise UsageError(
            "an uncertified replay cannot go on from checkpoints, which are of the run that it differs from: "
            "run it whole"
        )
    measure = MeasureOptions.asked(
        every=every,
        curvature_every=curvature_every,
        finite_step=finite_step,
        sharpness_every=sharpness_every,
        held_out_every=held_out_every,
        full_gradient_every=full_gradient_every,
        per_parameter=per_parameter,
        per_rank=per_rank,
        before_clipping=before_clipping,
        compiled=compiled,
    )
    ranks = here(patience)
    with ranks.watched(), contextlib.closing(own_record(target, ranks)) as recorded:
        seed, strict = recorded.manifest["seed"], recorded.manifest["strict"]
        with _running(seed, strict):
            manifest = start_manifest(seed=seed, strict=strict, script=script) | ranks.described()
            if not uncertified:
                require_same_start(recorded.manifest, manifest, target.path, "replay")
            manifest["sources"] = recorded.manifest.get("sources", {})
            files = {name: Path(path).absolute() for name, path in (references or {}).items()}
            weights = References(recorded, files)  # before an earlier trace is removed
            require_clipped(measure, recorded.manifest)
            with held_by_first(ranks, acquire(target, recorded, force, resume, segment)) as claimed:
                if claimed is not None:
                    stretch = StepRange(*claimed)
                    begin = replayed_before(target, recorded, stretch, ranks)
                    session = replaying(
                        target, recorded, weights, manifest, measure, uncertified, begin, stretch.stop, ranks
                    )
                    with contextlib.suppress(SegmentEnded), session.reporting():
                        train()
                        session.complete()
                if segment is not None:
                    if ranks.first:
                        sealing.seal_whole(target, recorded.num_steps)
                    ranks.said_by_first("segment over", True)
    return open_trace(target.path)


def two_pass(train: Train, run: RunPath, *, seed: int | None = None, force: bool = False) -> Trace:
    """Record ``train()`` and replay it, in one process: for notebooks and tests.

    Args:
        train: builds the model and trains it; whatever it needs it makes anew at each call.
        run: the run folder.
        seed: for Python, NumPy and torch; drawn and stored when None.
        force: replace what is in ``run``.

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
    record(train, run, seed=seed, force=force)
    return replay(train, run)


@contextlib.contextmanager
def _running(seed: int, strict: bool) -> Iterator[None]:
    _require_startable(seed)
    with untouched_rng(), strict_mode(strict):
        seed_everything(seed)
        yield


def _require_startable(seed: int) -> None:
    if observing() is not None:
        raise UsageError("A pass is running in this process already; a pass cannot run inside another.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed} is outside 0 .. {2**32 - 1}, the range that NumPy accepts.")
