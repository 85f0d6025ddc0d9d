"""The errors of geomprobe. Each message states what happened, where, with which values, and what to do next."""

from __future__ import annotations


class GeomprobeError(Exception):
    """The base of every error that geomprobe raises on purpose.

    Attributes:
        exit_code: the exit code of the command line: 0 success, 1 failed, 2 wrong usage, 3 diverged.

    >>> GeomprobeError("no such run").exit_code
    1
    """

    exit_code = 1


class UsageError(GeomprobeError):
    """The command or the call is wrong; nothing was started."""

    exit_code = 2


class RunError(GeomprobeError):
    """A run directory is missing, unfinished, locked, damaged, or of another format."""


class UnsupportedTraining(GeomprobeError):
    """The training does something that geomprobe cannot measure correctly, such as LBFGS."""


class EnvironmentMismatch(GeomprobeError):
    """The replay's environment differs from the recording's in a way that changes bits."""


class Stopped(BaseException):
    """The pass ends before its script does, because it was asked to. Its rows are kept, and it can be resumed.

    It is no `Exception`, so that ``except Exception`` in a script does not stop it.

    Attributes:
        together: whether every process of the run ends in this way, at the same step.

    >>> Stopped().exit_code
    75
    """

    exit_code = 75  # EX_TEMPFAIL: a queue may start the same command again

    def __init__(self, message: str = "the run was asked to stop", *, together: bool = False) -> None:
        super().__init__(message)
        self.together = together


class ReplayDiverged(GeomprobeError):
    """The replay was not the recorded run; the error names the first difference.

    Attributes:
        step: the first step that differed.
        component: ``"rng"``, ``"batch"``, ``"weights"``, ``"optimizer"``, ``"loss"``, ``"buffers"`` or ``"length"``.
        tensor: the name within the component, such as ``"layer1.0.conv1.weight"``.
    """

    exit_code = 3

    def __init__(self, message: str, *, step: int, component: str, tensor: str) -> None:
        super().__init__(message)
        self.step = step
        self.component = component
        self.tensor = tensor
