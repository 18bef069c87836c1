"""Data sources: hub data sets and local files, read into rows of known fields.

    rows = read_source(SourceSection(source="data.jsonl", columns={"prompt": "question", "response": "answer"}), "data.task", ("prompt", "response"))

Formats: .jsonl, .json (an array, an object holding one, or several objects one after another), .csv, .parquet, .arrow.
Every mistake of the user is a ValueError that names the recipe's field.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.data import builtin
from pipeline.sections import SourceSection

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
FIELDS = ("messages", "tools", "prompt", "input", "response", "system", "chosen", "rejected", "harmful")

# Columns of data sets met in the wild, tried in this order where the recipe maps nothing.
_ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "tools": ("tools",),
    "prompt": ("prompt", "instruction", "question", "harmful_input", "goal", "query", "text"),
    "input": ("input", "context"),
    "response": ("response", "output", "answer", "completion", "target"),
    "system": ("system",),
    "chosen": ("chosen", "safe_response", "llama3_output"),
    "rejected": ("rejected", "unsafe_response"),
}


def check_hub_id(text: str, field: str) -> None:
    """ValueError where a hub id is also a path from the working directory: the hub's libraries would read that."""
    if os.path.exists(text):
        raise ValueError(
            f"{field} '{text}' is a hub id, but {Path(text).absolute()} exists and would be read instead: "
            "run from another folder, or give the absolute path of what you mean"
        )


def check_source(source: SourceSection, field: str) -> None:
    """What can be said without reading the rows. Raises ValueError."""
    if source.source.startswith("builtin:"):
        try:
            builtin.check_builtin(source.source.removeprefix("builtin:"))
        except ValueError as error:
            raise ValueError(f"{field}.source: {error}") from None
        return
    path = Path(source.source).expanduser()
    looks_local = path.suffix in SUFFIXES or path.is_absolute() or source.source.startswith((".", "~"))
    if not looks_local:
        check_hub_id(source.source, f"{field}.source")
    else:
        if not path.is_file():
            problem = "is no regular file" if path.exists() else "does not exist"
            raise ValueError(f"{field}.source {source.source} {problem}: give a {', '.join(SUFFIXES)} file, a hub id or builtin:NAME")
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"{field}.source {source.source} has the unknown ending '{path.suffix}': it must be one of {', '.join(SUFFIXES)}"
            )
    unknown = sorted(set(source.columns) - set(FIELDS))
    if unknown:
        raise ValueError(
            f"{field}.columns maps to '{unknown[0]}', which is no field: map {', '.join(FIELDS)}, e.g. {{prompt: instruction, response: output}}"
        )
    if looks_local:
        columns = _columns(_read_file(path, source, field, limit=50))
        _mapping(source, field, columns, ())


def read_source(source: SourceSection, field: str, required: Iterable[str], stand_in: Iterable[str] = ("messages",)) -> list[Row]:
    """All rows, with the fields of FIELDS that the mapping yields (text values; messages as a list).

    required: fields that must be there, unless one of `stand_in` is, which may hold them. ValueError names the columns there are.
    """
    if source.source.startswith("builtin:"):
        raw = builtin.builtin_rows(source.source.removeprefix("builtin:"))
    elif Path(source.source).expanduser().suffix in SUFFIXES:
        raw = _read_file(Path(source.source).expanduser(), source, field)
    else:
        raw = _read_hub(source, field)
    mapping = _mapping(source, field, _columns(raw), required, stand_in)
    return [{name: row.get(column) for name, column in mapping.items()} for row in raw]


def _mapping(
    source: SourceSection, field: str, columns: list[str], required: Iterable[str], stand_in: Iterable[str] = ()
) -> dict[str, str]:
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|") and source.source.endswith(".csv"):
        raise ValueError(f"{field}.source {source.source} has the one column '{columns[0]}': separate its fields with commas")
    for name, column in source.columns.items():
        if column not in columns:
            raise ValueError(
                f"{field}.columns maps {name} to '{column}', which {source.source} does not have: its columns are {', '.join(columns)}"
            )
    mapping = dict(source.columns)
    if not mapping:
        mapping = {
            name: next(alias for alias in aliases if alias in columns)
            for name, aliases in _ALIASES.items()
            if any(a in columns for a in aliases)
        }
    missing = [name for name in required if name not in mapping]
    if missing and not any(name in mapping for name in stand_in):
        raise ValueError(
            f"{field}: no column of {source.source} is known to hold the {missing[0]}: map it with {field}.columns, e.g. {{{missing[0]}: {columns[0] if columns else 'NAME'}}}; its columns are {', '.join(columns)}"
        )
    return mapping


def _columns(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(str(key) for row in rows[:50] for key in row))


def _read_hub(source: SourceSection, field: str) -> list[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(source.source, source.subset, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError) as error:  # the hub's, the cache's and the library's own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{field}.source '{source.source}' (split {source.split}) cannot be had: check id, subset, split and network, or give a local file ({first})"
        ) from None
    return loaded.to_list()


def _read_file(path: Path, source: SourceSection, field: str, limit: int | None = None) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"{field}.source {path} does not exist: give a {', '.join(SUFFIXES)} file, a hub id or builtin:NAME")
    try:
        rows = _read_rows(path, source)
    except NotReadable as error:
        raise ValueError(f"{field}.source {path} {error}") from None
    except (ValueError, RecursionError, csv.Error) as error:  # UnicodeDecodeError and Arrow's own are ValueErrors
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{field}.source {path} cannot be read as a {path.suffix} file ({first}): save it again, text as UTF-8") from None
    other = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if other:
        raise ValueError(f"{field}.source {path} must hold objects with named values, but row {other} is a {type(rows[other - 1]).__name__}")
    if not rows:
        raise ValueError(f"{field}.source {path} holds no rows")
    return rows[:limit]


def _read_rows(path: Path, source: SourceSection) -> list[Any]:
    if path.suffix == ".csv":
        return _read_csv(path, source.header)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".arrow":
        import datasets

        return datasets.Dataset.from_file(str(path)).to_list()
    return _read_json(path, lines=path.suffix == ".jsonl")


def _read_csv(path: Path, header: bool) -> list[Row]:
    csv.field_size_limit(sys.maxsize)  # Python's own limit is 131,072 characters, less than a long document
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, strict=True)  # a quote that never closes would take in the rest of the file
        names, rows = None, []
        for values in reader:
            if not values:  # a blank line
                continue
            if names is None:
                names = values if header else [str(number) for number in range(len(values))]
                if len(set(names)) < len(names):
                    raise NotReadable(f"names the column '{next(name for name in names if names.count(name) > 1)}' twice: give each a name of its own")
                if header:
                    continue
            if len(values) > len(names):
                raise NotReadable(
                    f"has {len(values)} fields in the row that ends in line {reader.line_num}, and {len(names)} columns: put a field that holds commas in quotes"
                )
            rows.append(dict(zip(names, [*values, *[None] * (len(names) - len(values))], strict=True)))
    return rows


class NotReadable(ValueError):
    """What is wrong with a file, and where."""


def _read_json(path: Path, lines: bool) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    decoder, position, values = json.JSONDecoder(), 0, []
    while (position := _skip_space(text, position)) < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            hint = "the file seems cut short" if error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg else "check the file"
            raise NotReadable(f"is no valid JSON at line {error.lineno}, column {error.colno} ({error.msg}): {hint}") from None
        values.append(value)
    if lines or len(values) != 1:
        return values
    only = values[0]
    if isinstance(only, list):
        return only
    lists = [value for value in only.values() if isinstance(value, list)] if isinstance(only, dict) else []
    return lists[0] if len(lists) == 1 else [only]


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n,":
        position += 1
    return position
