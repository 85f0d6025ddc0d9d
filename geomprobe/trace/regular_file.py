"""Open the files of a run folder: regular files only, so that nothing in it can block, or lead to somewhere else."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from geomprobe.errors import RunError

_LONGEST_TEXT = 1 << 26
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
}


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """The descriptor of a regular file, which the caller closes; ``flags`` are those of `os.open`.

    A FIFO or a device is not waited for, and no symbolic link is followed: a run folder that somebody else made may
    hold one that leads to any file of yours.

    Raises:
        RunError: it is no regular file; the message says what it is.
        OSError: it cannot be opened, for instance because it is not there.

    >>> open_regular(Path("/dev/null"))
    Traceback (most recent call last):
        ...
    geomprobe.errors.RunError: /dev/null is a device, and a run has regular files only. Put the file itself there
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError:
        require_regular(path, os.lstat(path))  # its words are clearer than "too many levels of symbolic links"
        raise
    try:
        require_regular(path, os.fstat(descriptor))
    except RunError:
        os.close(descriptor)
        raise
    return descriptor


def require_regular(path: Path, found: os.stat_result) -> None:
    """Refuse what is no regular file.

    Raises:
        RunError: it is none; the message says what it is.
    """
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise RunError(
            f"{path} is {_KINDS.get(kind, 'no file')}, and a run has regular files only. Put the file itself there"
        )


def require_own_folder(path: Path) -> None:
    """Refuse a symbolic link, or a file, in the place of a folder that a pass writes to and empties.

    Raises:
        RunError: it is one.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise RunError(f"{path} is no folder of its own, so nothing is written there. Put the folder itself there")


def read_bytes(path: Path, most: int = _LONGEST_TEXT) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        RunError: it is no regular file, or longer.
        OSError: it cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise RunError(f"{path} is longer than {most} bytes: no pass wrote it")
    return content


def read_json(path: Path) -> Any:
    """The value in a file of JSON text.

    Raises:
        RunError: it is no regular file, or holds no JSON text.
        OSError: it cannot be read.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: it is no JSON text") from error
