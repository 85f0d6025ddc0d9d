"""Run the passes: record a training, replay it, or both in one process."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from geomprobe import sealing
from geomprobe.determinism import (
    BINDING_SECTIONS,
    FIRST_STEP_SECTIONS,
    changed_sources,
    draw_seed,
    require_same,
    seed_everything,
    source_digests,
    start_manifest,
    strict_mode,
    untouched_rng,
)
from geomprobe.errors import EnvironmentMismatch, RunError, UnsupportedTraining, UsageError
from geomprobe.interception import listening
from geomprobe.measuring import Measure
from geomprobe.probe import observe, observing
from geomprobe.recording import Recording
from geomprobe.replaying import Replaying
from geomprobe.run import Run
from geomprobe.trace.reader import Trace, open_trace
from geomprobe.trace.record import Record, open_record

Train = Callable[[], Any]
RunPath = str | os.PathLike[str]


def record(
    train: Train,
    run: RunPath,
    *,
    seed: int | None = None,
    strict: bool = True,
    force: bool = False,
    reference_steps: Collection[int] = (),
    script: Mapping[str, Any] | None = None,
) -> Record:
    """Pass 1: call ``train()``, and keep its final weights and what a replay needs in ``run``.

    Args:
        train: builds the model and trains it; whatever it needs it makes anew at each call.
        run: the run folder.
        seed: for Python, NumPy and torch; drawn and stored when None.
        strict: enforce deterministic algorithms while training.
        force: replace what is in ``run``.
        reference_steps: also keep the weights before these steps, as references ``step-N``.
        script: what is run, for the manifest; described from ``train`` when None.

    Returns:
        The sealed record.

    Raises:
        UsageError: ``run`` holds something and ``force`` is not set, or a pass is running already.
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
    target = Run(run)
    seed = draw_seed() if seed is None else seed
    script = _function_script(train) if script is None else script
    with _running(seed, strict), target.recording(force):
        manifest = start_manifest(seed=seed, strict=strict, script=script)
        recording = Recording(target, manifest, reference_steps)
        with _observed(recording):
            train()
            manifest["sources"] = _sources(script)
            recording.complete()
    return open_record(target.path)


def replay(
    train: Train,
    run: RunPath,
    *,
    every: int = 1,
    curvature_every: int | None = None,
    finite_step: bool = False,
    sharpness_every: int = 0,
    per_parameter: bool = False,
    compiled: bool = False,
    uncertified: bool = False,
    force: bool = False,
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
        per_parameter: keep the inner products of each parameter tensor too.
        compiled: compile the inner products (seconds at the start, faster steps).
        uncertified: go on where the replay differs, marking every later row.
        force: replace an earlier trace.
        script: what is run, to compare with the recording; described from ``train`` when None.

    Returns:
        The sealed trace.

    Raises:
        RunError: ``run`` is no finished recording, or its reference is not finite.
        EnvironmentMismatch: the environment differs in a way that changes bits; nothing was replayed.
        ReplayDiverged: the replay was not the same run; what was measured before is kept.
    """
    if every < 1:
        raise UsageError(f"every={every}: measure each N-th step with N at least 1")
    target = Run(run)
    script = _function_script(train) if script is None else script
    if min(curvature_every or 0, sharpness_every) < 0:
        raise UsageError(
            f"curvature_every={curvature_every}, sharpness_every={sharpness_every}: name each N-th step, or 0 for never"
        )
    if finite_step and curvature_every == 0:
        raise UsageError(
            "finite_step is measured where Hg is, and curvature_every=0 leaves Hg out: drop one of them"
        )
    measure = Measure(
        every=every,
        curvature_every=1 if curvature_every is None else curvature_every,
        curvature_required=curvature_every is not None or sharpness_every > 0,
        finite_step=finite_step,
        sharpness_every=sharpness_every,
        per_parameter=per_parameter,
        compiled=compiled,
    )
    with contextlib.closing(finished_record(target)) as recorded:
        seed, strict = recorded.manifest["seed"], recorded.manifest["strict"]
        with _running(seed, strict):
            manifest = start_manifest(seed=seed, strict=strict, script=script)
            if not uncertified:
                _require_same_start(recorded, manifest, target.path)
            manifest["sources"] = recorded.manifest.get("sources", {})
            replaying = Replaying(target, recorded, manifest, measure, uncertified)
            with target.replaying(force), _observed(replaying):
                train()
                replaying.complete()
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


def finished_record(run: Run) -> Record:
    """The sealed record of a run, ready to be replayed.

    Raises:
        RunError: the recording is missing, unfinished or failed.
    """
    sealing.finish(run)
    recorded = open_record(run.path)
    if recorded.status == "complete":
        return recorded
    status, steps = recorded.status, recorded.num_steps
    recorded.close()
    reason = {
        "failed": f"its script failed after {steps} steps, so it has no final weights",
        "incomplete": f"it is unfinished ({steps} steps so far): still running, or killed",
    }[status]
    raise RunError(
        f"{run.path} cannot be replayed: {reason}. `geomprobe inspect {run.path}` shows what is there; record it "
        "again with `geomprobe record --force`."
    )


@contextlib.contextmanager
def _running(seed: int, strict: bool) -> Iterator[None]:
    if observing() is not None:
        raise UsageError("A pass is running in this process already; a pass cannot run inside another.")
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UsageError(
            f"WORLD_SIZE is {ranks}: this version records and replays runs of one process only. Nothing was started; "
            "launch the script without torchrun, on one device."
        )
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed} is outside 0 .. {2**32 - 1}, the range that NumPy accepts.")
    with untouched_rng(), strict_mode(strict):
        seed_everything(seed)
        yield


@contextlib.contextmanager
def _observed(current: Recording | Replaying) -> Iterator[None]:
    before = observe(current)
    try:
        with listening(current):
            yield
    except Exception as error:
        current.fail()
        if current.failure not in (None, error):
            raise current.failure from error  # the script failed because the pass had stopped, or differed
        if current.manifest["strict"] and "use_deterministic_algorithms(True)" in str(error):
            raise UnsupportedTraining(
                f"{error} The recording is strict about that: replace the operation, or record with `geomprobe record "
                "--no-strict` (strict=False in Python), and the replay will tell whether it came out the same."
            ) from error
        raise
    except BaseException:  # interrupted: what is written stays as an unfinished pass
        current.close()
        raise
    finally:
        observe(before)


def _require_same_start(recorded: Record, manifest: Mapping[str, Any], run: Path) -> None:
    before, now = recorded.manifest["script"], manifest["script"]
    changed = changed_sources(recorded.manifest.get("sources", {}), Path(now.get("root") or "."))
    if before["sha256"] != now["sha256"] and before["path"] == now["path"]:
        changed.insert(0, now["path"])
    if changed and before.get("root") == now.get("root"):
        raise EnvironmentMismatch(
            f"{', '.join(changed)} changed since {run} was recorded, so the replay would be another run: nothing was "
            "replayed. Restore the recorded version, or record anew. (`replay --uncertified` goes on without a "
            "certificate.)"
        )
    sections = tuple(s for s in BINDING_SECTIONS if s not in FIRST_STEP_SECTIONS and s != "sources")
    require_same(recorded.manifest, manifest, sections, run)


def _sources(script: Mapping[str, Any]) -> dict[str, str]:
    return source_digests(Path(script["root"])) if script.get("root") else {}


def _function_script(train: Train) -> dict[str, Any]:
    """Describe a function as what is run; its source counts where Python can find it."""
    try:
        digest = sha256(inspect.getsource(train).encode()).hexdigest()
    except (OSError, TypeError):
        digest = None
    name = getattr(train, "__qualname__", type(train).__qualname__)
    return {"kind": "function", "path": name, "argv": [], "cwd": None, "root": None, "sha256": digest}
