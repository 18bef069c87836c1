"""The watchdog ends a process that stands still, with the reason and the stack; one that goes on it leaves alone."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.running.watchdog import EXIT_CODE, Watchdog
from tests.project import ROOT

HANGS = """
import time
from pipeline.running.watchdog import Watchdog
def stuck_in_the_collective():
    time.sleep(600)
with Watchdog(0.5, rank=3) as watchdog:
    watchdog.progress("step 12")
    stuck_in_the_collective()
"""


def test_a_hanging_rank_says_where_and_ends():
    found = subprocess.run(
        [sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert found.returncode == EXIT_CODE
    assert (
        "rank 3 on " in found.stderr
        and "after step 12" in found.stderr
        and "stuck_in_the_collective" in found.stderr
    )


QUIET = {
    "progress": """
with Watchdog(0.8, rank=0) as watchdog:
    for number in range(16):
        time.sleep(0.1)
        watchdog.progress(f"step {number}")
""",
    "zero": """
with Watchdog(0, rank=0) as watchdog:
    time.sleep(1)
""",
    "left": """
with Watchdog(0.3, rank=0) as watchdog:
    sentinel = watchdog._sentinel
assert sentinel.poll() is not None
time.sleep(1.5)
""",
}


@pytest.mark.parametrize("case", QUIET)
def test_it_is_quiet_with_progress_without_a_limit_and_after_the_block(case):
    code = (
        f"import time\nfrom pipeline.running.watchdog import Watchdog\n{QUIET[case]}print('done')"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "done\n", "")


HANGS_IN_C = """
import ctypes
from pipeline.running import watchdog
watchdog._BACKSTOP = 0.5
def stuck_with_the_lock_of_the_interpreter():
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):
        library.pthread_mutex_lock(mutex)
with watchdog.Watchdog(1, rank=0):
    print("up", flush=True)
    stuck_with_the_lock_of_the_interpreter()
"""
IS_STOPPED = """
import time
from pipeline.running import watchdog
watchdog._BACKSTOP = 0.2
with watchdog.Watchdog(1, rank=0) as dog:
    print("up", flush=True)
    for number in range(12):
        time.sleep(0.5)
        dog.progress(f"step {number}")
    print("done", flush=True)
"""


def start(code: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "up\n"
    return process


def test_a_hang_in_c_code_that_holds_the_interpreter_is_ended_from_outside():
    process = start(HANGS_IN_C)
    said = process.communicate(timeout=900)[1]
    assert process.returncode == -signal.SIGKILL
    assert "it hangs in C code" in said and "stuck_with_the_lock_of_the_interpreter" in said


@pytest.mark.parametrize("whole", [False, True], ids=["the process", "its whole group"])
def test_a_process_that_was_stopped_does_not_hang(whole):
    """SIGSTOP for longer than either limit, to the process alone or to all that belongs to it,
    as scontrol suspend does.
    """
    process = start(IS_STOPPED)
    send = (lambda number: os.killpg(process.pid, number)) if whole else process.send_signal
    send(signal.SIGSTOP)
    time.sleep(4)
    send(signal.SIGCONT)
    out, said = process.communicate(timeout=900)
    assert (process.returncode, out) == (0, "done\n"), said


def test_the_sentinel_ends_with_its_process():
    process = start(IS_STOPPED.replace("range(12)", "range(1200)"))
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert b"sentinel.py" in Path(f"/proc/{child}/cmdline").read_bytes()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    ("number", "failures", "starts"),
    [(errno.EFAULT, 2, 3), (errno.EAGAIN, 1, 2), (errno.EFAULT, 3, 3), (errno.ENOENT, 1, 1)],
)
def test_a_start_that_may_pass_is_tried_again(monkeypatch, number, failures, starts):
    popen, tried = subprocess.Popen, []

    def failing(command, **given):
        tried.append(given["env"]["PATH"])
        if len(tried) <= failures:
            raise OSError(number, os.strerror(number), command[0])
        return popen(command, **given)

    monkeypatch.setattr(subprocess, "Popen", failing)
    if failures < starts:
        with Watchdog(1800, rank=0) as watchdog:
            assert watchdog._sentinel.poll() is None
    else:
        with pytest.raises(OSError, match=os.strerror(number)), Watchdog(1800, rank=0):
            raise AssertionError("it was watched")
    assert len(tried) == starts
