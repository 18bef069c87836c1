"""docs/stages.md says for every field what runs again: each is changed, and the folders compared with its table."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import struct
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

from pipeline.defences import recipes
from pipeline.recipe.recipe import Experiment, Recipe
from pipeline.stages.layout import Layout

DOC = Path(__file__).resolve().parents[3] / "docs" / "stages.md"
STAGES = ("prepare", "prompts", "align", "filter", "direction", "train", "evaluate", "report")
PARTS = ("sap", "saft", "ema", "safe_mix", "safety_gradient", "lisa")
SOURCES = (
    *(
        f"data.{name}"
        for name in ("task", "harmful", "safety", "refusals", "harmless", "validation_prompts")
    ),
    *(f"evaluate.{name}" for name in ("harmful", "harmless", "ordinary")),
)

Settings = dict[str, Any]  # dotted field -> value; a file by its name below the project's folder

# Where a field acts only beside others: the settings from which it is changed, on top of the recipe below.
STARTS: dict[str, Settings] = {
    **{
        f"{source}.{field}": {f"{source}.source": "owner/name"}
        for source in SOURCES
        for field in ("subset", "split", "revision")
    },
    **{f"{source}.header": {f"{source}.source": "rows.csv"} for source in SOURCES},
    "model.revision": {"model.path": "owner/name"},
    "train.epochs": {"train.steps": None, "train.epochs": 1.0},
    **{
        f"{section}.spike_factor": {f"{section}.on_spike": "skip"}
        for section in ("train", "align.train")
    },
    "align.train.epochs": {"align.train.steps": None, "align.train.epochs": 1.0},
    **{
        f"{part}.packing": {f"{part}.tokens_per_micro_batch": 4096}
        for part in ("train", "align.train")
    },
    **{
        f"{part}.enabled": {"methods": {"sft": {}, "plain": {}}, "sap.enabled": False}
        for part in PARTS
    },
    "align.enabled": {"align.enabled": False},
}
UNALIGNED: Settings = {"align.enabled": False}
NEVER_DRAWN: Settings = {
    "safety_pairs.refresh_every": 0,
    "methods": {"sap": {"sap": {"enabled": True}}},
}
# Settings under which a field must change nothing: what the table's last column says.
IDLE: list[tuple[str, Settings]] = [
    *(
        (f"{source}.{field}", {})
        for source in SOURCES
        for field in ("subset", "split", "revision", "header")
    ),
    ("model.revision", {}),
    ("data.harmful.source", {"data.harmful_fraction": 0.0, "data.harmful.limit": None}),
    ("data.harmful.columns", {"data.harmful_fraction": 0.0, "data.harmful.limit": None}),
    ("data.harmful.max_bad_rows", {"data.harmful_fraction": 0.0, "data.harmful.limit": None}),
    ("data.harmful.reasoning", {"data.harmful_fraction": 0.0, "data.harmful.limit": None}),
    *(
        (f"data.refusals.{field}", UNALIGNED)
        for field in ("source", "columns", "limit", "max_bad_rows", "reasoning")
    ),
    *(
        (f"data.harmless.{field}", UNALIGNED)
        for field in ("source", "columns", "limit", "max_bad_rows", "reasoning")
    ),
    *(
        (f"data.{field}", UNALIGNED)
        for field in ("refusal_samples", "harmless_samples", "begun_share")
    ),
    *((f"align.{field}", UNALIGNED) for field in ("distill_tokens", "train.lr")),
    *(
        (f"{section}.{field}", {f"{section}.adapter": "full"})
        for section in ("train", "align.train")
        for field in (
            "lora.r",
            "lora.alpha",
            "lora.dropout",
            "lora.target_modules",
            "export_merged",
        )
    ),
    *(
        (f"{section}.micro_batch_size", {f"{section}.tokens_per_micro_batch": 4096})
        for section in ("train", "align.train")
    ),
    ("sap.target_correction", {"sap.probe_step": "rms"}),
    *((f"{section}.spike_factor", {}) for section in ("train", "align.train")),
    *((f"safety_pairs.{field}", NEVER_DRAWN) for field in ("batch_size", "micro_batch_size")),
    ("evaluate.harmless_prompts", {"evaluate.harmless": None}),
    ("evaluate.ordinary_prompts", {"evaluate.ordinary": None, "evaluate.attacks": []}),
    ("evaluate.attack_prompts", {"evaluate.attacks": []}),
]
VALUES: dict[str, Any] = {
    **{f"{source}.source": "other.jsonl" for source in SOURCES},
    **{f"{source}.columns": {"prompt": "goal"} for source in SOURCES},
    **{
        f"{section}.resume_from": "runs/.train-x-s0-1.work@4"
        for section in ("train", "align.train")
    },
    **{f"{section}.steps": 9 for section in ("train", "align.train")},
    **{f"{section}.lora.target_modules": ["o_proj"] for section in ("train", "align.train")},
    # not below data.max_length
    **{f"{section}.tokens_per_micro_batch": 4096 for section in ("train", "align.train")},
    "model.path": "other_model",
    "evaluate.attacks": ["role_play"],
    "model.dtype": "bfloat16",
    "model.chat_template": "template.jinja",
    "sap.layers": [0, 1],
    "methods": {part: {part: {"enabled": True}} for part in PARTS}
    | {"sft": {}, "added": {"train": {"lr": 0.5}}},
    "seeds": [0, 1],
    "extends": "parent.yaml",
}


def write_model(folder: Path, weights: bytes) -> None:
    """A model folder as far as a layout looks at it: one tensor of float32, a configuration and a tokenizer."""
    folder.mkdir()
    tensor = {"dtype": "F32", "shape": [len(weights) // 4], "data_offsets": [0, len(weights)]}
    header = json.dumps({"weight": tensor}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + weights)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")


def make_files(folder: Path) -> dict[str, Any]:
    """Files and a recipe in which every section acts; returns the recipe as a mapping."""
    write_model(folder / "model", bytes(4096))
    write_model(folder / "other_model", bytes([1]) * 4096)
    for name in (*SOURCES, "other"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    (folder / "rows.csv").write_text("prompt\na\n")
    (folder / "template.jinja").write_text("{{ messages }}")
    sections: dict[str, Any] = {"data": {}, "evaluate": {}}
    for name in SOURCES:
        section, field = name.split(".")
        sections[section][field] = {"source": str(folder / f"{name}.jsonl")}
    sections["data"]["harmful"]["limit"] = 20
    return {
        "name": "table",
        "output_dir": str(folder / "runs"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": sections["data"] | {"harmful_fraction": 0.1},
        "align": {"enabled": True, "train": {"steps": 100}},
        "train": {"steps": 100},
        "sap": {"direction": "precomputed"},
        "safety_pairs": {"refresh_every": 2},
        "evaluate": sections["evaluate"] | {"attacks": ["prefill"]},
        "methods": {"sft": {}} | {part: {part: {"enabled": True}} for part in PARTS},
    }


# stage -> method ("-" where it has none) -> folders, as paths
Folders = dict[str, dict[str, set[str]]]


def folders(experiment: Experiment) -> Folders:
    layout = Layout(experiment)
    found: Folders = {stage: {} for stage in STAGES}

    def add(stage: str, target: Path, method: str = "-") -> None:
        found[stage].setdefault(method, set()).add(str(target))

    add("prepare", layout.prepare())
    add("prompts", layout.prompts())
    if experiment.base.align.enabled:
        add("align", layout.align())
    for cell in experiment.cells():
        add("train", layout.train(cell), cell.method)
        if layout.needs_filter(cell):
            add("filter", layout.filter(cell), cell.method)
        if layout.needs_direction(cell):
            add("direction", layout.direction(cell), cell.method)
    for subject in layout.subjects():
        add("evaluate", layout.evaluate(subject), subject.name)
    add("report", layout.report())
    return found


def run_again(before: Folders, after: Folders) -> dict[str, set[str]]:
    """Stage -> the methods for which it has a folder that was not there before; stages without one are left out."""
    again = {
        stage: {
            method
            for method, targets in methods.items()
            if targets - before[stage].get(method, set())
        }
        for stage, methods in after.items()
    }
    return {stage: methods for stage, methods in again.items() if methods}


class Project:
    """The recipe and its files; recipes are loaded as the command does."""

    def __init__(self, folder: Path):
        self.folder, self.content = folder, make_files(folder)
        self.starts: dict[str, tuple[Experiment, Folders]] = {}  # most fields share one

    def loaded(self, content: Settings) -> Experiment:
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps(content))  # which is YAML too
        return recipes.load(path)

    def start(self, settings: Settings) -> tuple[Experiment, Folders]:
        key = json.dumps(settings)
        if key not in self.starts:
            experiment = self.loaded(self.changed(self.content, settings))
            self.starts[key] = experiment, folders(experiment)
        return self.starts[key]

    def changed(self, content: Settings, settings: Settings) -> Settings:
        """A copy of the recipe with some fields set."""
        result = copy.deepcopy(content)
        for field, value in settings.items():
            *sections, name = field.split(".")
            node = result
            for section in sections:
                node = node.setdefault(section, {})
            there = isinstance(value, str) and (self.folder / value).exists()
            node[name] = str(self.folder / value) if there else value
        return result

    def after(self, field: str, start: Experiment) -> Experiment:
        """The recipe that has another valid value for this field. A part is switched on in one method of two."""
        target = f"methods.sft.{field}" if field in {f"{part}.enabled" for part in PARTS} else field
        if field == "extends":
            (self.folder / VALUES[field]).write_text(json.dumps(start.raw))
        for value in [VALUES[field]] if field in VALUES else others(*current(start.base, field)):
            with contextlib.suppress(ValueError):
                return self.loaded(self.changed(start.raw, {target: value}))
        raise AssertionError(
            f"no other valid value for {field}: give one in VALUES, or a start for it in STARTS"
        )

    def change(
        self, field: str, settings: Settings
    ) -> tuple[Experiment, Experiment, dict[str, set[str]]]:
        """The recipe before and after, and what runs again."""
        before, there = self.start(settings)
        after = self.after(field, before)
        return before, after, run_again(there, folders(after))


def current(base: Recipe, field: str) -> tuple[Any, Any]:
    """The field's annotation and its value."""
    node: Any = base
    *sections, name = field.split(".")
    for section in sections:
        node = getattr(node, section)
    return type(node).model_fields[name].annotation, getattr(node, name)


def others(annotation: Any, value: Any) -> list[Any]:
    """Values of the annotated type that are not `value`; some may be refused."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return others(arguments[0], value)
    if origin in (Union, types.UnionType):
        return [other for argument in arguments for other in others(argument, value)]
    if origin is Literal:
        return [choice for choice in arguments if choice != value]
    if annotation is bool:
        return [not value]
    if annotation in (int, float):
        number = value if isinstance(value, int | float) else 0
        return [
            annotation(other)
            for other in (number + 2, number / 2, 1, 0.25)
            if annotation(other) != value
        ]
    return ["other"] if annotation in (str, Path) else []


@dataclass(frozen=True)
class Row:
    """One row of the table.

    stages: what runs again. methods: all, "with `PART`, `PART`", "the changed one", or "". only: where the field acts.
    """

    stages: set[str]
    methods: str
    only: str


def table() -> dict[str, Row]:
    """docs/stages.md's table by field. A name that begins with a dot stands beside the name before it."""
    rows: dict[str, Row] = {}
    for line in DOC.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 4 or not cells[0].startswith("`"):
            continue
        whole = {"everything": set(STAGES), "nothing": set()}
        stages = whole[cells[1]] if cells[1] in whole else set(cells[1].split(", "))
        assert stages <= set(STAGES), f"{cells[0]}: {cells[1]}"
        before = ""
        for name in re.findall(r"`([^`]+)`", cells[0]):
            name = before.rpartition(".")[0] + name if name.startswith(".") else name
            assert name not in rows, f"{name} stands in two rows"
            rows[name], before = Row(stages, cells[2], cells[3]), name
    return rows


FIELDS = [name for name, *_ in recipes.field_rows()]
ROWS = table()


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("table"))


def test_the_table_has_every_field_of_the_recipe_and_no_other():
    assert sorted(ROWS) == sorted(FIELDS)


def test_the_table_says_where_a_field_does_nothing():
    said = {field for field, row in ROWS.items() if row.only}
    tried = {field for field, _ in IDLE}
    assert tried <= said
    assert all(field.startswith("align.") for field in said - tried), (
        "of align's fields two are tried for all"
    )


@pytest.mark.parametrize("field", FIELDS)
def test_a_change_runs_what_the_table_says(project, field):
    before, after, again = project.change(field, STARTS.get(field, {}))
    row = ROWS[field]
    assert set(again) == row.stages
    if not {"train", "evaluate"} & set(again):
        assert row.methods == ""
        return
    cells = {cell.method: cell.recipe for cell in after.cells()}
    if row.methods == "the changed one":
        known = {cell.method: cell.recipe.parts for cell in before.cells()}
        expected = {
            method for method, resolved in cells.items() if known.get(method) != resolved.parts
        }
    elif row.methods == "all":
        expected = set(cells)
    else:
        parts = set(re.findall(r"`(\w+)`", row.methods))
        expected = {method for method, resolved in cells.items() if parts & set(resolved.parts)}
    shipped = "prompts" in again or "train" not in again or field.startswith("model.")
    baselines = {
        name
        for name, runs in (("shipped", shipped), ("aligned", shipped or "align" in again))
        if runs
    }
    assert expected and again["evaluate"] == expected | baselines
    assert again.get("train", expected) == expected


@pytest.mark.parametrize(("field", "settings"), IDLE)
def test_a_field_that_does_not_act_changes_nothing(project, field, settings):
    assert project.change(field, settings)[2] == {}
