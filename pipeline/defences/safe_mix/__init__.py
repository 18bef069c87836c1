"""SafeInstr: safe responses among the task's samples. The control that SAP's reviewers asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.defences.defence import Costs, Defence, Passes
from pipeline.defences.safe_mix.section import SafeMixSection

if TYPE_CHECKING:
    from pipeline.defences.step import Step
    from pipeline.engines.engine import Engine, ShardedVector
    from pipeline.recipe.recipe import Recipe


def _build(engine: Engine, recipe: Recipe, inner: Step, direction: ShardedVector | None) -> Step:
    from pipeline.defences.safe_mix.step import SafeMix

    return SafeMix(engine, inner, recipe.safety_pairs.refresh_every)


def _passes(section: SafeMixSection, costs: Costs, passes: Passes) -> Passes:
    return [*passes, (costs.draws, *costs.safe)]


def _consistent(section: SafeMixSection, recipe: Recipe) -> None:
    if recipe.safety_pairs.refresh_every == 0:
        raise ValueError(
            "safety_pairs.refresh_every is 0, so that safe_mix would never draw a safety pair: set it to 1 or more"
        )


SAFE_MIX = Defence(
    SafeMixSection,
    "Control: safe responses among the task's samples",
    "SafeInstr, arXiv 2309.07875",
    draws_pairs=True,
    control=True,
    build=_build,
    passes=_passes,
    consistent=_consistent,
)
