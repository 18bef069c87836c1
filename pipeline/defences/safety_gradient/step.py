"""The control without a probe: the task's gradient plus lambda times the safety gradient.

    step = SafetyGradientStep(engine, recipe.safety_gradient, refresh_every=4)

To first order SAP adds a preconditioned safety gradient (pipeline/defences/sap/step.py). This adds the gradient itself,
of the same pairs, refreshed as often and held at the same size relative to the task's: what SAP does better, its
preconditioner does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pipeline.defences.safety_gradient.section import SafetyGradientSection
from pipeline.defences.step import Metrics, Pairs, Step
from pipeline.engines.engine import Engine, ShardedVector
from pipeline.objectives.batches import MicroBatch
from pipeline.objectives.losses import safety_loss, useful_loss

# In the comparison it stays below 100 while the pairs have something to teach, and goes to 1e17 once they have not.
_MOST_LAMBDA = 1e4


class SafetyGradientStep(Step):
    """g = grad L_useful + lambda * g_s, lambda = correction * |grad L_useful| / |g_s|;
    g_s serves `refresh_every` steps.
    """

    def __init__(self, engine: Engine, section: SafetyGradientSection, refresh_every: int):
        self.engine, self.section, self.refresh_every = engine, section, refresh_every
        self.safety_loss = safety_loss(section.contrastive)
        self.direction: ShardedVector | None = None

    def __call__(
        self,
        useful: Sequence[MicroBatch],
        pairs: Pairs,
        number: int,
        part: Sequence[MicroBatch] | None = None,
    ) -> Metrics:
        metrics: Metrics = {}
        if self.direction is None or number % self.refresh_every == 0:
            metrics["safety_gradient/loss"], self.direction = self.engine.gradient(
                self.safety_loss, pairs()
            )
        norm = self.engine.norm(self.direction)
        if not (norm > 0 and math.isfinite(norm)):
            raise ValueError(
                f"the safety gradient has norm {norm}: check data.safety (chosen and rejected must "
                "differ) and safety_gradient.contrastive"
            )
        loss, _ = self.engine.forward_backward(useful_loss, useful)
        weight = self.section.correction * self.engine.gradient_norm().item() / norm
        if weight > _MOST_LAMBDA:
            raise ValueError(
                f"lambda is {weight:.1e} at step {number + 1}: the safety pairs' gradient has all "
                f"but vanished (norm {norm:.1e}), so that what would be added has no meaning; "
                "lower train.steps or train.lr, or take safety_gradient.enabled out"
            )
        self.engine.add_gradient(self.direction, weight)
        return {
            "train/loss": loss,
            "safety_gradient/lambda": weight,
            "safety_gradient/norm": norm,
            **metrics,
        }

    def vectors(self) -> dict[str, ShardedVector]:
        return {} if self.direction is None else {"direction": self.direction}

    def load_state_dict(
        self, state: dict[str, torch.Tensor], vectors: dict[str, ShardedVector]
    ) -> None:
        self.direction = vectors.get("direction")
