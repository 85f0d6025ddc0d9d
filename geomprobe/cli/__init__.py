"""Record a PyTorch training run, replay it bit for bit, and measure the geometry of its path.

geomprobe record -o runs/a train.py --lr 0.1    trains, and keeps w_T and what replay needs
geomprobe replay runs/a                         the same run, bit for bit, measured
geomprobe verify runs/a                         the identities any trace must satisfy
geomprobe plot runs/a -o gamma.png              RSI, EB and cosine by epoch

exit codes: 0 done, 1 failed, 2 wrong usage, 3 the replay diverged or an identity is broken,
75 stopped by SIGTERM, to go on with --resume
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import geomprobe
from geomprobe.errors import GeomprobeError, Stopped
from geomprobe.trace.printable import printable, show

VERBS = ("record", "replay", "watch", "inspect", "verify", "plot", "report", "diff", "export")

_INTERRUPTED = 130  # 128 + SIGINT, as shells count it
_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and give its exit code; argparse itself exits with 2 on wrong usage."""
    arguments = build_parser().parse_args(argv)
    try:
        code = int(import_module(f"{__name__}.{arguments.verb}").run(arguments))
        sys.stdout.flush()
        return code
    except GeomprobeError as error:
        return _failed(arguments, str(error), error.exit_code)
    except Stopped as stop:
        print(f"geomprobe {arguments.verb}: stopped as asked; --resume goes on from here", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print(f"geomprobe {arguments.verb}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; without this, Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        return _failed(arguments, str(error), GeomprobeError.exit_code)
    except Exception as error:
        why = f"{type(error).__name__}: {error}. This is a fault of geomprobe's own; --debug shows where it is"
        return _failed(arguments, why, GeomprobeError.exit_code)


def _failed(arguments: argparse.Namespace, why: str, code: int) -> int:
    """Say in one line why the command has failed, after the traceback where that was asked for."""
    if arguments.debug:
        traceback.print_exc()
    show(f"geomprobe {arguments.verb}: error: {printable(why)}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each verb's module docstring is its help text.

    >>> build_parser().prog
    'geomprobe'
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("geomprobe", description=__doc__, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"geomprobe {geomprobe.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        module = import_module(f"{__name__}.{name}")
        text = str(module.__doc__)
        short = text.partition("\n")[0]
        verb = verbs.add_parser(name, help=short, description=text, formatter_class=raw, allow_abbrev=False)
        module.add_arguments(verb)
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
