"""Local processes: ranks of one stage, or independent jobs side by side.

torchrun is not used here because its agent dies of SIGUSR1 and shoots its workers thirty seconds after SIGTERM, whatever they are saving;
this launcher passes signals on and waits.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_GRACE = 30.0  # seconds between a rank's failure and the end of the others


def run_ranks(script: str, arguments: Sequence[str], ranks: int) -> int:
    """Run launch/`script` as `ranks` processes with RANK and friends set; the first failure's exit code, else 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    jobs = [_start(script, arguments, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, ranks) for rank in range(ranks)]
    return _wait(jobs)


def run_side_by_side(script: str, argument_lists: Sequence[Sequence[str]], slots: int) -> int:
    """Run launch/`script` once per argument list, `slots` at a time, each alone; the first failure's exit code, else 0."""
    waiting, running = list(argument_lists), []
    with _Forwarding(running):
        while waiting or running:
            while waiting and len(running) < slots:
                running.append(_start(script, waiting.pop(0), {}, slots))
            time.sleep(0.1)
            for job in [job for job in running if job.poll() is not None]:
                running.remove(job)
                if job.returncode:
                    for other in running:
                        other.terminate()
                    for other in running:
                        other.wait()
                    return job.returncode
    return 0


def threads_per_process(processes: int) -> int:
    """Cores shared equally; oversubscribed OpenMP threads are five times slower."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _start(script: str, arguments: Sequence[str], environment: dict[str, str], share: int) -> subprocess.Popen:
    threads = os.environ.get("OMP_NUM_THREADS") or str(threads_per_process(share))
    command = [sys.executable, str(ROOT / "launch" / script), *arguments]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads, **environment})


def _wait(jobs: list[subprocess.Popen]) -> int:
    code, deadline = 0, float("inf")
    with _Forwarding(jobs):
        while any(job.poll() is None for job in jobs):
            failed = next((job.returncode for job in jobs if job.returncode), 0)
            if failed and not code:
                code, deadline = failed, time.monotonic() + _GRACE
            if time.monotonic() > deadline:
                for job in jobs:
                    if job.poll() is None:
                        job.kill()
            time.sleep(0.1)
    return code or next((job.returncode for job in jobs if job.returncode), 0)


class _Forwarding:
    """Pass SIGTERM, SIGINT and SIGUSR1 on to the jobs as SIGTERM: they save and leave, we wait."""

    def __init__(self, jobs: list[subprocess.Popen]):
        self.jobs = jobs

    def __enter__(self) -> None:
        self.previous = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _forward(self, _number: int, _frame: object) -> None:
        for job in self.jobs:
            if job.poll() is None:
                job.terminate()
