"""Seal a pass that is over, so that a kill or a full disk in the middle of it costs nothing but a second try.

What is to be sealed is first written down beside the parts; whoever comes next finishes it from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from geomprobe.run import Run
from geomprobe.trace.schema import SEALING_PREFIX
from geomprobe.trace.seal import seal_record, seal_trace

Kind = Literal["record", "trace"]

_PATIENCE_S = 600.0  # a block: the parts are our own, so what is slow is the disk, not a torn file


def seal(
    run: Run,
    kind: Kind,
    *,
    status: str,
    manifest: Mapping[str, Any],
    references: Sequence[str] = (),
    certificate: Mapping[str, Any] | None = None,
) -> None:
    """Seal the parts of a pass into ``record.h5`` or ``trace.h5``, and remove them.

    Args:
        run: whose parts, which must be closed.
        kind: which pass.
        status: what the sealed file says of itself.
        manifest: the environment, complete.
        references: names of stored references, for a record.
        certificate: what the comparison found, for a trace.

    Raises:
        WriteFailed: the disk refused; `finish` takes it up again once there is space.
    """
    plan = {
        "status": status,
        "manifest": dict(manifest),
        "references": list(references),
        "certificate": certificate,
    }
    _write_down(_plan(run, kind), plan)
    _carry_out(run, kind)


def finish(run: Run) -> list[Kind]:
    """Finish a sealing that was cut off, if there is one.

    Returns:
        What was sealed.

    Raises:
        RunError: another process is writing there, or the parts are damaged.
        WriteFailed: the disk refused.

    >>> finish(Run("nowhere"))
    []
    """
    kinds: tuple[Kind, ...] = ("record", "trace")
    cut_off = [kind for kind in kinds if planned(run, kind)]
    for kind in cut_off:
        with run.writing():
            _carry_out(run, kind)
    return cut_off


def planned(run: Run, kind: Kind) -> bool:
    """Whether a sealing was begun and not finished.

    >>> planned(Run("nowhere"), "trace")
    False
    """
    return _plan(run, kind).exists()


def _plan(run: Run, kind: Kind) -> Path:
    return run.stream / f"{SEALING_PREFIX}{kind}.json"


def _write_down(path: Path, plan: Mapping[str, Any]) -> None:
    aside = path.with_suffix(".new")
    with open(aside, "w") as file:
        json.dump(plan, file)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def _carry_out(run: Run, kind: Kind) -> None:
    plan = json.loads(_plan(run, kind).read_text())
    manifest, num_parameters = plan["manifest"], plan["manifest"]["model"]["num_parameters"]
    parts, status = [run.part(kind, 0)], plan["status"]
    if kind == "record":
        references = {name: run.stored_reference(name) for name in plan["references"]}
        seal_record(
            parts,
            run.record,
            status=status,
            manifest=manifest,
            num_parameters=num_parameters,
            references=references,
            timeout_s=_PATIENCE_S,
        )
    else:
        seal_trace(
            parts,
            run.trace,
            status=status,
            manifest=manifest,
            num_parameters=num_parameters,
            certificate=plan["certificate"],
            timeout_s=_PATIENCE_S,
        )
    _plan(run, kind).unlink()  # first: from here on there is nothing to take up again
    run.clear_stream()
