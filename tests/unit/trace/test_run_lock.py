"""Who writes a run is told from outside, and never at the writer's cost."""

import os
import socket
import subprocess
import threading

from support.live_writer import LiveWriter

from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.run_lock import Writer, writers

HOST = socket.gethostname()


def test_a_living_writer_is_named_and_a_killed_one_is_told_from_it(tmp_path):
    assert writers(tmp_path / "stream") == []
    with LiveWriter(tmp_path) as live:
        assert writers(tmp_path / "stream") == [Writer(live.pid, HOST, True)]
        live.kill()
        assert writers(tmp_path / "stream") == [Writer(live.pid, HOST, False)]
        with LiveWriter(tmp_path) as second:
            assert writers(tmp_path / "stream") == [Writer(second.pid, HOST, True)]
            second.close()
        assert writers(tmp_path / "stream") == []


def test_a_dead_writer_that_nobody_has_waited_for_is_dead(tmp_path):
    (tmp_path / "lock").touch()
    child = subprocess.Popen(["sleep", "60"])
    (tmp_path / "lock").write_text(f"process {child.pid} on {HOST}\n")
    os.kill(child.pid, 9)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert writers(tmp_path) == [Writer(child.pid, HOST, False)]
    child.wait()


def test_another_process_under_the_same_number_is_not_the_writer(tmp_path):
    (tmp_path / "lock").write_text(f"process {os.getpid()} on {HOST}\n")
    assert writers(tmp_path) == [Writer(os.getpid(), HOST, False)]


def test_a_writer_on_another_machine_is_neither_living_nor_dead(tmp_path):
    (tmp_path / "lock").write_text("process 1 on elsewhere.example\n")
    assert writers(tmp_path) == [Writer(1, "elsewhere.example", None)]


def test_several_locks_may_be_held_and_those_without_text_do_not_count(tmp_path):
    (tmp_path / "lock").write_text("")
    (tmp_path / "lock-1").write_text("process 1 on elsewhere\n")
    with open(tmp_path / "lock-2", "w") as held:
        held.write(f"process {os.getpid()} on {HOST}\n")
        held.flush()
        assert writers(tmp_path) == [Writer(os.getpid(), HOST, True), Writer(1, "elsewhere", None)]


def test_no_writer_is_ever_refused_because_somebody_asks(tmp_path):
    asking = threading.Event()
    asking.set()

    def ask():
        while asking.is_set():
            writers(tmp_path / "stream")

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(300):
            with RunFolder(tmp_path).writing():  # raises where the lock is held
                pass
    finally:
        asking.clear()
        thread.join()
