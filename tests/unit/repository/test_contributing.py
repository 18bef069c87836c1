"""CONTRIBUTING.md's defence, added to a copy of the project as it says, is one wherever defences are known."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import ROOT, make_project, quiet, write_recipe

DEFENCE, LINE, STAGE, STAGE_LINE = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL
)
pytestmark = [pytest.mark.processes, pytest.mark.slow]


def sap(copy: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        cwd=copy, env=quiet({"PYTHONPATH": str(copy)}), capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for name in ("pipeline", "launch", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pipeline" / "defences" / "anchor.py").write_text(DEFENCE)
    dictionary = folder / "pipeline" / "defences" / "__init__.py"
    text = dictionary.read_text()
    assert text.count('    "ema": EMA,\n') == 1
    text = text.replace('    "ema": EMA,\n', f'    "ema": EMA,\n{LINE}')
    dictionary.write_text(
        text.replace(
            "from pipeline.defences.ema",
            "from pipeline.defences.anchor import ANCHOR\nfrom pipeline.defences.ema",
        )
    )
    (folder / "pipeline" / "stages" / "count.py").write_text(STAGE)
    stages = folder / "pipeline" / "stages" / "__init__.py"
    text = stages.read_text()
    assert text.endswith("    ),\n}\n")
    text = text.removesuffix("}\n") + STAGE_LINE + "}\n"
    stages.write_text(
        text.replace(
            "from pipeline.stages.layout import",
            "from pipeline.stages.count import COUNT\nfrom pipeline.stages.layout import",
            1,
        )
    )
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("project")
    recipe = make_project(folder)
    recipe["align"]["enabled"] = False
    recipe["train"] |= {"engine": "single", "ranks": 1, "steps": 2}
    recipe["evaluate"]["baselines"] = False
    recipe["methods"] = {"sft": {}, "anchored": {"anchor": {"enabled": True, "rho": 3.0}}}
    return folder, recipe


def test_the_toy_trains_and_is_compared(copy, project):
    folder, recipe = project
    ran = sap(copy, "run", write_recipe(folder, recipe))
    assert ran.returncode == 0, ran.stderr
    assert "anchored" in ran.stdout
    (trained,) = (Path(recipe["output_dir"]) / "tiny").glob("train-anchored-s0-*")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    distances = [line["anchor/distance"] for line in lines if line["step"]]
    assert distances[0] == 0 < distances[1], "the step draws from the start"
    (counted,) = (Path(recipe["output_dir"]) / "tiny").glob("count-*")
    assert json.loads((counted / "facts.json").read_text())["words"] > 0


@pytest.mark.parametrize("field", ["anchor.rho", "anchor.enabled"])
def test_its_fields_are_in_the_help(copy, field):
    assert f"--{field} " in sap(copy, "--help").stdout


def test_its_fields_name_folders_where_it_is_enabled(copy, project):
    folder, recipe = project
    path = write_recipe(folder, recipe)

    def folders(*arguments: str) -> dict[str, str]:
        lines = sap(copy, "status", path, *arguments).stdout.splitlines()
        rows = [line.split("\t") for line in lines if not line.startswith("#")]
        return {row[1]: Path(row[4]).name for row in rows if row[0] == "train"}

    before, after = folders(), folders("--anchor.rho", "5", "--methods.anchored.anchor.rho", "5")
    assert before["sft"] == after["sft"] and before["anchored"] != after["anchored"]


def test_the_plan_counts_its_vector(copy, project):
    folder, recipe = project
    planned = sap(copy, "plan", write_recipe(folder, recipe), "--method", "anchored")
    assert planned.returncode == 0 and "the start" in planned.stdout, planned.stderr


def test_a_wrong_value_is_one_sentence(copy, project):
    folder, recipe = project
    refused = sap(copy, "run", write_recipe(folder, recipe), "--methods.anchored.anchor.rho", "-1")
    assert (
        refused.returncode == 2
        and "anchor.rho" in refused.stderr
        and "Traceback" not in refused.stderr
    )


def test_the_toy_stage_is_known_to_commands_and_to_scripts(copy, project):
    folder, recipe = project
    path = write_recipe(folder, recipe)
    names = ["prepare", "align", "filter", "direction", "train", "evaluate", "count", "report"]
    assert [line.split("\t")[0] for line in sap(copy, "stages").stdout.splitlines()] == names
    (row,) = sap(copy, "status", path, "--stage", "count").stdout.splitlines()
    assert row.split("\t")[:4] == ["count", "-", "-", "complete"]
    assert "count      complete" in sap(copy, "run", path, "--dry-run").stdout
    elsewhere = sap(copy, "count", path, f"--output_dir={folder / 'elsewhere'}")
    assert (
        elsewhere.returncode == 2
        and "prepare" in elsewhere.stderr
        and "is not complete: run `sap prepare" in elsewhere.stderr
    )


def test_slurm_submits_the_toy_stage(copy, project):
    folder, recipe = project
    path = write_recipe(
        folder,
        recipe
        | {"output_dir": str(folder / "other"), "model": recipe["model"] | {"dtype": "float32"}},
    )
    environment = quiet(
        {"PYTHONPATH": str(copy), "SAP_PYTHON": sys.executable, "SAP_HOME": str(copy)}
    )
    found = subprocess.run(
        [copy / "slurm" / "submit.sh", path, "--dry-run"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 0, found.stderr
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("count ")]
    assert "slurm/prepare.sh" in line and "afterok:<evaluate>" in line
