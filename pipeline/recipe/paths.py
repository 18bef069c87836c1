"""Paths in a recipe: which texts are paths, and what they are relative to.

    resolve({"output_dir": "runs"}, Recipe, Path("/data/recipe.yaml"))    # {"output_dir": "/data/runs"}
    resolve({"output_dir": "runs"}, Recipe, None)                         # the same below the working directory

This runs once, while a recipe is read; everything later sees absolute paths.
Which fields hold paths, and of which kind, is written at the fields (sections.PathField).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Template
from typing import Any, get_args

from pipeline import shipped
from pipeline.recipe.file_endings import suffix
from pipeline.recipe.redaction import redact
from pipeline.recipe.sections import PathField, Section

_SQLITE = "sqlite:///"
Change = Callable[[str, str, str], str]


class Unresolved(str):
    """A text that cannot be resolved. Why is said only where the text is used, because another layer may replace it."""

    sentence: str


def resolve(raw: dict[str, Any], recipe: type[Section], file: Path | None) -> dict[str, Any]:
    """A copy of a recipe's mapping, or of a part of it, in which every path is absolute.

    `~`, `$VAR` and `${VAR}` are expanded, `$$` stands for a dollar sign, and what cannot be expanded becomes
    `Unresolved`. file: where the mapping was read; its paths are relative to that file's folder. None: the mapping is
    the command line's, and its paths are relative to the working directory.
    """
    folder = Path.cwd() if file is None else file.absolute().parent

    def change(text: str, kind: str, field: str) -> str:
        try:
            return _resolved(text, kind, folder)
        except ValueError as error:
            left = Unresolved(text)
            where = f"--{field}" if file is None else f"{file}: {field}"
            left.sentence = redact(f"{where} is '{text}', {error}")
            return left

    return _changed(raw, recipe, change)


def check(raw: dict[str, Any], recipe: type[Section]) -> None:
    """ValueError, one sentence, for the first path that could not be resolved."""

    def refuse(text: str, _kind: str, _field: str) -> str:
        if isinstance(text, Unresolved):
            raise ValueError(text.sentence)
        return text

    _changed(raw, recipe, refuse)


def written(raw: dict[str, Any], recipe: type[Section]) -> dict[str, Any]:
    """A copy of a resolved mapping in which paths are written so that resolving them again changes nothing."""
    return _changed(
        raw, recipe, lambda text, kind, _: text if _stays(text, kind) else text.replace("$", "$$")
    )


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, or holds where it is not null."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _changed(
    raw: dict[str, Any], section: type[Section], change: Change, prefix: str = ""
) -> dict[str, Any]:
    """A copy in which change(text, kind, dotted field) has replaced the text of every field that holds a path."""
    result = dict(raw)
    for name, value in raw.items():
        field = section.model_fields.get(name)
        inner = section_of(field.annotation) if field is not None else None
        marker = next(_markers(section, [name]), None)
        if marker is not None and isinstance(value, str):
            result[name] = change(value, marker.kind, f"{prefix}{name}")
        elif isinstance(value, dict) and inner is not None:
            result[name] = _changed(value, inner, change, f"{prefix}{name}.")
        elif isinstance(value, dict) and name == "methods" and not prefix:
            result[name] = {
                method: _method(own, section, change, f"methods.{method}.")
                if isinstance(own, dict)
                else own
                for method, own in value.items()
            }
    return result


def _method(
    own: dict[str, Any], recipe: type[Section], change: Change, prefix: str
) -> dict[str, Any]:
    """A method's overrides, and the values that its grid goes through."""
    result = _changed(own, recipe, change, prefix)
    if isinstance(own.get("grid"), dict):
        for field, values in own["grid"].items():
            marker = next(_markers(recipe, str(field).split(".")), None)
            if marker is not None and isinstance(values, list):
                dotted = f"{prefix}grid.{field}"
                changed = [
                    change(value, marker.kind, dotted) if isinstance(value, str) else value
                    for value in values
                ]
                result["grid"] = result["grid"] | {field: changed}
    return result


def _markers(section: type[Section] | None, names: list[Any]) -> Iterator[PathField]:
    """The marker of the field that the names lead to, where it has one."""
    field = None
    for name in names:
        field = section.model_fields.get(name) if section else None
        section = section_of(field.annotation) if field else None
    yield from (
        marker for marker in (field.metadata if field else ()) if isinstance(marker, PathField)
    )


def _stays(text: str, kind: str) -> bool:
    """Whether a text is no path: built-in data and models, every store but a sqlite file, what is chosen by device."""
    if kind == "ds_config":
        return text == "auto"
    if kind == "uri":
        return not text.startswith(_SQLITE) or text.removeprefix(_SQLITE) in ("", ":memory:")
    return kind in ("model", "data") and text.startswith("builtin:")


def _resolved(text: str, kind: str, folder: Path) -> str:
    if _stays(text, kind):
        return text
    if kind == "uri":
        return f"{_SQLITE}{_joined(folder, _expanded(text.removeprefix(_SQLITE)))}"
    text = _expanded(text)
    if "://" in text:
        raise ValueError("which is an address: download what is there, and give the file or folder")
    path = _joined(folder, text)
    local = text.startswith(("/", "."))
    if kind == "data" and not (local or suffix(text) or os.path.exists(path)):
        return text
    if kind == "model" and not (local or text.count("/") != 1 or os.path.isdir(path)):
        return text
    if kind in ("recipe", "ds_config") and not os.path.isfile(path):
        path = (shipped.recipe if kind == "recipe" else shipped.ds_config)(text) or path
    return str(path)


def _expanded(text: str) -> str:
    template = Template(text)
    if not template.is_valid():
        raise ValueError(
            "in which a $ stands before no variable's name: write $$ for the sign itself"
        )
    for name in template.get_identifiers():
        if not os.environ.get(name):  # an empty one would make another path of $DATA/rows.jsonl
            state = "empty" if name in os.environ else "not set"
            raise ValueError(
                f"but the variable {name} is {state}: set it, or write the path itself"
            )
    text = template.substitute(os.environ)
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        home = text.partition("/")[0]
        raise ValueError(
            f"but {home} is nobody's home folder here: write the path itself, or ./{text}"
        ) from None


def _joined(folder: Path, text: str) -> Path:
    path = folder / text
    return Path(os.path.realpath(path)) if ".." in path.parts else path
