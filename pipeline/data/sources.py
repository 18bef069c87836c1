"""Data sources: hub data sets, local files and built-in data, read into rows of known fields.

    source = SourceSection(source="data.jsonl", columns={"prompt": "question", "response": "answer"})
    found = read_source(source, "data.task", ("prompt", "response"))
    found.rows     # [(Place(1, "line"), {"prompt": "a", "response": "b"}), ...]
    found.bad      # malformed rows, with the reason

How files are read is files.py's. Every mistake of the user is a ValueError that names the recipe's field.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from pipeline.data import builtin, files
from pipeline.data.malformed import Bad, Place, refusal
from pipeline.data.text_rows import NotReadable
from pipeline.recipe.file_endings import ENDINGS, suffix
from pipeline.recipe.sections import SourceSection
from pipeline.system.system_errors import passes

Row = dict[str, Any]
FIELDS = (
    "messages",
    "tools",
    "prompt",
    "input",
    "response",
    "system",
    "history",
    "chosen",
    "rejected",
    "harmful",
)
_PARTS = ("tools", "input", "system", "history")  # what belongs to a prompt where a data set has it
_TEXTS = ("prompt", "input", "response", "system", "chosen", "rejected")

# Columns of data sets met in the wild, tried in this order where the recipe maps nothing.
_ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "tools": ("tools",),
    "prompt": ("prompt", "instruction", "question", "harmful_input", "goal", "query", "text"),
    "input": ("input", "context"),
    "response": ("response", "output", "answer", "completion", "target"),
    "system": ("system",),
    "history": ("history",),
    "chosen": ("chosen", "safe_response", "llama3_output"),
    "rejected": ("rejected", "unsafe_response"),
}


@dataclass(frozen=True)
class Found:
    """A source's rows: each with its place, and the values of the fields that are mapped (messages as they stand).

    bad: rows that are malformed as far as can be seen here. unmapped: columns that would be part of a prompt by their
    name, and that the recipe's own mapping leaves out. unused: all columns that are not mapped.
    doubtful: places of rows that may be several. unwanted: places of answers that a column calls unwanted.
    """

    rows: list[tuple[Place, Row]]
    bad: list[Bad]
    unmapped: list[str]
    unused: list[str]
    doubtful: list[Place]
    unwanted: list[Place]


def check_hub_id(text: str, field: str) -> None:
    """ValueError where a hub id is also a path from the working directory: the hub's libraries would read that."""
    if os.path.exists(text):
        raise ValueError(
            f"{field} '{text}' is a hub id, but {Path(text).absolute()} exists and would be read instead: "
            "run from another folder, or give the absolute path of what you mean"
        )


def local_path(source: SourceSection) -> Path | None:
    """The file or folder that a source names, whether or not it is there; None for built-in data and the hub's."""
    if source.source.startswith("builtin:"):
        return None
    path = Path(source.source).expanduser()
    local = path.is_absolute() or source.source.startswith((".", "~")) or suffix(path)
    return path if local else None


def check_source(source: SourceSection, field: str) -> None:
    """What can be said without reading the rows. Raises ValueError."""
    if source.source.startswith("builtin:"):
        try:
            builtin.check_builtin(source.source.removeprefix("builtin:"))
        except ValueError as error:
            raise ValueError(f"{field}.source: {error}") from None
        return
    path = local_path(source)
    if path is None:
        check_hub_id(source.source, f"{field}.source")
    else:
        _check_path(path, source, field)
    unknown = sorted(set(source.columns) - set(FIELDS))
    if unknown:
        raise ValueError(
            f"{field}.columns maps to '{unknown[0]}', which is not a field: map {', '.join(FIELDS)}, "
            "such as {prompt: instruction, response: output}"
        )


def _check_path(path: Path, source: SourceSection, field: str) -> None:
    where = f"{field}.source {source.source}"
    if path.is_dir():
        try:
            found = files.parts(path, source.split)
        except NotReadable as error:
            raise ValueError(f"{where} {error}") from None
        if not found:
            raise ValueError(f"{where} holds no rows")
        return
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise ValueError(
            f"{where} {problem}: give a {ENDINGS}, a folder of such files, a hub id or builtin:NAME"
        )
    if not suffix(path):
        raise ValueError(
            f"{where} has the unknown ending '{path.suffix}': it must be one of {ENDINGS}"
        )


def read_source(
    source: SourceSection,
    field: str,
    required: Iterable[str],
    stand_in: Iterable[str] = ("messages",),
) -> Found:
    """All rows, with the fields of FIELDS that the mapping yields, and the malformed ones.

    required: fields that must be mapped, unless one of `stand_in` is, which may hold them. ValueError names the columns
    there are.
    """
    table = read_table(source, field)
    if not table.rows and table.bad:
        raise ValueError(refusal(field, source, table.bad, len(table.bad)))
    mapping = _mapping(source, field, table.columns, required, stand_in)
    if not source.columns:
        _check_unwanted(table, mapping, source, field)
    return mapped(table, mapping)


def _check_unwanted(
    table: files.Table, mapping: dict[str, str], source: SourceSection, field: str
) -> None:
    """ValueError where a column says of some answers that nobody wants them, as KTO's data do."""
    unwanted = _unwanted(table, mapping)
    if unwanted:
        raise ValueError(
            f"{field}: {source.source} says of {len(unwanted)} of its {len(table.rows)} answers that nobody wants them "
            f"(label is false, first in {unwanted[0]}), and they would be trained as the others: leave their "
            f"rows out, or say with {field}.columns what to use"
        )


def _unwanted(table: files.Table, mapping: dict[str, str]) -> list[Place]:
    label = next((column for column in table.columns if _folded(column) == "label"), None)
    if label is None or "response" not in mapping or label in mapping.values():
        return []
    return [place for place, row in table.rows if row.get(label) is False]


def mapped(table: files.Table, mapping: dict[str, str]) -> Found:
    """The table's rows by field, without those whose values no text can be made of. mapping: field -> column."""
    known = known_columns(table.columns)
    parts = [known[name] for name in _PARTS if name in known and name not in mapping]
    unused = [column for column in table.columns if column not in mapping.values()]
    unmapped = [column for column in parts if column in unused]
    found = Found([], list(table.bad), unmapped, unused, table.doubtful, _unwanted(table, mapping))
    for place, raw in table.rows:
        problem = _value_problem(mapping, raw, place)
        if problem is None:
            values = {name: _value(table, name, column, raw) for name, column in mapping.items()}
            found.rows.append((place, values))
        else:
            found.bad.append(problem)
    return found


def _value(table: files.Table, name: str, column: str, row: Row) -> Any:
    """A row's value for a field: a class by its name where a text is wanted, else as it stands."""
    value = row.get(column)
    if name not in _TEXTS or type(value) is not int:
        return value
    names = table.labels.get(column, [])
    return names[value] if 0 <= value < len(names) else value


def read_table(source: SourceSection, field: str) -> files.Table:
    """All rows as the source has them, by column. ValueError where it cannot be read, or holds none."""
    path = local_path(source)
    if path is None:
        if not source.source.startswith("builtin:"):
            return _read_hub(source, field)
        raw = builtin.builtin_rows(source.source.removeprefix("builtin:"))
        rows = [(Place(number), row) for number, row in enumerate(raw, 1)]
        return files.Table("built-in data", files.columns_of(rows), rows)
    _check_path(path, source, field)
    try:
        table = files.read(path, source.header, source.split)
    except NotReadable as error:
        raise ValueError(f"{field}.source {source.source} {error}") from None
    if not table.rows and not table.bad:
        raise ValueError(f"{field}.source {source.source} holds no rows")
    return table


def _mapping(
    source: SourceSection,
    field: str,
    columns: list[str],
    required: Iterable[str],
    stand_in: Iterable[str] = (),
) -> dict[str, str]:
    listed = ", ".join(columns)
    for name, column in source.columns.items():
        if column not in columns:
            near = difflib.get_close_matches(_folded(column), map(_folded, columns), 1, 0.75)
            meant = next(
                (
                    f" (perhaps '{other}')"
                    for other in columns
                    if near and _folded(other) == near[0]
                ),
                "",
            )
            raise ValueError(
                f"{field}.columns maps {name} to '{column}', which {source.source} does not have{meant}: "
                f"its columns are {listed}"
            )
    mapping = dict(source.columns) or known_columns(columns)
    missing = [name for name in required if name not in mapping]
    if missing and not any(name in mapping for name in stand_in):
        if missing[0] == "response" and not source.columns and _folded(mapping["prompt"]) == "text":
            raise ValueError(
                f"{field}: {source.source} holds texts (column '{mapping['prompt']}') and no responses to them: "
                "give prompts with responses, or messages"
            )
        free = next((column for column in columns if column not in mapping.values()), "NAME")
        example = f"{{{missing[0]}: {free}}}"
        raise ValueError(
            f"{field}: no column of {source.source} is known to hold the {missing[0]}: "
            f"map it with {field}.columns, such as {example}; its columns are {listed}"
        )
    return mapping


def known_columns(columns: list[str]) -> dict[str, str]:
    """Field -> column, by the names that data sets have; letter case and spaces at the ends do not count."""
    found = {}
    for name, aliases in _ALIASES.items():
        exact = [alias for alias in aliases if alias in columns]
        alike = [column for alias in aliases for column in columns if _folded(column) == alias]
        if exact or alike:
            found[name] = (exact or alike)[0]
    return found


def _folded(column: str) -> str:
    return column.strip().lower()


def _value_problem(mapping: dict[str, str], row: Row, place: Place) -> Bad | None:
    """What is wrong with the values of a row that are used, whatever the format."""
    for name, column in mapping.items():
        value = row.get(column)
        if isinstance(value, bool) and name in _TEXTS:
            said = f"'{column}' is {str(value).lower()}, which is not text: write the text that is meant"
            return Bad(place, f"no text as {name}", said)
        try:
            what = _unusable(value)
        except RecursionError:
            what = "nesting", "is nested too deeply: give lists of messages, or texts"
        if what:
            return Bad(place, f"{what[0]} in {name}", f"'{column}' {what[1]}")
    return None


def _unusable(value: Any) -> tuple[str, str] | None:
    """A reason and its sentence for a value, or one inside of it, that no text can be made of."""
    if isinstance(value, str):
        if "\0" in value:
            return "NUL", "holds a NUL character: leave it out"
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                code = f"\\u{ord(value[error.start]):04x}"
                return (
                    "half a character",
                    f"holds {code}, half of a character (a lone surrogate): write it whole",
                )
        return None
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        what = "NaN" if math.isnan(value) else "Infinity"
        return what, f"is {what}, which is not text: write what is meant, or leave the row out"
    inner = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    )
    return next((found for found in map(_unusable, inner) if found), None)


def _read_hub(source: SourceSection, field: str) -> files.Table:
    import datasets

    try:
        loaded = datasets.load_dataset(
            source.source, source.subset, split=source.split, revision=source.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # hub, cache, library
        if found := passes(error):
            raise found from None
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{field}.source '{source.source}' (split {source.split}) could not be loaded: check id, subset, split and "
            f"network, or give a local file ({first})"
        ) from None
    rows = [
        (Place(number), files.without_fillers(row))
        for number, row in enumerate(loaded.to_list(), 1)
    ]
    classes = {
        name: kind.names
        for name, kind in loaded.features.items()
        if isinstance(kind, datasets.ClassLabel)
    }
    return files.Table("data set of the hub", loaded.column_names, rows, labels=classes)
