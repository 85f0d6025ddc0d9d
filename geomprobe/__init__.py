"""Record a PyTorch training run, replay it bit for bit, and measure the geometry of its path.

The names below load on first use, so that reading a trace never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geomprobe.errors import GeomprobeError, ReplayDiverged
    from geomprobe.passes import record, replay, two_pass
    from geomprobe.probe import attach
    from geomprobe.trace.reader import Trace, open_trace

__version__ = "0.1.0"

_HOMES = {
    "GeomprobeError": "geomprobe.errors",
    "ReplayDiverged": "geomprobe.errors",
    "Trace": "geomprobe.trace.reader",
    "attach": "geomprobe.probe",
    "open_trace": "geomprobe.trace.reader",
    "record": "geomprobe.passes",
    "replay": "geomprobe.passes",
    "two_pass": "geomprobe.passes",
}

__all__ = [
    "GeomprobeError",
    "ReplayDiverged",
    "Trace",
    "attach",
    "open_trace",
    "record",
    "replay",
    "two_pass",
]


def __getattr__(name: str) -> Any:
    if name in ("corridor", "schedules"):
        return import_module(f"geomprobe.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'geomprobe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
