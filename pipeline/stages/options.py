"""The options of `sap`: what there are, which command takes which, and the recipe that they open.

parser = options.parser("what the command does", STAGES, ["data"])
given, experiment = options.opened(parser, STAGES, ["train", "demo.yaml", "--method", "sap", "--train.lr", "2e-4"])
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterable, Mapping

from pipeline.recipe import strict_yaml
from pipeline.recipe.recipe import Experiment
from pipeline.recipe.redaction import redact
from pipeline.stages import command_line
from pipeline.stages.stage import Stage


def _only_for(stages: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Options that other commands would ignore, and the commands that take them."""
    running = (*stages, "run")
    of_cells = (*running, "status", "plan", "doctor")
    return {
        "of_stage": ("status",), "portable": ("status",), "ranks": ("plan",), "gpu_gb": ("plan",),
        "resume_from": (*running, "status"), "method": of_cells, "methods": of_cells, "seed": of_cells,
        "jobs": running, "no_warm": running, "dry_run": running, "show": running,
    }  # fmt: skip


def commands(stages: Iterable[str]) -> tuple[str, ...]:
    """Those that take a recipe."""
    return (*stages, "run", "status", "track", "plan", "doctor")


def check_command(name: str, stages: Iterable[str], without_recipe: Iterable[str]) -> None:
    """ValueError that lists every command where there is none of that name."""
    known = (*commands(stages), *without_recipe)
    if name not in known and not name.startswith("-"):
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"the nearest is {nearest[0]}, and " if nearest else ""
        raise ValueError(
            f"there is no command '{redact(name)}': {hint}all are {', '.join(known)} (`sap --help`)"
        )


def parser(
    description: str, stages: Mapping[str, Stage], without_recipe: Iterable[str]
) -> argparse.ArgumentParser:
    """The parser of every command that takes a recipe. without_recipe: names of the others, for the usage line."""
    result = argparse.ArgumentParser(
        prog="sap",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    known = commands(stages)
    named = "{" + ",".join((*known, *without_recipe)) + "}"
    result.add_argument(
        "stage",
        choices=known,
        metavar=named,
        help="what to do; run: everything that is missing; track: deliver to MLflow what waits",
    )
    shipped = "launch/recipes/NAME.yaml of one that ships with the package"
    result.add_argument("recipe", help=f"path of the recipe, or {shipped}; for data: the file")
    result.add_argument("--method", help="only this method of the recipe")
    result.add_argument(
        "--methods",
        help="the recipe as if it had these methods only, e.g. sft,sap (a grid: the name before its "
        "settings): a report of its own",
    )
    result.add_argument(
        "--stage", dest="of_stage", choices=list(stages), help="for status: only this stage"
    )
    result.add_argument(
        "--portable",
        action="store_true",
        help="for status: refuse a recipe whose folders differ from machine to machine",
    )
    result.add_argument("--seed", type=int, help="only this seed (need not be in the recipe)")
    result.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="cells of one rank that train, and subjects that are evaluated, at a time; default 1",
    )
    alone = "start every process as a Python of its own, which imports for itself: slower, the same results"
    result.add_argument("--no-warm", action="store_true", help=alone)
    result.add_argument(
        "--resume-from",
        metavar="FOLDER@STEP",
        help="with one --method and --seed: start that training from another one's checkpoint (train.resume_from)",
    )
    result.add_argument(
        "--ranks", type=int, help="for plan: GPUs to plan for; default: train.ranks"
    )
    result.add_argument(
        "--gpu-gb",
        type=float,
        default=80.0,
        help="for plan: memory of a GPU in GB (1e9 bytes); default 80",
    )
    result.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked, print what would run and what is there, and stop",
    )
    result.add_argument(
        "--show", action="store_true", help="print the resolved recipe of every method, and stop"
    )
    return result


def opened(
    parser: argparse.ArgumentParser, stages: Mapping[str, Stage], argv: list[str]
) -> tuple[argparse.Namespace, Experiment]:
    """The options, and the recipe with its overrides and the methods that are asked for.

    ValueError for what does not go together.
    """
    options, rest = parser.parse_known_args(argv)
    for name in ("method", "methods", "resume_from"):
        if getattr(options, name) == "":  # a variable of a script that is not set
            raise ValueError(
                f"--{name.replace('_', '-')} is empty: give it a value, or leave it out"
            )
    if options.resume_from:
        if any(
            argument.partition("=")[0].replace("-", "_") == "__train.resume_from"
            for argument in rest
        ):
            raise ValueError(
                "--resume-from and --train.resume_from are the same: leave one of them out"
            )
        rest.append(f"--train.resume_from={json.dumps(options.resume_from)}")
    overrides = strict_yaml.parse_overrides(rest)
    if options.seed is not None:
        overrides["seeds"] = [options.seed]
    _check_belongs(parser, stages, options)
    experiment = command_line.open_recipe(options.recipe, overrides)
    if options.methods:
        experiment = experiment.only(options.methods.split(","))
    if options.resume_from and (
        len(experiment.base.seeds) > 1 or not (options.method or len(experiment.base.methods) == 1)
    ):
        raise ValueError(
            "--resume-from applies to one training: `sap train RECIPE --method M --seed S "
            "--resume-from FOLDER@STEP`, and so for later stages"
        )
    if options.method and experiment.base.train.resume_from is not None:
        experiment = experiment.only([options.method])  # the others do not start from it
    return options, experiment


def _check_belongs(
    parser: argparse.ArgumentParser, stages: Mapping[str, Stage], options: argparse.Namespace
) -> None:
    """ValueError for an option that the command would ignore."""
    for name, takers in _only_for(stages).items():
        if getattr(options, name) != parser.get_default(name) and options.stage not in takers:
            option = "--stage" if name == "of_stage" else f"--{name.replace('_', '-')}"
            many = "commands that look at cells" if "doctor" in takers else "stages that run"
            where = (
                many
                if ("run" in takers and "status" not in takers) or "doctor" in takers
                else " and ".join(f"`sap {taker}`" for taker in takers)
            )
            raise ValueError(
                f"{option} would do nothing in `sap {options.stage}`, and belongs to {where}: leave it out"
            )
