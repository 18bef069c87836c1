"""A site for the tests: a throw-away cluster, a tiny project on a file system that its nodes share,
and the project's own job scripts.

with opened(folder) as site:
    job = site.train(site.output("mine"))
    site.wait(job)
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.project import ROOT, make_project, write_recipe
from tests.slurm.minicluster import Cluster

NODES, RANKS_PER_NODE = 2, 2
STEPS, SAVE_EVERY = 30, 6
SHAPE_OF_ALL = [f"--nodes={NODES}", "--exclusive", f"--gpus-per-node={RANKS_PER_NODE}"]
SHAPE = [
    f"--nodes={NODES}",
    f"--ntasks-per-node={RANKS_PER_NODE}",
    f"--gpus-per-node={RANKS_PER_NODE}",
    "--cpus-per-task=1",
    "--mem=8G",
]

# fault, what happened, seconds from the fault to the end of the job
SEEN: list[tuple[str, str, float]] = []


def make_recipe(folder: Path) -> dict[str, Any]:
    """The tiny project, without alignment, with a training that is long enough to be disturbed."""
    recipe = make_project(folder)
    recipe["align"]["enabled"] = False
    for source in ("refusals", "harmless"):
        recipe["data"].pop(source)
    recipe["train"] |= {"steps": STEPS, "save_every": SAVE_EVERY, "validate_every": STEPS // 2}
    recipe.setdefault("safety_pairs", {})["batch_size"] = NODES * RANKS_PER_NODE * 2
    return recipe


class Site:
    """The cluster and the project on it.

    `output(name)`: a place of its own for a test's runs, where data and direction are ready.
    """

    def __init__(self, cluster: Cluster, folder: Path, upstream: Path | None = None):
        self.cluster, self.folder, self.upstream = cluster, folder, upstream
        self.recipe = folder / "recipe.yaml"
        self.environment = {
            "SAP_PYTHON": sys.executable, "SAP_GPUS_PER_NODE": str(RANKS_PER_NODE), "SAP_CPUS_PER_GPU": "1",
            "SAP_RETRY_SECONDS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
            "SAP_SITE_ENV": str(folder / "none"),
        }  # fmt: skip

    def shell(self, *command: str | Path, check: bool = True, **environment: str):
        """Run on the login node, in the project's root."""
        return self.cluster.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=self.environment | environment,
            check=check,
        )

    def chain(
        self,
        output: Path,
        *options: str,
        overrides: tuple[str, ...] = (),
        recipe: Path | None = None,
        **environment: str,
    ) -> dict[str, str]:
        """slurm/submit.sh; returns the job ids by what they do ("train-sap-s0")."""
        arguments = [
            "slurm/submit.sh",
            recipe or self.recipe,
            "--nodes",
            str(NODES),
            *options,
            "--",
            f"--output_dir={output}",
            *overrides,
        ]
        self.printed = self.shell(*arguments, **environment).stdout
        chains = sorted(
            (output / "tiny" / "slurm").glob("chain-*.tsv"), key=lambda path: path.stat().st_mtime
        )
        rows = (
            [line.split("\t") for line in chains[-1].read_text().splitlines()]
            if "job " in self.printed
            else []
        )
        return {what.rpartition("-")[0] or what: job for job, _, what, _ in rows}

    def sbatch(self, *arguments: str | Path, **environment: str) -> str:
        log = self.folder / "logs" / "%x-%j.log"
        return self.shell(
            "sbatch", "--parsable", f"--output={log}", *arguments, **environment
        ).stdout.strip()

    def train(
        self, output: Path, *options: str, overrides: tuple[str, ...] = (), **environment: str
    ) -> str:
        """slurm/sap_7b.sh for the cell sap, seed 0, on two nodes x two ranks; returns the job id."""
        return self.sbatch(
            *SHAPE,
            *options,
            "slurm/sap_7b.sh",
            self.recipe,
            f"--output_dir={output}",
            *overrides,
            **environment,
        )

    def output(self, name: str) -> Path:
        runs = self.folder / "outputs" / name
        runs.mkdir(parents=True)
        if self.upstream:
            for folder in (*self.upstream.glob("prepare-*"), *self.upstream.glob("direction-*")):
                shutil.copytree(folder, runs / "tiny" / folder.name)
        return runs

    def log(self, job: str) -> str:
        paths = sorted((self.folder / "logs").glob(f"*-{job}.log")) + sorted(
            self.folder.rglob(f"slurm/logs/*-{job}.log")
        )
        return "".join(path.read_text(errors="replace") for path in paths)

    def wait(self, job: str, state: str = "COMPLETED", seconds: float = 600) -> None:
        found = self.cluster.wait(job, seconds)
        assert found == state, f"job {job} is {found}, not {state}:\n{self.log(job)}"

    def step(self, output: Path, method: str = "sap") -> int:
        """The newest checkpoint of a training that is under way; 0 before the first."""
        markers = (output / "tiny").glob(f".train-{method}-s0-*.work/checkpoints/step-*/DONE")
        return max((int(marker.parent.name.removeprefix("step-")) for marker in markers), default=0)

    def wait_for_step(self, output: Path, number: int, job: str, seconds: float = 400) -> None:
        """Wait until the checkpoint of this step is there and the training is still running."""

        def reached() -> bool:
            state = self.cluster.state(job)
            assert state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED"), (
                f"{state}\n{self.log(job)}"
            )
            return self.step(output) >= number

        self.cluster.wait_for(reached, seconds, f"checkpoint {number} of job {job}")

    def restarted(self, job: str, times: int = 1) -> bool:
        return int(self.cluster.job(job)["Restarts"]) >= times

    def ranks(self, node: str) -> list[int]:
        """Process ids, as the node numbers them, of the ranks that train there."""
        found = self.cluster.on(
            node, ["pgrep", "-f", r"launch/train\.py.*--method"], check=False
        ).stdout.split()
        commands = {
            pid: self.cluster.on(node, ["cat", f"/proc/{pid}/cmdline"], check=False).stdout
            for pid in found
        }
        return [
            int(pid)
            for pid, command in commands.items()
            if command.startswith(sys.executable) and "--check" not in command
        ]

    def signal_ranks(self, name: str) -> None:
        for node in self.cluster.settings.names:
            self.cluster.on(node, ["kill", f"-{name}", *map(str, self.ranks(node))])


def adapter(output: Path, method: str = "sap") -> dict[str, torch.Tensor]:
    found = list((output / "tiny").glob(f"train-{method}-s0-*/adapter/adapter_model.safetensors"))
    assert len(found) == 1, found
    return load_file(found[0])


def manifest(output: Path, prefix: str) -> dict[str, Any]:
    found = [path for path in (output / "tiny").glob(f"{prefix}*/manifest.json")]
    assert len(found) == 1, found
    return json.loads(found[0].read_text())


def steps_logged(output: Path, method: str = "sap") -> list[int]:
    path = next((output / "tiny").glob(f"train-{method}-s0-*/metrics.jsonl"))
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def same_adapter(output: Path, undisturbed: Path) -> None:
    found, wanted = adapter(output), adapter(undisturbed)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert manifest(output, "train-sap-")["world_size"] == NODES * RANKS_PER_NODE
    assert steps_logged(output) == list(range(STEPS + 1)), "every step once, whatever was repeated"


def crashing_python(
    site: Site, body: str, script: str = "launch/train.py", python: Path | None = None
) -> Path:
    """A python that runs `body` (shell) before what it was asked for, where that is a rank of this script.
    python: what it then runs.
    """
    path = site.folder / f"python-{abs(hash((body, script, python)))}"
    path.write_text(
        f'#!/bin/bash\nif [[ "$*" == *"{script}"* && "$*" != *--check* ]]; then {body}; fi\nexec '
        f'{python or site.environment["SAP_PYTHON"]} "$@"\n'
    )
    path.chmod(0o755)
    return path


def make_recipe_in(site: Site, name: str) -> Path:
    folder = site.folder / name
    folder.mkdir()
    return write_recipe(folder, make_recipe(folder))


@contextlib.contextmanager
def opened(folder: Path, other: Site | None = None, **settings: int) -> Iterator[Site]:
    """A cluster in folder/cluster, for as long as the block lasts, and a project in folder/project,
    or that of another site.
    """
    project = other.folder if other else folder / "project"
    if other is None:
        project.mkdir(parents=True)
        write_recipe(project, make_recipe(project))
        (project / "logs").mkdir()
    # Nodes have a /tmp of their own: a checkout or an environment that lies there is shared too.
    shared = [
        path
        for path in dict.fromkeys((project, ROOT, Path(sys.prefix)))
        if path.is_relative_to("/tmp") or path.is_relative_to("/dev/shm")
    ]
    with Cluster(
        folder / "cluster", nodes=NODES, gpus=RANKS_PER_NODE, shared=shared, **settings
    ) as cluster:
        yield Site(cluster, project, other.upstream if other else None)


class Stopwatch:
    """Seconds since it was made: what the table of faults says."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self.started
