"""The watchdog ends a process that stands still, with the reason and the stack; one that goes on it leaves alone."""

import subprocess
import sys
import time

import pytest

from pipeline.training import watchdog
from pipeline.training.watchdog import EXIT_CODE, Watchdog
from tests.project import ROOT

HANGS = """
import time
from pipeline.training.watchdog import Watchdog
def stuck_in_the_collective():
    time.sleep(600)
with Watchdog(0.5, rank=3) as watchdog:
    watchdog.progress("step 12")
    stuck_in_the_collective()
"""


def test_a_hanging_rank_says_where_and_ends():
    found = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == EXIT_CODE
    assert "rank 3 on " in found.stderr and "after step 12" in found.stderr and "stuck_in_the_collective" in found.stderr


@pytest.mark.parametrize("seconds", [0.4, 0])
def test_progress_or_zero_keeps_it_quiet(seconds):
    with Watchdog(seconds, rank=0) as watchdog:
        for number in range(8):
            time.sleep(0.1)
            if seconds:
                watchdog.progress(f"step {number}")


def test_after_the_block_nothing_is_watched():
    with Watchdog(0.2, rank=0):
        pass
    time.sleep(0.6)


def test_the_backstop_moves_on_with_progress_but_not_at_every_step(monkeypatch):
    """It starts a thread each time; armed once alone, it would end a healthy run."""
    armed, now = [], [1000.0]
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda seconds, exit: armed.append(now[0]))
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = watchdog.Watchdog(1800, 0)
    for seconds in (0.0, 0.4, 0.5, 0.3, 1.2, 0.1):
        now[0] += seconds
        dog.progress("a step")
    assert armed == pytest.approx([1000.0, 1001.2, 1002.4])
