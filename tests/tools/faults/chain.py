"""A tiny chain of stages as a user runs it, what it makes, and how it is disturbed and run again.

chain = Chain(folder, "zero3"); undisturbed = chain.finished(chain.folder / "undisturbed")
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import artifacts
from tests.project import ROOT, make_project, quiet, write_recipe

ENGINES = ("single", "zero3", "fsdp2")
REFUSED = 2
PATIENCE = 240.0  # seconds for one command: the chain takes less than thirty alone
_OWN_WORDS = ("time", "seconds", "created")
# What a run makes that depends on when it ran, or on what was in the way: everything else must be the same to the bit.
# The report holds times a step.
_NOT_COMPARED = {"manifest.json", "DONE"}


@dataclass
class Ended:
    """How a command ended. code: None where it did not within PATIENCE, and was killed."""

    code: int | None
    said: str


@dataclass
class Chain:
    """The recipe of an engine, prepared once; every trial begins with a copy of some of its finished stages."""

    folder: Path
    engine: str
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        raw = make_project(self.folder)
        own = {
            "engine": self.engine,
            "ranks": 1 if self.engine == "single" else 2,
            "steps": 4,
            "save_every": 1,
            "validate_every": 2,
        }
        raw["train"] |= own
        raw["align"]["train"] |= {
            "engine": self.engine,
            "ranks": own["ranks"],
            "steps": 2,
            "save_every": 1,
        }
        raw["evaluate"] |= {"attacks": ["prefill"], "max_new_tokens": 3, "baselines": False}
        raw["methods"]["sap"]["sap"] |= {"probe_step": "target_correction"}
        raw["safety_pairs"]["refresh_every"] = 2
        raw["seeds"] = [0]
        self.recipe = write_recipe(self.folder, raw)

    def command(self, output: Path) -> list[str]:
        return [
            sys.executable,
            "-m",
            "pipeline.cli",
            "run",
            str(self.recipe),
            f"--output_dir={output}",
        ]

    def start(self, output: Path, **environment: str) -> subprocess.Popen:
        """The command, in a process group and a session of its own."""
        log = self.log(output).open("ab")
        own = quiet({"SAP_CACHE": str(self.folder / "cache"), **self.environment, **environment})
        with log:
            return subprocess.Popen(
                self.command(output),
                cwd=ROOT,
                env=own,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def ended(self, process: subprocess.Popen, output: Path) -> Ended:
        """Wait for it; what it and its jobs left behind is ended, or it is an error of the
        product: see `left_behind`.
        """
        try:
            code: int | None = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
            end_group(process.pid)
        return Ended(code, self.log(output).read_text(errors="replace"))

    def log(self, output: Path) -> Path:
        """What all commands of an output folder print: not on the trial's disk, which may be full."""
        return self.folder / f"{output.name}.log"

    def run(self, output: Path, **environment: str) -> Ended:
        return self.ended(self.start(output, **environment), output)

    def begun(self, output: Path, undisturbed: Path, stages: list[str]) -> None:
        """Copy these finished stages into `output`: a trial need not repeat what it does not disturb."""
        target = output / "tiny"
        target.mkdir(parents=True)
        for folder in (undisturbed / "tiny").iterdir():
            if folder.name.split("-")[0] in stages and folder.is_dir():
                shutil.copytree(folder, target / folder.name)


def end_group(pid: int) -> None:
    for number in (signal.SIGCONT, signal.SIGKILL):
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            return


def alive(group: int) -> list[int]:
    """Processes of a group that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def left_behind(group: int, seconds: float = 30.0) -> list[int]:
    """Processes of a command's group that are still there so long after it has ended."""
    deadline = time.monotonic() + seconds
    while (found := alive(group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def products(output: Path) -> dict[str, str]:
    """Digest by name of everything that a finished chain has made; metrics without times.

    ValueError where a folder is damaged.
    """
    found = {}
    for folder in sorted(
        path
        for path in (output / "tiny").iterdir()
        if path.is_dir() and path.name[0] != "." and path.name not in ("tracking", "slurm")
    ):
        artifacts.verify(folder)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = str(path.relative_to(output))
            if path.name == "metrics.jsonl":
                found[name] = artifacts.digest(
                    [_without_times(json.loads(line)) for line in path.read_text().splitlines()]
                )
            elif path.name not in _NOT_COMPARED and not folder.name.startswith("report-"):
                content = path.read_bytes().replace(str(output).encode(), b"<output>")
                found[name] = hashlib.sha256(content).hexdigest()
    return found


def _without_times(line: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in line.items() if not key.startswith(_OWN_WORDS)}
