"""Jobs that start with their imports done: forked from a warm parent, a process that has imported all they need.

    with WarmParents(["pipeline.stages.train", "pipeline.running.lean_imports:import_peft"]) as warm:
        job = warm.fork(script, ["--config", "demo.yaml"], environment, {"RANK": "0"})

A job is a process of its own, and a child of this one: it ends alone, gives back its memory, and `poll`, `returncode`
and signals are those of subprocess.Popen. What it computes is, bit for bit, what a Python started for it computes.
Nothing is loaded ahead but code: each job maps a model's files from the page cache. fork_server.py is the parent.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.running import fork_server

# A Ctrl-C reaches every process of the terminal. We pass it on as SIGTERM; by itself it would be a traceback of each
# that still imports.
WITHOUT_CTRL_C = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
# While it imports: torch asks NVIDIA's library how many GPUs there are, and not CUDA, which does not survive a fork;
# NumPy's BLAS starts no threads (no stage multiplies with NumPy); MLflow sends nobody a message, as in mlflow_store.py.
_IMPORTING = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Forked:
    """A child that was forked elsewhere: what of subprocess.Popen its launcher needs."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None
        # names this process for ever, a pid only until somebody waits for it
        self._descriptor = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while it runs."""
        if self.returncode is None:
            # a signal's handler waited for it between our two lines
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
                    os.close(self._descriptor)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing happens where it has ended."""
        if self.returncode is None:
            with contextlib.suppress(OSError):  # a handler waited for it meanwhile
                signal.pidfd_send_signal(self._descriptor, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class WarmParents:
    """Warm parents, one for every number of threads: OpenMP and MKL read OMP_NUM_THREADS when they are loaded.

    torch.set_num_threads in the job would not be the same: it forbids MKL to use fewer, as it does on hyperthreads.
    preload: modules, or module:function to call, in their order. None is started before it is asked for.
    """

    def __init__(self, preload: Sequence[str]):
        self.preload = list(preload)
        self.problem: str | None = None  # why every job is a Python of its own
        self._parents: dict[str | None, _Parent] = {}

    def __enter__(self) -> WarmParents:
        try:
            if not sys.platform.startswith("linux"):
                raise OSError(f"{sys.platform} has no subreapers")
            if not (hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal")):
                # conda's and uv's, for old kernels
                raise OSError("this Python was built without pidfd_open")
            fork_server.prctl(fork_server.SET_CHILD_SUBREAPER, 1)
            os.close(os.pidfd_open(os.getpid()))
        except OSError as error:
            self._give_up(str(error))
        return self

    def __exit__(self, *_: object) -> None:
        for parent in self._parents.values():
            parent.close()
        with contextlib.suppress(OSError):
            fork_server.prctl(fork_server.SET_CHILD_SUBREAPER, 0)

    def begin(self, environment: dict[str, str]) -> _Parent | None:
        """Let the parent of jobs in this environment import meanwhile; None where there can be none."""
        threads = environment.get("OMP_NUM_THREADS")
        if self.problem is None and threads not in self._parents:
            self._parents[threads] = _Parent(self.preload, environment)
        return None if self.problem else self._parents[threads]

    def fork(
        self, script: Path, arguments: Sequence[str], environment: dict[str, str], own: dict[str, str],
        given_up: Callable[[], bool] = lambda: False,
    ) -> Forked | None:  # fmt: skip
        """Start the script in `environment` with its `own` added (its rank, its GPU); None where no parent can.

        environment: the parent's, too. given_up: whether nobody wants it any more; asked while the parent imports.
        """
        parent = self.begin(environment)
        if parent is None:
            return None
        while not parent.answered(0.1):
            if given_up():
                return None
        request = {"script": str(script), "arguments": list(arguments), "folder": str(Path.cwd())}
        found = parent.ask({**request, "environment": {**environment, **own}})
        if isinstance(found, str):
            self._give_up(found)
            return None
        return Forked(found)

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        print(
            f"note: every process imports for itself, which takes seconds: {problem}",
            file=sys.stderr,
            flush=True,
        )


class _Parent:
    """One of them, from its start on."""

    def __init__(self, preload: Sequence[str], environment: dict[str, str]):
        self._control, theirs = socket.socketpair()
        self._ready = False
        with theirs:
            given = [str(theirs.fileno()), str(os.getpid()), *preload]
            server = [
                *WITHOUT_CTRL_C,
                sys.executable,
                "-P",
                "-m",
                "pipeline.running.fork_server",
                *given,
            ]
            self._process = subprocess.Popen(
                server, env={**environment, **_IMPORTING}, pass_fds=[theirs.fileno()]
            )

    def answered(self, seconds: float) -> bool:
        """Whether it has said within so many seconds that its imports are done, or that they cannot be."""
        return self._ready or bool(select.select([self._control], [], [], seconds)[0])

    def ask(self, request: dict[str, object]) -> int | str:
        """The pid of a new job, or why there is none."""
        try:
            if not self._ready:
                answer = fork_server.receive(self._control)
                if answer is None or answer["problem"]:
                    return (
                        answer["problem"] if answer else "the process that imports ahead has ended"
                    )
                self._ready = True
            fork_server.send(self._control, request)
            answer = fork_server.receive(self._control)
        except ConnectionError:
            answer = None
        return (
            "the process that imports ahead has ended"
            if answer is None
            else answer.get("problem") or answer["pid"]
        )

    def close(self) -> None:
        self._control.close()
        # it may be importing still; it holds nothing, and jobs are not its children
        self._process.kill()
        self._process.wait()
