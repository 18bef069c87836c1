"""A fresh process for every measurement, without the time that imports take.

    processes = Processes()
    row = processes.call("pipeline.bench.measure:measure", case)
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import threading
from multiprocessing.connection import Connection, wait
from typing import Any


class Processes:
    """Forks each process from one that has imported all there is to import and has done nothing else."""

    def __init__(self) -> None:
        # Asked through NVIDIA's library: CUDA itself does not survive a fork once it has been asked anything.
        os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "HF_HUB_OFFLINE": "1"}
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pipeline.bench.measure", "pipeline.bench.preloaded"])
        self._answered = False

    def call(self, function: str, *given: Any, seconds: float = 600, environment: dict[str, str] | None = None) -> Any:
        """`module:function` of what is given, in a process of its own. RuntimeError where no answer comes within `seconds`."""
        answer = self._ask(function, given, seconds, environment or {})
        if not answer and not self._answered:  # an import has asked CUDA after all: processes that import for themselves are slower, and right
            self._context, self._answered = multiprocessing.get_context("spawn"), True
            answer = self._ask(function, given, seconds, environment or {})
        if not answer:
            raise RuntimeError(f"{function}{given} gave no answer within {seconds:g} s, or its process ended: see above")
        self._answered = True
        return answer[0]

    def _ask(self, function: str, given: tuple[Any, ...], seconds: float, environment: dict[str, str]) -> list[Any]:
        """The answer, or nothing."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(theirs, function, given, {"MASTER_PORT": str(port), **environment}))
        process.start()
        theirs.close()
        try:
            answer = [ours.recv()] if ours.poll(seconds) else []
            process.join(10 if answer else 0)
            return answer
        except EOFError:
            process.join(10)  # it ends, and may still be saying why
            return []
        finally:
            process.kill()
            process.join()


def _answer(pipe: Connection, function: str, given: tuple[Any, ...], environment: dict[str, str]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= environment
    module, name = function.split(":")
    with pipe:
        pipe.send(getattr(importlib.import_module(module), name)(*given))


def _end_with_parent() -> None:
    """However the program that asked has ended: a process left behind would keep its GPU."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
