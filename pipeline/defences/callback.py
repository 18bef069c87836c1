"""What goes along with a training: the loop calls it at these points,
and callbacks in the order in which they are given.
"""

from __future__ import annotations

import contextlib

import torch

from pipeline.engines.engine import ShardedVector


class Callback:
    """Every method may be left as it is. Those of the first group are called on all ranks, the others on the first."""

    def begin(self, steps: int) -> None:
        """A training of so many steps is about to begin, or to go on. ValueError where they do not suffice."""

    def around(self) -> contextlib.AbstractContextManager[object]:
        """What is open while the training runs."""
        return contextlib.nullcontext()

    def updated(self, number: int) -> None:
        """`number` steps have been taken; not called for one whose update is left out."""

    def progress(self, what: str) -> None:
        """Something was finished, in a few words."""

    def weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the engine's weights are those that count: for validation, and for the product."""
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What it carries, the same on every rank."""
        return {}

    def vectors(self) -> dict[str, ShardedVector]:
        """What it carries of the trained weights' size, this rank's shard of it."""
        return {}

    def load_state_dict(
        self, state: dict[str, torch.Tensor], vectors: dict[str, ShardedVector]
    ) -> None:
        """Take back what `state_dict` and `vectors` gave."""

    def logged(self, metrics: dict[str, float], number: int) -> None:
        """Step `number` (from 1) has these metrics."""

    def event(self, text: str, where: str = "") -> None:
        """Something happened that people should know. where: the path that it was in, for a console."""
