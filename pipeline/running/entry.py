"""How every command ends: errors as one sentence and an exit code, ranks that say the same once,
a terminal that is gone.

if __name__ == "__main__":
    entry.run(main)
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from pipeline import artifacts
from pipeline.recipe.redaction import redact, shielded
from pipeline.running.batch_job import report_error, report_fault
from pipeline.running.runner import STOPPED, SYSTEM_ERROR, Stopped
from pipeline.running.stop_signals import end_with_parent
from pipeline.system import system_errors

BAD_INPUT = 2
INTERRUPTED = 130  # as a shell says of a program that SIGINT ended
_LEAVING = 5.0  # seconds for what is registered with atexit, after a request to leave
_BROKEN_PIPE = 141  # the same of SIGPIPE
# seconds that a node's other ranks leave its first to say the same: it may deliver to MLflow for 20 before it ends
_BEHIND_THE_FIRST = 25.0
_BEHIND_ANOTHER = 2.0  # the same for a rank that notices another one's end
# gloo, NCCL, c10d's store
_ANOTHER_RANK = re.compile(
    r"Connection (closed|reset) by peer|remote process exited|recv, got 0 bytes|Broken pipe"
)


def guarded(main: Callable[[], int | None]) -> int:
    """Run main; what goes wrong by the input, by the system or on request becomes one sentence on
    stderr and an exit code, without a traceback.

    ValueError: 2. What the system is behind (system_errors.py): 74. Stopped: 75. KeyboardInterrupt: 130. Whoever reads
    our output may leave before its end: 0 where all that was left to do was to print, else 141. A rank whose connection
    to another one breaks: 1. Any other passes.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    try:
        with shielded():
            return _guarded(main)
    finally:
        os.umask(umask)  # a recipe's permissions are those of the command that opens it


def _guarded(main: Callable[[], int | None]) -> int:
    try:
        code = main() or 0
        with system_errors.naming(Path("standard output")):
            sys.stdout.flush()  # here, where an error of it is still ours to tell
        return code
    except (Exception, KeyboardInterrupt) as error:
        found = system_errors.behind(error)
        if found is None and not _is_expected(error):
            raise
        code = _told(found or error)
        if os.environ.get("SAP_DEBUG"):
            raise
        return code


def _is_expected(error: BaseException) -> bool:
    """Whether an exception with which the system has nothing to do is told in one sentence;
    others are faults of ours.
    """
    if isinstance(error, RuntimeError):
        return (
            os.environ.get("WORLD_SIZE", "1") != "1"
            and _ANOTHER_RANK.search(str(error)) is not None
        )
    # io.UnsupportedOperation is both.
    return isinstance(error, KeyboardInterrupt | ValueError) and not isinstance(error, OSError)


def _told(error: BaseException) -> int:
    """Tell the user and the batch script of the error; returns the exit code that it stands for."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if isinstance(error, ValueError):  # once a node: a path may be missing on one node only
        sentence = redact(str(error))
        if not isinstance(error, artifacts.Busy):
            report_error(sentence)
        return _say(f"error: {sentence}", BAD_INPUT) if first else BAD_INPUT
    if isinstance(error, Stopped):
        return _say(f"stopped on request ({error}): run the same command again to go on", STOPPED)
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED) if first else INTERRUPTED
    if isinstance(error, RuntimeError):
        # where that rank has told why it ends, the launcher ends this one now;
        # it may have been killed, or its node is lost
        time.sleep(_BEHIND_ANOTHER)
        return (
            _say(
                "error: the connection to another rank is lost: it has ended, or its node is gone; "
                "its own words say why",
                1,
            )
            if first
            else 1
        )
    assert isinstance(error, OSError), "no other error comes here (_guarded)"
    gone = [stream for stream in (sys.stdout, sys.stderr) if _unusable(stream)]
    for stream in gone:
        # or the interpreter would try, and complain, once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if isinstance(error, BrokenPipeError) and gone:
        # stages tell their progress on stderr; stdout gets what is printed in the end
        return _BROKEN_PIPE if sys.stderr in gone else 0
    if gone and error.filename is None:
        error.filename = "standard output" if sys.stdout in gone else "standard error"
    sentence = redact(system_errors.sentence(error))
    report_fault(sentence)
    if not first:
        # where all fail alike the first has said it by then, and the launcher ends the others
        time.sleep(_BEHIND_THE_FIRST)
    return _say(f"error: {sentence}", SYSTEM_ERROR)


def _say(sentence: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    with contextlib.suppress(OSError):  # the log may be on the disk that is full
        print(sentence if rank == "0" else f"{sentence} (rank {rank})", file=sys.stderr, flush=True)
    return code


def _unusable(stream: TextIO) -> bool:
    """Whether what the stream still holds cannot be written: its reader is gone, or its disk is full."""
    try:
        stream.flush()
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    except ValueError:  # no file behind it
        return False
    except OSError:
        return True


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run main, guarded, and end the process with its exit code; a traceback is redacted as all else is.

    Where the `sap` that has started it has ended meanwhile, it does not begin.
    """
    with shielded():
        try:
            code = guarded(main) if end_with_parent() else STOPPED
        except Exception:
            traceback.print_exc()
            code = 1
    end(code)


def end(code: int) -> NoReturn:
    """End this process without the interpreter's finalization.

    Threads of communication libraries may outlive the process group. One that asks for the interpreter while it
    finalizes is ended in the middle of C++ code, and a rank that has done all its work aborts: "terminate called
    without an active exception", seen once in some hundred launches. What is registered with atexit still runs, and
    output is flushed.

    After a request to leave it runs for a while only. The request may have come while two threads imported, as MLflow's
    and our own do: the lock of imports was then seen to stay taken, and libraries (torch) import when they leave.
    """
    if code in (STOPPED, INTERRUPTED):
        threading.Thread(target=_leave, args=(code,), daemon=True).start()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _leave(code: int) -> NoReturn:
    time.sleep(_LEAVING)
    os._exit(code)
