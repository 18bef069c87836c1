"""What `--dry-run` prints once every check has passed.

The machine and what is needed of it, samples and steps as far as they are known, then a line for every stage.

    print(overview(experiment, {"prepare": [folder], ...}, capacity, samples, cells))

Writes nothing, fetches nothing, and needs no torch where the model's files are on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import artifacts
from pipeline.defences import DEFENCES
from pipeline.recipe.recipe import Cell, Experiment, Recipe
from pipeline.running import devices
from pipeline.stages.capacity import Capacity
from pipeline.stages.samples import Samples


def overview(
    experiment: Experiment,
    folders: Mapping[str, Sequence[Path]],
    found: Capacity | None,
    samples: Samples,
    cells: Sequence[Cell],
) -> str:
    """The lines.

    folders: stage -> those that it writes, in the order of the stages. found: None where the model is not here yet.
    """
    base = experiment.base
    needs = "what it needs is not known yet" if found is None else found.line()
    lines = [
        f"{'machine':<10} {devices.describe(base.model, base.train)}; {needs}",
        f"{'data':<10} {samples.line()}",
        f"{'steps':<10} {_steps(base, samples, cells)}",
    ]
    return "\n".join(
        [*lines, *(f"{stage:<10} {_state(owned)}" for stage, owned in folders.items())]
    )


def _steps(base: Recipe, samples: Samples, cells: Sequence[Cell], shown: int = 12) -> str:
    """Of the alignment and of every method; methods with as many stand together."""
    align = base.align.train
    of_align = str(align.steps) if align.epochs is None else f"{align.epochs:g} epochs"
    steps = {"align": of_align} if base.align.enabled else {}
    for cell in cells:
        filtered = any("filter" in DEFENCES[name].stages for name in cell.recipe.parts)
        at_most = "up to " * (filtered and cell.recipe.train.steps is None)
        steps[cell.method] = f"{at_most}{samples.steps(cell.recipe.train)}"
    alike: dict[str, list[str]] = {}
    for name, count in steps.items():
        alike.setdefault(count, []).append(name)
    return "; ".join(
        f"{count} for {', '.join(names[:shown])}"
        + (f" and {len(names) - shown} more" if len(names) > shown else "")
        for count, names in alike.items()
    )


def _state(folders: Sequence[Path]) -> str:
    if not folders:
        return "not in this recipe"
    missing = [folder for folder in folders if not artifacts.complete(folder)]
    if not missing:
        return f"complete   {folders[0].parent / _names(folders)}"
    done = (
        f", {len(folders) - len(missing)} of {len(folders)} complete"
        if len(missing) < len(folders)
        else ""
    )
    return f"would run  {folders[0].parent / _names(missing)}{done}"


def _names(folders: Sequence[Path], shown: int = 6) -> str:
    names = [folder.name for folder in folders[:shown]]
    return ", ".join(names) + (f" and {len(folders) - shown} more" if len(folders) > shown else "")
