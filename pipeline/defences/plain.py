"""Plain fine-tuning's step: the gradient of the useful loss, nothing else.

metrics = PlainStep(engine)(useful_batches, pairs, number)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.engines.engine import Engine, Shard
from pipeline.objectives.batches import MicroBatch
from pipeline.objectives.losses import useful_loss


class PlainStep:
    """Same call as SapStep; ignores the safety pairs and carries no state."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def __call__(self, useful: Sequence[MicroBatch], pairs: Any, number: int) -> dict[str, float]:
        loss, _ = self.engine.forward_backward(useful_loss, useful)
        return {"train/loss": loss}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def vectors(self) -> dict[str, Shard]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor], vectors: dict[str, Shard]) -> None:
        assert not state and not vectors, "a plain step has no state"
