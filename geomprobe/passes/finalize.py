"""Seal a pass that is over, so that a kill or a full disk in the middle of it costs nothing but a second try.

What is to be sealed is first written down beside the parts; the next command finishes it from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geomprobe.errors import RunError
from geomprobe.passes.attempts import begun, contiguous_end
from geomprobe.trace.atomic_file import write_json
from geomprobe.trace.json_values import CERTIFICATE, COUNT, MANIFEST, STATUSES, require_form
from geomprobe.trace.regular_file import read_json
from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.schema import SCHEMAS, SEALING_PREFIX, Kind
from geomprobe.trace.seal import seal_record, seal_trace

_FORM = {
    "status": str,
    "manifest": MANIFEST,
    "references": [str],
    "certificate": CERTIFICATE,
    "num_steps": COUNT,
}
_PATIENCE_S = 600.0  # a block: the parts are our own, so what is slow is the disk, not a torn file


def seal(
    run: RunFolder,
    kind: Kind,
    *,
    status: str,
    manifest: Mapping[str, Any],
    references: Sequence[str] = (),
    certificate: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
) -> None:
    """Seal the parts of a pass into ``record.h5`` or ``trace.h5``, and remove them.

    Where the pass failed or diverged they stay, so that ``--resume`` can continue it. The parts must be closed.

    Args:
        run: whose parts.
        kind: which pass.
        status: of the sealed file.
        manifest: the environment, complete.
        references: names of stored references, for a record.
        certificate: what the comparison found, for a trace.
        num_steps: how many steps; all that there are when None.

    Raises:
        WriteFailed: the disk refused; `finish` takes it up again once there is space.
    """
    plan = {"status": status, "manifest": dict(manifest), "references": list(references)}
    write_json(_plan(run, kind), {**plan, "certificate": certificate, "num_steps": num_steps})
    _carry_out(run, kind)


def seal_whole(run: RunFolder, total: int) -> bool:
    """Seal a trace of ``total`` steps that was replayed in segments, if all have ended; gives whether it is sealed now.

    Raises:
        WriteFailed: the disk refused; `finish` takes it up again once there is space.
    """
    with run.sealing():
        if run.trace.exists():
            return True
        last = run.proof("trace", total)
        if not last.exists() or contiguous_end(run, "trace", begun(run, "trace")) < total:
            return False
        seal(run, "trace", status="complete", **_read(last, ("manifest", "certificate")))
        return True


def finish(run: RunFolder) -> list[Kind]:
    """Finish a sealing that was cut off, if there is one; gives what was sealed.

    Raises:
        RunError: another process is writing there, or the parts are damaged.
        WriteFailed: the disk refused.
    """
    cut_off = [kind for kind in SCHEMAS if planned(run, kind)]
    for kind in cut_off:
        with run.writing():
            _carry_out(run, kind)
    return cut_off


def planned(run: RunFolder, kind: Kind) -> bool:
    """Whether a sealing was begun and not finished."""
    return _plan(run, kind).exists()


def _of_ranks(run: RunFolder, plan: Mapping[str, Any]) -> dict[int, tuple[list[Path], dict[str, Path]]]:
    """The parts, and the shards of references, that the other processes of a run have left."""
    found = {}
    for rank in range(1, plan["manifest"].get("ranks", {}).get("world_size", 1)):
        own = run.of_rank(rank)
        files = {name: own.stored_reference(name) for name in plan["references"]}
        found[rank] = own.parts("record"), {name: path for name, path in files.items() if path.exists()}
    return found


def _plan(run: RunFolder, kind: Kind) -> Path:
    return run.stream / f"{SEALING_PREFIX}{kind}.json"


def _read(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The entries of these names, and no others, in a file that `seal` or the end of a segment has left.

    Raises:
        RunError: the file is damaged.
    """
    found = require_form(read_json(path), _FORM, str(path))
    may_be_null = ("certificate", "num_steps")
    missing = [name for name in names if found.get(name) is None and not (name in found and name in may_be_null)]
    if missing or (found["manifest"].get("model") or {}).get("num_parameters") is None:
        raise RunError(f"{path} is damaged: it lacks {', '.join(missing) or 'manifest.model.num_parameters'}")
    return {name: found[name] for name in names}


def _carry_out(run: RunFolder, kind: Kind) -> None:
    plan = _read(_plan(run, kind), ("status", "manifest", "references", "certificate", "num_steps"))
    require_form(plan["status"], STATUSES[SCHEMAS[kind]], "status")
    facts = {name: plan[name] for name in ("status", "manifest", "num_steps")}
    facts |= {"num_parameters": plan["manifest"]["model"]["num_parameters"], "timeout_s": _PATIENCE_S}
    if kind == "record":
        references = {name: run.stored_reference(name) for name in plan["references"]}
        seal_record(run.parts(kind), run.record, references=references, ranks=_of_ranks(run, plan), **facts)
    else:
        seal_trace(run.parts(kind), run.trace, certificate=plan["certificate"], **facts)
    _plan(run, kind).unlink()  # first: from here on there is nothing to take up again
    if plan["status"] not in ("failed", "diverged"):
        run.clear_stream()
