"""Leaving in order: SIGTERM, SIGUSR1, SIGINT, SIGHUP or a stop file ask the run to save at the step's end and leave.

with StopRequest(Path("runs/demo/.work/STOP")) as stop:
    ... if engine.ranks_with(stop.requested()) is read as more than 0: save at the step's end and leave
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.running.stop_signals import stop_signals

Handler = (
    Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
)  # as signal.signal returns it


class StopRequest:
    """Remembers a request; the loop asks once a step, before the update, on all ranks together.

    One that comes while the update, a validation or a checkpoint runs is obeyed at the next step's end.
    """

    def __init__(self, file: Path):
        self.file = file
        self.reason: str | None = None
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {
            number: signal.signal(number, self._remember) for number in stop_signals()
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether a stop is asked for, by a signal or by the stop file; `reason` says which."""
        if self.reason is None and self.file.exists():
            self.reason = f"stop file {self.file}"
        return self.reason is not None

    def obeyed(self, rank: int) -> None:
        """The state is saved: take the stop file away, or the next run would stop too."""
        if rank == 0:
            self.file.unlink(missing_ok=True)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
