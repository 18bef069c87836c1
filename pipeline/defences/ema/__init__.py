"""EMA in parameter space (arXiv 2508.12531): the average of the weights over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.defences.defence import Defence, Row, Sizes, kept
from pipeline.defences.ema.section import EmaSection

if TYPE_CHECKING:
    from pipeline.defences.callback import Callback
    from pipeline.engines.engine import Engine
    from pipeline.recipe.recipe import Recipe


def _callback(engine: Engine, section: EmaSection) -> Callback:
    from pipeline.defences.ema.average import Ema

    return Ema(engine, section)


def _memory(section: EmaSection, sizes: Sizes) -> list[Row]:
    width = sizes.width + sizes.master
    formula = f"{sizes.count} x {width} bytes, while a validation sees the average"
    return [
        *kept(sizes, "EMA's average"),
        Row("weights put aside", formula, sizes.local * width, "in a pass"),
    ]


def _consistent(section: EmaSection, recipe: Recipe) -> None:
    if recipe.train.steps is not None:
        section.check_steps(recipe.train.steps)


EMA = Defence(
    EmaSection,
    "Averaged weights",
    "arXiv 2508.12531",
    callback=_callback,
    vectors_kept=("average",),
    memory=_memory,
    consistent=_consistent,
)
