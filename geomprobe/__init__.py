"""Record a PyTorch training run, replay it bit for bit, and measure the geometry of its path.

The names below load on first use, so that reading a trace never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from geomprobe._package import __version__ as __version__
from geomprobe._package import lazy_names

if TYPE_CHECKING:
    from geomprobe.errors import GeomprobeError as GeomprobeError
    from geomprobe.errors import ReplayDiverged as ReplayDiverged
    from geomprobe.passes.api import record as record
    from geomprobe.passes.api import replay as replay
    from geomprobe.passes.api import two_pass as two_pass
    from geomprobe.probe.probe import attach as attach
    from geomprobe.trace.reader import Trace as Trace
    from geomprobe.trace.reader import open_trace as open_trace

_load, __dir__ = lazy_names(__name__)


def __getattr__(name: str) -> Any:
    if name in ("corridor", "schedules"):  # modules
        return import_module(f"geomprobe.corridor{'.schedules' if name == 'schedules' else ''}")
    return _load(name)
