"""A fresh process for every measurement, without the time that imports take.

with Processes() as processes:
    row = processes.call("pipeline.bench.measure:measure", case)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import shipped
from pipeline.bench.cases import Case
from pipeline.running.runner import Job, free_port
from pipeline.running.warm import WITHOUT_CTRL_C, WarmParents
from pipeline.system.system_errors import from_parts, naming

# What cases would else import one by one: DeepSpeed, PEFT, transformers' Trainer and the model.
_NEEDED = (
    "pipeline.bench.measure", "pipeline.running.lean_imports:import_peft",
    "pipeline.engines.deepspeed_private:import_deepspeed",
    "transformers.trainer", "transformers.models.llama.modeling_llama",
)  # fmt: skip
_SCRIPT = Path(__file__).with_name("answer.py")
_ENDED = "has no answer: its process ended"


class Processes:
    """Forks each process from one that has imported all there is to import, and has done nothing else (warm.py)."""

    def __init__(self) -> None:
        self._warm = WarmParents(_NEEDED)
        self._separate = self._answered = False

    def __enter__(self) -> Processes:
        self._warm.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._warm.__exit__()

    def call(
        self,
        function: str,
        *given: Any,
        seconds: float = 600,
        environment: dict[str, str] | None = None,
    ) -> Any:
        """`module:function` of what is given, in a process of its own; both are of JSON, but for cases.

        environment: what is to be different there. OSError where it met one, RuntimeError, with the reason, where no
        answer comes for another.
        """
        problem, answer = self._ask(function, given, seconds, environment or {})
        if problem and not self._answered and ("CUDA" in problem or problem == _ENDED):
            # An import has asked CUDA after all: processes that import for themselves are slower, and right.
            self._separate = True
            problem, answer = self._ask(function, given, seconds, environment or {})
        if problem:
            raise from_parts(answer) if answer else RuntimeError(f"{function}{given} {problem}")
        self._answered = True
        return answer

    def _ask(
        self, function: str, given: tuple[Any, ...], seconds: float, own: dict[str, str]
    ) -> tuple[str | None, Any]:
        """What went wrong, or None; and the answer, or where an error of the system went wrong, that in parts."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            arguments = [
                {"Case": asdict(value)} if isinstance(value, Case) else value for value in given
            ]
            with naming(folder):
                (folder / "asked").write_text(json.dumps([sys.path, function, arguments]))
            job, deadline = (
                self._start(name, {"MASTER_PORT": free_port(), **own}),
                time.monotonic() + seconds,
            )
            try:
                while job.poll() is None:
                    if time.monotonic() > deadline:
                        return f"gave no answer within {seconds:g} s", None
                    time.sleep(0.02)
            finally:
                job.kill()
                while job.poll() is None:  # it may be letting go of a GPU
                    time.sleep(0.02)
            answer = folder / "answer"
            return tuple(json.loads(answer.read_text())) if answer.is_file() else (_ENDED, None)

    def _start(self, folder: str, own: dict[str, str]) -> Job:
        shared = {**os.environ, "HF_HUB_OFFLINE": "1", **shipped.environment()}
        job = None if self._separate else self._warm.fork(_SCRIPT, [folder], shared, own)
        if job is not None:
            return job
        return subprocess.Popen(
            [*WITHOUT_CTRL_C, sys.executable, str(_SCRIPT), folder], env={**shared, **own}
        )
