"""Text from files on its way to a terminal: what is no letter there is shown, and nothing acts."""

from __future__ import annotations

import sys
import unicodedata
from typing import TextIO

# C0 and C1 codes (ESC among them), marks that change the direction of the text, separators of lines, half characters.
_ACTING = ("Cc", "Cf", "Zl", "Zp", "Cs")


def printable(text: str, *, lines: bool = False) -> str:
    r"""The text with each control character as ``\uNNNN``, as JSON writes it; with ``lines``, line ends stay.

    Names and texts of a file may hold escape sequences, which a terminal would carry out.

    >>> print(printable("\x1b[2Jrsi\n"))
    \u001b[2Jrsi\u000a
    """
    if text.isprintable():
        return text
    return "".join(_shown(letter, lines) for letter in text)


def show(text: str, file: TextIO | None = None) -> None:
    """Print lines to a terminal or a pipe, by default on standard output: the one way out of text from files."""
    print(printable(text, lines=True), file=file or sys.stdout, flush=True)


def _shown(letter: str, lines: bool) -> str:
    if (lines and letter == "\n") or unicodedata.category(letter) not in _ACTING:
        return letter
    code = ord(letter)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
