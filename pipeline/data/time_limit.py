"""A limit on the time of code that is not ours, such as a chat template.

with time_limit(20, "the chat template does not end"):
    ...
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _TimeIsUp(Exception):
    pass


@contextmanager
def time_limit(seconds: float, sentence: str) -> Iterator[None]:
    """ValueError with the sentence after that many seconds. Without effect outside the main thread, as signals are.

    A timer that runs already goes on afterwards, and is left alone where it ends sooner.
    """
    others = signal.getitimer(signal.ITIMER_REAL)[0]
    if threading.current_thread() is not threading.main_thread() or 0 < others < seconds:
        yield
        return
    started = time.monotonic()

    def ended(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, ended)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeIsUp:
        raise ValueError(sentence) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if others:
            signal.setitimer(signal.ITIMER_REAL, max(others - (time.monotonic() - started), 0.001))
