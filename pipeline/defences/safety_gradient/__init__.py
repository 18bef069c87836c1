"""The safety gradient itself, added to the task's: the control that shows what SAP's preconditioner does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.defences.defence import Costs, Defence, Passes, kept
from pipeline.defences.safety_gradient.section import SafetyGradientSection

if TYPE_CHECKING:
    from pipeline.defences.step import Step
    from pipeline.engines.engine import Engine, ShardedVector
    from pipeline.recipe.recipe import Recipe


def _build(engine: Engine, recipe: Recipe, inner: Step, direction: ShardedVector | None) -> Step:
    from pipeline.defences.safety_gradient.step import SafetyGradientStep

    section = SAFETY_GRADIENT.of(recipe)
    return SafetyGradientStep(engine, section, recipe.safety_pairs.refresh_every)


def _passes(section: SafetyGradientSection, costs: Costs, passes: Passes) -> Passes:
    return [*passes, (costs.draws, *costs.safety)]


def _consistent(section: SafetyGradientSection, recipe: Recipe) -> None:
    if recipe.safety_pairs.refresh_every == 0:
        raise ValueError(
            "safety_pairs.refresh_every is 0, so that safety_gradient would never draw a safety "
            "pair: set it to 1 or more"
        )


SAFETY_GRADIENT = Defence(
    SafetyGradientSection,
    "Control: the safety gradient added to the task's",
    draws_pairs=True,
    conflicts={
        "sap": (
            "one adds the safety gradient and the other a preconditioned one, and neither's "
            "correction could be told from the sum"
        )
    },
    control=True,
    build=_build,
    vectors_kept=("direction",),
    memory=lambda section, sizes: kept(sizes, "the safety gradient"),
    passes=_passes,
    consistent=_consistent,
    replaces=True,
)
