"""The stages of the chain, in their order; the report (pipeline/report/stage.py) is the last.

    prepare -> [align] -> [filter] -> direction -> train -> evaluate -> report

A line here and a module of its own is all that another one takes. Commands, `sap status`, the checks, launch/ and
slurm/submit.sh (by `sap stages`) know stages from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline import artifacts
from pipeline.stages.layout import Layout
from pipeline.stages.stage import Stage, Unit, lazily, of_each_cell, unit


def _align(layout: Layout) -> Iterator[Unit]:
    if layout.base.align.enabled:
        yield unit(layout, "align", layout.align())


def _evaluate(layout: Layout) -> Iterator[Unit]:
    for subject in layout.subjects():
        yield unit(
            layout,
            "evaluate",
            layout.evaluate(subject),
            subject.name,
            subject.seed,
            trained=subject.trained,
        )


def _filters_in_waves(layout: Layout, units: Sequence[Unit]) -> Sequence[Sequence[Unit]]:
    """Filters may share embeddings: where they are missing, one of each sort computes them,
    and the others come after.
    """
    sorts = {
        layout.embeddings(each.cell): each for each in reversed(units) if each.cell is not None
    }
    leaders = {folder: each for folder, each in sorts.items() if not artifacts.complete(folder)}
    return [
        [each for each in units if each in leaders.values()],
        [each for each in units if each not in leaders.values()],
    ]


STAGES = {
    "prepare": Stage(
        "prepare",
        lambda layout: iter([unit(layout, "prepare", layout.prepare())]),
        lazily("pipeline.stages.prepare", "prepare"),
        also=lambda layout: [layout.prompts()],
    ),
    "align": Stage(
        "align",
        _align,
        lazily("pipeline.stages.align", "align"),
        ("prepare",),
        where="ranks",
        saves=True,
    ),
    "filter": Stage(
        "filter",
        of_each_cell("filter", Layout.filter, Layout.needs_filter),
        lazily("pipeline.stages.filter", "filter_data"),
        ("prepare", "align"),
        where="ranks",
        of_cells=True,
        waves=_filters_in_waves,
    ),
    "direction": Stage(
        "direction",
        of_each_cell("direction", Layout.direction, Layout.needs_direction),
        lazily("pipeline.stages.direction", "direction"),
        ("prepare", "align"),
        where="ranks",
        of_cells=True,
    ),
    "train": Stage(
        "train",
        of_each_cell("train", Layout.train, lambda layout, cell: True),
        lazily("pipeline.stages.train", "train"),
        ("prepare", "align", "filter", "direction"),
        where="ranks",
        of_cells=True,
        saves=True,
    ),
    "evaluate": Stage(
        "evaluate",
        _evaluate,
        lazily("pipeline.stages.evaluate", "evaluate"),
        ("prepare", "align", "train"),
        where="alone",
    ),
}
