"""What the launch scripts share: their arguments, the recipe, the choice of a cell.

deepspeed launch/train.py --config launch/recipes/demo.yaml --method sap --seed 0 --train.lr 2e-4
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.defences.recipes import load
from pipeline.recipe import strict_yaml
from pipeline.recipe.recipe import Cell, Experiment
from pipeline.stages import STAGES


def arguments(
    description: str, argv: list[str] | None = None, checkable: bool = False
) -> tuple[argparse.Namespace, Experiment]:
    """Parse a launch script's command line and load its recipe. checkable: whether the script knows --check."""
    parser = argparse.ArgumentParser(
        description=description, epilog="Any field of the recipe can be overridden: --train.lr 2e-4"
    )
    parser.add_argument("--config", required=True, help="path of the recipe")
    parser.add_argument("--method", help="method of the recipe; needed where it has several")
    parser.add_argument("--seed", type=int, help="seed of the recipe; needed where it has several")
    if checkable:
        parser.add_argument(
            "--check",
            action="store_true",
            help="check what can be checked before weights are read or ranks meet, and stop",
        )
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    options, rest = parser.parse_known_args(argv)
    if options.local_rank is not None and options.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    return options, open_recipe(options.config, strict_yaml.parse_overrides(rest))


def open_recipe(given: str, overrides: dict[str, Any]) -> Experiment:
    """`recipes.load`, and a line on stderr where a shipped recipe stands in for a file that is not there.

    What this process writes from now on has the recipe's permissions.
    """
    experiment = load(given, overrides)
    artifacts.keep_from_others(experiment.base.umask)
    if experiment.path != Path(given) and os.environ.get("RANK", "0") == "0":
        print(
            f"no file {Path(given).absolute()}: the recipe is the shipped {experiment.path}",
            file=sys.stderr,
        )
    return experiment


def recipe_given(module: str) -> Experiment:
    """The recipe that `python -m MODULE RECIPE [--dotted.override value]` names. ValueError without one."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise ValueError(
            f"give a recipe: python -m {module} launch/recipes/compare.yaml [--dotted.override value]"
        )
    return open_recipe(sys.argv[1], strict_yaml.parse_overrides(sys.argv[2:]))


def choose_cell(experiment: Experiment, method: str | None, seed: int | None) -> Cell:
    """The one cell meant; ValueError listing the choices where there are several, or where there is none such."""
    methods, seeds = list(experiment.base.methods), list(experiment.base.seeds)
    if method is None and len(methods) > 1:
        raise ValueError(
            f"{experiment.path} has the methods {', '.join(methods)}: choose one with --method"
        )
    if seed is None and len(seeds) > 1:
        raise ValueError(
            f"{experiment.path} has the seeds {', '.join(map(str, seeds))}: choose one with --seed"
        )
    return experiment.cell(method or methods[0], seeds[0] if seed is None else seed)


def run_stage(name: str, description: str) -> None:
    """What launch/NAME.py does for a stage on ranks: this process is one of them.

    With --check it looks at the input only.
    """
    options, experiment = arguments(description, checkable=True)
    stage = STAGES[name]
    cell = choose_cell(experiment, options.method, options.seed) if stage.of_cells else None

    from pipeline.stages import checks

    checks.check(experiment, cell or "align", light=options.check)
    if options.check:
        checks.check_upstream(experiment, stage, cell)
        return
    from pipeline.engines.open import leave

    stage.run(experiment, *([cell] if cell else []))
    leave()
