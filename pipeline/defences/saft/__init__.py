"""SAFT (arXiv 2410.10014): training samples that the start model's hidden states give away as harmful are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.defences.defence import Defence
from pipeline.defences.saft.section import SaftSection
from pipeline.recipe.layer_choice import read_layer

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe

NO_LABELS = (
    "saft has no labelled samples to choose its threshold on: map a column of true and false to "
    "harmful with data.task.columns, or set saft.contamination to the share of harmful samples "
    "you expect"
)


def _notes(section: SaftSection, recipe: Recipe, ranks: int) -> list[str]:
    data = recipe.data
    if section.contamination is None and not (
        data.harmful_fraction > 0 or "harmful" in data.task.columns
    ):
        raise ValueError(NO_LABELS)
    return []


def _fits(section: SaftSection, layers: int) -> None:
    read_layer(section.layer, layers)


SAFT = Defence(
    SaftSection,
    "Filter of the training samples",
    "arXiv 2410.10014",
    stages=("filter",),
    reads=lambda section: ("filter",),
    decides=lambda section: {},  # the filter's folder is named by it
    fits=_fits,
    notes=_notes,
)
