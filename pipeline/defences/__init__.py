"""The defences, and the controls beside them: what a recipe's methods are made of.

A line here and a module of its own is all that another one takes (CONTRIBUTING.md has one written out).
"""

from __future__ import annotations

from typing import Any

from pipeline.defences.defence import Defence
from pipeline.defences.ema import EMA
from pipeline.defences.lisa import LISA
from pipeline.defences.safe_mix import SAFE_MIX
from pipeline.defences.safety_gradient import SAFETY_GRADIENT
from pipeline.defences.saft import SAFT
from pipeline.defences.sap import SAP
from pipeline.recipe.recipe import Recipe

DEFENCES: dict[str, Defence[Any]] = {
    "saft": SAFT,
    "sap": SAP,
    "safety_gradient": SAFETY_GRADIENT,
    "lisa": LISA,
    "safe_mix": SAFE_MIX,
    "ema": EMA,
}


def enabled(recipe: Recipe) -> list[tuple[str, Defence]]:
    """A recipe's, in the order in which its step is made: the one that replaces plain
    fine-tuning's, and those around it.
    """
    return sorted(
        ((name, DEFENCES[name]) for name in recipe.parts), key=lambda named: not named[1].replaces
    )
