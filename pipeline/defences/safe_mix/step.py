"""SafeInstr: the safe responses of the safety pairs mixed into the task's batches,
the control that SAP's reviewers asked for.

    step = SafeMix(engine, PlainStep(engine), every=4)

The task's samples stay as they are and the safe responses come on top, so that every method sees the same of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.defences.step import Metrics, Pairs, Step
from pipeline.engines.engine import Engine, ShardedVector
from pipeline.objectives.batches import MicroBatch, PairBatch


class SafeMix(Step):
    """A step around another one, whose useful batches it mixes; the state is the other's.

    Where the other looks at a share of the samples (SapStep), that is a share of the task's.
    """

    def __init__(self, engine: Engine, step: Step, every: int):
        """every: steps between those that are mixed, from the first on."""
        self.engine, self.step, self.every = engine, step, every
        self.share, self.summary_keys = step.share, step.summary_keys

    def __call__(
        self,
        useful: Sequence[MicroBatch],
        pairs: Pairs,
        number: int,
        part: Sequence[MicroBatch] | None = None,
    ) -> Metrics:
        if number % self.every == 0:
            useful = pooled(self.engine, [*useful, *safe_batches(pairs())])
        return self.step(useful, pairs, number, part)

    def positions(self, number: int) -> tuple[int, int]:
        return self.step.positions(number)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.step.state_dict()

    def vectors(self) -> dict[str, ShardedVector]:
        return self.step.vectors()

    def load_state_dict(
        self, state: dict[str, torch.Tensor], vectors: dict[str, ShardedVector]
    ) -> None:
        self.step.load_state_dict(state, vectors)


def safe_batches(pairs: Sequence[PairBatch]) -> list[MicroBatch]:
    """The chosen rows alone, as task batches; their global token count is still to be set (`pooled`)."""
    count = [batch.input_ids.shape[0] // 2 for batch in pairs]
    return [
        MicroBatch(batch.input_ids[:n], batch.labels[:n], 0, batch.seed)
        for batch, n in zip(pairs, count, strict=True)
    ]


def pooled(engine: Engine, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The same batches as one global batch: every supervised token of all ranks weighs the same. A collective call."""
    own = sum(len(batch.targets.tokens) for batch in batches)
    total = engine.sum_over_ranks(
        torch.tensor(float(own), dtype=torch.float64, device=engine.device)
    )
    return [replace(batch, global_tokens=int(total.item())) for batch in batches]
