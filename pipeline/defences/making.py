"""From a recipe to what trains it: the step, and the callbacks that its defences bring along.

step, callbacks = make_step(cell.recipe, engine, direction), make_callbacks(cell.recipe, engine)
"""

from __future__ import annotations

from pipeline.defences import enabled
from pipeline.defences.callback import Callback
from pipeline.defences.plain import PlainStep
from pipeline.defences.step import Step
from pipeline.engines.engine import Engine, ShardedVector
from pipeline.recipe.recipe import Recipe


def make_step(recipe: Recipe, engine: Engine, direction: ShardedVector | None = None) -> Step:
    """The step that the recipe's enabled sections make up.

    direction: for sap.direction precomputed, as SapStep takes it.
    """
    step: Step = PlainStep(engine)
    for _, defence in enabled(recipe):
        if defence.build is not None:
            step = defence.build(engine, recipe, step, direction)
    return step


def make_callbacks(recipe: Recipe, engine: Engine) -> list[Callback]:
    """Those of the enabled defences, in DEFENCES' order."""
    return [
        defence.callback(engine, getattr(recipe, name))
        for name, defence in enabled(recipe)
        if defence.callback is not None
    ]
