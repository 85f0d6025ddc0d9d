"""What geomprobe raises. Each message says what happened, where, with which values, and what to do next."""

from __future__ import annotations


class GeomprobeError(Exception):
    """Base of every error that geomprobe raises on purpose.

    ``exit_code`` is what the command line exits with (DESIGN: 0 held, 1 failed, 2 wrong usage, 3 diverged).

    >>> GeomprobeError("no such run").exit_code
    1
    """

    exit_code = 1


class UsageError(GeomprobeError):
    """The command or call itself is wrong; nothing was started."""

    exit_code = 2


class RunError(GeomprobeError):
    """A run directory is missing, unfinished, locked, damaged, or of another format."""


class UnsupportedTraining(GeomprobeError):
    """The training loop does something that geomprobe cannot measure rightly, such as two optimizers stepping."""


class EnvironmentMismatch(GeomprobeError):
    """The replay's environment differs from the recording's in a way that changes bits."""


class Stopped(BaseException):
    """The pass ends before its script does, as it was asked to; what it has done is kept, and it can go on from there.

    No script's ``except Exception`` holds it up.

    Attributes:
        together: whether every process of the run ends so, at the same step.

    >>> Stopped().exit_code
    75
    """

    exit_code = 75  # EX_TEMPFAIL: a queue may start the same command again

    def __init__(self, message: str = "the run was asked to stop", *, together: bool = False) -> None:
        super().__init__(message)
        self.together = together


class ReplayDiverged(GeomprobeError):
    """The replay was not the same run: the first difference, by step, component and tensor.

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
