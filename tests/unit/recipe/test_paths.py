"""Paths in a recipe: what they are relative to, what is expanded, what ships with the package. Needs no torch."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import yaml

from pipeline import artifacts, shipped
from pipeline.data import sources
from pipeline.defences import recipes
from pipeline.defences.recipes import recipe_class
from pipeline.model import model_files
from pipeline.recipe.paths import section_of
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import PathField, SourceSection
from pipeline.recipe.strict_yaml import parse_overrides
from pipeline.stages import command_line

SHIPPED = shipped.FOLDER


def write(path: Path, **changes) -> Path:
    """The shortest valid recipe, with changes by dotted field; creates its folder."""
    raw = {
        "name": "short",
        "model": {"path": "owner/model"},
        "data": {"task": {"source": "owner/task"}, "safety": {"source": "owner/safety"}},
        "train": {"steps": 5},
        "evaluate": {"harmful": {"source": "owner/harmful"}},
    }
    for field, value in changes.items():
        *parents, leaf = field.split(".")
        node = raw
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return write_raw(path, raw)


def write_raw(path: Path, raw: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(raw))
    return path


def value(loaded: Recipe, field: str) -> str:
    node = loaded
    for name in field.split("."):
        node = getattr(node, name)
    return str(node)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """The working directory, which is not the recipe's folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


RELATIVE = {
    "output_dir": ("out", "{}/out"),
    "model.path": ("./models/llama", "{}/models/llama"),
    "model.chat_template": ("chat.jinja", "{}/chat.jinja"),
    "data.task.source": ("rows.jsonl", "{}/rows.jsonl"),
    "data.safety.source": ("../shared/rows.csv", "{}/../shared/rows.csv"),
    "data.harmless.source": ("./rows", "{}/rows"),
    "evaluate.harmful.source": ("sub/rows.parquet", "{}/sub/rows.parquet"),
    "train.ds_config": ("mine.json", "{}/mine.json"),
    "align.train.ds_config": ("sub/mine.json", "{}/sub/mine.json"),
    "tracking.uri": ("sqlite:///sub/mlflow.db", "sqlite:///{}/sub/mlflow.db"),
}


@pytest.mark.parametrize("field", RELATIVE)
def test_a_file_s_paths_are_relative_to_it_and_overrides_to_the_working_directory(
    tmp_path, elsewhere, field
):
    text, expected = RELATIVE[field]
    steps = {"align.enabled": False, "align.train.steps": 5} if field.startswith("align") else {}
    path = write(tmp_path / "recipes" / "mine.yaml", **steps, **{field: text})

    def places(folder: Path) -> str:
        return expected.format(folder).replace(f"{folder}/..", str(folder.parent))

    assert value(recipes.load(path).base, field) == places(tmp_path / "recipes")
    assert value(recipes.load(os.path.relpath(path)).base, field) == places(tmp_path / "recipes")
    given = parse_overrides([f"--{field}", text])
    assert value(recipes.load(write(path, **steps), given).base, field) == places(elsewhere)


@pytest.mark.parametrize("field", RELATIVE)
def test_home_and_variables_expand_in_every_path(tmp_path, elsewhere, monkeypatch, field):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", "/shared/data")
    monkeypatch.setenv("AT_HOME", "~/data")
    prefix, ending = ("sqlite:///", ".db") if field == "tracking.uri" else ("", ".json")
    steps = {"align.enabled": False, "align.train.steps": 5} if field.startswith("align") else {}
    written = {
        "~/x": f"{tmp_path}/home/x", "$DATA/x": "/shared/data/x", "${DATA}_x/y": "/shared/data_x/y",
        "$AT_HOME/x": f"{tmp_path}/home/data/x", "/a/$$5": "/a/$5", "/a/b": "/a/b",
    }  # fmt: skip
    for text, expected in written.items():
        path = write(tmp_path / "mine.yaml", **steps, **{field: f"{prefix}{text}{ending}"})
        assert value(recipes.load(path).base, field) == f"{prefix}{expected}{ending}"


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("model.path", "owner/model"),
        ("model.path", "builtin:smollm2-135m-instruct"),
        ("data.task.source", "owner/rows"),
        ("data.task.source", "rows"),
        ("data.task.source", "builtin:advbench"),
        ("tracking.uri", "http://host:5000"),
        ("tracking.uri", "postgresql://user:pa$word@host/~db"),
        ("tracking.uri", "sqlite:////abs/mlflow.db"),
        ("tracking.uri", "sqlite:///:memory:"),
    ],
)
def test_what_is_no_path_stays(tmp_path, field, text):
    assert value(recipes.load(write(tmp_path / "mine.yaml", **{field: text})).base, field) == text


def test_every_field_that_holds_a_path_is_marked():
    """Also one that is added later: a Path in the schema that is not resolved would depend on the working directory."""

    def unmarked(section, prefix=""):
        for name, field in section.model_fields.items():
            inner = section_of(field.annotation)
            if inner:
                yield from unmarked(inner, f"{prefix}{name}.")
            elif Path in (field.annotation, *get_args(field.annotation)) and not any(
                isinstance(marker, PathField) for marker in field.metadata
            ):
                yield f"{prefix}{name}"

    assert list(unmarked(recipe_class())) == []


def test_a_parents_paths_are_relative_to_the_parent(tmp_path, elsewhere):
    base = {"data.task.source": "rows.jsonl", "output_dir": "runs", "model.path": "./llama"}
    write(tmp_path / "shared" / "base.yaml", **base)
    methods = {"sft": {"train": {"ds_config": "sft.json"}}}
    own = {"extends": "../shared/base.yaml", "model": {"path": "./llama"}, "methods": methods}
    child = write_raw(tmp_path / "own" / "mine.yaml", own)
    loaded = recipes.load(child)
    assert value(loaded.base, "data.task.source") == str(tmp_path / "shared" / "rows.jsonl")
    assert loaded.base.output_dir == tmp_path / "shared" / "runs"
    assert loaded.base.model.path == str(tmp_path / "own" / "llama")
    assert loaded.cell("sft", 0).recipe.train.ds_config == tmp_path / "own" / "sft.json"


def test_extends_expands_and_may_name_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES", str(tmp_path / "shared"))
    write(tmp_path / "shared" / "base.yaml", name="base")
    assert (
        recipes.load(
            write_raw(tmp_path / "own" / "mine.yaml", {"extends": "$RECIPES/base.yaml"})
        ).base.name
        == "base"
    )
    for name in ("launch/recipes/demo.yaml", "demo.yaml"):
        loaded = recipes.load(
            write_raw(tmp_path / "own" / "mine.yaml", {"extends": name, "name": "mine"})
        ).base
        assert loaded.extends == SHIPPED / "launch" / "recipes" / "demo.yaml"
        assert loaded.data.task.source == "builtin:text_to_sql"
        assert loaded.output_dir == tmp_path / "own" / "runs", "beside the recipe that was given"


def test_a_grids_paths_are_resolved_and_its_cells_have_the_same_names_everywhere(tmp_path):
    grid = {"train.ds_config": ["one.json", "sub/two.json"]}
    loaded = recipes.load(write(tmp_path / "mine.yaml", methods={"sft": {"grid": grid}}))
    assert {cell.method: cell.recipe.train.ds_config for cell in loaded.cells()} == {
        "sft.ds_config_one.json": tmp_path / "one.json",
        "sft.ds_config_two.json": tmp_path / "sub" / "two.json",
    }


def test_a_folder_beside_the_recipe_is_the_model_and_else_it_is_a_hub_id(tmp_path, elsewhere):
    path = write(tmp_path / "mine.yaml", **{"model.path": "models/llama"})
    assert recipes.load(path).base.model.path == "models/llama"
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert recipes.load(path).base.model.path == str(tmp_path / "models" / "llama")
    loaded = recipes.load(write(path, **{"model.path": "deep/models/llama"})).base
    with pytest.raises(
        ValueError, match=f"model.path '{tmp_path}/deep/models/llama' is not a folder"
    ):
        model_files.model_location(loaded.model)


def test_a_hub_id_that_the_working_directory_shadows_is_refused(tmp_path, elsewhere):
    """transformers and datasets would read the folder: what is trained would depend on where the command runs."""
    (elsewhere / "owner" / "model").mkdir(parents=True)
    loaded = recipes.load(write(tmp_path / "mine.yaml")).base
    assert loaded.model.path == "owner/model"
    with pytest.raises(
        ValueError,
        match=f"model.path 'owner/model' is a hub id, but {elsewhere}/owner/model exists",
    ):
        model_files.model_location(loaded.model)
    with pytest.raises(ValueError, match=r"data.task.source 'owner/model' is a hub id, but"):
        sources.check_source(SourceSection(source="owner/model"), "data.task")


def test_ds_config_is_the_recipes_own_file_before_a_shipped_one(tmp_path):
    for name in ("ds_configs/zero3_70b.json", "zero3_70b.json"):
        path = write(tmp_path / "mine.yaml", **{"train.ds_config": name})
        assert recipes.load(path).base.train.ds_config == SHIPPED / "ds_configs" / "zero3_70b.json"
    (tmp_path / "zero3_70b.json").write_text("{}")
    assert recipes.load(path).base.train.ds_config == tmp_path / "zero3_70b.json"


def test_runs_go_beside_a_recipe_and_of_a_shipped_one_to_the_working_directory(tmp_path, elsewhere):
    assert recipes.load(write(tmp_path / "mine.yaml")).base.output_dir == tmp_path / "runs"
    for name in (
        "demo",
        "demo.yaml",
        "launch/recipes/demo.yaml",
        str(SHIPPED / "launch" / "recipes" / "demo.yaml"),
    ):
        loaded = recipes.load(name)
        assert loaded.base.output_dir == elsewhere / "runs"
        assert loaded.path == SHIPPED / "launch" / "recipes" / "demo.yaml"
    assert recipes.load("demo", {"output_dir": "other"}).base.output_dir == elsewhere / "other"


@pytest.mark.parametrize("recipe_of", ["mine.yaml", "demo"])
def test_a_process_in_another_folder_is_told_the_same(tmp_path, elsewhere, monkeypatch, recipe_of):
    """Also from a folder with a dollar sign in its name, and with a variable that only this process has."""
    here = tmp_path / "$here"
    here.mkdir()
    write(here / "mine.yaml")
    monkeypatch.chdir(here)
    monkeypatch.setenv("ONLY_HERE", "rows")
    given = [
        "--data.task.source",
        "$ONLY_HERE.jsonl",
        "--train.ds_config=zero3_70b.json",
        "--tracking.uri=sqlite:///m.db",
    ]
    loaded = recipes.load(recipe_of, parse_overrides(given))
    assert value(loaded.base, "data.task.source") == str(here / "rows.jsonl")
    monkeypatch.delenv("ONLY_HERE")
    path, *arguments = loaded.arguments()
    monkeypatch.chdir(elsewhere)
    assert recipes.load(path, parse_overrides(arguments)).base == loaded.base


BAD = {
    "$NOT_SET/rows.jsonl": "but the variable NOT_SET is not set: set it, or write the path itself",
    "${EMPTY}/rows.jsonl": "but the variable EMPTY is empty: set it, or write the path itself",
    "rows$.jsonl": "in which a $ stands before no variable's name: write $$ for the sign itself",
    "~nobody-of-that-name/rows.jsonl": "but ~nobody-of-that-name is nobody's home folder here: write the path itself",
}


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_expanded_is_one_sentence_with_field_and_place(tmp_path, monkeypatch, text):
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.setenv("EMPTY", "")
    path = tmp_path / "mine.yaml"
    methods = {"sft": {"train": {"ds_config": text}}}
    for file, overrides, where in (
        ({"data.task.source": text}, [], f"{path}: data.task.source"),
        ({}, [f"--data.task.source={text}"], "--data.task.source"),
        ({"methods": methods}, [], f"{path}: methods.sft.train.ds_config"),
    ):
        with pytest.raises(ValueError) as caught:
            recipes.load(write(path, **file), parse_overrides(overrides))
        assert str(caught.value).startswith(f"{where} is '{text}', {BAD[text]}")


def test_a_variable_is_asked_for_only_where_its_value_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    write(tmp_path / "base.yaml", output_dir="$NOT_SET/runs")
    child = write_raw(tmp_path / "mine.yaml", {"extends": "base.yaml"})
    assert recipes.load(child, {"output_dir": "/given"}).base.output_dir == Path("/given")
    write_raw(child, {"extends": "base.yaml", "output_dir": "own"})
    assert recipes.load(child).base.output_dir == tmp_path / "own"
    with pytest.raises(
        ValueError,
        match=r"base.yaml: output_dir is '[$]NOT_SET/runs', but the variable NOT_SET is not",
    ):
        recipes.load(write_raw(child, {"extends": "base.yaml"}))


def test_a_shipped_recipe_that_stands_in_is_said_once(elsewhere, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    command_line.open_recipe("launch/recipes/demo.yaml", {})
    name = "launch/recipes/demo.yaml"
    assert (
        capsys.readouterr().err
        == f"no file {elsewhere}/{name}: the recipe is the shipped {SHIPPED}/{name}\n"
    )
    monkeypatch.setenv("RANK", "1")
    command_line.open_recipe("launch/recipes/demo.yaml", {})
    assert capsys.readouterr().err == ""


def test_a_recipe_that_is_nowhere_is_told_with_the_path_and_the_names_there_are(elsewhere):
    for name in ("none.yaml", "other/recipes/demo.yaml", "launch/recipes/../demo.yaml"):
        with pytest.raises(
            ValueError, match=f"no recipe at {elsewhere}/{name}: .*ships with the package .*demo, "
        ):
            recipes.load(name)


def test_the_revision_is_that_of_the_repository_that_holds_the_package(tmp_path):
    """An environment may lie inside somebody's project, whose revision says nothing of this package."""
    assert spec_revision(Path(artifacts.__file__)) == artifacts.git_revision()
    installed = tmp_path / "project" / ".venv" / "site-packages" / "pipeline"
    installed.mkdir(parents=True)
    shutil.copy(artifacts.__file__, installed)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        command = ["git", *identity, *arguments]
        found = subprocess.run(
            command, cwd=tmp_path / "project", check=True, capture_output=True, text=True
        )
        return found.stdout.strip()

    git("init")
    (tmp_path / "project" / "own.txt").write_text("x")
    git("add", "own.txt")
    git("commit", "-m", "theirs")
    assert spec_revision(installed / "artifacts.py") is None
    git("add", "-f", ".venv")
    git("commit", "-m", "the package itself")
    assert spec_revision(installed / "artifacts.py") == git("rev-parse", "HEAD")


def spec_revision(path: Path) -> str | None:
    """git_revision() of a copy of artifacts.py."""
    spec = importlib.util.spec_from_file_location("copied", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.git_revision()
