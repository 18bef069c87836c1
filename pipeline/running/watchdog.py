"""A run that hangs says where, and ends: one rank that waits for ever would hold every node of the
job until its time limit.

with Watchdog(seconds=1800, rank=3) as watchdog:
    ... watchdog.progress("step 12 done")

Every rank watches itself. Where one rank is stuck, the others wait for it in a collective: after `seconds` without
progress each of them prints what it did last and the stack of its threads, and ends its process; the launcher then ends
the rest. The rank to look at is the one whose stack is in no collective, or that printed nothing.

What counts is time in which the process could run: one that is stopped (SIGSTOP, a debugger, scontrol suspend)
or whose machine sleeps does not hang.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

EXIT_CODE = 70  # EX_SOFTWARE
# seconds beyond the limit until the sentinel acts, where the thread below cannot run
_BACKSTOP = 60.0
_DUMP = signal.SIGRTMIN + 5  # at which this process prints its stacks: one that nobody else uses
_SENTINEL = Path(__file__).with_name("sentinel.py")
# Full tables of processes, and EFAULT: execve has said it of sound arguments, once in thousands of trainings, and the
# reason was not found (100,000 starts beside MLflow's thread never did).
_MAY_PASS = frozenset((errno.EAGAIN, errno.ENOMEM, errno.EFAULT))


class Watchdog:
    """Ends this process when `progress` was not called for `seconds` of its life; 0: never."""

    def __init__(self, seconds: float, rank: int):
        self.seconds, self.rank = seconds, rank
        self._count, self._what = 0, "the start"
        self._leaving = threading.Event()
        self._sentinel: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watchdog:
        if self.seconds:
            faulthandler.register(_DUMP)
            given = [str(os.getpid()), str(self.seconds + _BACKSTOP), str(int(_DUMP))]
            self._sentinel = _start([sys.executable, "-I", "-S", str(_SENTINEL), *given])
            os.set_blocking(self._heard_by().fileno(), False)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        if self._sentinel is not None:
            self._sentinel.kill()
            self._sentinel.wait()
            self._heard_by().close()

    def progress(self, what: str) -> None:
        """Something was finished, in a few words for the message: "step 12"."""
        self._count, self._what = self._count + 1, what

    def _heard_by(self) -> IO[bytes]:
        """Where the sentinel reads that this process is alive."""
        assert self._sentinel is not None and self._sentinel.stdin is not None
        return self._sentinel.stdin

    def _watch(self) -> None:
        tick = max(0.05, min(1.0, self.seconds / 10))
        idle, before, seen = 0.0, time.monotonic(), self._count
        while not self._leaving.wait(tick):
            now = time.monotonic()
            # A wait that took much longer than it was to take: the process was stopped meanwhile.
            idle, before = (idle + min(now - before, 2 * tick) if seen == self._count else 0.0), now
            seen = self._count
            # it was killed, or closed between our two lines
            with contextlib.suppress(OSError, ValueError):
                os.write(self._heard_by().fileno(), b".")
            if idle > self.seconds:
                print(
                    f"error: rank {self.rank} on {socket.gethostname()} has made no progress for "
                    f"{idle:.0f} s after {self._what} (train.watchdog_seconds): a rank hangs or "
                    "is gone; this one ends, its stack:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_CODE)


def _start(command: list[str], tries: int = 3) -> subprocess.Popen[bytes]:
    """A process that reads what we write; OSError where it cannot be started.

    It gets a copy of the environment: the C library's own may be changed by a thread that does not hold Python's lock.
    """
    while True:
        tries -= 1
        try:
            return subprocess.Popen(command, stdin=subprocess.PIPE, env=dict(os.environ))
        except OSError as error:
            if not tries or error.errno not in _MAY_PASS:
                raise
        time.sleep(0.1)
