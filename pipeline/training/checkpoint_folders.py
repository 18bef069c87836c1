"""Which checkpoints there are, and which of them a run may start from. Needs no torch.

    start_checkpoint(Path("runs/demo/.train-sap-s0-1a2b3c4d5e.work@40"), layout.basis(cell))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline import artifacts


def checkpoints(root: Path) -> list[Path]:
    """The complete ones below `root`, the oldest first."""
    return sorted(folder for folder in root.glob("step-*") if artifacts.complete(folder))


def start_checkpoint(given: Path, basis: dict[str, Any]) -> Path:
    """The folder of the checkpoint that FOLDER@STEP names. ValueError where it is not there, is damaged, or does not fit.

    basis: what the run that starts from it fits on, by the recipe's fields; the checkpoint must have been written on the same.
    """
    folder = _named(given)
    found = artifacts.damage(folder)
    if found:
        raise ValueError(f"resume_from names a damaged checkpoint: {found}")
    written = json.loads((folder / "state.json").read_text()).get("basis", {})
    for field, own in basis.items():
        if written.get(field) != own:
            values = "is another one" if field == "model" else f"was {_text(written.get(field))} there, and is {_text(own)} here"
            raise ValueError(f"resume_from names {folder}, whose run does not go with this one: {field} {values}; make it the same")
    return folder


def _named(given: Path) -> Path:
    folder, _, number = str(given).rpartition("@")
    root = Path(folder) / "checkpoints"
    found = {int(path.name.removeprefix("step-")): path for path in checkpoints(root)}
    if int(number) not in found:
        there = f"it has those of steps {', '.join(map(str, found))}" if found else "it has none"
        raise ValueError(f"resume_from is {given}, and {root} holds no checkpoint of step {number}: {there}")
    return found[int(number)]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
