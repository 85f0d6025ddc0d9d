"""Watch a pass while it is being written: progress, rate, time left, last values, curves.

Looks from another process, in a plain terminal, and disturbs nobody: it writes nothing and takes no lock. It
goes on when the writer dies, and when another one takes over, and ends when the pass is sealed, or on Ctrl-C.
For the replay of a finished recording it waits.
What several processes write at once is shown as one. Needs rich: pip install 'geomprobe[terminal]'.

    geomprobe watch runs/a
    geomprobe watch runs/a --interval 30
    geomprobe watch runs/a --once | mail -s runs/a me

With --once, or where standard output is no terminal, it prints one view. That takes two looks at a pass that is
running, INTERVAL apart, for the rate.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from geomprobe.errors import UsageError
from geomprobe.report.watch.snapshot import Snapshot, Watch
from geomprobe.report.watch.terminal import console, render

if TYPE_CHECKING:
    from rich.console import Console

_SHARE = 4  # of the time that a look takes, the least pause after it: to watch a pass must not slow it down


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--once", action="store_true", help="print one view and end")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Show the pass until it is over, and name the next command."""
    if not arguments.interval > 0:
        raise UsageError(f"--interval {arguments.interval:g}: name a time in seconds, above 0")
    terminal = console()
    lasting = sys.stdout.isatty() and not terminal.is_dumb_terminal and not arguments.once
    watch = Watch(arguments.run, waits=lasting)
    try:
        if lasting:
            snapshot = _last(watch, terminal, arguments.interval)
        else:
            snapshot = _once(watch, arguments.interval)
            terminal.print(render(snapshot))
    except KeyboardInterrupt:
        return 0
    print(f"Next: geomprobe {_next(snapshot)} {arguments.run}", file=sys.stderr)
    return 0


def _once(watch: Watch, interval: float) -> Snapshot:
    snapshot = watch.look()
    if snapshot.state not in ("running", "unknown"):
        return snapshot
    time.sleep(interval)
    return watch.look()


def _last(watch: Watch, terminal: Console, interval: float) -> Snapshot:
    from rich.live import Live

    with Live(console=terminal, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            snapshot = watch.look()
            live.update(render(snapshot), refresh=True)
            if snapshot.state == "sealed":
                return snapshot
            time.sleep(max(interval, _SHARE * (time.monotonic() - began)))


def _next(snapshot: Snapshot) -> str:
    if snapshot.state == "sealed" and snapshot.status in ("complete", "uncertified"):
        return "replay" if snapshot.kind == "record" else "verify"
    return "inspect"
