"""``python -m geomprobe``, which is how torchrun starts it."""

import atexit
import contextlib
import os
import sys

code = 1


@atexit.register
def _leave_before_the_interpreter_ends() -> None:
    """End a process of a torchrun job here: the first function registered with atexit is the last that is called.

    Threads of gloo's outlive the process group, also where that is destroyed. One that frees the tensors of a last
    exchange needs Python's lock. Once the interpreter is ending, the thread cannot have it, and aborts the process
    ("terminate called without an active exception").
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and "torch.distributed" in sys.modules:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # its reader is gone, or it is closed
                stream.flush()
        os._exit(code)


from geomprobe.cli import main  # noqa: E402 - the package must not register anything before the function above

try:
    code = main()
except SystemExit as error:  # argparse, for wrong usage and --help
    code = error.code if isinstance(error.code, int) else 1
sys.exit(code)
