"""Where a data set's files have to lie, and the errors of those that are missing or damaged."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from geomprobe.errors import GeomprobeError, UsageError


class DamagedData(GeomprobeError):
    """A data set's file is truncated, misnamed, of the wrong shape, or not of its format."""


@dataclass(frozen=True)
class Source:
    """A data set that the user has to fetch.

    Attributes:
        name: as the papers call it.
        url: where it is to be had.
        advice: what to do with what one gets there; ``{root}`` stands for the data folder.
    """

    name: str
    url: str
    advice: str

    def require(self, path: Path, root: Path) -> Path:
        """``path``, which exists.

        Raises:
            UsageError: it does not; the message names where to get the data set, and where to put it.

        >>> Source("X", "https://x.org", "Unpack it into {root}.").require(Path("here/x.bin"), Path("here"))
        Traceback (most recent call last):
        geomprobe.errors.UsageError: here/x.bin is not there. X is to be had from https://x.org. Unpack it into here.
        """
        if path.exists():
            return path
        advice = self.advice.format(root=root)
        raise UsageError(f"{path} is not there{_alike(path)}. {self.name} is to be had from {self.url}. {advice}")


def _alike(path: Path) -> str:
    """The files beside a missing one that may be it under another name."""
    if not path.parent.is_dir():
        return ""
    names = sorted(beside.name for beside in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f" (beside it: {', '.join(close)})" if close else ""
