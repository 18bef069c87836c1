"""The recipe: one strict, typed YAML file that describes one experiment.

    sap run launch/recipes/demo.yaml --train.lr 2e-4 --dry-run

A recipe has shared sections, `methods` (named overrides of those sections) and `seeds`; a cell is one (method, seed).
Precedence, lowest first: defaults here, the file's sections, the method's overrides, `--dotted.overrides` of the
command line. Every violation is a `ValueError` of one sentence: what, where, which field to change, what it takes.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from pipeline import shipped
from pipeline.recipe import paths
from pipeline.recipe.paths import section_of
from pipeline.recipe.redaction import REDACTED, redact, secret_name, token_in
from pipeline.recipe.sections import (
    AlignSection,
    DataSection,
    DefenceSection,
    DirectionSection,
    EvaluateSection,
    ModelSection,
    PathField,
    SafetyPairsSection,
    Section,
    SourceSection,
    TrackingSection,
    TrainSection,
)
from pipeline.recipe.strict_yaml import MOST_CELLS, as_arguments, expanded, mapping_of, merge, read
from pipeline.system.system_errors import reading_input


def _plain() -> dict[str, dict[str, Any]]:
    return {"sft": {}}


class Recipe(Section):
    """What every recipe has; defences/recipes.py adds a section for each defence."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = Field(
        description="Name of the experiment and of its folder below output_dir"
    )
    extends: Annotated[Path | None, PathField("recipe")] = Field(
        None,
        description="Recipe file that this one starts from, relative to this file, or one that ships with the package; "
        "mappings are merged, other values replaced",
    )
    output_dir: Annotated[Path, PathField("path")] = Field(
        Path("runs"),
        description="Where stages write; default: runs beside the recipe, or in the working "
        "directory for a recipe that ships with the package",
    )
    permissions: Literal["private", "group", "all"] = Field(
        "private",
        description="Who may read what is written (answers to harmful prompts and your data "
        "among it): private: this user (folders 0700, files 0600); group: the user's "
        "group too; all: everybody",
    )
    model: ModelSection = Field(description="The chat model to fine-tune")
    data: DataSection = Field(description="What is prepared")
    align: AlignSection = Field(AlignSection(), description="Alignment of the start model")
    direction: DirectionSection = Field(
        DirectionSection(), description="The safety direction at the initial weights"
    )
    train: TrainSection = Field(description="The fine-tuning")
    safety_pairs: SafetyPairsSection = Field(
        SafetyPairsSection(), description="How safety pairs are drawn, whatever draws them"
    )
    evaluate: EvaluateSection = Field(description="What is measured")
    tracking: TrackingSection = Field(TrackingSection(), description="MLflow")
    methods: dict[str, dict[str, Any]] = Field(
        default_factory=_plain,
        min_length=1,
        description="Named overrides of the sections above; one cell each and seed. grid: {field: "
        "[values]} makes one of each combination, null none",
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0], min_length=1, description="Seeds of data order, adapter and dropout"
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _grids(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        result: dict[Any, Any] = {}
        for name, overrides in value.items():
            # null takes away a method of the recipe that this one extends
            result |= (
                {}
                if overrides is None
                else expanded(name, overrides)
                if isinstance(overrides, dict)
                else {name: overrides}
            )
        if len(result) > MOST_CELLS:
            raise ValueError(
                f"these are {len(result):,} methods, and a recipe has at most {MOST_CELLS:,}: "
                "leave values out of the grids"
            )
        return result

    @field_validator("name", "output_dir")
    @classmethod
    def _no_secret(cls, value: Any) -> Any:
        # Folders are called so, and stand in logs, manifests and scripts that have to find them.
        if token_in(str(value)):
            raise ValueError(
                f"'{redact(str(value))}' holds what looks like a token, and names folders: choose another name"
            )
        return value

    @field_validator("methods")
    @classmethod
    def _method_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for method, overrides in value.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.]*", method):
                raise ValueError(
                    f"'{method}' is not a valid method name: use letters, digits, _ and ."
                )
            fixed = sorted(_SHARED & set(overrides))
            if fixed:
                own = [name for name in cls.model_fields if name not in _SHARED]
                raise ValueError(
                    f"method '{method}' overrides {fixed[0]}: methods share it, or they could not "
                    f"be compared; override {', '.join(own[:-1])} or {own[-1]}"
                )
        return value

    @property
    def umask(self) -> int:
        """What `permissions` keeps from others, as umask(2) takes it."""
        return {"private": 0o077, "group": 0o027, "all": 0o022}[self.permissions]

    @model_validator(mode="after")
    def _token_budgets(self) -> Recipe:
        self._check_token_budgets()
        return self

    def _check_token_budgets(self) -> None:
        """ValueError where a row may be longer than a micro-batch. An alignment that is off is not looked at."""
        length = self.data.max_length
        align = [("align.train", self.align.train)] if self.align.enabled else []
        for section, train in [("train", self.train), *align]:
            field, budget = f"{section}.tokens_per_micro_batch", train.tokens_per_micro_batch
            if budget is not None and budget < length:
                raise ValueError(
                    f"{field} {budget} is below data.max_length {length}, so that a row might fit into no micro-batch: "
                    f"set {field} to {length} or more, or lower data.max_length"
                )

    @property
    def parts(self) -> list[str]:
        """The enabled sections that make up a method, in DEFENCES' order; none for plain fine-tuning."""
        sections = ((name, getattr(self, name)) for name in type(self).model_fields)
        return [
            name
            for name, section in sections
            if isinstance(section, DefenceSection) and section.enabled
        ]

    @property
    def switched(self) -> list[str]:
        """The sections that do nothing unless they are enabled."""
        fields = type(self).model_fields.items()
        return [
            name
            for name, field in fields
            if (section := section_of(field.annotation))
            and (issubclass(section, DefenceSection) or section is AlignSection)
        ]

    @property
    def draws_pairs(self) -> bool:
        """Whether training draws safety pairs step by step."""
        return False  # no defence, no pairs


# What all methods of a recipe have in common.
_SHARED = {
    "name",
    "extends",
    "output_dir",
    "permissions",
    "methods",
    "seeds",
    "model",
    "data",
    "align",
    "evaluate",
    "tracking",
}


@dataclass(frozen=True)
class Cell:
    """One (method, seed) of an experiment, with its resolved recipe."""

    method: str
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Experiment:
    """A loaded recipe file: the base recipe and the cells it spans."""

    path: Path
    base: Recipe
    raw: dict[str, Any]
    overrides: dict[str, Any]

    @property
    def model(self) -> type[Recipe]:
        """The class of its recipes, which knows the sections that they may have."""
        return type(self.base)

    def cell(self, method: str, seed: int) -> Cell:
        """Resolve one cell; ValueError where the method is unknown or its recipe is not valid."""
        if method not in self.base.methods:
            raise ValueError(
                f"no method '{method}' in {self.path}: it has {', '.join(self.base.methods)}"
            )
        merged = merge(merge(self.raw, self.base.methods[method]), self.overrides)
        return Cell(method, seed, _validate(merged, f"{self.path} (method {method})", self.model))

    def only(self, methods: list[str]) -> Experiment:
        """The same experiment with some of its methods; the name before a grid's settings stands for all of them.

        ValueError for one that it lacks.
        """
        known = self.base.methods
        members = {
            method: [method]
            if method in known
            else [name for name in known if name.startswith(f"{method}.")]
            for method in methods
        }
        for method, names in members.items():
            self.cell(names[0] if names else method, self.base.seeds[0])
        chosen = {
            name: overrides
            for name, overrides in self.base.methods.items()
            if any(name in names for names in members.values())
        }
        return replace(self, base=self.base.model_copy(update={"methods": chosen}))

    def arguments(self) -> list[str]:
        """The recipe and its overrides for a process that runs in another folder: paths are absolute."""
        return [str(self.path.absolute()), *as_arguments(paths.written(self.overrides, self.model))]

    def cells(self) -> Iterator[Cell]:
        """Every method with every seed, method by method."""
        for method in self.base.methods:
            for seed in self.base.seeds:
                yield self.cell(method, seed)


@reading_input()
def load(path: str | Path, overrides: dict[str, Any] | None, model: type[Recipe]) -> Experiment:
    """Read and validate a recipe file and every method in it.

    model: the class of its recipes (defences/recipes.py, whose `load` gives it).
    path: of a file, or the name of a recipe that ships with the package. Paths in it are relative to it.
    overrides: nested mapping that wins over file and methods (see `strict_yaml.parse_overrides`). Paths in it are
        relative to the working directory.
    Raises ValueError (one sentence) on any violation.
    """
    if "extends" in (overrides or {}):
        raise ValueError(
            "extends is read from a recipe's file only: write it there, or give the other file as the recipe"
        )
    given = Path(path)
    path = given if given.is_file() else shipped.recipe(str(given)) or given
    raw = read(path, lambda mapping, file: paths.resolve(mapping, model, file))
    overrides = paths.resolve(overrides or {}, model, None)
    if "output_dir" not in merge(raw, overrides):
        # as if given on the command line, so that `arguments` mean the same in any folder
        if shipped.holds(path):
            overrides["output_dir"] = str(Path.cwd() / "runs")
        else:
            raw["output_dir"] = str(path.absolute().parent / "runs")
    _check_moved(merge(raw, overrides), path, model)
    experiment = Experiment(
        path, _validate(merge(raw, overrides), str(path), model), raw, overrides
    )
    _check_grids(merge(raw, overrides).get("methods"), overrides)
    cells = [
        experiment.cell(method, experiment.base.seeds[0]) for method in experiment.base.methods
    ]
    _check_enabled(experiment, cells, mapping_of(path))
    return experiment


def _check_enabled(experiment: Experiment, cells: list[Cell], given: dict[str, Any]) -> None:
    """ValueError where a section is filled in and switched on nowhere: it would do nothing, without a word.

    A method's, unless the method or the command line says whether it is enabled; and what the file itself gives for all
    methods, where it does not say so and none of them enables it. What it takes over from the file that it extends may
    be for methods that it leaves out. cells: of every method; given: the file's own mapping.
    """
    merged = merge(experiment.raw, experiment.overrides)
    for name in experiment.base.switched:
        filled, said = given.get(name), experiment.overrides.get(name)
        for cell in cells:
            written = experiment.base.methods[cell.method].get(name)
            if (
                written is not None
                and not getattr(cell.recipe, name).enabled
                and "enabled" not in written
                and "enabled" not in (said or {})
            ):
                fields = ", ".join(f"{name}.{field}" for field in written) or f"the section {name}"
                raise ValueError(
                    f"{experiment.path}: method '{cell.method}' sets {fields}, but {name} is not enabled: "
                    f"write methods.{cell.method}.{name}: {{enabled: true, ...}}, or {{enabled: false, ...}} "
                    "where it is to stay off"
                )
        of_methods = (of_method.get(name) or {} for of_method in experiment.base.methods.values())
        if (
            filled
            and "methods" not in experiment.overrides  # it may have been for one that is left out
            and "enabled" not in (merged.get(name) or {})
            and not any("enabled" in written for written in of_methods)
            and not any(getattr(cell.recipe, name).enabled for cell in cells)
        ):
            where = (
                "set it to true" if name in _SHARED else "set it to true in a method that uses it"
            )
            raise ValueError(
                f"{experiment.path}: {', '.join(f'{name}.{field}' for field in filled)} would do nothing, "
                f"because {name}.enabled is not set: {where}, or to false where it is to stay off"
            )


def _check_moved(merged: dict[str, Any], path: Path, model: type[Recipe]) -> None:
    """ValueError that lists every key that belongs into another section, in methods and their grids too.

    An old recipe has several.
    """
    methods = merged.get("methods")
    parts = [("", merged)]
    for method, own in methods.items() if isinstance(methods, dict) else ():
        if isinstance(own, dict):
            parts.append((f"methods.{method}.", own))
            grid = own.get("grid")
            fields = [str(field).split(".", 1) for field in grid] if isinstance(grid, dict) else []
            parts += [(f"methods.{method}.grid.", {f[0]: {f[1]: None}}) for f in fields if f[1:]]
    moved = []
    for prefix, mapping in parts:
        for name, value in mapping.items():
            field = model.model_fields.get(name)
            section = section_of(field.annotation) if field else None
            if section is not None and isinstance(value, dict):
                moved += [
                    f"{prefix}{place} instead of {prefix}{name}.{key}"
                    for key in value
                    if (place := _moved(section, key))
                ]
    if moved:
        keys = "keys" if len(moved) > 1 else "key"
        raise ValueError(f"{path}: unknown {keys}: write {redact(', and '.join(moved))}")


def _moved(section: type[Section], key: Any) -> str | None:
    """The field to write instead of a key that the section does not have.

    One that it had, or one of how safety pairs are drawn.
    """
    if key in section.model_fields:
        return None
    drawn = issubclass(section, DefenceSection) and key in SafetyPairsSection.model_fields
    return section.MOVED.get(key) or (f"safety_pairs.{key}" if drawn else None)


def _check_grids(methods: Any, overrides: dict[str, Any]) -> None:
    """ValueError where an override wins over a grid: its cells would all be alike, and their names false."""
    for method, own in (methods or {}).items():
        for field in (own or {}).get("grid", {}):
            node: Any = overrides
            for part in field.split("."):
                node = node.get(part) if isinstance(node, dict) else None
            if node is not None:
                raise ValueError(
                    f"--{field} is what the grid of method '{method}' goes through: leave it out, "
                    f"or override --methods.{method}.grid"
                )


def dump(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain, redacted data (JSON and YAML safe)."""
    return redact(recipe.model_dump(mode="json"))


def field_rows(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, description) of every field, depth first: the source of `--help` and docs."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            yield from field_rows(section, f"{prefix}{name}.")
            continue
        default = (
            "required" if field.is_required() else str(field.get_default(call_default_factory=True))
        )
        yield f"{prefix}{name}", _type_name(field.annotation), default, field.description or ""


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return (
            "mapping"
            if arguments[1] is Any
            else f"mapping of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
        )
    return "None" if annotation is types.NoneType else annotation.__name__


def _validate(raw: dict[str, Any], where: str, model: type[Recipe]) -> Recipe:
    paths.check(raw, model)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{where}: {_sentence(error, model)}") from None


def _sentence(error: ValidationError, model: type[Recipe]) -> str:
    """The first violation in one sentence, without secrets: a refused value may be one."""
    first = error.errors()[0]
    names, annotation = _follow(first["loc"], model)
    field = ".".join(names)
    section = (
        section_of(_follow(first["loc"][:-1], model)[1])
        if first["type"] == "extra_forbidden"
        else None
    )
    if first["type"] == "extra_forbidden":
        sentence = f"unknown key '{field}'{_instead(names, section, model)}"
    elif first["type"] == "model_type":
        sentence = _no_section(names, first["input"], section_of(annotation), model)
    elif first["type"] == "int_type" and isinstance(first["input"], dict) and _beside(names, model):
        sentence = (
            f"'{field}' holds fields, but it takes a number: "
            f"fields go into the section {names[-1]}, which stands beside {names[0]}"
        )
    elif first["type"] == "missing":
        sentence = f"'{field}' is missing: it is required"
    elif first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        sentence = (
            message if not field or message.startswith(f"{field}.") else f"{field}: {message}"
        )
    else:
        value = REDACTED if any(map(secret_name, names)) else repr(redact(first["input"]))
        member = isinstance(first["loc"][-1], int)  # of a list: what it must be is known
        one_of = (
            not member
            and len(names) < len(first["loc"])
            and get_origin(annotation) in (Union, types.UnionType)
        )
        problem = (
            f"it takes {_type_name(annotation)}"
            if one_of
            else f"{first['msg'][0].lower()}{first['msg'][1:]}"
        )
        sentence = f"'{field}' is {value}, but: {problem}"
    return redact(sentence)


def _instead(names: list[str], section: type[Section] | None, model: type[Recipe]) -> str:
    """What to write instead of an unknown key: the one field of that name, or the nearest of its section."""
    known = [name for name, *_ in field_rows(model) if name.count(".") == 1]
    same = [name for name in known if name.rpartition(".")[2] == names[-1]]
    if len(same) == 1:
        return f": write {same[0]}"
    close = difflib.get_close_matches(
        names[-1], list(section.model_fields) if section else [], n=1, cutoff=0.0
    )
    return f"; the nearest known one is '{'.'.join([*names[:-1], close[0]])}'" if close else ""


def _beside(names: list[str], model: type[Recipe]) -> bool:
    """Whether a field has the name of a section that stands beside its own."""
    field = model.model_fields.get(names[-1])
    return len(names) > 1 and field is not None and section_of(field.annotation) is not None


def _no_section(
    names: list[str], given: Any, section: type[Section] | None, model: type[Recipe]
) -> str:
    """The sentence for a value in the place of a section."""
    field, fields = ".".join(names), section.model_fields if section else {}
    example = next(
        (name for name in fields if name == "enabled" or fields[name].is_required()),
        next(iter(fields), "FIELD"),
    )
    value = REDACTED if any(map(secret_name, names)) else repr(redact(given))
    sentence = f"'{field}' is {value}, but it is a section: write its fields, as in {names[-1]}: {{{example}: ...}}"
    other = [name for name, *_ in field_rows(model) if name.endswith(f".{field}")]
    return sentence + (f"; {other[0]} takes a number" if other and isinstance(given, int) else "")


def _follow(location: tuple[Any, ...], model: type[Recipe]) -> tuple[list[str], Any]:
    """The names a user writes for an error's location (pydantic adds those of a union's members),
    and the annotation found there.
    """
    names: list[str] = []
    annotation: Any = model
    for part in location:
        section = section_of(annotation)
        if section is not None:
            annotation = (
                section.model_fields[part].annotation if part in section.model_fields else None
            )
        elif get_origin(annotation) is dict and part != "[key]":
            annotation = get_args(annotation)[1]
        elif not isinstance(part, int):
            continue
        names.append(str(part))
    return names, annotation


def sources(recipe: Recipe) -> Iterator[tuple[str, SourceSection]]:
    """Every data source that the recipe names, by its field ("data.task")."""
    for section, name in ((recipe.data, "data"), (recipe.evaluate, "evaluate")):
        for field in type(section).model_fields:
            value = getattr(section, field)
            if isinstance(value, SourceSection):
                yield f"{name}.{field}", value
