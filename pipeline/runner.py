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

from pipeline import shipped

STOPPED = 75  # EX_TEMPFAIL: stopped on request; the same command goes on
# glibc hands every freed activation back to the kernel and faults it in again; keeping it took an align step of the demo from 3.7 to 3.2 s.
_ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "67108864"}
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
_GRACE = 30.0  # seconds between a rank's failure and the end of the others


def run_ranks(script: str, arguments: Sequence[str], ranks: int) -> int:
    """Run launch/`script` as `ranks` processes with RANK and friends set.

    Returns the first failure's exit code; STOPPED where a signal asked to stop (it may have come in the last step, with the work done); else 0.
    """
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    jobs = [_start(script, arguments, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, ranks) for rank in range(ranks)]
    return _wait(jobs)


def run_side_by_side(script: str, argument_lists: Sequence[Sequence[str]], slots: int) -> int:
    """Run launch/`script` once per argument list, `slots` at a time, each alone, on a GPU of its own where there are any.

    Returns as `run_ranks`: the jobs have nothing to do with each other, so one's failure leaves the others alone. After a signal nothing new is started.
    """
    waiting, running, free, code = list(argument_lists), [], list(range(slots)), 0
    slot_of: dict[subprocess.Popen, int] = {}
    with _Forwarding(running) as forwarding:
        while running or (waiting and not forwarding.received):
            while waiting and free and not forwarding.received:
                slot = free.pop(0)
                job = _start(script, waiting.pop(0), {**_one_gpu(slot), "MASTER_PORT": _free_port()}, slots)
                running.append(job)
                slot_of[job] = slot
            time.sleep(0.1)
            for job in [job for job in running if job.poll() is not None]:
                running.remove(job)
                free.append(slot_of[job])
                code = code or job.returncode
    return _outcome(code, forwarding.received)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _one_gpu(slot: int) -> dict[str, str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}


def threads_per_process(processes: int) -> int:
    """Cores shared equally; oversubscribed OpenMP threads are five times slower."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _start(script: str, arguments: Sequence[str], environment: dict[str, str], share: int) -> subprocess.Popen:
    threads = os.environ.get("OMP_NUM_THREADS") or str(threads_per_process(share))
    command = [sys.executable, str(shipped.launch_script(script)), *arguments]
    allocator = {} if any(Path(device).exists() for device in _GPU_DEVICES) else _ALLOCATOR
    inherited = {**allocator, **os.environ, **shipped.environment()}
    return subprocess.Popen(command, env={**inherited, "OMP_NUM_THREADS": threads, **environment})


def _wait(jobs: list[subprocess.Popen]) -> int:
    code, deadline = 0, float("inf")
    with _Forwarding(jobs) as forwarding:
        while None in [job.poll() for job in jobs]:  # a list: every job is polled, or a failure behind a hanging rank is not seen
            failed = next((job.returncode for job in jobs if job.returncode), 0)
            if failed and not code:
                code, deadline = failed, time.monotonic() + _GRACE
            if time.monotonic() > deadline:
                for job in jobs:
                    if job.poll() is None:
                        job.kill()
            time.sleep(0.1)
    return _outcome(code or next((job.returncode for job in jobs if job.returncode), 0), forwarding.received)


def _outcome(code: int, stopped: bool) -> int:
    """A process that had no handler yet when the request to stop came has ended by it: that is no failure."""
    return STOPPED if stopped and code in (0, -signal.SIGTERM) else code


class _Forwarding:
    """Pass SIGTERM, SIGINT and SIGUSR1 on to the jobs as SIGTERM: they save and leave, we wait."""

    def __init__(self, jobs: list[subprocess.Popen]):
        self.jobs, self.received = jobs, False

    def __enter__(self) -> _Forwarding:
        self.previous = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _forward(self, _number: int, _frame: object) -> None:
        self.received = True
        for job in self.jobs:
            if job.poll() is None:
                job.terminate()
