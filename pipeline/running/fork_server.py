"""A process that has imported what jobs need, and forks one for every request:
the far side of pipeline/running/warm.py.

    python -P -m pipeline.running.fork_server DESCRIPTOR CLIENT [MODULE | MODULE:FUNCTION]...

It listens at a socket and does nothing else: no CUDA context, no OpenMP pool, no thread. A job goes on in its fork as
if the interpreter had just been started with the job's script: arguments, environment, folder and signals are its own,
and it ends as any program does. Jobs are forked twice, so that the client becomes their parent (it is a subreaper): it
waits for them and signals them itself, whatever becomes of this process. Where it ends without them, the kernel sends
them SIGTERM (PR_SET_PDEATHSIG, prctl(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.libraries import torch_private

SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
# They may be sent to the whole process group: this process ends with its client. Ctrl-C is ignored since its start.
_REQUESTS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
# pyarrow's allocator, which takes its locks before a fork and starts its thread again
_FORKABLE = {"jemalloc_bg_thd"}
_LENGTH = struct.Struct("!I")


def send(control: socket.socket, message: dict[str, Any]) -> None:
    """Send a JSON object. OSError where the other side is gone."""
    text = json.dumps(message).encode()
    control.sendall(_LENGTH.pack(len(text)) + text)


def receive(control: socket.socket) -> dict[str, Any] | None:
    """The next JSON object; None where the other side is gone."""
    parts: list[bytes] = []
    for length in (_LENGTH.size, None):
        wanted = length or _LENGTH.unpack(parts[0])[0]
        part = b""
        while len(part) < wanted:
            try:
                more = control.recv(wanted - len(part))
            except ConnectionError:
                more = b""
            if not more:
                return None
            part += more
        parts.append(part)
    return json.loads(parts[1])


def prctl(option: int, value: int) -> None:
    """prctl(2). OSError where the kernel refuses."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> None:
    """Serve until the client closes the socket; in a fork, be the job that was asked for."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
    control, client = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    given = dict(os.environ)
    job = _serve(control, sys.argv[3:])
    if job is None:
        return
    request, between = job
    control.close()
    _begin(request, _with_imports(request["environment"], given), between, client)
    runpy.run_path(request["script"], run_name="__main__")


def _serve(control: socket.socket, wanted: Sequence[str]) -> tuple[dict[str, Any], int] | None:
    """Answer requests. None in this process; in each of its jobs, the request and the pid of the process between."""
    problem = _import(wanted) or _unforkable()
    gc.collect()
    gc.freeze()  # what is collected later in a job leaves these pages alone: they stay shared
    with contextlib.suppress(ConnectionError):  # the client has ended
        send(control, {"problem": problem})
        while (request := receive(control)) is not None:
            try:
                pid, between = _fork()
            except (OSError, ValueError) as error:  # no memory, no more processes
                send(control, {"problem": f"no process can be forked ({error})"})
                continue
            if not pid:
                return request, between
            send(control, {"pid": pid})
    return None


def _import(wanted: Sequence[str]) -> str | None:
    """Import the modules, call the functions; what failed, or None."""
    for name in wanted:
        module, _, function = name.partition(":")
        try:
            found = importlib.import_module(module)
            if function:
                getattr(found, function)()
        except Exception as error:
            # a process that imports for itself meets it again, and tells it in full
            return f"{name} cannot be imported ahead ({type(error).__name__}: {error})"
    return None


def _with_imports(wanted: dict[str, str], given: dict[str, str]) -> dict[str, str]:
    """The environment of a job, with what imports have put into this process's since it had `given`.

    What the job was to have of its own stands: an import would have found it, and most set what is not set.
    """
    told = {name: value for name, value in os.environ.items() if given.get(name) != value}
    return wanted | {
        name: value for name, value in told.items() if wanted.get(name) == given.get(name)
    }


def _unforkable() -> str | None:
    """What would be broken in a fork, or None: locks that another thread holds,
    CUDA once it has been asked anything.
    """
    tasks = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
    others = [
        name
        for name in ((task / "comm").read_text().strip() for task in tasks)
        if name not in _FORKABLE
    ]
    if others:
        return f"an import has started a thread ({', '.join(others)})"
    try:
        broken_by_fork = torch_private.broken_by_fork()
    except ValueError as error:
        return str(error)
    pid = os.fork()
    if not pid:
        broken = True
        try:
            broken = broken_by_fork()
        finally:
            os._exit(int(broken))
    return (
        "an import has asked CUDA, which does not survive a fork" if os.waitpid(pid, 0)[1] else None
    )


def _fork() -> tuple[int, int]:
    """Fork a child of the client's. (its pid, 0) here, (0, pid of the process between) in the child."""
    reading, writing = os.pipe()
    try:
        between = os.fork()
    except OSError:
        os.close(reading)
        os.close(writing)
        raise
    if between:
        os.close(writing)
        with os.fdopen(reading) as stream:
            told = stream.read()
        os.waitpid(between, 0)  # only then is the client the parent, and may wait for it
        if not told:
            raise OSError("no memory, or too many processes")
        return int(told), 0
    between, pid = os.getpid(), -1
    try:
        pid = os.fork()
        if pid:
            os.write(writing, str(pid).encode())
    finally:
        if pid:
            os._exit(0)
    os.close(reading)
    os.close(writing)
    return 0, between


def _begin(request: dict[str, Any], environment: dict[str, str], between: int, client: int) -> None:
    """Take on what a process of its own would have been started with."""
    while os.getppid() == between:
        time.sleep(0.001)
    prctl(SET_PDEATHSIG, signal.SIGTERM)  # it may save, as if it had been asked to stop
    if os.getppid() != client:
        os._exit(0)  # it has ended meanwhile
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(environment)
    # a new process has a seed of its own; Python's generator takes one at a fork
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    sys.argv = [request["script"], *request["arguments"]]
    sys.path.insert(0, str(Path(request["script"]).parent))
    # A request that came before now ends this job, as it would end a process that still imports.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _REQUESTS)


if __name__ == "__main__":
    main()
