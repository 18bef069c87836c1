"""From a recipe to the step that trains it: plain, SAP, or a control, and what goes around it.

    step = make_step(cell.recipe, engine, direction)
"""

from __future__ import annotations

from pipeline.defences.lisa import LisaStep
from pipeline.defences.plain import PlainStep
from pipeline.defences.safe_mix import SafeMix
from pipeline.defences.safety_gradient import SafetyGradientStep
from pipeline.defences.sap.probe import Probe
from pipeline.defences.sap.step import SapStep
from pipeline.engines.engine import Engine, Shard
from pipeline.model.models import decoder_layers
from pipeline.recipe.layer_choice import probed_layers
from pipeline.recipe.recipe import Recipe

Step = PlainStep | SapStep | SafetyGradientStep | LisaStep | SafeMix


def make_step(recipe: Recipe, engine: Engine, direction: Shard | None = None) -> Step:
    """The step that the recipe's enabled sections make up. direction: for sap.direction precomputed, as SapStep takes it."""
    step = _inner(recipe, engine, direction)
    return SafeMix(engine, step, recipe.sap.refresh_every) if recipe.safe_mix.enabled else step


def _inner(recipe: Recipe, engine: Engine, direction: Shard | None) -> Step:
    if recipe.sap.enabled:
        layers = decoder_layers(engine.module)
        probe = Probe(layers, probed_layers(recipe.sap.layers, len(layers)), engine.module.config.get_text_config().hidden_size)
        return SapStep(engine, probe, recipe.sap, direction)
    if recipe.safety_gradient.enabled:
        return SafetyGradientStep(engine, recipe.safety_gradient, recipe.sap.refresh_every)
    return LisaStep(engine, recipe.lisa, recipe.sap.refresh_every) if recipe.lisa.enabled else PlainStep(engine)
