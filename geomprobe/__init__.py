"""Record a PyTorch training run, replay it bit for bit, and measure the geometry of its path.

The names below load on first use, so that reading a trace never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from geomprobe._package import __version__ as __version__

if TYPE_CHECKING:
    from geomprobe.errors import GeomprobeError, ReplayDiverged
    from geomprobe.passes.api import record, replay, two_pass
    from geomprobe.probe.probe import attach
    from geomprobe.trace.reader import Trace, open_trace

_HOMES = {
    "GeomprobeError": "geomprobe.errors",
    "ReplayDiverged": "geomprobe.errors",
    "Trace": "geomprobe.trace.reader",
    "attach": "geomprobe.probe.probe",
    "open_trace": "geomprobe.trace.reader",
    "record": "geomprobe.passes.api",
    "replay": "geomprobe.passes.api",
    "two_pass": "geomprobe.passes.api",
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
    if name == "corridor":
        return import_module("geomprobe.corridor")
    if name == "schedules":
        return import_module("geomprobe.corridor.schedules")
    if name not in _HOMES:
        raise AttributeError(f"module 'geomprobe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
