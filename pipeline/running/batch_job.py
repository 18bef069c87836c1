"""What a run and the batch script around it tell each other. Without a batch script nothing here does anything.

The Slurm scripts (slurm/common.sh) set these variables of the environment for the ranks they start:

    SAP_ERROR_FILE       where to write the sentence of an error that running again cannot mend (bad input);
                         exit codes do not come through srun
    SAP_FAULT_FILE       the same for one that may pass, or stay behind on this node
                         (a full disk, a folder that is not mounted)
    SAP_RESTART_REASON   why the run before this one ended, e.g. "time limit or preemption"
    SAP_PROGRESS         steps that were safe in a checkpoint when the batch script looked
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def report_error(sentence: str) -> None:
    """Tell the batch script that this error is final: it gives up instead of trying again."""
    _leave("SAP_ERROR_FILE", sentence)


def report_fault(sentence: str) -> None:
    """Tell the batch script why this run ends, so that it can say so when it tries again."""
    _leave("SAP_FAULT_FILE", sentence)


def _leave(variable: str, sentence: str) -> None:
    path = os.environ.get(variable)
    if path:
        # the disk that is full may be this one; the sentence is in the log, too
        with contextlib.suppress(OSError):
            Path(path).write_text(sentence + "\n")


def circumstances() -> str:
    """Which job this is and why it runs again, for the record of events: ", Slurm job 12, restart 1:
    time limit"; "" outside a job.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return ""
    restart, reason = (
        os.environ.get("SLURM_RESTART_COUNT", "0"),
        os.environ.get("SAP_RESTART_REASON"),
    )
    again = f", restart {restart}" if restart != "0" else ""
    return f", Slurm job {job}{again}" + (f": {reason}" if reason else "")


def saved_before() -> int:
    """Steps that are safe in a checkpoint, as the batch script saw it; 0 without one."""
    return int(os.environ.get("SAP_PROGRESS") or 0)
