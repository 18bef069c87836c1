"""How a program of ours learns that it is to save and leave:
by a signal, or by the end of the command that has started it.

for number in stop_signals(): signal.signal(number, leave)
end_with_parent()
"""

from __future__ import annotations

import contextlib
import os
import signal

from pipeline.running.fork_server import SET_PDEATHSIG, prctl

PARENT = "SAP_PARENT"  # in the environment of a job: the pid of the `sap` that waits for it


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, SIGINT and SIGUSR1 (Slurm's, before a time limit), and SIGHUP, of a terminal that is closed, unless
    nohup has this process ignore it.
    """
    requests = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    return (
        requests
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        else (*requests, signal.SIGHUP)
    )


def end_with_parent() -> bool:
    """Have the kernel send this process SIGTERM when the `sap` that has started it ends, even by SIGKILL.

    False where it has ended already.

    Nothing happens in a process that no `sap` has started, or on a kernel without prctl.
    """
    parent = os.environ.pop(PARENT, None)  # of this process alone, not of what it starts
    if parent is None:
        return True
    with contextlib.suppress(OSError, AttributeError):
        prctl(SET_PDEATHSIG, signal.SIGTERM)
    return str(os.getppid()) == parent
