"""A run that hangs says where, and ends: one rank that waits for ever would hold every node of the job until its time limit.

with Watchdog(seconds=1800, rank=3) as watchdog:
    ... watchdog.progress("step 12 done")

Every rank watches itself. Where one rank is stuck, the others wait for it in a collective: after `seconds` without progress each of
them prints what it did last and the stack of its threads, and ends its process; the launcher then ends the rest. The rank to look at is the one whose
stack is in no collective, or that printed nothing.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time

EXIT_CODE = 70  # EX_SOFTWARE
_BACKSTOP = 60.0  # seconds; the thread below cannot run where C code hangs with the interpreter's lock held, faulthandler's can


class Watchdog:
    """Ends this process when `progress` was not called for `seconds`; 0: never."""

    def __init__(self, seconds: float, rank: int):
        self.seconds, self.rank = seconds, rank
        self._last, self._what, self._armed = time.monotonic(), "the start", 0.0
        self._leaving = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self.progress(self._what)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    def progress(self, what: str) -> None:
        """Something was finished, in a few words for the message: "step 12"."""
        self._last, self._what = time.monotonic(), what
        if self.seconds and self._last - self._armed > 1.0:  # it starts a thread every time, which takes as long as a small model's layer
            self._armed = self._last
            faulthandler.dump_traceback_later(self.seconds + _BACKSTOP, exit=True)

    def _watch(self) -> None:
        while not self._leaving.wait(max(0.05, min(1.0, self.seconds / 10))):
            idle = time.monotonic() - self._last
            if idle > self.seconds:
                print(
                    f"error: rank {self.rank} on {socket.gethostname()} has made no progress for {idle:.0f} s after {self._what} "
                    "(train.watchdog_seconds): a rank hangs or is gone; this one ends, its stack:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_CODE)
