"""One trial: disturb the chain, run the same command until it ends well, and say what came of it."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from tests.tools.faults.chain import REFUSED, Chain, Ended, end_group, left_behind, products
from tests.tools.faults.kinds import FAULTS, Trial

AGAIN = 6  # times the command is run after the fault, at most
# What a trial may begin with: stages that are finished already, so that faults strike at all of them.
BEGINNINGS = (
    [],
    ["prepare", "prompts"],
    ["prepare", "prompts", "align"],
    ["prepare", "prompts", "align", "direction"],
)


@dataclass(frozen=True)
class Verdict:
    """result: identical, or refused (a file was named, and what the sentence said was done),
    or lost, with the reason.
    """

    engine: str
    kind: str
    seed: int
    told: str
    result: str
    reason: str
    runs: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def tried(
    chain: Chain, expected: dict[str, str], undisturbed: Path, kind: str, seed: int, room: Path
) -> Verdict | None:
    """The verdict; None where the fault found nothing to strike at.

    room: where the trial's folder is, and is removed from.
    """
    random = Random(seed)
    output = room / f"trial-{seed}"
    trial = Trial(chain, output, random)
    chain.begun(output, undisturbed, random.choice(BEGINNINGS))
    told = FAULTS[kind](trial)
    first = chain.ended(trial.process, output)
    try:
        if told is None and first.code == 0:
            return None
        return Verdict(
            chain.engine, kind, seed, told or "", *settled(chain, trial, first, expected)
        )
    finally:
        end_group(trial.process.pid)
        keep = room.parent / "lost"
        log = chain.log(output)
        if log.exists():
            keep.mkdir(exist_ok=True)
            shutil.move(log, keep / log.name)
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(room / f"{output.name}-clock", ignore_errors=True)


def settled(
    chain: Chain, trial: Trial, first: Ended, expected: dict[str, str]
) -> tuple[str, str, int]:
    """(result, reason, runs) of the same command, run until it ends well."""
    if first.code is None:
        return "lost", "the disturbed command hangs", 0
    if behind := left_behind(trial.process.pid):
        return "lost", f"{len(behind)} processes were left behind", 0
    output, refused, said = trial.output, [], first.said
    for runs in range(1, AGAIN + 1):
        process = chain.start(output)
        ended = chain.ended(process, output)
        new, said = ended.said[len(said) :], ended.said
        if ended.code is None:
            return "lost", "the command hangs when it is run again", runs
        if "Traceback (most recent call last)" in new:
            return "lost", f"a traceback: {_last_line(new)}", runs
        if behind := left_behind(process.pid):
            return "lost", f"{len(behind)} processes were left behind when it ran again", runs
        problem = f"error: {_errors(new)}" if ended.code == REFUSED else None
        if ended.code == 0:
            try:
                found = products(output)
            except ValueError as error:  # damaged after it was last read
                problem = str(error)
            else:
                return (*_compared(found, expected, refused), runs)
        if problem is not None:
            damaged = _named(problem, output)
            if damaged is None:
                return "lost", f"refused, and no file is named: {problem}", runs
            refused.append(str(damaged.relative_to(output)))
            _remove(damaged, output)
    return "lost", f"not done after {AGAIN} runs: {_errors(said) or _last_line(said)}", AGAIN


def _compared(
    found: dict[str, str], expected: dict[str, str], refused: list[str]
) -> tuple[str, str]:
    different = sorted(
        name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
    )
    if different:
        return "lost", f"{len(different)} files differ, {different[0]} first" + (
            f" (after {refused} was refused)" if refused else ""
        )
    return ("refused", ", ".join(refused)) if refused else ("identical", "")


def _named(problem: str, output: Path) -> Path | None:
    """The file or folder of the run that a sentence names."""
    for text in re.findall(re.escape(str(output)) + r"[^\s:;,()']*", problem):
        path = Path(text.rstrip("."))
        if path != output and path != output / "tiny":
            return path
    return None


def _remove(damaged: Path, output: Path) -> None:
    """Do what sentences say: delete the stage's folder, or a training's checkpoints."""
    inside = damaged.relative_to(output).parts
    depth = 3 if len(inside) > 2 and inside[2] == "checkpoints" else 2
    target = output.joinpath(*inside[:depth])
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)


def _errors(said: str) -> str:
    found = [line for line in said.splitlines() if line.startswith("error: ")]
    return found[-1].removeprefix("error: ") if found else ""


def _last_line(said: str) -> str:
    return next((line for line in reversed(said.splitlines()) if line.strip()), "nothing was said")[
        :200
    ]
