"""SAP (arXiv 2505.16737): the task's gradient under a probe that makes the harmful direction useless for the task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.defences.defence import Costs, Defence, Passes, Row, Sizes
from pipeline.defences.sap.section import SapSection
from pipeline.objectives.sharing import share_of
from pipeline.recipe.layer_choice import probed_layers

if TYPE_CHECKING:
    from pipeline.defences.step import Step
    from pipeline.engines.engine import Engine, ShardedVector
    from pipeline.recipe.recipe import Recipe


def _build(engine: Engine, recipe: Recipe, inner: Step, direction: ShardedVector | None) -> Step:
    from pipeline.defences.sap.probe import probe_of
    from pipeline.defences.sap.step import SapStep

    section = SAP.of(recipe)
    return SapStep(
        engine,
        probe_of(engine.module, section.layers),
        section,
        direction,
        recipe.safety_pairs.refresh_every,
    )


def _decides(section: SapSection) -> dict[str, Any]:
    without = {"speed"}  # what a speed sets is there
    if section.probe_step != "target_correction":
        without.add("target_correction")
    return section.model_dump(mode="json", exclude=without)


def _memory(section: SapSection, sizes: Sizes) -> list[Row]:
    """The direction and, while passes run, the perturbed weights' old values or, after those,
    g(0) for the correction.
    """
    second = max(sizes.width, 4 if section.correction_every else 0)
    probed = len(probed_layers(section.layers, sizes.layers))
    formula = f"{sizes.count} x (direction 4 + old values or g(0) {second}) bytes; V, its gradients and moments"
    rows = [
        Row(
            "SAP's vectors",
            formula,
            sizes.local * (4 + second) + 6 * 4 * probed * sizes.hidden,
            "always",
        )
    ]
    if section.correction_every:
        rows.append(
            Row(
                "the correction's norm",
                f"{sizes.count} x 4 bytes, one more gradient",
                4 * sizes.local,
                "between",
            )
        )
    return rows


def _passes(section: SapSection, costs: Costs, passes: Passes) -> Passes:
    probe = costs.probe(
        section.probe_share, costs.layers - 1 - probed_layers(section.layers, costs.layers)[0]
    )
    noise, correction = (
        1 / every if every else 0.0 for every in (section.noise_every, section.correction_every)
    )
    return [
        (1 + correction, *costs.main),
        ((2 if section.schedule == "exact" else 1) + noise, *probe),
        (costs.draws, *costs.safety),
    ]


def _consistent(section: SapSection, recipe: Recipe) -> None:
    if recipe.safety_pairs.refresh_every == 0 and section.direction == "live":
        raise ValueError("safety_pairs.refresh_every 0 needs sap.direction: precomputed")


def _fits(section: SapSection, layers: int) -> None:
    probed_layers(section.layers, layers)


def _notes(section: SapSection, recipe: Recipe, ranks: int) -> list[str]:
    batch = recipe.train.batch_size
    samples = share_of(batch, section.probe_share)
    if samples >= ranks:
        return []
    return [
        f"sap.probe_share {section.probe_share:g} of train.batch_size {batch} is {samples}: "
        f"{ranks - samples} of {ranks} ranks would have no sample of their own, and compute "
        f"copies; a share of {ranks / batch:g} takes the same time"
    ]


SAP = Defence(
    SapSection,
    "Safety-aware probing",
    "arXiv 2505.16737, Algorithm 1",
    draws_pairs=True,
    build=_build,
    stages=("direction",),
    reads=lambda section: ("direction",) if section.direction == "precomputed" else (),
    decides=_decides,
    vectors_kept=("direction",),
    memory=_memory,
    passes=_passes,
    consistent=_consistent,
    fits=_fits,
    notes=_notes,
    replaces=True,
)
