"""Plain fine-tuning's step: the gradient of the useful loss, nothing else.

metrics = PlainStep(engine)(useful_batches, pairs, number)
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.defences.step import Metrics, Pairs, Step
from pipeline.engines.engine import Engine
from pipeline.objectives.batches import MicroBatch
from pipeline.objectives.losses import useful_loss


class PlainStep(Step):
    """Ignores the safety pairs and carries no state."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def __call__(
        self,
        useful: Sequence[MicroBatch],
        pairs: Pairs,
        number: int,
        part: Sequence[MicroBatch] | None = None,
    ) -> Metrics:
        loss, _ = self.engine.forward_backward(useful_loss, useful)
        return {"train/loss": loss}
