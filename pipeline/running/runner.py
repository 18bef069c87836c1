"""Local processes: ranks of one stage, or independent jobs side by side. Where warm parents are given, forked from one.

torchrun is not used here because its agent dies of SIGUSR1 and shoots its workers thirty seconds after SIGTERM,
whatever they are saving; this launcher passes signals on and waits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from pipeline import shipped
from pipeline.running import devices
from pipeline.running.stop_signals import PARENT, stop_signals
from pipeline.running.warm import WITHOUT_CTRL_C, Forked, WarmParents
from pipeline.system.system_errors import AGAIN

STOPPED = 75  # EX_TEMPFAIL: stopped on request; the same command goes on
# EX_IOERR: a full disk, a folder that is gone; what else would write there fails, too
SYSTEM_ERROR = 74
# glibc hands every freed activation back to the kernel and faults it in again;
# keeping it took an align step of the demo from 3.7 to 3.2 s.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
}
Job = subprocess.Popen | Forked
_GRACE = 30.0  # seconds between a rank's failure and the end of the others
# the same where it has been told why: the others wait for that rank, or are about to say the same
_GRACE_SAID = 1.0
# Of a process that a signal ended: what it could not say.
_LAST_WORDS = {
    signal.SIGBUS: "a file of weights was cut short while it was read, or its disk or network "
    "file system fails (SIGBUS): see whether the model's and output_dir's folders "
    "are sound",
    signal.SIGKILL: "a process was killed (SIGKILL), as the system does where memory is full, "
    "and the watchdog after its words: free memory, or lower --jobs or the "
    "recipe's micro_batch_size",
}


class Stopped(KeyboardInterrupt):
    """A request to stop that came while this process itself was at work; its text names the signal."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside the block the signals that ask to leave raise Stopped, so that what is half-written is tidied up,
    and the same command goes on.
    """
    requests = stop_signals()

    def leave(number: int, _frame: FrameType | None) -> None:
        for each in requests:  # once: what tidies up must not be interrupted
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    previous = {number: signal.signal(number, leave) for number in requests}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_ranks(
    script: str, arguments: Sequence[str], ranks: int, warm: WarmParents | None = None
) -> int:
    """Run launch/`script` as `ranks` processes with RANK and friends set.

    Returns STOPPED where a signal asked to stop (it may have come in the last step, with the work done, or after a
    failure, which the same command meets again); else the first failure's exit code; else 0.
    """
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    with _Forwarding(warm) as forwarding:
        for rank in range(ranks):
            forwarding.start(
                script, arguments, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, ranks
            )
        code = _wait(forwarding.jobs)
    return STOPPED if forwarding.received else code


def run_side_by_side(
    script: str,
    argument_lists: Sequence[Sequence[str]],
    slots: int,
    warm: WarmParents | None = None,
) -> int:
    """Run launch/`script` once per argument list, `slots` at a time, each alone,
    on a GPU of its own where there are any.

    Returns as `run_ranks`: the jobs have nothing to do with each other, so one's failure leaves the others alone. After
    a signal, or an error of the system, nothing new is started.
    """
    waiting, free, code = list(argument_lists), list(range(slots)), 0
    slot_of: dict[Job, int] = {}
    with _Forwarding(warm) as forwarding:
        while forwarding.jobs or (waiting and not forwarding.received):
            while waiting and free and not forwarding.received:
                slot = free.pop(0)
                job = forwarding.start(
                    script, waiting.pop(0), {**_one_gpu(slot), "MASTER_PORT": free_port()}, slots
                )
                if job is not None:
                    slot_of[job] = slot
            time.sleep(0.1)
            for job in [job for job in forwarding.jobs if job.poll() is not None]:
                forwarding.jobs.remove(job)
                free.append(slot_of[job])
                _say_for_the_dead([job])
                code = code or _failure([job])
                if _failure([job]) == SYSTEM_ERROR:
                    waiting.clear()
    return STOPPED if forwarding.received else code


def free_port() -> str:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _one_gpu(slot: int) -> dict[str, str]:
    found = devices.gpus()
    return {"CUDA_VISIBLE_DEVICES": found[slot % len(found)].name} if found else {}


def threads_per_process(processes: int) -> int:
    """Cores shared equally; oversubscribed OpenMP threads are five times slower."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def environment(processes: int) -> dict[str, str]:
    """What jobs have in their environment where so many share this machine, apart from what is each one's own."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(threads_per_process(processes))
    allocator = {} if devices.gpus() else _ALLOCATOR
    return {**allocator, **os.environ, **shipped.environment(), "OMP_NUM_THREADS": threads}


def _start(
    script: str, arguments: Sequence[str], own: dict[str, str], share: int, forwarding: _Forwarding
) -> Job | None:
    """Start launch/`script`, `share` at a time; None where a request to stop came while the warm parent imported."""
    path, shared = shipped.launch_script(script), environment(share)
    own = {**own, PARENT: str(os.getpid())}
    if forwarding.warm is not None:
        job = forwarding.warm.fork(path, arguments, shared, own, lambda: forwarding.received)
        if job is not None or forwarding.received:
            return job
    return subprocess.Popen(
        [*WITHOUT_CTRL_C, sys.executable, str(path), *arguments], env={**shared, **own}
    )


def _wait(jobs: list[Job]) -> int:
    code, deadline = 0, float("inf")
    # a list: every job is polled, or a failure behind a hanging rank is not seen
    while None in [job.poll() for job in jobs]:
        failed = _failure(jobs)
        if failed and not code:
            _say_for_the_dead(jobs)
            code, deadline = (
                failed,
                time.monotonic()
                + (_GRACE_SAID if failed == SYSTEM_ERROR or -failed in _LAST_WORDS else _GRACE),
            )
        if time.monotonic() > deadline:
            for job in jobs:
                if job.poll() is None:
                    job.kill()
        time.sleep(0.1)
    if not code:
        _say_for_the_dead(jobs)
    return code or _failure(jobs)


def _failure(jobs: list[Job]) -> int:
    """The exit code that says most: an error of the system, which the others' broken connections follow from, else that
    of the lowest rank that failed.

    SIGBUS is one: a file that was mapped into memory has been cut, or its disk or network file system does not answer.
    """
    codes = [job.returncode for job in jobs if job.returncode]
    return SYSTEM_ERROR if {SYSTEM_ERROR, -signal.SIGBUS} & set(codes) else next(iter(codes), 0)


def _say_for_the_dead(jobs: list[Job]) -> None:
    """What a process that the system ended could not say itself."""
    for number, sentence in _LAST_WORDS.items():
        if any(job.returncode == -number for job in jobs):
            print(f"error: {sentence}, and {AGAIN}", file=sys.stderr, flush=True)


class _Forwarding:
    """Pass the signals that ask to leave on to the jobs as SIGTERM: they save and leave, we wait.

    After one nothing is started.
    """

    def __init__(self, warm: WarmParents | None) -> None:
        self.warm = warm
        self.jobs: list[Job] = []
        self.received = False

    def start(
        self, script: str, arguments: Sequence[str], own: dict[str, str], share: int
    ) -> Job | None:
        """Start launch/`script` with its own in its environment; None where the request to stop has come before."""
        if self.received:
            return None
        job = _start(script, arguments, own, share, self)
        if job is None:
            return None
        self.jobs.append(job)
        if self.received:  # it came while the job was being started, and did not reach it
            job.terminate()  # type: ignore[unreachable]  # a signal's handler sets it
        return job

    def __enter__(self) -> _Forwarding:
        self.previous = {number: signal.signal(number, self._forward) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _forward(self, _number: int, _frame: object) -> None:
        self.received = True
        for job in self.jobs:
            if job.poll() is None:
                job.terminate()
