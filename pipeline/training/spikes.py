"""Losses and gradient norms that leap: beyond a multiple of their running median.

spikes = Spikes(20.0, from_first(logged(folder / "metrics.jsonl")), kind=lambda number: number % 5 == 0)
sentence = spikes.seen(metrics, number)  # None where there is none
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path

_WINDOW, _LEAST = 50, 10  # steps that the median is of, and from how many on there is one
_WATCHED = {"train/loss": "the loss", "train/grad_norm": "the gradient's norm"}


def logged(metrics: Path) -> list[dict[str, float]]:
    """What `Spikes` needs of a run's metrics so far; nothing where there are none.

    Of all steps: which were spikes depends on those before.
    """
    lines = map(json.loads, metrics.read_text().splitlines()) if metrics.is_file() else ()
    return [
        {key: line[key] for key in ("step", *_WATCHED)}
        for line in lines
        if all(key in line for key in _WATCHED)
    ]


class Spikes:
    """Which steps are spikes, each against the last ones of its own kind:
    Lisa's on safe responses have other losses than those on the task.

    before: numbers of the steps so far, where the run is resumed: what is skipped must not depend on where it was
    stopped. kind: of a step, from 0.
    """

    def __init__(
        self,
        factor: float,
        before: Sequence[dict[str, float]],
        kind: Callable[[int], Hashable] = lambda number: None,
    ):
        self.factor, self.kind, self.in_a_row = factor, kind, 0
        self._before: dict[Hashable, deque[dict[str, float]]] = defaultdict(
            lambda: deque(maxlen=_WINDOW)
        )
        for metrics in before:
            self.seen(metrics, int(metrics["step"]) - 1)

    def seen(self, metrics: dict[str, float], number: int) -> str | None:
        """Half a sentence where step `number` (from 0) is a spike; it then stays out of the median.

        `in_a_row`: spikes up to and with this step.
        """
        before = self._before[self.kind(number)]
        found = next(
            filter(None, (self._leap(key, before, metrics[key]) for key in _WATCHED)), None
        )
        if found is None:
            before.append({key: metrics[key] for key in _WATCHED})
        self.in_a_row = 0 if found is None else self.in_a_row + 1
        return found

    def _leap(self, key: str, before: Collection[dict[str, float]], value: float) -> str | None:
        middle = (
            abs(statistics.median(line[key] for line in before)) if len(before) >= _LEAST else 0.0
        )
        return (
            f"{_WATCHED[key]} is {value:.3g}, {value / middle:.0f} times its median"
            if value > self.factor * middle > 0
            else None
        )
