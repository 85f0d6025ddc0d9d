"""What holds for every test. Its place also puts tests/ on the import path: `from support.cases import ...`."""

import os
import sys

# Before anything imports torch: tests run on all cores, and their small tensors gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    """Keep the process that reads parts of a run from one pass to the next.

    Each pass ends it before the script trains, since a script may wait for children of its own. No script of a test
    does, and a new reader costs 0.3 s, as much as most tests. tests/unit/trace/stream/test_reader.py ends it itself.
    """
    if "torch" in sys.modules:
        from geomprobe.passes import api, attempts

        attempts.end_readers = api.end_readers = lambda: None
