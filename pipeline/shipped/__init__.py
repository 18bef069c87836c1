"""Files that come with the package: launch scripts, DeepSpeed settings, recipes, job scripts.

A checkout has them at its top, an installed package in this folder.

    shipped.launch_script("train.py")          # .../launch/train.py
    shipped.recipe("demo")                     # .../launch/recipes/demo.yaml; also by launch/recipes/demo.yaml
    shipped.ds_config("ds_configs/zero3.json")
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_PACKAGE = _HERE.parent
# holds launch/, ds_configs/ and slurm/
FOLDER = _HERE if (_HERE / "launch").is_dir() else _PACKAGE.parent


def launch_script(name: str) -> Path:
    """Path of a script of launch/, such as train.py."""
    return FOLDER / "launch" / name


def recipe(name: str) -> Path | None:
    """The shipped recipe that launch/recipes/NAME.yaml, NAME.yaml or NAME names; None where there is none."""
    return _named(name, "launch/recipes", ".yaml")


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in (FOLDER / "launch" / "recipes").glob("*.yaml"))


def summary(name: str) -> str:
    """The first sentence of a shipped recipe's comment."""
    lines = (FOLDER / "launch" / "recipes" / f"{name}.yaml").read_text().splitlines()
    words = " ".join(
        line.removeprefix("#").strip()
        for line in itertools.takewhile(lambda line: line.startswith("# "), lines)
    )
    return re.split(r"(?<=[.?]) ", words)[0]


def holds(path: Path) -> bool:
    """Whether a recipe file is one of the shipped ones."""
    return path.resolve().parent == FOLDER / "launch" / "recipes"


def ds_config(name: str) -> Path | None:
    """The shipped DeepSpeed file that ds_configs/NAME.json or NAME.json names; None where there is none."""
    return _named(name, "ds_configs", "")


def _named(name: str, folder: str, suffix: str) -> Path | None:
    given = Path(name)
    if str(given.parent) not in (".", folder):
        return None
    found = FOLDER / folder / (given.name if given.name.endswith(suffix) else given.name + suffix)
    return found if found.is_file() else None


def environment() -> dict[str, str]:
    """What lets a launch script import this very package: a checkout need not be what is installed."""
    if (_HERE / "launch").is_dir():  # installed, and the child runs the same interpreter
        return {}
    return {
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH")))
        )
    }
