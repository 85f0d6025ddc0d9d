"""Optional libraries, imported where they are needed, with an error that says what to install."""

from __future__ import annotations

import random
from importlib import import_module
from typing import Any

from geomprobe.errors import UsageError


def library(module: str, extra: str) -> Any:
    """An optional library's module, imported without a trace in Python's random numbers.

    Args:
        module: its name, such as ``"torchvision.models"``.
        extra: geomprobe's extra that installs it.

    Raises:
        UsageError: it is not installed.

    >>> library("torchvision.models", "vision").__name__
    'torchvision.models'
    """
    # The first import of scikit-learn draws some. Only pass 1 of two in one process makes it, so they would differ.
    drawn = random.getstate()
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise UsageError(f"{package} is not installed: pip install 'geomprobe[{extra}]'") from error
    finally:
        random.setstate(drawn)
