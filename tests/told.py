"""A callback that a test looks through, or interferes by."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.defences.callback import Callback


class Told(Callback):
    """Calls on_metrics(metrics, number) and on_event(text); both may be replaced while it runs."""

    def __init__(
        self,
        on_metrics: Callable[[dict[str, float], int], object] = lambda metrics, number: None,
        on_event: Callable[[str], object] = lambda text: None,
    ):
        self.on_metrics, self.on_event = on_metrics, on_event

    def logged(self, metrics: dict[str, float], number: int) -> None:
        self.on_metrics(metrics, number)

    def event(self, text: str, where: str = "") -> None:
        self.on_event(text)
