"""Whether a trace satisfies the identities that any trace must, found from the trace alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geomprobe.errors import RunError
from geomprobe.report.table import number, table
from geomprobe.report.verify import any_optimizer as identities
from geomprobe.report.verify.check import FAIL, SKIPPED, Check, Precision, held, precision, skipped
from geomprobe.report.verify.plain_sgd import check_plain_sgd
from geomprobe.report.verify.sketch import check_sketch
from geomprobe.trace.certificate import Certificate

if TYPE_CHECKING:
    from geomprobe.trace.reader import Trace


@dataclass(frozen=True)
class Verification:
    """The checks of one trace, and what a reader must know to weigh them."""

    path: str
    status: str
    num_steps: int
    rows_not_finite: int
    precision: Precision
    checks: tuple[Check, ...]

    @property
    def broken(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.outcome == FAIL)

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "path": self.path,
            "status": self.status,
            "held": not self.broken,
            "num_steps": self.num_steps,
            "rows_not_finite": self.rows_not_finite,
            "dtype": self.precision.dtype,
            "unit_roundoff": self.precision.unit_roundoff,
            "checks": [check.as_json() for check in self.checks],
        }


def verify(trace: Trace) -> Verification:
    """Check a trace against itself: derived columns, bounds, the certificate and, for plain SGD, NWT eq. 4.

    Where the recording beside it has a sketch, that is compared with the trace.

    Raises:
        RunError: the trace holds no row, names a dtype without known rounding, or is damaged.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from geomprobe.trace.reader import open_trace
    >>> from geomprobe.trace.stream.writer import PartWriter, Table
    >>> w, d = np.array([2.0, 1.0]), np.array([1.5, 0.5])  # of the loss w^2 / 2, whose gradient is w
    >>> raw = {"g.g": w * w, "w.g": w * w, "w.w": w * w, "g.d": w * d, "w.d": w * d, "d.d": d * d}
    >>> table = Table("values", tuple(f"inner_products/{name}" for name in raw), "float64")
    >>> path = Path(tempfile.mkdtemp()) / "part.h5"
    >>> with PartWriter(path, schema="geomprobe-trace", tables=[table], attributes={}) as part:
    ...     part.append({"values": np.stack(list(raw.values()), axis=1)})
    >>> result = verify(open_trace(path))
    >>> result.broken, next(check.rows for check in result.checks if check.name == "|cosine| <= 1")
    ((), 2)
    """
    if trace.num_steps == 0:
        raise RunError(
            f"{trace.path} ({trace.status}) holds no step, so there is nothing to verify. "
            f"See: geomprobe inspect {trace.path}"
        )
    p = precision(trace.manifest, trace.num_parameters)
    c = identities.columns(trace)
    checks = [
        _check_certificate(trace),
        *identities.check_identities(c, p),
        *identities.check_side_gradients(c, p),
        *check_plain_sgd(c, p, certified=not Certificate.of(trace.certificate).why_not(trace.num_steps)),
        *check_sketch(trace, p),
    ]
    missing = identities.not_finite(c)
    return Verification(str(trace.path), trace.status, trace.num_steps, missing, p, tuple(checks))


def _check_certificate(trace: Trace) -> Check:
    """The status says what the certificate proves: T of T for ``complete``, a difference for ``diverged``."""
    name, found = f"certificate fits status {trace.status}", Certificate.of(trace.certificate)
    why_not = found.why_not(trace.num_steps)
    if trace.status == "incomplete":
        return skipped(name, "the replay has not finished")
    if not trace.certificate:
        return held(name, False, "there is no certificate")
    if trace.status == "complete":
        return held(name, not why_not, why_not)
    if trace.status == "diverged":
        return held(name, bool(why_not and found.first_difference), found.counts)
    return held(name, _same_agrees(trace), found.counts)


def _same_agrees(trace: Trace) -> bool:
    """An uncertified trace marks as many rows ``same`` as its certificate counts equal."""
    return "same" in trace and int((trace["same"] == 1).sum()) == trace.certificate.get("steps_equal")


def render(result: Verification) -> str:
    """The verification as text: a table with one check a line, and the verdict."""
    p = result.precision
    lines = [
        f"{result.path}: {result.status}, {result.num_steps} steps, parameters in {p.dtype} "
        f"(unit roundoff {p.unit_roundoff:.1e}), inner products to {p.sums:.1e}"
    ]
    if result.status == "uncertified":
        lines.append("UNCERTIFIED: the replay was not the recorded run; what follows is of the replay alone.")
    if result.rows_not_finite:
        lines.append(f"{result.rows_not_finite} rows hold values that are not finite and were not checked.")
    header = ["check", "rows", "worst", "tolerance", "step", "outcome"]
    rows = [_line(check) for check in result.checks]
    count = sum(check.outcome != SKIPPED for check in result.checks)
    verdict = f"{len(result.broken)} of {count} checks FAILED" if result.broken else f"all {count} checks held"
    return "\n".join([*lines, "", table(header, rows, right=(1, 2, 3, 4)), "", verdict])


def _line(check: Check) -> list[str]:
    outcome = f"{check.outcome} ({check.note})" if check.note else check.outcome
    row = "-" if check.row is None else str(check.row)
    rows = str(check.rows) if check.rows else "-"
    return [check.name, rows, number(check.worst, 2), number(check.tolerance, 2), row, outcome]
