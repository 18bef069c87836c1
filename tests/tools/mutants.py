"""Deliberate faults, each of which some test must catch: `make mutants`.

    python -m tests.tools.mutants NAME...     # some of them

Every fault (tests/tools/mutants_list.py) is an exact replacement in a temporary copy of the repository, on which the
tests that should notice are run. Exit code 1 where a fault survives, where something else than an assertion or the
program's own ValueError ends the tests, where a replacement no longer applies, or where the tests fail without any
fault.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from tests.distributed import imported  # noqa: F401  so that no fault waits for torch, transformers and peft
from tests.tools.first_failure import VARIABLE
from tests.tools.mutants_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("pipeline", "launch", "tests", "ds_configs", "pyproject.toml")
OWN = ("pipeline", "tests")  # packages that a copy has in its own version
WORKERS = 2  # some faults need one core, some two or three
REPORT, PRINTED = "report.json", "printed.txt"
HONEST = ("AssertionError", "ValueError")  # a test's assertion, or a check of the program itself


@dataclass(frozen=True)
class Outcome:
    """verdict: killed, SURVIVED, BROKEN (ended by something else), or FAILED (the control)."""

    name: str
    verdict: str
    by: str
    seconds: float


def applied(mutant: Mutant, root: Path) -> dict[Path, str]:
    """The mutated texts of the files it changes. ValueError where an old text is not there exactly once."""
    texts: dict[Path, str] = {}
    for file, old, new in mutant.edits:
        path = root / file
        text = texts.get(path) or path.read_text()
        if text.count(old) != 1:
            raise ValueError(
                f"'{mutant.name}' no longer applies: its text is in {file} {text.count(old)} times, not once"
            )
        texts[path] = text.replace(old, new)
    return texts


def start_tests(copy: Path, tests: Sequence[str]) -> int:
    """Begin pytest on a copy, in a process forked from this one, which has imported the libraries; returns its id."""
    (copy / REPORT).unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            _run_tests(copy, tests)
        finally:  # whatever happens, the rest of this program is the parent's
            traceback.print_exc()
            os._exit(70)
    return pid


def _run_tests(copy: Path, tests: Sequence[str]) -> NoReturn:
    os.chdir(copy)
    printed = os.open(copy / PRINTED, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(printed, descriptor)
    # No bytecode: two versions of a file within a second and of one size would be taken for the same.
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    os.environ[VARIABLE] = str(copy / REPORT)
    sys.dont_write_bytecode = True
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
    # the copy's own are to be imported
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]
    importlib.invalidate_caches()
    plugins = ["-p", "no:cacheprovider", "-p", "tests.tools.first_failure"]
    code = pytest.main(["-x", "-q", "--tb=short", *plugins, *tests])
    sys.stdout.flush()
    os._exit(code)


def first_failure(copy: Path) -> dict[str, str]:
    """What tests/tools/first_failure.py wrote of the tests that ran last; empty where none failed."""
    report = copy / REPORT
    return json.loads(report.read_text()) if report.exists() else {}


def verdict(mutant: Mutant | None, code: int, copy: Path, seconds: float) -> Outcome:
    """What the end of the tests says; without a mutant it is the control: all tests named pass without a fault."""
    first, output = first_failure(copy), (copy / PRINTED).read_text()
    if mutant is None:
        found, by = (
            ("passes", "all tests named here")
            if code == 0
            else ("FAILED", first.get("test", "") or output[-300:])
        )
        return Outcome("no fault", found, by, seconds)
    if code == 0:
        return Outcome(mutant.name, "SURVIVED", " ".join(mutant.tests), seconds)
    if first.get("when") == "call" and first["type"] in HONEST:
        return Outcome(mutant.name, "killed", first["test"], seconds)
    reason = (
        f"{first['type']} in {first['test']} ({first['when']}): {first['message'][-300:]}"
        if first
        else output[-300:]
    )
    return Outcome(mutant.name, "BROKEN", reason, seconds)


def judge(mutants: Sequence[Mutant], folder: Path) -> Iterator[Outcome]:
    """The control and every fault, as they end; WORKERS at a time, each on a copy of its own."""
    named = sorted({test for mutant in mutants for test in mutant.tests})
    waiting: list[Mutant | None] = [None, *mutants]
    free = [copy_repository(folder / str(number)) for number in range(WORKERS)]
    running: dict[int, tuple[Mutant | None, Path, dict[Path, str], float]] = {}
    while waiting or running:
        while waiting and free:
            mutant, copy = waiting.pop(0), free.pop()
            mutated = applied(mutant, copy) if mutant else {}
            originals = {path: path.read_text() for path in mutated}
            for path, text in mutated.items():
                path.write_text(text)
            running[start_tests(copy, mutant.tests if mutant else named)] = (
                mutant,
                copy,
                originals,
                time.monotonic(),
            )
        pid, status = os.wait()
        mutant, copy, originals, started = running.pop(pid)
        for path, text in originals.items():
            path.write_text(text)
        free.append(copy)
        yield verdict(mutant, os.waitstatus_to_exitcode(status), copy, time.monotonic() - started)


def copy_repository(target: Path) -> Path:
    target.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def main(names: Sequence[str]) -> int:
    mutants = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if len(mutants) < len(names):
        print(
            f"error: no such fault among: {', '.join(mutant.name for mutant in MUTANTS)}",
            file=sys.stderr,
        )
        return 2
    stale = []
    for mutant in mutants:
        try:
            applied(mutant, ROOT)
        except ValueError as error:
            stale.append(f"error: {error}")
    if stale:
        print("\n".join(stale), file=sys.stderr)
        return 1
    print("| fault | verdict | by | seconds |\n|---|---|---|---|", flush=True)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for outcome in judge(mutants, Path(folder)):
            outcomes.append(outcome)
            print(
                f"| {outcome.name} | {outcome.verdict} | {outcome.by} | {outcome.seconds:.0f} |",
                flush=True,
            )
    return int(any(outcome.verdict not in ("passes", "killed") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
