"""What is written is this user's alone, unless the recipe says otherwise:
answers to harmful prompts and the user's data are among it.
"""

import os
import stat
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.defences import recipes
from tests.project import make_project, run, write_recipe

pytestmark = [pytest.mark.processes, pytest.mark.slow]
MODES = {"private": (0o700, 0o600), "group": (0o750, 0o640), "all": (0o755, 0o644)}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("permissions")
    raw = make_project(folder)
    raw["align"] = {"enabled": False}
    raw["train"] |= {"engine": "single", "ranks": 1, "steps": 2}
    raw["evaluate"] |= {"baselines": False}
    raw["methods"] = {"sft": {}}
    return write_recipe(folder, raw)


@pytest.mark.parametrize("permissions", MODES)
def test_every_file_and_folder_has_the_recipe_s_permissions_whatever_the_shell_s_are(
    project, tmp_path, permissions
):
    before = os.umask(0o002)  # the shells of many systems
    try:
        given = [f"--output_dir={tmp_path / 'runs'}", f"--permissions={permissions}"]
        found = run(["-m", "pipeline.cli", "run", str(project), *given])
    finally:
        os.umask(before)
    assert found.returncode == 0, found.stderr
    folders, files = MODES[permissions]
    paths = [tmp_path / "runs", *(tmp_path / "runs").rglob("*")]
    assert {"answers.jsonl", "mlflow.db", "tracking", "task_train.parquet", "DONE"} <= {
        path.name for path in paths
    }
    wrong = {
        str(path): oct(stat.S_IMODE(path.stat().st_mode))
        for path in paths
        if stat.S_IMODE(path.stat().st_mode) != (folders if path.is_dir() else files)
    }
    assert not wrong


def test_what_is_copied_into_a_folder_has_no_modes_of_its_own(tmp_path):
    before = os.umask(0o077)
    try:
        with artifacts.building(tmp_path / "stage", {}) as folder:
            (folder / "copied.txt").write_text("x")
            (folder / "copied.txt").chmod(0o777)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "stage" / "copied.txt").stat().st_mode) == 0o600


def test_a_file_system_whose_modes_are_fixed_is_said_and_does_not_end_the_stage(
    tmp_path, monkeypatch
):
    def fixed(path, mode):
        raise PermissionError(1, "Operation not permitted", str(path))

    chmod = Path.chmod
    monkeypatch.setattr(type(tmp_path), "chmod", fixed)
    with (
        pytest.warns(UserWarning, match="keeps modes of its own, and who may read it"),
        artifacts.building(tmp_path / "stage", {}) as folder,
    ):
        (folder / "data.txt").touch(0o777)
        chmod(folder / "data.txt", 0o777)
    assert artifacts.complete(tmp_path / "stage")


def test_a_method_has_no_permissions_of_its_own(project):
    with pytest.raises(ValueError, match="method 'sft' overrides permissions"):
        recipes.load(project, {"methods": {"sft": {"permissions": "all"}}})
