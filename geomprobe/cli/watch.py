"""Watch a pass while it runs: progress, rate, time left, last values, curves.

This runs in a process of its own and does not disturb the pass: it writes nothing and takes no lock. It continues
when the process that writes dies, and when another one takes over. It ends when the pass is sealed, or on Ctrl-C.
After a finished recording it waits for the replay. The rows of several processes are shown as one pass.
Needs rich: pip install 'geomprobe[terminal]'.

    geomprobe watch runs/a
    geomprobe watch runs/a --interval 30
    geomprobe watch runs/a --once | mail -s runs/a me

With --once, or where standard output is no terminal, it prints one view. If the pass is running, it looks twice,
INTERVAL apart, because the rate needs two looks.
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
from geomprobe.trace.printable import show

if TYPE_CHECKING:
    from rich.console import Console

_SHARE = 4  # a pause is at least so many times as long as a look, so that watching does not slow the pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--once", action="store_true", help="print one view and end")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS", help="time between two looks (default: 2)"
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
    show(f"Next: geomprobe {_next(snapshot)} {arguments.run}", file=sys.stderr)
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
