"""The watchdog's last resort, a process of its own: nothing in a process can run where C code
hangs with the interpreter's lock held.

    python -I -S sentinel.py PID SECONDS SIGNAL        # stdin: a byte, again and again, as long as PID is alive

Where none comes for SECONDS, PID gets SIGNAL, at which it prints its stacks (faulthandler), and is killed. A process
that is stopped (SIGSTOP, a debugger, scontrol suspend) is waited for. It ends when stdin is closed.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

# seconds to be heard again: both may have been stopped, and this one may go on first
_AFTER_A_STOP = 10.0


def heard(seconds: float) -> bool:
    """Whether a byte comes within so many seconds. Ends this process where none can come any more."""
    if not select.select([0], [], [], seconds)[0]:
        return False
    if not os.read(0, 65536):
        sys.exit()
    return True


def stopped(pid: int) -> bool:
    """Whether the process is stopped, by a signal or under a debugger. FileNotFoundError where it has ended."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1")
    return stat.rpartition(")")[2].split()[0] in "Tt"


def main(pid: int, seconds: float, dump: int) -> None:
    """Watch process `pid` until stdin is closed, or end it by the signal `dump` and SIGKILL."""
    # they reach a whole process group
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while heard(seconds) or stopped(pid) or heard(_AFTER_A_STOP):
        pass
    print(
        f"error: process {pid} has not answered for {seconds:.0f} s (train.watchdog_seconds): it "
        "hangs in C code; its stack:",
        file=sys.stderr,
        flush=True,
    )
    os.kill(pid, dump)
    time.sleep(2)
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
