"""Whether a run's replay was the recorded run: a headline, and the lines that give its reasons."""

from __future__ import annotations

from dataclasses import dataclass

from geomprobe.report.summary.summary import Summary
from geomprobe.trace.certificate import Certificate


@dataclass(frozen=True)
class Verdict:
    """The first that a report says of a run.

    Attributes:
        mark: ``"good"`` where the replay is proven to be the recorded run, ``"wait"`` where a pass is still to
            come, ``"bad"`` where something failed or differed.
        headline: the verdict in a few words.
        lines: the reasons.
        passes: the state of ``"record"`` and ``"trace"``.
    """

    mark: str
    headline: str
    lines: list[str]
    passes: dict[str, str]


def verdict(summary: Summary) -> Verdict:
    """The verdict on a run that `summarize` has read.

    >>> found = {"steps_recorded": 3, "steps_compared": 2, "steps_equal": 1, "final_weights_equal": False}
    >>> first = {"step": 1, "component": "loss", "tensor": "loss"}
    >>> trace = {"status": "diverged", "num_steps": 1, "num_epochs": 0}
    >>> result = verdict({"record": None, "trace": {**trace, "certificate": {**found, "first_difference": first}}})
    >>> result.mark, result.headline, result.lines[1]
    ('bad', 'The replay diverged', 'First difference: step 1, loss, loss.')
    """
    trace, record = summary["trace"] or {}, summary["record"] or {}
    mark, headline, lines = _of_trace(trace) if "status" in trace else _of_record(record)
    passes = {
        name: each.get("error") or _steps(each)
        for name, each in (("record", record), ("trace", trace))
        if each
    }
    return Verdict(mark, headline, lines, passes)


def _steps(entry: Summary) -> str:
    epochs = f", {entry['num_epochs']} epochs" if entry["num_epochs"] else ""
    return f"{entry['status']}, {entry['num_steps']} steps{epochs}"


def _of_record(record: Summary) -> tuple[str, str, list[str]]:
    status = record.get("status")
    if status == "complete":
        return "wait", "Recorded, not replayed", ["Nothing is measured before the replay."]
    if status == "failed":
        return (
            "bad",
            "The recording failed",
            ["The script ended with an error; what it did until then is kept."],
        )
    return "wait", "The recording has not finished", [f"{record['num_steps']} steps so far."]


def _of_trace(trace: Summary) -> tuple[str, str, list[str]]:
    certificate, status = Certificate.of(trace["certificate"]), trace["status"]
    lines = _compared(certificate) if trace["certificate"] else []
    if status == "incomplete":
        return "wait", "The replay has not finished", [f"{trace['num_steps']} steps so far.", *lines]
    if status == "uncertified":
        warning = "What follows is of a run that is not proven to be the recorded one."
        return "bad", "UNCERTIFIED", [warning, *lines]
    if status == "diverged":
        return "bad", "The replay diverged", lines
    if certificate.why_not(trace["num_steps"]):
        warning = f"The trace calls itself {status}, but its certificate does not say so."
        return "bad", "No valid certificate", [warning, *lines]
    return "good", "Certified: the recorded run, bit for bit", lines


def _compared(certificate: Certificate) -> list[str]:
    """The certificate in sentences."""
    weights = "bitwise equal" if certificate.final_weights_equal else "NOT equal"
    lines = [
        f"Of {certificate.steps_recorded} recorded steps, {certificate.steps_compared} were compared and "
        f"{certificate.steps_equal} are equal; the final weights are {weights}."
    ]
    if certificate.first_difference:
        lines.append(f"First difference: {certificate.first_difference}.")
    if certificate.components:
        lines.append(f"Compared in each step: {', '.join(certificate.components)}.")
    return lines
