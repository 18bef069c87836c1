"""The command line: `sap STAGE RECIPE [--method M] [--seed S] [--dry-run] [--dotted.field value]`.

    sap run launch/recipes/demo.yaml
    sap train launch/recipes/demo.yaml --method sap --seed 1 --train.lr 2e-4

`run` does all stages that are not complete yet; the others do one. `status` says how far each is, `plan` what memory and time
training takes by arithmetic. `doctor` checks the SAP step on this model and these ranks, writes nothing, and exits with 1 where a check fails.
`sap data FILE` says what a data file holds and how a recipe would read it, `sap template MODEL` what of a conversation is trained,
`sap bench` what a step costs, by engine and method, beside Trainer and TRL, on a GPU or a CPU.
Exit codes: 0 done, 2 bad input, 74 an error of the system (a full disk, a folder that is gone, a broken file), 75 stopped on request (SIGTERM, SIGUSR1,
Ctrl-C; run it again to go on), whatever failed before, anything else a stage's own failure.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline import artifacts
from pipeline.bench import command as bench
from pipeline.doctor import describe, show_template
from pipeline.recipe import recipe, redaction
from pipeline.recipe.recipe import Cell, Experiment
from pipeline.running import devices, entry, runner
from pipeline.running.warm import WarmParents
from pipeline.stages import capacity, checks, dry_run
from pipeline.stages import options as options_of
from pipeline.stages.capacity import Capacity
from pipeline.stages.layout import Layout
from pipeline.stages.status import STAGES, check_portable, status
from pipeline.system.system_errors import reading_input
from pipeline.tracking.run import deliver, describe_store, waiting

_ON_RANKS = {"align", "filter", "direction", "train"}  # stages that start ranks
_ENDS_ALL = (runner.STOPPED, runner.SYSTEM_ERROR)  # exit codes after which no other cell is begun: it would have to stop, or meet the same


# Commands that look at one file or model, and take no recipe.
_WITHOUT_RECIPE: dict[str, Callable[[list[str]], int]] = {
    "data": lambda argv: describe.command(argv[1:]),
    "template": lambda argv: show_template.main(argv[1:]),
    "bench": lambda argv: bench.command(argv[1:]),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sap`; returns the exit code."""

    def work() -> int:
        given = sys.argv[1:] if argv is None else list(argv)
        if hasattr(sys.stdout, "reconfigure"):  # a stream of Python's own, redacted or not
            sys.stdout.reconfigure(errors="backslashreplace")  # names of columns may be beyond what a terminal shows
        with runner.stoppable():
            return _WITHOUT_RECIPE.get(given[0], _main)(given) if given else _main(given)

    code = entry.guarded(work)
    if argv is None and code in (runner.STOPPED, entry.INTERRUPTED):
        entry.end(code)
    return code


def _main(argv: list[str]) -> int:
    parser = options_of.parser(__doc__, _WITHOUT_RECIPE)
    if not argv or "--help" in argv or "-h" in argv:
        parser.print_help()
        _print_fields()
        return 0
    options, experiment = options_of.opened(parser, argv)
    if options.stage == "status":
        if options.portable:
            check_portable(experiment)
        with reading_input():
            print(status(experiment, options.of_stage, options.method, options.seed, options.portable))
        return 0
    if options.method:
        experiment.cell(options.method, experiment.base.seeds[0])
    if options.stage == "track":
        return _track(experiment)
    if options.stage == "plan":
        with reading_input():
            return _plan(experiment, options)
    if options.stage == "doctor":
        return _doctor(experiment, options)
    if options.show:
        return _show(experiment, options.method)
    if options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}: it takes a number from 1")
    if options.method and options.stage == "report":
        raise ValueError(
            "a report compares all methods of a recipe: leave --method out; a training of --resume-from is compared as a method of the recipe, "
            "with train: {resume_from: FOLDER@STEP}"
        )
    with reading_input():
        artifacts.check_writable(experiment.base.output_dir / experiment.base.name, "output_dir")
        chain = Chain(experiment, options.method, options.jobs)
    stages = STAGES if options.stage == "run" else (options.stage,)
    idle = not any(chain.pending(stage) for stage in stages if stage != "report")
    starts = bool(_ON_RANKS & set(stages))
    found = _check(chain, light=options.dry_run or idle, starts=starts)
    if options.dry_run:
        print(dry_run.overview(experiment, {stage: chain.folders(stage) for stage in stages}, found))
        return 0
    if starts and not idle:
        print(devices.describe(experiment.base.model, experiment.base.train), file=sys.stderr)
    if options.no_warm:
        code = _run(chain, stages, options)
    else:
        with WarmParents(_needed(chain)) as chain.warm:
            code = _run(chain, stages, options)
    deliver(chain.layout)  # what a server missed that is back by now; MLflow is not imported where nothing waits
    return code


def _track(experiment: Experiment) -> int:
    """Deliver to MLflow what waits; 74 where something still does."""
    if not experiment.base.tracking.enabled:
        raise ValueError(f"{experiment.path} has tracking.enabled false: there is nothing to deliver")
    layout = Layout(experiment)
    before, left = waiting(layout), deliver(layout)
    print(f"{len(before) - len(left)} of {len(before)} runs delivered to {describe_store(experiment.base)}" if before else "nothing waits to be delivered")
    for outbox in left:
        print(f"still waits: {outbox}", file=sys.stderr)
    return runner.SYSTEM_ERROR if left else 0


def _needed(chain: Chain) -> list[str]:
    """What the processes of an experiment import, in an order in which lean_imports.py can keep it small."""
    trains = [cell.recipe.train for cell in chain.cells] + [chain.base.align.train] * chain.base.align.enabled
    deepspeed = ["pipeline.engines.deepspeed_private:import_deepspeed"] * any(train.engine == "zero3" for train in trains)
    mlflow = ["mlflow", "mlflow.store.tracking.sqlalchemy_store"] * chain.base.tracking.enabled
    return ["pipeline.stages.stages", "pipeline.running.lean_imports:import_peft", *deepspeed, *mlflow]


def _check(chain: Chain, light: bool, starts: bool) -> Capacity | None:
    """Every check there is, and whether memory and disk suffice for what starts here; None where that is not known. What is no error is printed."""
    checked = checks.check(chain.experiment, light=light, starts=starts)
    found = capacity.capacity(chain.experiment, checked.facts, chain.cells) if starts and checked.facts else None
    for note in (*checked.notes, *(found.notes if found else ()), *_alike(chain)):
        print(f"note: {redaction.redact(note)}", file=sys.stderr)
    return found


def _alike(chain: Chain) -> list[str]:
    """A sentence for every two methods that train the same: one of them changes nothing, as a section that nobody enabled."""
    first: dict[str, str] = {}
    notes = []
    for cell in chain.cells:
        if cell.seed == chain.base.seeds[0]:
            other = first.setdefault(chain.layout.train_hash(cell), cell.method)
            if other != cell.method:
                notes.append(f"methods {other} and {cell.method} train the same: set what makes {cell.method} another one, e.g. lisa: {{enabled: true}}")
    return notes


def _run(chain: Chain, stages: Sequence[str], options: argparse.Namespace) -> int:
    """The stages in turn; the first failure's exit code. Where some cells trained and others failed, those that trained are evaluated, and no report is made."""
    failure = 0
    chain.begin(stages)
    for stage in stages:
        if stage == "report" and failure:
            names = ", ".join(folder.name for folder in chain.failed)
            print(f"not trained: {names} (the reason is above); what trained is evaluated, and the report waits for the rest", file=sys.stderr)
            break
        if stage == "report" and options.method:
            print(f"the report needs every method: `sap report {options.recipe}` once they are evaluated", file=sys.stderr)
            continue
        code = chain.run(stage)
        if code == runner.STOPPED:  # a failure before it is met again
            print(f"stopped in {stage}: what was finished or saved stays; run the same command again to go on", file=sys.stderr)
            return code
        failure = failure or code
        if code and not (stage == "train" and chain.failed):
            break
    return failure


class Chain:
    """The stages of an experiment on this machine, one after the other."""

    def __init__(self, experiment: Experiment, method: str | None, jobs: int = 1):
        self.jobs = jobs
        self.warm: WarmParents | None = None  # what its processes are forked from
        self.failed: list[Path] = []  # cells whose training failed in this command, while others trained
        self.experiment, self.layout, self.base = experiment, Layout(experiment), experiment.base
        self.arguments = ["--config", *experiment.arguments()]
        self.cells = [cell for cell in experiment.cells() if method in (None, cell.method)]

    def run(self, stage: str) -> int:
        """Do one stage; returns its exit code."""
        started = time.time()
        todo = self.pending(stage)
        code = getattr(self, stage)() if todo else 0
        if todo and not code and stage != "report":
            print(f"{stage}: done in {time.time() - started:.0f} s", file=sys.stderr)
        return code

    def begin(self, stages: Sequence[str]) -> None:
        """Let the first processes' imports run while this one prepares the data."""
        first = next((stage for stage in stages if stage in _ON_RANKS and self.pending(stage)), None)
        if self.warm and first and "prepare" in stages and self.pending("prepare"):
            ranks = devices.ranks(self.base.align.train if first == "align" else self.cells[0].recipe.train)
            beside = ranks == 1 and first != "align"  # then cells share the machine, where --jobs says so
            self.warm.begin(runner.environment(min(self.jobs, len(self.pending(first))) if beside else ranks))

    def pending(self, stage: str) -> list[Path]:
        """Folders this stage still has to write (the report is always shown)."""
        return [folder for folder in self.folders(stage) if stage == "report" or not artifacts.complete(folder)]

    def folders(self, stage: str) -> list[Path]:
        layout = self.layout
        if stage == "align":
            return [layout.align()] if self.base.align.enabled else []
        if stage == "filter":
            return list(dict.fromkeys(layout.filter(cell) for cell in self.cells if layout.needs_filter(cell)))
        if stage == "direction":
            return list(dict.fromkeys(layout.direction(cell) for cell in self.cells if layout.needs_direction(cell)))
        if stage == "train":
            return [layout.train(cell) for cell in self.cells]
        if stage == "evaluate":
            return [layout.evaluate(subject) for subject in layout.subjects() if self._selected(subject.name)]
        return [layout.prepare(), layout.prompts()] if stage == "prepare" else [layout.report()]

    def prepare(self) -> int:
        from pipeline.stages import stages

        stages.prepare(self.experiment)
        return 0

    def align(self) -> int:
        self._need("prepare")
        code = runner.run_ranks("align.py", self.arguments, devices.ranks(self.base.align.train), self.warm)
        return self._outcome(code, self.layout.align())

    def filter(self) -> int:
        self._need("prepare", "align")
        # Filters may share embeddings: one of each sort computes them, and the others come after.
        leaders = {self.layout.embeddings(cell): cell for cell in reversed(self.cells) if self.layout.needs_filter(cell)}
        code = self._each_cell("filter.py", self.layout.filter, lambda cell: cell in leaders.values())
        return code or self._each_cell("filter.py", self.layout.filter, self.layout.needs_filter)

    def direction(self) -> int:
        self._need("prepare", "align")
        return self._each_cell("direction.py", self.layout.direction, self.layout.needs_direction)

    def train(self) -> int:
        self._need("prepare", "align", "filter")
        precomputed = [
            self.layout.direction(cell) for cell in self.cells if cell.recipe.sap.enabled and cell.recipe.sap.direction == "precomputed"
        ]
        missing = next((folder for folder in precomputed if not artifacts.complete(folder)), None)
        if missing:
            raise ValueError(f"{missing} is not complete: run `sap direction {self.experiment.path}` first, or `sap run`")
        code = self._each_cell("train.py", self.layout.train, lambda cell: True)
        folders = self.folders("train")
        if code not in (0, *_ENDS_ALL) and any(map(artifacts.complete, folders)):
            self.failed = [folder for folder in folders if not artifacts.complete(folder)]
        return code

    def evaluate(self) -> int:
        """Of the subjects that are trained; one that failed in this very command is left out, one that was never trained is an error."""
        self._need("prepare", "align", *([] if self.failed else ["train"]))
        jobs = []
        for subject in self.layout.subjects():
            if subject.trained in self.failed:
                continue
            if self._selected(subject.name) and not artifacts.complete(self.layout.evaluate(subject)):
                seed = [] if subject.seed is None else ["--seed", str(subject.seed)]
                jobs.append([*self.arguments, "--method", subject.name, *seed])
        slots = max(len(devices.gpus()) or devices.ranks(self.base.train), self.jobs)
        return runner.run_side_by_side("evaluate.py", jobs, max(1, min(slots, len(jobs))), self.warm)

    def report(self) -> int:
        self._need("prepare", "align", "train", "evaluate")
        from pipeline.report import stage

        folder = stage.report(self.experiment)
        artifacts.verify(folder, "table.txt")
        print((folder / "table.txt").read_text())
        print(f"report  {(folder / 'report.html').resolve()}")
        if self.base.tracking.enabled:
            print(f"mlflow  {describe_store(self.base)}")
        return 0

    def _selected(self, name: str) -> bool:
        return len(self.cells) == len(list(self.experiment.cells())) or name in {cell.method for cell in self.cells}

    def _each_cell(self, script: str, target_of: Callable[[Cell], Path], wanted: Callable[[Cell], bool]) -> int:
        todo: dict[Path, Cell] = {}  # methods may share a folder
        for cell in self.cells:
            if wanted(cell) and not artifacts.complete(target_of(cell)):
                todo.setdefault(target_of(cell), cell)
        alone = {target: cell for target, cell in todo.items() if self.jobs > 1 and devices.ranks(cell.recipe.train) == 1}
        first = 0  # failure: cells have nothing to do with each other, so the others go on, unless it ends all
        if alone:
            jobs = [self._arguments(cell) for cell in alone.values()]
            first = runner.run_side_by_side(script, jobs, min(self.jobs, len(alone)), self.warm)
            missing = next((target for target in alone if not artifacts.complete(target)), None)
            first = self._outcome(first, missing) if missing else first
        for target, cell in todo.items():
            if target in alone:
                continue
            if first in _ENDS_ALL:
                break
            ranks = devices.ranks(cell.recipe.train)
            code = self._outcome(runner.run_ranks(script, self._arguments(cell), ranks, self.warm), target)
            first = code if code in _ENDS_ALL else first or code
        return first

    def _arguments(self, cell: Cell) -> list[str]:
        return [*self.arguments, "--method", cell.method, "--seed", str(cell.seed)]

    def _outcome(self, code: int, target: Path) -> int:
        """A stage that ends in order before its folder is complete has been asked to stop by a signal of its own."""
        return runner.STOPPED if code == 0 and not artifacts.complete(target) else code

    def _need(self, *stages: str) -> None:
        for stage in stages:
            # Of prepare's folders all need the training sets; an evaluation makes the prompts where they are missing.
            folders = [self.layout.prepare()] if stage == "prepare" else self.folders(stage)
            missing = [folder for folder in folders if not artifacts.complete(folder)]
            if missing:
                raise ValueError(
                    f"{missing[0]} is not complete: run `sap {stage} {self.experiment.path}` first (same overrides), or `sap run`"
                )


def _doctor(experiment: Experiment, options: argparse.Namespace) -> int:
    from pipeline.doctor.case import choose_cell

    cell = choose_cell(experiment, options.method, options.seed)
    arguments = ["--config", *experiment.arguments(), "--method", cell.method, "--seed", str(cell.seed)]
    return runner.run_ranks("doctor.py", arguments, devices.ranks(cell.recipe.train))


def _plan(experiment: Experiment, options: argparse.Namespace) -> int:
    from pipeline.planner.planner import plan_cell

    if (options.ranks is not None and options.ranks < 1) or not 0 < options.gpu_gb < float("inf"):
        raise ValueError("--ranks takes a number from 1, --gpu-gb a finite one above 0")
    for cell in Chain(experiment, options.method).cells:
        if cell.seed == experiment.base.seeds[0]:  # seeds change nothing here
            print(plan_cell(experiment, cell, options.ranks or devices.ranks(cell.recipe.train), options.gpu_gb), end="\n\n")
    return 0


def _show(experiment: Experiment, method: str | None) -> int:
    import yaml

    for cell in Chain(experiment, method).cells:
        print(f"# {cell.method}, seed {cell.seed}")
        print(yaml.safe_dump(recipe.dump(cell.recipe) | {"methods": redaction.redact(experiment.base.methods)}, sort_keys=False))
    return 0


def _print_fields() -> None:
    width = min(shutil.get_terminal_size().columns, 110)
    print("\nFields of a recipe; each can be overridden on the command line, e.g. --train.lr 2e-4:")
    for name, kind, default, meaning in recipe.field_rows():
        print(f"  --{name}  {kind} ({default if default == 'required' else f'default {default}'})")
        print(textwrap.fill(meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6))


if __name__ == "__main__":
    sys.exit(main())
