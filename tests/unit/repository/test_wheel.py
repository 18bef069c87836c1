"""The wheel: built, installed into an environment of its own, and run from folders that have nothing to do with it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.project import ROOT, make_project, quiet, write_recipe

pytestmark = pytest.mark.slow
SOURCES = ("pipeline", "launch", "ds_configs", "slurm", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Installed:
    """The wheel, and the environment that has it."""

    wheel: Path
    environment: Path

    def run(
        self, program: str, *arguments: str | Path, cwd: Path, **environment: str
    ) -> subprocess.CompletedProcess:
        clean = {name: value for name, value in quiet(environment).items() if name != "PYTHONPATH"}
        command = [str(self.environment / "bin" / program), *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=900
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """Built from a copy, because a build leaves folders behind.

    Its requirements are those of the tests' environment.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source, environment = folder / "source", folder / "environment"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source)
    (source / "slurm" / "site.env").write_text("# what belongs to a site stays there\n")

    def run(*command: str | Path) -> None:
        found = subprocess.run(
            [str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=900
        )
        assert found.returncode == 0, found.stdout + found.stderr

    offline = ("--no-index", "--no-deps")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        *offline,
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        source,
    )
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    (wheel,) = folder.glob("*.whl")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        environment / "bin" / "python",
        "install",
        *offline,
        wheel,
    )
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    # After its own packages, and without the .pth files there: an editable install of the checkout stays out.
    needed = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    (packages / "of_the_tests.pth").write_text("\n".join(needed))
    return Installed(wheel, environment)


@pytest.fixture
def empty(tmp_path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def small(project: Path) -> dict[str, Any]:
    """The tiny project, one method and as little work as there can be, with the paths that a user would write."""
    recipe = make_project(project)
    recipe.pop("output_dir")
    recipe["align"]["enabled"] = False
    recipe["methods"] = {"sft": {}}
    recipe["train"] |= {
        "engine": "single",
        "ranks": 1,
        "steps": 2,
        "ds_config": "ds_configs/zero3_cpu.json",
    }
    recipe["model"]["path"] = "./model"
    recipe["evaluate"]["baselines"] = False
    recipe["tracking"] = {"uri": "sqlite:///tracked.db"}
    for section in ("data", "evaluate"):
        for name, source in recipe[section].items():
            if isinstance(source, dict):
                plain = f"data/{Path(source['source']).name}"
                source["source"] = {
                    "task": "$ROWS/task.jsonl",
                    "safety": "~/data/safety.jsonl",
                }.get(name, plain)
    return recipe


def test_the_wheel_holds_the_package_and_what_ships_with_it_and_nothing_else(installed):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "pipeline").rglob("*.py")}
    expected |= {
        str(path.relative_to(ROOT)) for path in (ROOT / "pipeline" / "data" / "texts").iterdir()
    }
    for pattern in (
        "launch/*.py",
        "launch/recipes/*.yaml",
        "ds_configs/*.json",
        "slurm/*.sh",
        "slurm/*.example",
    ):
        expected |= {f"pipeline/shipped/{path.relative_to(ROOT)}" for path in ROOT.glob(pattern)}
    with zipfile.ZipFile(installed.wheel) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_it_trains_and_evaluates_from_any_folder(installed, tmp_path, empty):
    project = tmp_path / "project"
    project.mkdir()
    path = write_recipe(project, small(project))
    # matplotlib's list of fonts: seconds
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    environment = {"HOME": str(project), "ROWS": str(project / "data"), "XDG_CACHE_HOME": cache}
    first = installed.run("sap", "run", path, cwd=empty, **environment)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "sft" in first.stdout and f"{project}/runs/tiny/report-" in first.stdout
    assert (
        len(
            list(
                (project / "runs" / "tiny").glob("train-sft-s0-*/adapter/adapter_model.safetensors")
            )
        )
        == 1
    )
    assert len(list((project / "runs" / "tiny").glob("evaluate-sft-s0-*/DONE"))) == 1
    assert (project / "tracked.db").is_file() and not list(empty.iterdir())
    elsewhere = installed.run("sap", "status", path, cwd=Path("/"), **environment)
    assert elsewhere.returncode == 0, elsewhere.stderr
    states = [
        line.split("\t")[3] for line in elsewhere.stdout.splitlines() if not line.startswith("#")
    ]
    assert states == ["complete"] * 4, "what ran from one folder is complete in another"


def test_it_runs_what_it_holds_and_not_the_checkout(installed, empty):
    program = (
        "import pipeline; from pipeline import shipped; from pipeline.defences import recipes; "
        "from pipeline.running import runner\n"
        "print(pipeline.__file__, shipped.FOLDER, shipped.environment())\n"
        "print(*(recipes.load(name).base.name for name in shipped.recipes()), flush=True)\n"
        "runner.run_ranks('train.py', ['--help'], 1)"
    )
    found = installed.run("python", "-c", program, cwd=empty)
    assert found.returncode == 0, found.stderr
    first, names, *launched = found.stdout.splitlines()
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(installed.environment)}))
    assert first == f"{packages}/pipeline/__init__.py {packages}/pipeline/shipped {{}}"
    assert "demo" in names.split() and "llama_7b_sap" in names.split()
    assert launched[0].startswith("usage: train.py")
    shown = installed.run(
        "python", packages / "pipeline/shipped/launch/train.py", "--config", "no.yaml", cwd=empty
    )
    assert shown.returncode == 2 and f"no recipe at {empty}/no.yaml" in shown.stderr


def test_a_shipped_recipe_is_found_by_name_and_its_runs_go_to_the_working_directory(
    installed, empty
):
    for name in ("llama_7b_sap", "launch/recipes/llama_7b_sap.yaml"):
        found = installed.run("sap", "status", name, "--stage", "prepare", cwd=empty)
        assert found.returncode == 0 and f"{empty}/runs/llama_7b_sap/prepare-" in found.stdout, (
            found.stderr
        )
        assert "pipeline/shipped/launch/recipes/llama_7b_sap.yaml" in found.stderr


def test_the_recipes_that_it_holds_are_listed(installed, empty):
    found = subprocess.run(
        [installed.environment / "bin" / "sap", "recipes"],
        cwd=empty,
        capture_output=True,
        text=True,
        timeout=900,
    )
    lines = found.stdout.splitlines()
    assert found.returncode == 0 and [line.split()[0] for line in lines] == sorted(
        path.stem for path in (ROOT / "launch" / "recipes").glob("*.yaml")
    )
    assert all(line.endswith((".", "?")) and len(line) > 40 for line in lines)


def test_its_job_scripts_submit_themselves(installed, empty):
    scripts = next(installed.environment.rglob("shipped/slurm"))
    foreign = ("SAP_", "SLURM_", "SBATCH_", "PYTHONPATH")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    clean |= {"SAP_PYTHON": str(installed.environment / "bin" / "python"), "HF_HUB_OFFLINE": "1"}
    command = [scripts / "submit.sh", "launch/recipes/llama_7b_sap.yaml", "--dry-run"]
    found = subprocess.run(
        command, cwd=empty, env=clean, capture_output=True, text=True, timeout=900
    )
    assert found.returncode == 0, found.stderr
    assert (
        f'{scripts.parent}/launch/recipes/llama_7b_sap.yaml --output_dir="{empty}/runs"'
        in found.stdout
    )
