"""A fresh process for every measurement, without the time that imports take.

    processes = Processes()
    row = processes.call("pipeline.bench.measure:measure", case)
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import threading
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

_ENDED = "has no answer: its process ended"


class Processes:
    """Forks each process from one that has imported all there is to import and has done nothing else."""

    def __init__(self) -> None:
        # Asked through NVIDIA's library: CUDA itself does not survive a fork once it has been asked anything.
        os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "HF_HUB_OFFLINE": "1"}
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pipeline.bench.measure", "pipeline.bench.preloaded"])
        self._answered = False

    def call(self, function: str, *given: Any, seconds: float = 600, environment: dict[str, str] | None = None) -> Any:
        """`module:function` of what is given, in a process of its own; the answer is plain Python. RuntimeError, with the reason, where none comes."""
        problem, answer = self._ask(function, given, seconds, environment or {})
        if problem and not self._answered and ("CUDA" in problem or problem == _ENDED):
            # An import has asked CUDA after all: processes that import for themselves are slower, and right.
            self._context = multiprocessing.get_context("spawn")
            problem, answer = self._ask(function, given, seconds, environment or {})
        if problem:
            raise RuntimeError(f"{function}{given} {problem}")
        self._answered = True
        return answer

    def _ask(self, function: str, given: tuple[Any, ...], seconds: float, environment: dict[str, str]) -> tuple[str | None, Any]:
        """What went wrong, or None, and the answer."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(theirs, function, given, {"MASTER_PORT": str(port), **environment}))
        process.start()
        theirs.close()
        try:
            return ours.recv() if ours.poll(seconds) else (f"gave no answer within {seconds:g} s", None)
        except EOFError:
            process.join(10)  # it ends, and may still be saying why
            return _ENDED, None
        finally:
            process.kill()
            process.join()


def _answer(pipe: Connection, function: str, given: tuple[Any, ...], environment: dict[str, str]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= environment
    module, name = function.split(":")
    with pipe:
        try:
            pipe.send((None, getattr(importlib.import_module(module), name)(*given)))
        except Exception as error:  # whatever it is, it is the caller's to say
            traceback.print_exc()
            pipe.send((f"failed: {''.join(traceback.format_exception_only(error)).strip()}", None))
            sys.exit(1)


def _end_with_parent() -> None:
    """However the program that asked has ended: a process left behind would keep its GPU."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
