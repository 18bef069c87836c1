"""What goes along with every training: the console, MLflow, and the watchdog over it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

from pipeline.defences.callback import Callback
from pipeline.running.watchdog import Watchdog
from pipeline.tracking.run import Run

_SECONDS = 5  # between two lines of progress


class Console(Callback):
    """A line for the first step, the last one and every few seconds between, and for every event, on stderr."""

    def __init__(self, label: str, keys: Sequence[str] = ()):
        """label: in front of each line. keys: of the metrics that are shown beside the loss."""
        self.label, self.keys = label, (*keys, "validation/task_loss")
        self.steps, self.printed = 0, 0.0

    def begin(self, steps: int) -> None:
        self.steps = steps

    def logged(self, metrics: dict[str, float], number: int) -> None:
        if number not in (1, self.steps) and time.monotonic() - self.printed <= _SECONDS:
            return
        self.printed = time.monotonic()
        seconds = metrics["time/step"]
        extra = "".join(
            f"  {key.split('/')[1]} {metrics[key]:.3g}" for key in self.keys if key in metrics
        )
        self._say(
            f"step {number}/{self.steps}  loss {metrics['train/loss']:.3f}{extra}  {seconds:.1f} s/step, "
            f"about {(self.steps - number) * seconds:.0f} s left"
        )

    def event(self, text: str, where: str = "") -> None:
        self._say(text + where)

    def _say(self, text: str) -> None:
        # a terminal that is closed must not end a training before it has saved
        with contextlib.suppress(OSError):
            print(f"[{self.label}] {text}", file=sys.stderr, flush=True)


class Tracked(Callback):
    """Steps and events go to the training's run in MLflow."""

    def __init__(self, run: Run):
        self.run = run

    def logged(self, metrics: dict[str, float], number: int) -> None:
        self.run.log_metrics(metrics, number)

    def event(self, text: str, where: str = "") -> None:
        self.run.event(text)  # without the path, which is this machine's


class Watched(Callback):
    """A training without progress ends (running/watchdog.py)."""

    def __init__(self, seconds: float, rank: int):
        self.seconds, self.rank = seconds, rank

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with Watchdog(self.seconds, self.rank) as self.watchdog:
            yield

    def progress(self, what: str) -> None:
        self.watchdog.progress(what)
