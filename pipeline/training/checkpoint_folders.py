"""Which checkpoints there are, and which of them a run may start from. Needs no torch.

start_checkpoint(Path("runs/demo/.train-sap-s0-1a2b3c4d5e.work@40"), layout.basis(cell), names=("state.json",))
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import artifacts


def checkpoints(root: Path) -> list[Path]:
    """The complete ones below `root`, the oldest first; a copy under another name is nobody's."""
    found = (
        folder
        for folder in root.glob("step-*")
        if re.fullmatch(r"step-\d{6,}", folder.name) and artifacts.complete(folder)
    )
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """After how many steps a checkpoint was written."""
    return int(folder.name.removeprefix("step-"))


def start_checkpoint(
    given: Path, basis: dict[str, Any], steps: int | None = None, names: Sequence[str] = ()
) -> Path:
    """The folder of the checkpoint that FOLDER@STEP names.

    ValueError where it is not there, is damaged, or does not fit.

    basis: what the run that starts from it fits on, by the recipe's fields; the checkpoint must have been written on
    the same. steps: of that run, where they are known. names: the files that are looked at, where not all are.
    """
    folder = _named(given)
    number = step_of(folder)
    if steps is not None and number >= steps:
        raise ValueError(
            f"resume_from is at step {number}, and the training has {steps}: set train.steps beyond it"
        )
    found = artifacts.damage(folder, names)
    if found:
        raise ValueError(
            f"resume_from names a damaged checkpoint ({found}): give another step, or begin without"
        )
    written = json.loads((folder / "state.json").read_text()).get("basis")
    # the names of what it holds may be others
    if not written or written.get("format") != basis.get("format"):
        raise ValueError(
            f"resume_from names {folder}, whose checkpoints have another form: another version has "
            "written it, so begin without"
        )
    for field, own in basis.items():
        if written.get(field) != own:
            raise ValueError(
                f"resume_from names {folder}, whose run does not go with this one: "
                f"{_difference(field, written.get(field), own)}; make it the same"
            )
    return folder


def _named(given: Path) -> Path:
    folder, _, number = str(given).rpartition("@")
    root = Path(folder) / "checkpoints"
    if not Path(folder).is_dir():
        raise ValueError(
            f"resume_from is {given}, and there is no folder {folder}: a training has it until it is finished"
        )
    found = {step_of(path): path for path in checkpoints(root)}
    if int(number) not in found:
        there = f"it has those of steps {', '.join(map(str, found))}" if found else "it has none"
        raise ValueError(
            f"resume_from is {given}, and {root} holds no checkpoint of step {number}: {there}"
        )
    return found[int(number)]


def _difference(field: str, there: Any, here: Any) -> str:
    """What differs: of a section its first field that does;
    of what is no field ("the start model") no more than that.
    """
    if field.startswith("the "):
        return f"{field} is another one"
    if isinstance(there, dict) and isinstance(here, dict):
        name = next(name for name in {**here, **there} if there.get(name) != here.get(name))
        return _difference(f"{field}.{name}", there.get(name), here.get(name))
    return f"{field} was {json.dumps(there)} there, and is {json.dumps(here)} here"
