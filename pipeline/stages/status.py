"""How far an experiment is: one line for every folder that its stages write. Needs no torch and no GPU, and reads weights once
at the most, to know them by their content (digests.py).

    sap status launch/recipes/demo.yaml
    sap status launch/recipes/demo.yaml --stage train --method sap --seed 0

Tab-separated columns, also for scripts (slurm/ reads them): stage, method, seed ("-" where a stage has none), state, folder, work folder.
State: complete | step N (unfinished, goes on after step N) | missing. Lines that begin with # are for people.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import artifacts
from pipeline.recipe.recipe import Experiment
from pipeline.stages.layout import Layout

STAGES = ("prepare", "align", "filter", "direction", "train", "evaluate", "report")


@dataclass(frozen=True)
class Unit:
    """One folder of one stage. method, seed: "-" where the stage has none."""

    stage: str
    method: str
    seed: str
    folder: Path
    work: Path

    @property
    def state(self) -> str:
        if artifacts.complete(self.folder):
            return "complete"
        steps = [int(path.parent.name.removeprefix("step-")) for path in (self.work / "checkpoints").glob(f"step-*/{artifacts.MARKER}")]
        return f"step {max(steps)}" if steps else "missing"

    def line(self) -> str:
        return "\t".join((self.stage, self.method, self.seed, self.state, str(self.folder.absolute()), str(self.work.absolute())))


def units(experiment: Experiment) -> Iterator[Unit]:
    """Every folder, in the order in which stages run."""
    layout = Layout(experiment)

    def unit(stage: str, folder: Path, method: str = "-", seed: int | None = None) -> Unit:
        return Unit(stage, method, "-" if seed is None else str(seed), folder, layout.work(folder))

    yield unit("prepare", layout.prepare())
    if experiment.base.align.enabled:
        yield unit("align", layout.align())
    cells = list(experiment.cells())
    for cell in cells:
        if layout.needs_filter(cell):
            yield unit("filter", layout.filter(cell), cell.method, cell.seed)  # methods and seeds share one folder
    for cell in cells:
        if layout.needs_direction(cell):
            yield unit("direction", layout.direction(cell), cell.method, cell.seed)  # methods may share one folder
    for cell in cells:
        yield unit("train", layout.train(cell), cell.method, cell.seed)
    for subject in layout.subjects():
        yield unit("evaluate", layout.evaluate(subject), subject.name, subject.seed)
    yield unit("report", layout.report())


def check_portable(experiment: Experiment) -> None:
    """ValueError where folder names depend on the machine: a login node would name others than the compute nodes."""
    for field, choices in (("dtype", "bfloat16 or float32"), ("attention", "sdpa or eager")):
        if getattr(experiment.base.model, field) == "auto":
            raise ValueError(f"{experiment.path}: model.{field} auto is another one on another machine: set it to {choices}")


def status(
    experiment: Experiment, stage: str | None = None, method: str | None = None, seed: int | None = None, portable: bool = False
) -> str:
    """The lines, with the store of its MLflow runs in a comment where all are asked for.

    portable: also a comment for every override, as a job in another folder is to be given it (slurm/submit.sh).
    """
    from pipeline.tracking.run import describe_store

    chosen = [
        unit for unit in units(experiment)
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
