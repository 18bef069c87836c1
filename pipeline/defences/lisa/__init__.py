"""Lisa (arXiv 2405.18641): steps on safe responses and on the task in turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.defences.defence import Costs, Defence, Passes, kept
from pipeline.defences.lisa.section import LisaSection

if TYPE_CHECKING:
    from pipeline.defences.step import Step
    from pipeline.engines.engine import Engine, ShardedVector
    from pipeline.recipe.recipe import Recipe


def _build(engine: Engine, recipe: Recipe, inner: Step, direction: ShardedVector | None) -> Step:
    from pipeline.defences.lisa.step import LisaStep

    return LisaStep(engine, LISA.of(recipe), recipe.safety_pairs.refresh_every)


def _passes(section: LisaSection, costs: Costs, passes: Passes) -> Passes:
    aligning = section.alignment_steps / (section.alignment_steps + section.task_steps)
    return [(1 - aligning, *costs.main), (aligning, *costs.safe)]


def _consistent(section: LisaSection, recipe: Recipe) -> None:
    if recipe.safety_pairs.refresh_every == 0:
        raise ValueError(
            "safety_pairs.refresh_every is 0, so that lisa would never draw a safety pair: set it to 1 or more"
        )


LISA = Defence(
    LisaSection,
    "Alignment and task steps in turns, each near where the other left off",
    "arXiv 2405.18641",
    draws_pairs=True,
    conflicts={
        "sap": "Lisa's alignment steps have no task whose gradient SAP could probe",
        "safety_gradient": "both descend the safety pairs' loss, Lisa in steps of its own",
        "safe_mix": "Lisa trains on the same safe responses in steps of its own",
    },
    build=_build,
    vectors_kept=("anchor",),
    memory=lambda section, sizes: kept(sizes, "Lisa's w_last"),
    passes=_passes,
    consistent=_consistent,
    replaces=True,
)
