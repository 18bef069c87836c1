"""What the rest of the pipeline knows of a defence. No torch: recipes, folders and plans are made without it.

DEFENCES["lisa"].draws_pairs                # pipeline/defences/__init__.py has them all
LISA.of(cell.recipe).rho                    # its section of a recipe
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import DefenceSection

if TYPE_CHECKING:
    from pipeline.defences.callback import Callback
    from pipeline.defences.step import Step
    from pipeline.engines.engine import Engine, ShardedVector

Moment = Literal["always", "in a pass", "between"]
Cost = tuple[float, float]  # of a pass on one rank: FLOPs, bytes of weights received
Passes = list[tuple[float, float, float]]  # (times a step, FLOPs, bytes received)


@dataclass(frozen=True)
class Row:
    """A part of a GPU's memory: what it is, how it is computed, its bytes, and when they are there."""

    part: str
    formula: str
    bytes: float
    moment: Moment


@dataclass(frozen=True)
class Sizes:
    """Of a training on one rank. count: the trained weights / the ranks, as text; local: this rank's, in elements.

    width: bytes of a trained weight; master: of its float32 copy, 0 where there is none. hidden: the model's width;
    layers: its decoder layers.
    """

    count: str
    local: float
    width: int
    master: int
    hidden: int
    layers: int


@dataclass(frozen=True)
class Costs:
    """What passes of a step cost: main, of the task's samples; safe, of the pairs' safe responses; safety, of both.

    draws: of pairs, a step. probe(share, layers): a pass without weight gradients of a share of
    the samples through the last layers.
    """

    main: Cost
    safe: Cost
    safety: Cost
    draws: float
    layers: int
    probe: Callable[[float, int], Cost]


def _decides_all(section: DefenceSection) -> dict[str, Any]:
    return section.model_dump(mode="json")


S = TypeVar("S", bound=DefenceSection)


@dataclass(frozen=True)
class Defence(Generic[S]):
    """A defence, or a control.

    `section` and `title` make its part of a recipe; all else says what differs from plain fine-tuning.

    source: the paper. draws_pairs: whether its training draws safety pairs step by step. conflicts: other defences that
    it does not go with, and why. control: whether reports compare other methods with it.
    """

    section: type[S]
    title: str
    source: str = ""
    draws_pairs: bool = False
    conflicts: Mapping[str, str] = field(default_factory=dict)
    control: bool = False
    # Whether its step is not around another one: it is made first, and no two of them go together.
    replaces: bool = False
    # The step that it trains with, around the one that the defences before it make:
    # (engine, recipe, that step, direction).
    build: Callable[[Engine, Recipe, Step, ShardedVector | None], Step] | None = None
    # What goes along with the training: (engine, section).
    callback: Callable[[Engine, S], Callback] | None = None
    # Stages that make something of it, and those of them whose product its training reads: (section). Layout has a
    # method by the name of each, which gives the folder.
    stages: tuple[str, ...] = ()
    reads: Callable[[S], tuple[str, ...]] = lambda section: ()
    # What of an enabled section decides the trained weights, beyond what `reads` names: (section), JSON.
    decides: Callable[[S], dict[str, Any]] = _decides_all
    # Vectors of the trained weights' size that checkpoints keep.
    vectors_kept: tuple[str, ...] = ()
    # Memory and passes beyond plain fine-tuning's: (section, sizes), (section, costs, passes of the step so far).
    memory: Callable[[S, Sizes], list[Row]] = lambda section, sizes: []
    passes: Callable[[S, Costs, Passes], Passes] = lambda section, costs, passes: passes
    # ValueError where it does not go with other sections (section, recipe),
    # or with a model of so many layers (section, layers).
    consistent: Callable[[S, Recipe], None] = lambda section, recipe: None
    fits: Callable[[S, int], None] = lambda section, layers: None
    # Sentences about what it does on so many ranks: (section, recipe, ranks). ValueError for what cannot be.
    notes: Callable[[S, Recipe, int], list[str]] = lambda section, recipe, ranks: []

    @property
    def name(self) -> str:
        """As recipes write it: the section's class without its ending, in lower case with underscores."""
        words = self.section.__name__.removesuffix("Section")
        return "".join(
            f"_{letter.lower()}" if letter.isupper() else letter for letter in words
        ).lstrip("_")

    def of(self, recipe: Recipe) -> S:
        """Its section of a recipe."""
        return getattr(recipe, self.name)


def kept(sizes: Sizes, what: str) -> list[Row]:
    """Memory of a vector that is kept from step to step, in float32, and of its update."""
    return [
        Row(what, f"{sizes.count} x 4 bytes", 4 * sizes.local, "always"),
        Row(
            "updates of what is kept",
            f"{sizes.count} x 2 copies x 4 bytes",
            8 * sizes.local,
            "between",
        ),
    ]
