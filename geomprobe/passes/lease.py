"""Lock a run for a pass, from its start, from where one was cut off, or for one segment: what the options mean.

pass       options       an earlier pass that is sealed          parts of one that was cut off    what is done
record     none          refused                                 refused                          the whole run
record     --force       removed                                 removed                          the whole run
record     --resume      kept, unless its script had failed      compared, then continued         what is missing
replay     none          refused                                 refused                          the whole run
replay     --force       removed                                 removed                          the whole run
replay     --resume      kept, unless it had diverged            compared, then continued         what is missing
replay     --segment     kept; refused if it had diverged        compared, then continued         what is missing of it

The lock and the removal are `RunFolder`'s. Rank 0 has the lock for all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from geomprobe.distributed.ranks import Ranks
from geomprobe.errors import EnvironmentMismatch, RunError, UsageError
from geomprobe.passes import finalize
from geomprobe.passes.attempts import begun, committed, contiguous_end, manifest_of
from geomprobe.passes.checkpoint.resume_point import ResumePoint, cuts, find_resume_point, segments
from geomprobe.trace.json_values import REPLAYED, require_entries
from geomprobe.trace.reader import Trace, open_trace
from geomprobe.trace.record import Record, open_record
from geomprobe.trace.run_folder import RunFolder


class StepRange(NamedTuple):
    """The part of a run that a replay covers."""

    first: int = 0
    """The first step whose row is wanted."""
    stop: int | None = None
    """The step after the last; None for the end of the run."""
    latest: int = 0
    """Where the replay begins at the latest, since what it finds there is to be compared."""


@contextlib.contextmanager
def acquire(
    target: RunFolder, recorded: Record, force: bool, resume: bool, segment: tuple[int, int] | None
) -> Iterator[StepRange | None]:
    """Lock a run for a replay; gives what of it is to be replayed, or None where nothing is left to do.

    Raises (on entering):
        UsageError: there is a trace, or no such segment; with few checkpoints there are fewer than k.
        RunError: another process is writing there, or what is there is damaged.
    """
    if segment is not None:
        with _segment(target, recorded, segment) as left:
            yield left
    elif not resume:
        with target.replaying(force):
            yield StepRange()
    else:
        with target.going_on():
            if _is_done(target):
                yield None
                return
            reached = contiguous_end(target, "trace", committed(target, "trace"))
            yield StepRange(latest=min(reached, recorded.num_steps) - 1)


@contextlib.contextmanager
def _segment(target: RunFolder, recorded: Record, segment: tuple[int, int]) -> Iterator[StepRange | None]:
    """Lock a segment of a run, beside other processes that have theirs."""
    number, count = segment
    pieces = segments(cuts(target, world_size(recorded.manifest)), recorded.num_steps, count)
    if not 1 <= number <= len(pieces):
        raise UsageError(
            f"segment {number}/{count}: the checkpoints of {target.path} cut it into {len(pieces)} pieces; there is "
            "none of that number, and nothing was replayed."
        )
    if target.trace.exists():
        if (status := open_trace(target.path).status) != "complete":
            raise UsageError(
                f"{target.trace} is of a replay that ended {status}: no segment was replayed. `geomprobe replay "
                f"{target.path} --resume` continues one that diverged; --force starts from the first step."
            )
        with target.writing(shared=True), target.sealing():
            target.clear_stream()  # of what a kill left
        yield None
        return
    first, stop = pieces[number - 1]
    with target.segment(first):
        parts = committed(target, "trace", first, stop)
        reached = min(contiguous_end(target, "trace", parts, first), stop)
        if reached == stop and target.proof("trace", stop).exists():
            yield None
            return
        # The last row that is there, or more, is made again, so that its update is seen to lead to what follows.
        yield StepRange(first, stop, max(first, reached - 1))


def ready_for_segments(run: RunFolder, *, force: bool = False, resume: bool = False) -> bool:
    """Make a run ready to be replayed in segments, by other processes; gives whether anything is left to do.

    Raises:
        UsageError: there is a trace, or a part of one, and neither ``force`` nor ``resume`` is set.
        RunError: another process is writing there.
    """
    if not resume:
        with run.replaying(force):
            return True
    with run.going_on():
        return not _is_done(run)


@contextlib.contextmanager
def unfinished_recording(target: RunFolder) -> Iterator[bool]:
    """Lock a run for ``record --resume``, which starts one where there is none; gives whether anything is left to do.

    Raises (on entering):
        UsageError: the folder is not a run.
        RunError: another process is writing there, or what is there is damaged.
    """
    finalize.finish(target)
    with target.going_on():
        if not target.record.exists() or _drop_unfinished(target.record, open_record(target.path)):
            yield True
        else:
            target.clear_stream()  # of what a kill left
            yield False


def _is_done(run: RunFolder) -> bool:
    """Whether there is a trace that was not cut short; then what a kill left of its parts goes."""
    if not run.trace.exists() or _drop_unfinished(run.trace, open_trace(run.path)):
        return False
    run.clear_stream()
    return True


def _drop_unfinished(path: Path, found: Record | Trace) -> bool:
    """Whether a sealed pass was cut short; then its file goes, since its parts have the same rows."""
    if isinstance(found, Record):
        found.close()
    if found.status not in ("failed", "diverged"):
        return False
    path.unlink()
    return True


def begun_recording(target: RunFolder, seed: int | None, ranks: Ranks) -> ResumePoint | None:
    """Where this process continues a recording that was cut off, if there is one.

    Raises:
        UsageError: ``seed`` is not the one that it was started with.
        EnvironmentMismatch: it was started by another number of processes.
    """
    own = target.of_rank(ranks.rank)
    parts = committed(own, "record")
    manifests = [found for found in ranks.all_gather("begun", manifest_of(parts) if parts else None) if found]
    if not manifests:
        return None
    begun = manifests[0]
    require_entries(begun, REPLAYED, target.path)
    _require_world_size(begun, ranks, target.path)
    if seed not in (None, begun["seed"]):
        raise UsageError(
            f"seed {seed}: the recording in {target.path} was begun with seed {begun['seed']}. Leave the seed out, or "
            "record it again with --force."
        )
    mine = manifest_of(parts) if parts else begun
    latest = contiguous_end(own, "record", parts)
    return find_resume_point(own, mine, parts, latest, ranks)


def replayed_before(target: RunFolder, recorded: Record, wanted: StepRange, ranks: Ranks) -> ResumePoint:
    """Where a process continues a replay; only rank 0 has rows of it."""
    parts = begun(target, "trace") if ranks.first else []
    own = target.of_rank(ranks.rank)
    return find_resume_point(own, recorded.manifest, parts, wanted.latest, ranks, wanted.first)


def finished_record(run: RunFolder, finish: bool = True) -> Record:
    """The sealed record of a run, ready to be replayed; with ``finish``, a sealing that was cut off is finished first.

    Raises:
        RunError: the recording is missing, unfinished or failed.
    """
    if finish:
        finalize.finish(run)
    recorded = open_record(run.path)
    if recorded.status == "complete":
        require_entries(recorded.manifest, REPLAYED, run.path)
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
def locked_by_first(ranks: Ranks, lease: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
    """Let rank 0 lock a run for all, while the others wait; gives every rank what the lease gave rank 0.

    Raises (on entering):
        RunError: rank 0 could not.
        ElsewhereStopped: the same, on the others.
    """
    if not ranks.first:
        yield ranks.broadcast("locked")
        return
    with lease as found:
        yield ranks.broadcast("locked", found)


def own_record(target: RunFolder, ranks: Ranks) -> Record:
    """What this process has recorded, in a run of as many.

    Raises:
        EnvironmentMismatch: it was recorded by another number of processes.
        RunError: the recording is missing, unfinished or failed.
    """
    recorded = finished_record(target, ranks.first)
    if world_size(recorded.manifest) == ranks.size and ranks.first:
        return recorded
    recorded.close()
    _require_world_size(recorded.manifest, ranks, target.path)
    return open_record(target.path, ranks.rank)


def world_size(manifest: Mapping[str, Any]) -> int:
    """How many processes a run is of."""
    size: int = manifest.get("ranks", {}).get("world_size", 1)
    return size


def _require_world_size(manifest: Mapping[str, Any], ranks: Ranks, path: Path) -> None:
    then = world_size(manifest)
    if then != ranks.size:
        raise EnvironmentMismatch(
            f"{path} was recorded by {then} process{'es' if then > 1 else ''}, and here are {ranks.size}: the ranks' "
            f"batches, and the order of sums over them, would be others. Nothing was done. Start {then}."
        )
