"""What the training loop asks of a step. `Step` has plain fine-tuning's answers; a step overrides those that differ.

Imports no torch, so that a small defence may have its section and its step in one module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from pipeline.engines.engine import ShardedVector
    from pipeline.objectives.batches import MicroBatch, PairBatch

# draws this step's; a step that asks for none draws none
Pairs = Callable[[], "Sequence[PairBatch]"]
Metrics = dict[str, "float | torch.Tensor"]  # a scalar may still be on the device (Engine.read)


class Step(Protocol):
    """Leaves the gradient of a training step in the engine. It may carry state from step to step."""

    share: float = 1.0  # of a step's samples that it wants by themselves, as `part`
    summary_keys: tuple[str, ...] = ()  # of its metrics, those that the console shows

    def __call__(
        self,
        useful: Sequence[MicroBatch],
        pairs: Pairs,
        number: int,
        part: Sequence[MicroBatch] | None = None,
    ) -> Metrics:
        """Compute the gradient of step `number` (from 0) over the task's micro-batches;
        returns what was measured on the way.

        part: micro-batches of `share` of the samples, where that is below 1.
        train/loss is the loss whose gradient is taken.
        """
        ...

    def positions(self, number: int) -> tuple[int, int]:
        """Which task batch and which draw of pairs step `number` sees:
        a step of several kinds counts each by itself.
        """
        return number, number

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
        assert not state and not vectors, "this step has no state"
