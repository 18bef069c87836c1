"""What the rest of the pipeline knows of a stage. Needs no torch: a stage's function is imported when it is called.

STAGES["train"].units(layout)       # pipeline/stages/__init__.py has them all
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import artifacts
from pipeline.recipe.recipe import Cell
from pipeline.stages.layout import Layout


@dataclass(frozen=True)
class Unit:
    """One folder of one stage. method, seed: "-" where the stage has none. cell: whose it is, where it is one's.

    trained: the training's folder whose product it looks at.
    """

    stage: str
    folder: Path
    work: Path
    method: str = "-"
    seed: str = "-"
    cell: Cell | None = None
    trained: Path | None = None

    @property
    def state(self) -> str:
        """`complete`, `step N` where a checkpoint of step N is there, or `missing`."""
        if artifacts.complete(self.folder):
            return "complete"
        steps = [
            int(path.parent.name.removeprefix("step-"))
            for path in (self.work / "checkpoints").glob(f"step-*/{artifacts.MARKER}")
        ]
        return f"step {max(steps)}" if steps else "missing"

    def line(self) -> str:
        """A row of `sap status`: its fields with tabs between them."""
        return "\t".join(
            (
                self.stage,
                self.method,
                self.seed,
                self.state,
                str(self.folder.absolute()),
                str(self.work.absolute()),
            )
        )


def _none(layout: Layout) -> Sequence[Path]:
    return ()


def _all_at_once(layout: Layout, units: Sequence[Unit]) -> Sequence[Sequence[Unit]]:
    return [units]


@dataclass(frozen=True)
class Stage:
    """A stage of the chain.

    It makes a folder for each of its units, and returns True where that is complete afterwards.

    units(layout): in the order in which they are made; of none the recipe has no such stage. needs: stages that must be
    complete before; of those that belong to a defence, what a training reads (Layout.read_by). also(layout): folders
    that it makes beside its units', and that nothing of `needs` waits for.

    where: how it runs. here: in the process of `sap`, as run(experiment). ranks: launch/NAME.py on the ranks of the
    unit's training. alone: launch/NAME.py in processes that have nothing to do with each other. of_cells: whether units
    are of a (method, seed). saves: whether it goes on from a checkpoint when it was asked to leave. waves(layout,
    units): those of a wave may be made side by side, and the next wave comes after.
    """

    name: str
    units: Callable[[Layout], Iterator[Unit]]
    run: Callable[..., object]
    needs: tuple[str, ...] = ()
    where: Literal["here", "ranks", "alone"] = "here"
    of_cells: bool = False
    saves: bool = False
    also: Callable[[Layout], Sequence[Path]] = _none
    waves: Callable[[Layout, Sequence[Unit]], Sequence[Sequence[Unit]]] = _all_at_once

    def line(self) -> str:
        """For scripts, separated by tabs: name, where, of_cells, saves, needs."""
        words = {True: "yes", False: "no"}
        return "\t".join(
            (
                self.name,
                self.where,
                words[self.of_cells],
                words[self.saves],
                ",".join(self.needs) or "-",
            )
        )


def unit(
    layout: Layout,
    stage: str,
    folder: Path,
    method: str = "-",
    seed: int | None = None,
    **more: Any,
) -> Unit:
    """A unit, with its work folder."""
    return Unit(
        stage, folder, layout.work(folder), method, "-" if seed is None else str(seed), **more
    )


def of_each_cell(
    stage: str, folder: Callable[[Layout, Cell], Path], made: Callable[[Layout, Cell], bool]
) -> Callable[[Layout], Iterator[Unit]]:
    """`units` of a stage that has a folder for cells; several may share one. made: whether a cell has one."""

    def units(layout: Layout) -> Iterator[Unit]:
        for cell in layout.experiment.cells():
            if made(layout, cell):
                yield unit(layout, stage, folder(layout, cell), cell.method, cell.seed, cell=cell)

    return units


def lazily(module: str, name: str) -> Callable[..., bool]:
    """A function of a module that is imported when it is called."""
    return lambda *arguments: getattr(importlib.import_module(module), name)(*arguments)
