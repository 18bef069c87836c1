"""What `--dry-run` prints once every check has passed: the machine and what is needed of it,
then a line for every stage.

    print(overview(experiment, {"prepare": [folder], ...}, checked))

Writes nothing, fetches nothing, and needs no torch where the model's files are on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import artifacts
from pipeline.recipe.recipe import Experiment
from pipeline.running import devices
from pipeline.stages.capacity import Capacity


def overview(
    experiment: Experiment, folders: Mapping[str, Sequence[Path]], found: Capacity | None
) -> str:
    """The lines.

    folders: stage -> those that it writes, in the order of the stages. found: None where the model is not here yet.
    """
    base = experiment.base
    needs = "what it needs is not known yet" if found is None else found.line()
    lines = [f"{'machine':<10} {devices.describe(base.model, base.train)}; {needs}"]
    return "\n".join(
        [*lines, *(f"{stage:<10} {_state(owned)}" for stage, owned in folders.items())]
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
