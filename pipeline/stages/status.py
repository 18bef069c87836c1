"""How far an experiment is: one line for every folder that its stages write.

Needs no torch and no GPU, and reads weights once at the most, to know them by their content (digests.py).

    sap status launch/recipes/demo.yaml
    sap status launch/recipes/demo.yaml --stage train --method sap --seed 0

Tab-separated columns, also for scripts (slurm/ reads them): stage, method, seed ("-" where a stage has none), state,
folder, work folder. State: complete | step N (unfinished, goes on after step N) | missing. Lines that begin with # are
for people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.recipe.recipe import Experiment
from pipeline.stages.layout import Layout
from pipeline.stages.stage import Stage, Unit


def units(experiment: Experiment, stages: Mapping[str, Stage]) -> Iterator[Unit]:
    """Every folder, in the order in which stages run; methods and seeds may share one."""
    layout = Layout(experiment)
    for stage in stages.values():
        yield from stage.units(layout)


def check_portable(experiment: Experiment) -> None:
    """ValueError where folder names depend on the machine: a login node would name others than the compute nodes."""
    choices = {"dtype": "bfloat16 or float32", "attention": "sdpa or eager"}
    found = [field for field in choices if getattr(experiment.base.model, field) == "auto"]
    if found:
        autos = " and ".join(f"model.{field} auto" for field in found)
        means = "means" if len(found) == 1 else "mean"
        others = "".join(f", and model.{field} to {choices[field]}" for field in found[1:])
        first = "it" if len(found) == 1 else f"model.{found[0]}"
        raise ValueError(
            f"{experiment.path}: {autos} {means} something else on another machine: "
            f"set {first} to {choices[found[0]]}{others}"
        )


def status(
    experiment: Experiment,
    stages: Mapping[str, Stage],
    stage: str | None = None,
    method: str | None = None,
    seed: int | None = None,
    portable: bool = False,
) -> str:
    """The lines, with the store of its MLflow runs in a comment where all are asked for.

    portable: also a comment for every override, as a job in another folder is to be given it (slurm/submit.sh).
    """
    from pipeline.tracking.run import describe_store

    chosen = [
        unit for unit in units(experiment, stages)
        if stage in (None, unit.stage) and method in (None, unit.method) and (seed is None or unit.seed == str(seed))
    ]  # fmt: skip
    lines = [unit.line() for unit in chosen]
    if stage is None and experiment.base.tracking.enabled:
        name = experiment.base.tracking.experiment or experiment.base.name
        runs = ", ".join(f"{cell.method}-s{cell.seed}" for cell in experiment.cells())
        lines.append(f"# mlflow  {describe_store(experiment.base)}  experiment {name}, runs {runs}")
    if stage is None and portable:
        lines += [f"# override\t{argument}" for argument in experiment.arguments()[1:]]
    return "\n".join(lines)
