"""Lisa (arXiv 2405.18641): steps on safe responses and on the task in turns,
each drawn towards where the other left off.

    step = LisaStep(engine, recipe.lisa)

In both states the gradient is that of loss + rho / 2 * |w - w_last|^2, w_last being the weights at the last switch;
at first, the initial ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.defences.lisa.section import LisaSection
from pipeline.defences.safe_mix.step import pooled, safe_batches
from pipeline.defences.step import Metrics, Pairs, Step
from pipeline.engines.engine import Engine, ShardedVector
from pipeline.objectives.batches import MicroBatch
from pipeline.objectives.losses import useful_loss


class LisaStep(Step):
    """A cycle is `alignment_steps` on the safe responses, then `task_steps` on the task's batches.

    w_last is kept on each rank's shard.
    """

    def __init__(self, engine: Engine, section: LisaSection, draw_every: int = 1):
        """draw_every: steps between the draws of a method that draws at its task steps;
        Lisa then sees the same pairs.
        """
        self.engine, self.section, self.draw_every = engine, section, max(draw_every, 1)
        self.anchor = engine.weights()

    def positions(self, number: int) -> tuple[int, int]:
        """Which task batch and which draw of pairs step `number` sees:
        those that another method would, each counted by its own steps.
        """
        aligning, task = self.section.alignment_steps, self.section.task_steps
        cycles, position = divmod(number, aligning + task)
        return cycles * task + max(position - aligning, 0), (
            cycles * aligning + min(position, aligning)
        ) * self.draw_every

    def __call__(
        self,
        useful: Sequence[MicroBatch],
        pairs: Pairs,
        number: int,
        part: Sequence[MicroBatch] | None = None,
    ) -> Metrics:
        """train/loss is the state's loss, without the proximal term."""
        engine, section = self.engine, self.section
        position = number % (section.alignment_steps + section.task_steps)
        if position in (0, section.alignment_steps):  # a switch
            self.anchor = engine.weights()
        aligning = position < section.alignment_steps
        loss, _ = engine.forward_backward(
            useful_loss, pooled(engine, safe_batches(pairs())) if aligning else useful
        )
        drift = [weight - last for weight, last in zip(engine.weights(), self.anchor, strict=True)]
        engine.add_gradient(drift, section.rho)
        return {
            "train/loss": loss,
            "lisa/aligning": float(aligning),
            "lisa/proximal": section.rho / 2 * engine.dot(drift, drift),
        }

    def vectors(self) -> dict[str, ShardedVector]:
        return {"anchor": self.anchor}

    def load_state_dict(
        self, state: dict[str, torch.Tensor], vectors: dict[str, ShardedVector]
    ) -> None:
        self.anchor = vectors["anchor"]
