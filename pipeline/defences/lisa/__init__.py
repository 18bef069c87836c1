"""Lisa (arXiv 2405.18641): steps on safe responses and on the task in turns."""

from __future__ import annotations

from typing import Any

from pipeline.defences.defence import Costs, Defence, Passes, kept
from pipeline.defences.lisa.section import LisaSection


def _build(engine: Any, recipe: Any, inner: Any, direction: Any) -> Any:
    from pipeline.defences.lisa.step import LisaStep

    return LisaStep(engine, recipe.lisa, recipe.safety_pairs.refresh_every)


def _passes(section: LisaSection, costs: Costs, passes: Passes) -> Passes:
    aligning = section.alignment_steps / (section.alignment_steps + section.task_steps)
    return [(1 - aligning, *costs.main), (aligning, *costs.safe)]


def _consistent(section: LisaSection, recipe: Any) -> None:
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
