"""The command line: `sap STAGE RECIPE [--method M] [--seed S] [--dry-run] [--dotted.field value]`.

    sap run launch/recipes/demo.yaml
    sap train launch/recipes/demo.yaml --method sap --seed 1 --train.lr 2e-4

`run` does all stages that are not complete yet; the others do one. `status` says how far each is, `plan` what memory
and time training takes by arithmetic. `doctor` checks the SAP step on this model and these ranks, writes nothing, and
exits with 1 where a check fails. `sap data FILE` says what a data file holds and how a recipe would read it, `sap
template MODEL` what of a conversation is trained, `sap bench` what a step costs, by engine and method, beside Trainer
and TRL, on a GPU or a CPU. `sap recipes` lists the recipes that ship with the package, `sap stages` the stages, for
scripts. Exit codes: 0 done, 2 bad input, 74 an error of the system (a full disk, a folder that is gone, a broken file),
75 stopped on request (SIGTERM, SIGUSR1, Ctrl-C; run it again to go on), whatever failed before, anything else a stage's
own failure.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence

from pipeline import artifacts, shipped
from pipeline.bench import command as bench
from pipeline.defences import recipes
from pipeline.doctor import describe, show_template
from pipeline.recipe import recipe, redaction
from pipeline.recipe.recipe import Cell, Experiment
from pipeline.report.stage import ALL_STAGES
from pipeline.running import devices, entry, runner
from pipeline.running.warm import WarmParents
from pipeline.stages import capacity, checks, dry_run, method_notes
from pipeline.stages import options as options_of
from pipeline.stages.capacity import Capacity
from pipeline.stages.chain import Chain
from pipeline.stages.layout import Layout
from pipeline.stages.samples import Samples, samples_of
from pipeline.stages.status import check_portable, status
from pipeline.system.system_errors import reading_input
from pipeline.tracking.run import deliver, describe_store, waiting

# Commands that look at one file or model, and take no recipe.
_WITHOUT_RECIPE: dict[str, Callable[[list[str]], int]] = {
    "data": lambda argv: describe.command(argv[1:]),
    "template": lambda argv: show_template.main(argv[1:]),
    "bench": lambda argv: bench.command(argv[1:]),
    "stages": lambda argv: _stages(argv[1:]),
    "recipes": lambda argv: _recipes(argv[1:]),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sap`; returns the exit code."""

    def work() -> int:
        given = sys.argv[1:] if argv is None else list(argv)
        if hasattr(sys.stdout, "reconfigure"):  # a stream of Python's own, redacted or not
            # names of columns may be beyond what a terminal shows
            sys.stdout.reconfigure(errors="backslashreplace")
        with runner.stoppable():
            return _WITHOUT_RECIPE.get(given[0], _main)(given) if given else _main(given)

    code = entry.guarded(work)
    if argv is None and code in (runner.STOPPED, entry.INTERRUPTED):
        entry.end(code)
    return code


def _main(argv: list[str]) -> int:
    parser = options_of.parser(__doc__, ALL_STAGES, _WITHOUT_RECIPE)
    if not argv or "--help" in argv or "-h" in argv:
        parser.print_help()
        _print_fields()
        return 0
    options_of.check_command(argv[0], ALL_STAGES, _WITHOUT_RECIPE)
    options, experiment = options_of.opened(parser, ALL_STAGES, argv)
    if options.stage == "status":
        return _status(experiment, options)
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
            "a report compares all methods of a recipe: leave --method out; a training of "
            "--resume-from is compared as a method of the recipe, with train: {resume_from: "
            "FOLDER@STEP}"
        )
    with reading_input():
        artifacts.check_writable(experiment.base.output_dir / experiment.base.name, "output_dir")
        chain = Chain(experiment, ALL_STAGES, options.method, options.jobs)
    stages = tuple(ALL_STAGES) if options.stage == "run" else (options.stage,)
    idle = not any(chain.pending(stage) for stage in stages if stage != "report")
    starts = chain.starts(stages)
    found, samples = _check(chain, light=options.dry_run or idle, starts=starts)
    if options.dry_run:
        folders = {stage: chain.folders(stage) for stage in stages}
        print(dry_run.overview(experiment, folders, found, samples, chain.cells))
        return 0
    if starts and not idle:
        print(devices.describe(experiment.base.model, experiment.base.train), file=sys.stderr)
    if options.no_warm:
        code = _run(chain, stages, options)
    else:
        with WarmParents(chain.needed()) as chain.warm:
            code = _run(chain, stages, options)
    # what a server missed that is back by now; MLflow is not imported where nothing waits
    deliver(chain.layout)
    return code


def _status(experiment: Experiment, options: argparse.Namespace) -> int:
    of_stage, method, seed = options.of_stage, options.method, options.seed
    if options.portable:
        check_portable(experiment)
    with reading_input():
        lines = status(experiment, ALL_STAGES, of_stage, method, seed, options.portable)
    _header("stage", "method", "seed", "state", "folder", "work folder")
    print(lines)
    return 0


def _track(experiment: Experiment) -> int:
    """Deliver to MLflow what waits; 74 where something still does."""
    if not experiment.base.tracking.enabled:
        raise ValueError(
            f"{experiment.path} has tracking.enabled false: there is nothing to deliver"
        )
    layout = Layout(experiment)
    before, left = waiting(layout), deliver(layout)
    print(
        f"{len(before) - len(left)} of {len(before)} runs delivered to {describe_store(experiment.base)}"
        if before
        else "nothing waits to be delivered"
    )
    for outbox in left:
        print(f"still waits: {outbox}", file=sys.stderr)
    return runner.SYSTEM_ERROR if left else 0


def _check(chain: Chain, light: bool, starts: bool) -> tuple[Capacity | None, Samples]:
    """Every check there is, and whether memory and disk suffice for what starts here; None where that is not known.

    What is no error is printed. The samples are as far as they are known.
    """
    checked = checks.check(chain.experiment, light=light, starts=starts)
    found = (
        capacity.capacity(chain.experiment, checked.facts, chain.cells)
        if starts and checked.facts
        else None
    )
    known = samples_of(chain.layout, checked.rows)
    repeated = known.notes(chain.cells)
    for note in (
        *checked.notes,
        *(found.notes if found else ()),
        *method_notes.notes(chain),
        *repeated,
    ):
        print(f"note: {redaction.redact(note)}", file=sys.stderr)
    return found, known


def _run(chain: Chain, stages: Sequence[str], options: argparse.Namespace) -> int:
    """The stages in turn; the first failure's exit code.

    Where some cells trained and others failed, those that trained are evaluated, and no report is made.
    """
    failure = 0
    chain.begin(stages)
    for stage in stages:
        if stage == "report" and failure:
            names = ", ".join(folder.name for folder in chain.failed)
            print(
                f"not trained: {names} (the reason is above); what trained is evaluated, and the "
                "report waits for the rest",
                file=sys.stderr,
            )
            break
        if stage == "report" and options.method:
            print(
                f"the report needs every method: `sap report {options.recipe}` once they are evaluated",
                file=sys.stderr,
            )
            continue
        if stage == "report":
            chain.need(stage)  # also where it is there: what it reports may be gone
        code = chain.run(stage)
        if stage == "report":
            _print_report(chain)
        if code == runner.STOPPED:  # a failure before it is met again
            print(
                f"stopped in {stage}: what was finished or saved stays; run the same command again to go on",
                file=sys.stderr,
            )
            return code
        failure = failure or code
        if code and not (stage == "train" and chain.failed):
            break
    return failure


def _print_report(chain: Chain) -> None:
    folder = chain.layout.report()
    artifacts.verify(folder, "table.txt")
    print((folder / "table.txt").read_text())
    print(f"report  {(folder / 'report.html').resolve()}")
    if chain.base.tracking.enabled:
        print(f"mlflow  {describe_store(chain.base)}")


def _cells(experiment: Experiment, method: str | None) -> list[Cell]:
    return [cell for cell in experiment.cells() if method in (None, cell.method)]


def _stages(argv: list[str]) -> int:
    """For scripts (slurm/submit.sh): a line for every stage, in their order."""
    _refuse_arguments("stages", argv)
    _header("stage", "where it runs", "for each method and seed", "saves", "needs")
    print("\n".join(stage.line() for stage in ALL_STAGES.values()))
    return 0


def _header(*names: str) -> None:
    """What the columns are, for people: scripts read the lines, and no terminal."""
    if sys.stdout.isatty():
        print("# " + "\t".join(names))


def _recipes(argv: list[str]) -> int:
    """The recipes that ship with the package: `sap run NAME` finds them by name."""
    _refuse_arguments("recipes", argv)
    names = shipped.recipes()
    for name in names:
        print(f"{name:<{max(map(len, names))}}  {shipped.summary(name)}")
    return 0


def _refuse_arguments(command: str, argv: list[str]) -> None:
    if argv and argv[0] not in ("--help", "-h"):
        raise ValueError(
            f"`sap {command}` takes no arguments, and was given {argv[0]}: leave it out"
        )


def _doctor(experiment: Experiment, options: argparse.Namespace) -> int:
    from pipeline.doctor.case import choose_cell

    cell = choose_cell(experiment, options.method, options.seed)
    arguments = [
        "--config",
        *experiment.arguments(),
        "--method",
        cell.method,
        "--seed",
        str(cell.seed),
    ]
    return runner.run_ranks("doctor.py", arguments, devices.ranks(cell.recipe.train))


def _plan(experiment: Experiment, options: argparse.Namespace) -> int:
    from pipeline.planner.planner import plan_cell

    if (options.ranks is not None and options.ranks < 1) or not 0 < options.gpu_gb < float("inf"):
        raise ValueError("--ranks takes a number from 1, --gpu-gb a finite one above 0")
    for cell in _cells(experiment, options.method):
        if cell.seed == experiment.base.seeds[0]:  # seeds change nothing here
            print(
                plan_cell(
                    experiment,
                    cell,
                    options.ranks or devices.ranks(cell.recipe.train),
                    options.gpu_gb,
                ),
                end="\n\n",
            )
    return 0


def _show(experiment: Experiment, method: str | None) -> int:
    import yaml

    for cell in _cells(experiment, method):
        print(f"# {cell.method}, seed {cell.seed}")
        print(
            yaml.safe_dump(
                recipe.dump(cell.recipe) | {"methods": redaction.redact(experiment.base.methods)},
                sort_keys=False,
            )
        )
    return 0


def _print_fields() -> None:
    width = min(shutil.get_terminal_size().columns, 110)
    print("\nFields of a recipe; each can be overridden on the command line, e.g. --train.lr 2e-4:")
    for name, kind, default, meaning in recipes.field_rows():
        print(f"  --{name}  {kind} ({default if default == 'required' else f'default {default}'})")
        print(textwrap.fill(meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6))


if __name__ == "__main__":
    sys.exit(main())
