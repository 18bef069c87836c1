"""Recipes with a section for each defence, and what these sections have to agree on.

experiment = load("launch/recipes/demo.yaml", {"train": {"lr": 2e-4}})
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, create_model, model_validator

from pipeline.defences import DEFENCES
from pipeline.recipe import recipe
from pipeline.recipe.recipe import Experiment
from pipeline.recipe.sections import DefenceSection


class _Combined(recipe.Recipe):
    @model_validator(mode="after")
    def _combinations(self) -> _Combined:
        for name in self.parts:
            for other, reason in DEFENCES[name].conflicts.items():
                if other in self.parts:
                    one, two = sorted((name, other), key=list(DEFENCES).index)
                    raise ValueError(
                        f"{one}.enabled and {two}.enabled do not go together: {reason}; set one of them to false"
                    )
        replacing = [name for name in self.parts if DEFENCES[name].replaces]
        if len(replacing) > 1:
            raise ValueError(
                f"{replacing[0]}.enabled and {replacing[1]}.enabled do not go together: each has "
                "a step of its own, which is around no other; set one of them to false"
            )
        for name in self.parts:
            DEFENCES[name].consistent(getattr(self, name), self)
        return self

    @property
    def draws_pairs(self) -> bool:
        """Whether training draws safety pairs step by step."""
        return any(DEFENCES[name].draws_pairs for name in self.parts)


def recipe_class() -> type[recipe.Recipe]:
    """The class of recipes that have a section for every one of DEFENCES."""
    return _class_with(
        tuple((name, defence.section, defence.title) for name, defence in DEFENCES.items())
    )


@functools.cache  # two recipes are equal only where their classes are the same
def _class_with(sections: tuple[tuple[str, type[DefenceSection], str], ...]) -> type[recipe.Recipe]:
    fields: dict[str, Any] = {
        name: (section, Field(section(), description=title)) for name, section, title in sections
    }
    return create_model("Recipe", __base__=_Combined, **fields)


def load(path: str | Path, overrides: dict[str, Any] | None = None) -> Experiment:
    """Read and validate a recipe file and every method in it (pipeline/recipe/recipe.py: load)."""
    return recipe.load(path, overrides, recipe_class())


def field_rows() -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, description) of every field, depth first: the source of `--help` and docs."""
    return recipe.field_rows(recipe_class())
