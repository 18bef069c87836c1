"""SafeInstr: safe responses among the task's samples. The control that SAP's reviewers asked for."""

from __future__ import annotations

from typing import Any

from pipeline.defences.defence import Costs, Defence, Passes
from pipeline.defences.safe_mix.section import SafeMixSection


def _build(engine: Any, recipe: Any, inner: Any, direction: Any) -> Any:
    from pipeline.defences.safe_mix.step import SafeMix

    return SafeMix(engine, inner, recipe.safety_pairs.refresh_every)


def _passes(section: SafeMixSection, costs: Costs, passes: Passes) -> Passes:
    return [*passes, (costs.draws, *costs.safe)]


def _consistent(section: SafeMixSection, recipe: Any) -> None:
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
