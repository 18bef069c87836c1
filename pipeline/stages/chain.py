"""The stages of an experiment on this machine, one after the other.

chain = Chain(experiment, STAGES, method=None, jobs=2)
code = chain.run("train")
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline import artifacts
from pipeline.recipe.recipe import Experiment
from pipeline.recipe.sections import TrainSection
from pipeline.running import devices, runner
from pipeline.running.warm import WarmParents
from pipeline.stages.layout import Layout
from pipeline.stages.stage import Stage, Unit

# exit codes after which no other cell is begun: it would have to stop, or meet the same
ENDS_ALL = (runner.STOPPED, runner.SYSTEM_ERROR)


class Chain:
    """What is there, what is missing, and how it is made.

    `failed`: cells whose training failed in this command, while others trained.
    """

    def __init__(
        self, experiment: Experiment, stages: Mapping[str, Stage], method: str | None, jobs: int = 1
    ):
        self.experiment, self.layout, self.base = experiment, Layout(experiment), experiment.base
        self.stages, self.method, self.jobs = stages, method, jobs
        self.warm: WarmParents | None = None  # what its processes are forked from
        self.failed: list[Path] = []
        self.arguments = ["--config", *experiment.arguments()]
        every = list(experiment.cells())  # each is validated as it is made
        self.cells = [cell for cell in every if method in (None, cell.method)]
        # None: all, baselines too
        self._names = (
            None if len(self.cells) == len(every) else {cell.method for cell in self.cells}
        )

    def units(self, stage: str) -> list[Unit]:
        """Those of the methods that are asked for; what belongs to no cell belongs to all.

        One for each folder: the first.
        """
        found: dict[Path, Unit] = {}
        for unit in self.stages[stage].units(self.layout):
            if self._selected(unit.method):
                found.setdefault(unit.folder, unit)
        return list(found.values())

    def folders(self, stage: str) -> list[Path]:
        """All that a stage makes."""
        return [*(unit.folder for unit in self.units(stage)), *self.stages[stage].also(self.layout)]

    def pending(self, stage: str) -> list[Path]:
        """Folders this stage still has to write."""
        return [folder for folder in self.folders(stage) if not artifacts.complete(folder)]

    def starts(self, stages: Iterable[str]) -> bool:
        """Whether one of them starts ranks."""
        return any(self.stages[stage].where == "ranks" for stage in stages)

    def run(self, stage: str) -> int:
        """Do one stage; returns its exit code. ValueError where what it needs is not complete."""
        of, started, todo = self.stages[stage], time.time(), self.pending(stage)
        if not todo:
            return 0
        self.need(stage)
        if of.where == "here":
            of.run(self.experiment)
            code = 0
        else:
            units = [
                unit
                for unit in self.units(stage)
                if not artifacts.complete(unit.folder) and unit.trained not in self.failed
            ]
            code = (
                self._side_by_side(of, units) if of.where == "alone" else self._on_ranks(of, units)
            )
        if not code:
            print(f"{stage}: done in {time.time() - started:.0f} s", file=sys.stderr)
        if (
            stage == "train"
            and code not in (0, *ENDS_ALL)
            and any(artifacts.complete(unit.folder) for unit in self.units(stage))
        ):
            self.failed = self.pending(stage)
        return code

    def begin(self, stages: Sequence[str]) -> None:
        """Let the first processes' imports run while this one prepares the data."""
        first = next(
            (
                stage
                for stage in stages
                if self.stages[stage].where == "ranks" and self.pending(stage)
            ),
            None,
        )
        if self.warm and first and "prepare" in stages and self.pending("prepare"):
            ranks = devices.ranks(self._train_section(self.units(first)[0]))
            # then cells share the machine, where --jobs says so
            beside = ranks == 1 and self.stages[first].of_cells
            self.warm.begin(
                runner.environment(min(self.jobs, len(self.pending(first))) if beside else ranks)
            )

    def needed(self) -> list[str]:
        """What its processes import, in an order in which lean_imports.py can keep it small."""
        trains = [cell.recipe.train for cell in self.cells] + [
            self.base.align.train
        ] * self.base.align.enabled
        deepspeed = ["pipeline.engines.deepspeed_private:import_deepspeed"] * any(
            train.engine == "zero3" for train in trains
        )
        mlflow = ["mlflow", "mlflow.store.tracking.sqlalchemy_store"] * self.base.tracking.enabled
        stages = ["pipeline.stages.train", "pipeline.stages.evaluate"]
        return [*stages, "pipeline.running.lean_imports:import_peft", *deepspeed, *mlflow]

    def _selected(self, name: str) -> bool:
        return name == "-" or self._names is None or name in self._names

    def _train_section(self, unit: Unit) -> TrainSection:
        return self.base.align.train if unit.cell is None else unit.cell.recipe.train

    def _on_ranks(self, of: Stage, units: Sequence[Unit]) -> int:
        # failure: units have nothing to do with each other, so the others go on, unless it ends all
        first = 0
        for wave in of.waves(self.layout, units):
            first = self._one_wave(of, wave, first)
            if first and len(units) > len(wave):
                break  # the next wave reads what this one makes
        return first

    def _one_wave(self, of: Stage, units: Sequence[Unit], first: int) -> int:
        script = f"{of.name}.py"
        todo = [unit for unit in units if not artifacts.complete(unit.folder)]
        beside = [
            unit
            for unit in todo
            if self.jobs > 1 and unit.cell and devices.ranks(self._train_section(unit)) == 1
        ]
        if beside:
            code = runner.run_side_by_side(
                script,
                [self._arguments(unit) for unit in beside],
                min(self.jobs, len(beside)),
                self.warm,
            )
            missing = next(
                (unit.folder for unit in beside if not artifacts.complete(unit.folder)), None
            )
            first = first or (self._outcome(code, missing) if missing else code)
        for unit in todo:
            if first in ENDS_ALL:
                break
            if unit not in beside:
                ranks = devices.ranks(self._train_section(unit))
                code = self._outcome(
                    runner.run_ranks(script, self._arguments(unit), ranks, self.warm), unit.folder
                )
                first = code if code in ENDS_ALL else first or code
        return first

    def _side_by_side(self, of: Stage, units: Sequence[Unit]) -> int:
        slots = max(len(devices.gpus()) or devices.ranks(self.base.train), self.jobs)
        jobs = [self._arguments(unit) for unit in units]
        return runner.run_side_by_side(
            f"{of.name}.py", jobs, max(1, min(slots, len(jobs))), self.warm
        )

    def _arguments(self, unit: Unit) -> list[str]:
        method = [] if unit.method == "-" else ["--method", unit.method]
        return [*self.arguments, *method, *([] if unit.seed == "-" else ["--seed", unit.seed])]

    def _outcome(self, code: int, target: Path) -> int:
        """A stage that ends in order before its folder is complete has been asked to stop by a signal of its own."""
        return runner.STOPPED if code == 0 and not artifacts.complete(target) else code

    def need(self, stage: str) -> None:
        """ValueError where a folder that the stage needs is not complete."""
        of = self.stages[stage]
        read = {folder for cell in self.cells for folder in self.layout.read_by(cell).values()}
        for before in of.needs:
            folders = [
                unit.folder
                for unit in self.units(before)
                if not self.layout.of_defences(before) or unit.folder in read
            ]
            missing = [
                folder
                for folder in folders
                if not artifacts.complete(folder) and folder not in self.failed
            ]
            if missing:
                raise ValueError(
                    f"{missing[0]} is not complete: run `sap {before} {self.experiment.path}` "
                    "first (same overrides), or `sap run`"
                )
