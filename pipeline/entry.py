"""What the launch scripts share: arguments, the choice of a cell, errors as one sentence and exit code 2.

deepspeed launch/train.py --config launch/recipes/demo.yaml --method sap --seed 0 --train.lr 2e-4
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pipeline import artifacts, recipe, strict_yaml
from pipeline.batch_job import report_error
from pipeline.recipe import Cell, Experiment

BAD_INPUT = 2


def arguments(description: str, argv: list[str] | None = None, checkable: bool = False) -> tuple[argparse.Namespace, Experiment]:
    """Parse a launch script's command line and load its recipe. checkable: whether the script knows --check."""
    parser = argparse.ArgumentParser(description=description, epilog="Any field of the recipe can be overridden: --train.lr 2e-4")
    parser.add_argument("--config", required=True, help="path of the recipe")
    parser.add_argument("--method", help="method of the recipe; needed where it has several")
    parser.add_argument("--seed", type=int, help="seed of the recipe; needed where it has several")
    if checkable:
        parser.add_argument("--check", action="store_true", help="check what can be checked before weights are read or ranks meet, and stop")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    options, rest = parser.parse_known_args(argv)
    if options.local_rank is not None and options.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    return options, open_recipe(options.config, strict_yaml.parse_overrides(rest))


def open_recipe(given: str, overrides: dict[str, Any]) -> Experiment:
    """`recipe.load`, and a line on stderr where a shipped recipe stands in for a file that is not there."""
    experiment = recipe.load(given, overrides)
    if experiment.path != Path(given) and os.environ.get("RANK", "0") == "0":
        print(f"no file {Path(given).absolute()}: the recipe is the shipped {experiment.path}", file=sys.stderr)
    return experiment


def recipe_given(module: str) -> Experiment:
    """The recipe that `python -m MODULE RECIPE [--dotted.override value]` names. ValueError without one."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise ValueError(f"give a recipe: python -m {module} launch/recipes/compare.yaml [--dotted.override value]")
    return open_recipe(sys.argv[1], strict_yaml.parse_overrides(sys.argv[2:]))


def choose_cell(experiment: Experiment, method: str | None, seed: int | None) -> Cell:
    """The one cell meant; ValueError listing the choices where there are several, or where there is none such."""
    methods, seeds = list(experiment.base.methods), list(experiment.base.seeds)
    if method is None and len(methods) > 1:
        raise ValueError(f"{experiment.path} has the methods {', '.join(methods)}: choose one with --method")
    if seed is None and len(seeds) > 1:
        raise ValueError(f"{experiment.path} has the seeds {', '.join(map(str, seeds))}: choose one with --seed")
    return experiment.cell(method or methods[0], seeds[0] if seed is None else seed)


def guarded(main: Callable[[], int | None]) -> int:
    """Run main; a ValueError becomes one sentence on stderr and exit code 2. Once a node: a path may be missing on one node only."""
    try:
        return main() or 0
    except ValueError as error:
        if not isinstance(error, artifacts.Busy):
            report_error(str(error))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            rank = os.environ.get("RANK", "0")
            print(f"error: {error}" if rank == "0" else f"error: {error} (rank {rank})", file=sys.stderr, flush=True)
        if os.environ.get("SAP_DEBUG"):
            raise
        return BAD_INPUT


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run main, guarded, and end the process with its exit code."""
    end(guarded(main))


def end(code: int) -> NoReturn:
    """End this process without the interpreter's finalization.

    Threads of communication libraries may outlive the process group. One that asks for the interpreter while it finalizes is ended
    in the middle of C++ code, and a rank that has done all its work aborts: "terminate called without an active exception", seen
    once in some hundred launches. What is registered with atexit still runs, and output is flushed.
    """
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
