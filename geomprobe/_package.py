"""What this package is: its version, the folder of its files, and names that load on first use.

Reading a trace must not import torch, so `geomprobe` and its larger rooms import nothing until a name is asked for.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

FOLDER = Path(__file__).parent
"""The folder of geomprobe's own files, which are never the user's sources, wherever in it a module lies."""


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's ``__getattr__`` and ``__dir__``; its ``__all__`` is set.

    Its names are those that it imports under ``if TYPE_CHECKING:``. Type checkers and editors read them there, and so
    does this function, from the package's source: so each is written in one place.

    >>> import geomprobe
    >>> geomprobe.open_trace.__module__, "open_trace" in geomprobe.__all__
    ('geomprobe.trace.reader', True)
    """
    module: Any = sys.modules[package]
    source = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    blocks = (node for node in source.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = (node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom))
    homes = {alias.name: node.module or "" for node in imports for alias in node.names}
    module.__all__ = sorted(homes)

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return load, lambda: sorted(homes)
