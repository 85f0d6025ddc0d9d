"""Why a number is not there: reasons for which a row has NaN instead of a loss, a Hessian product, a rate, an epoch.

A number in a trace is right, or it is not there. The column ``steps/absent`` holds, for each row, the sum of the
numbers of the reasons that hold there; 0 where nothing is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ABSENT = "steps/absent"

_NAMES = {"loss": ("loss", "clr"), "Hg": ("Hg",), "lr": ("lr",), "epoch": ("epoch",)}
_OF_RATE = ("relative_residual", "flow_drift")
_COLUMNS = {
    "loss": ("loss", "clr"),
    "Hg": (
        *("hg_norm", "g_hg", "g.Hg", "Hg.Hg", "corridor_residual", *_OF_RATE),
        *("secant_residual", "linear_decrease_gap", "sharpness"),
    ),
    "lr": ("lr", *_OF_RATE),
    "epoch": ("epoch",),
}


@dataclass(frozen=True, eq=False)
class Absence:
    """A reason for which numbers of a row are left out; each exists once.

    Attributes:
        number: a power of two.
        hides: what is left out: ``loss`` (and ``clr``), ``Hg`` (all that is made of it), ``lr`` or ``epoch``.
        reason: what happened.
        remedy: what to change for the number to be there.
    """

    number: int
    hides: tuple[str, ...]
    reason: str
    remedy: str

    def __str__(self) -> str:
        names = [name for what in self.hides for name in _NAMES[what]]
        what = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        return f"no {what}: {self.reason}. {self.remedy}"

    def hides_column(self, path: str) -> bool:
        """Whether a column is left out for this reason, or is made of one that is.

        >>> WRITTEN.hides_column("steps/clr"), WRITTEN.hides_column("rsi")
        (True, False)
        """
        return any(path.rpartition("/")[2] in _COLUMNS[what] for what in self.hides)


_GRADIENT = ("loss", "Hg")

WRITTEN, CARRIED, UNSEEN, NO_SCALAR, ELSEWHERE, NOT_CAUGHT, UNPROVEN, RATE, EPOCH, LATE, HOOKED, GIVEN_UP = ABSENCES = (
    Absence(
        1,
        _GRADIENT,
        "something other than a backward pass wrote to the gradients, so the loss that they are the gradient of is not "
        "known",
        "Scale the loss instead of the gradients, clip by torch.nn.utils.clip_grad_norm_ or clip_grad_value_, and zero "
        "all gradients together.",
    ),
    Absence(
        2,
        _GRADIENT,
        "the gradients of an earlier step were still there, so they are the sum of gradients at several weights",
        "Call optimizer.zero_grad() before each step's first backward pass.",
    ),
    Absence(
        4,
        _GRADIENT,
        "no backward pass of the step was seen that made its gradients",
        "Call loss.backward(), or probe.backward(loss).",
    ),
    Absence(
        8,
        _GRADIENT,
        "a backward pass did not begin at a scalar loss",
        "Reduce the loss to a scalar and call backward on it.",
    ),
    Absence(
        16,
        ("Hg",),
        "the weights were others when the loss was evaluated than at the update, and the Hessian is of those",
        "Nothing is wrong where the method demands it, as SAM does, or where another optimizer steps in between.",
    ),
    Absence(
        32,
        ("Hg",),
        "a backward pass of the step had options or several losses, so its graph was not kept",
        "Call loss.backward() without options on one loss.",
    ),
    Absence(
        64,
        ("Hg",),
        "the gradients are not those of any one function of the weights: their Jacobian is not symmetric",
        "Look for hooks and torch.autograd.Functions that change gradients, and for detach() within the loss.",
    ),
    Absence(
        128,
        ("lr",),
        "the learning rate changed within the optimizer's step, so it is not known which one was used",
        "Set learning rates between the steps, as torch's schedulers do.",
    ),
    Absence(
        256,
        ("epoch",),
        "it is not clear which of the script's loaders an epoch is a pass over",
        "Name the epochs: for epoch in probe.epochs(n).",
    ),
    Absence(
        512,
        ("Hg",),
        "the script does not call geomprobe.attach, so the first update's backward pass was over before it was known "
        "what is trained",
        "Call geomprobe.attach(model, optimizer) before the first step.",
    ),
    Absence(
        1024,
        ("Hg",),
        "a hook changed gradients within the backward pass, or what autograd saves for it",
        "Change the loss instead of its gradients.",
    ),
    Absence(
        2048,
        ("Hg",),
        "Hg has no exact route in this run, which the replay's manifest explains under measure, curvature, missing",
        "geomprobe inspect shows it.",
    ),
)


def steps_of(column: NDArray[np.float64]) -> dict[Absence, NDArray[np.int64]]:
    """The rows at which each reason holds, of those that hold anywhere.

    Args:
        column: values of ``steps/absent``.

    >>> steps_of(np.array([0.0, 1.0, 3.0]))[WRITTEN]
    array([1, 2])
    """
    known = 2 * ABSENCES[-1].number  # a file that somebody else wrote may have any number here
    numbers = np.where((column >= 0) & (column < known), column, 0).astype(np.int64)
    found = {absence: np.flatnonzero(numbers & absence.number) for absence in ABSENCES}
    return {absence: rows for absence, rows in found.items() if len(rows)}
