"""Deliberate faults, each of which some test must catch: `make mutants`, or `python -m tests.mutants NAME...` for some.

Every fault (tests/mutants_list.py) is an exact replacement in a temporary copy of the repository, on which the tests that should notice
are run. Exit code 1 where a fault survives, where something else than an assertion or the program's own ValueError ends the tests, where a
replacement no longer applies, or where the tests fail without any fault.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tests.first_failure import VARIABLE
from tests.mutants_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("pipeline", "launch", "tests", "ds_configs", "pyproject.toml")
WORKERS = 2  # some faults need one core, some two or three
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
            raise ValueError(f"'{mutant.name}' no longer applies: its text is in {file} {text.count(old)} times, not once")
        texts[path] = text.replace(old, new)
    return texts


def run_tests(copy: Path, tests: Sequence[str]) -> tuple[int, dict[str, str], str]:
    """Exit code of pytest, what failed first, and what it printed."""
    report = copy / "report.json"
    report.unlink(missing_ok=True)
    # No bytecode: two versions of a file within a second and of one size would be taken for the same.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", VARIABLE: str(report)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "tests.first_failure", *tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    return done.returncode, json.loads(report.read_text()) if report.exists() else {}, done.stdout + done.stderr


def judge(mutant: Mutant, copy: Path) -> Outcome:
    started, mutated = time.monotonic(), applied(mutant, copy)
    originals = {path: path.read_text() for path in mutated}
    try:
        for path, text in mutated.items():
            path.write_text(text)
        code, first, output = run_tests(copy, mutant.tests)
    finally:
        for path, text in originals.items():
            path.write_text(text)
    seconds = time.monotonic() - started
    if code == 0:
        return Outcome(mutant.name, "SURVIVED", " ".join(mutant.tests), seconds)
    if first.get("when") == "call" and first["type"] in HONEST:
        return Outcome(mutant.name, "killed", first["test"], seconds)
    reason = f"{first['type']} in {first['test']} ({first['when']}): {first['message'][-300:]}" if first else output[-300:]
    return Outcome(mutant.name, "BROKEN", reason, seconds)


def control(mutants: Sequence[Mutant], copy: Path) -> Outcome:
    """Every test that is to catch a fault passes without one."""
    started = time.monotonic()
    code, first, output = run_tests(copy, sorted({test for mutant in mutants for test in mutant.tests}))
    verdict, by = ("passes", "all tests named here") if code == 0 else ("FAILED", first.get("test", "") or output[-300:])
    return Outcome("no fault", verdict, by, time.monotonic() - started)


def copy_repository(target: Path) -> Path:
    target.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def main(names: Sequence[str]) -> int:
    mutants = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if len(mutants) < len(names):
        print(f"error: no such fault among: {', '.join(mutant.name for mutant in MUTANTS)}", file=sys.stderr)
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
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(WORKERS) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(WORKERS):
            copies.put(copy_repository(Path(folder) / str(number)))

        def in_a_copy(work: Callable[..., Outcome], what: Any) -> Outcome:
            copy = copies.get()
            try:
                outcome = work(what, copy)
            finally:
                copies.put(copy)
            print(f"| {outcome.name} | {outcome.verdict} | {outcome.by} | {outcome.seconds:.0f} |", flush=True)
            return outcome

        futures = [pool.submit(in_a_copy, control, mutants), *(pool.submit(in_a_copy, judge, mutant) for mutant in mutants)]
        outcomes = [future.result() for future in futures]
    return int(any(outcome.verdict not in ("passes", "killed") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
