"""`sap data FILE`: what a data file holds, and how a recipe would read it.

    sap data tickets.csv
    sap data tickets.csv --columns '{prompt: question, response: reply}' --model meta-llama/Llama-3.1-8B-Instruct

Prints format, columns, the mapping to paste into a recipe, lengths, duplicates, and which rows are malformed. Reads
every row, writes nothing. It takes what `source` of a recipe takes: files, folders, builtin:NAME and ids of the hub.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.data import builtin
from pipeline.data.malformed import Bad, by_reason, share_above
from pipeline.data.rows import doubts, made_rows
from pipeline.data.sources import check_source, known_columns, mapped, read_source, read_table
from pipeline.recipe.file_endings import suffix
from pipeline.recipe.redaction import redact
from pipeline.recipe.sections import DataSection, ModelSection, SourceSection
from pipeline.system.system_errors import reading_input

Row = dict[str, Any]
Count = Callable[[list[str]], list[int]]  # lengths of texts
_TOKENISED = 1000  # texts at a time
_SECONDS = 5  # between two lines of progress
# names of columns
_NO_TEXT = re.compile(
    r"(?:.*[_\W])?(?:id|uuid|guid|hash|url|uri|date|time|timestamp|lang|language|category|topic|tags?"
    r"|status|priority|agent|author|username|name|email|channel|team)",
    re.I,
)
# Usual ones for answers that a recipe does not read unless they are mapped. If it did, prepared folders that are there
# would stand for other rows.
_ANSWERS = ("reply", "solution", "assistant_response", "response_text", "assistant", "resolution")
# What harmful data sets call their prompts, and AdvBench its affirmative openings.
_HARMFUL, _GOAL, _OPENING = re.compile(r"harmful.*|.*[_\W]harmful", re.I), "goal", "target"
_KINDS = {
    "str": "text",
    "bool": "true or false",
    "int": "number",
    "float": "number",
    "dict": "object",
}
# Stands for a field that nothing tells. Fields that take prompts alone:
_ANY = "a recipe's field"
_OF_PROMPTS = (
    "data.safety",
    "data.harmful",
    "data.refusals",
    "data.harmless",
    "data.validation_prompts",
    "evaluate.harmful",
    "evaluate.harmless",
    "evaluate.ordinary",
)
_HINT = "--columns '{prompt: COLUMN, response: COLUMN}'"


def command(argv: Sequence[str]) -> int:
    """`sap data`: prints the description. ValueError, one sentence, for what cannot be read.

    Returns the exit code: 2 where every row is malformed.
    """
    parser = argparse.ArgumentParser(
        prog="sap data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "file", help="a file or folder of data, builtin:NAME, or a data set id of the hub"
    )
    parser.add_argument(
        "--model",
        help="model whose tokenizer counts lengths; default: the built-in one where it is cached",
    )
    parser.add_argument(
        "--columns",
        default="{}",
        help="mapping as in a recipe, e.g. '{prompt: question, response: reply}'",
    )
    parser.add_argument(
        "--no-header",
        action="store_true",
        help="the first line of a CSV or TSV file names no columns",
    )
    parser.add_argument(
        "--split", default="train", help="split of a hub data set or of a folder that holds several"
    )
    parser.add_argument("--subset", help="configuration name of a hub data set")
    parser.add_argument("--revision", help="branch, tag or commit of a hub data set")
    options = parser.parse_args(argv)
    source = SourceSection(
        source=_located(options.file), columns=_columns(options.columns), header=not options.no_header,
        split=options.split, subset=options.subset, revision=options.revision,
    )  # fmt: skip
    with reading_input():
        count, unit = _measure(options.model)
        text, usable = describe(source, count, unit)
        print(redact(text))
    return 0 if usable else 2


def _located(text: str) -> str:
    """A path as an absolute one, like a recipe's; what is neither there nor looks like a path is an id of the hub."""
    path = Path(text).expanduser()
    local = os.path.exists(path) or text.startswith((".", "~", "/")) or suffix(text)
    return str(path.absolute()) if local and not text.startswith("builtin:") else text


def _columns(text: str) -> dict[str, str]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"--columns is '{text}': give a mapping such as '{{prompt: question, response: reply}}'"
        )
    return {str(name): str(column) for name, column in found.items()}


def _measure(model: str | None) -> tuple[Count, str]:
    """What counts a text's length, and the unit in words."""
    if model is None and not (builtin.builtin_model_folder() / "tokenizer.json").is_file():
        return lambda texts: [len(text) for text in texts], "characters (give --model for tokens)"
    from pipeline.model.model_files import BUILTIN
    from pipeline.model.models import load_tokenizer

    name = model or BUILTIN
    tokenizer = load_tokenizer(
        ModelSection(path=str(Path(name).absolute()) if Path(name).is_dir() else name)
    )
    unit = f"tokens of {name}, without the chat template's own"

    def count(texts: list[str]) -> list[int]:
        lengths: list[int] = []
        last = time.monotonic()
        for start in range(0, len(texts), _TOKENISED):  # all at once would take gigabytes
            if time.monotonic() - last > _SECONDS:
                last = time.monotonic()
                print(
                    f"[data] lengths of {start:,} of {len(texts):,} texts",
                    file=sys.stderr,
                    flush=True,
                )
            found = tokenizer(texts[start : start + _TOKENISED], add_special_tokens=False)[
                "input_ids"
            ]
            lengths += [len(ids) for ids in found]
        return lengths

    return count, unit


def describe(source: SourceSection, count: Count, unit: str) -> tuple[str, bool]:
    """The lines, and whether any row may be used. count: lengths of texts, in `unit`.

    Raises ValueError where the source cannot be read.
    """
    check_source(source, "data.task")
    table = read_table(source, "data.task")
    total = len(table.rows) + len(table.bad)
    values = {name: [row.get(name) for _, row in table.rows] for name in table.columns}
    lines = [f"source      {source.source}", f"format      {table.format}", f"rows        {total}"]
    lines += _named("columns", [_column(name, found) for name, found in values.items()])
    if source.columns and table.rows:
        read_source(source, "data.task", ())  # ValueError where a column is not there
    name = source.source.removeprefix("builtin:")
    known = builtin.FIELDS.get(name) if name != source.source else None
    if source.columns:
        mapping, remark = dict(source.columns), ""
    else:
        mapping, remark = (known_columns(table.columns), "") if known else _proposed(values)
    field, also = known or _field(mapping)
    if field is None or not table.rows:
        lines.append(
            f"mapping     {remark or f'none: nothing is mapped to a prompt, so add it, as in {_HINT}'}"
        )
        return "\n".join([*lines, *_dropped(table.bad, total, "data.task")]), bool(table.rows)
    required = ("prompt", "response") if field == "data.task" else ("prompt",)
    found = mapped(table, mapping)
    placed, bad = made_rows(field, found, required, pairs=field == "data.safety")
    rows = [row for _, row in placed]
    if field == _ANY:
        lines += _named("mapping", _prompts_alone(source, mapping, remark))
    else:
        lines += ["mapping     to paste into a recipe:", *_yaml(source, field, mapping)]
        lines += [f"            ({said})" for said in (remark, also) if said]
    lines += [f"not used    {', '.join(found.unused)}"] if found.unused else []
    lines += _named("mind", doubts(found, placed))
    lines += _lengths(rows, count, unit) + _duplicates(rows)
    return "\n".join([*lines, *_dropped(bad, total, field)]), bool(rows)


def _proposed(values: dict[str, list[Any]]) -> tuple[dict[str, str], str]:
    """A mapping of the columns, and what is to be said of it. values: of each column.

    Names that are known decide. Beside a prompt the only other column of texts is taken for the response, and of two
    columns of texts in all the first for the prompt: that is a guess, and said.
    """
    found = known_columns(list(values))
    texts = [
        name
        for name, of in values.items()
        if name not in found.values() and _all_texts(of) and not _NO_TEXT.fullmatch(name.strip())
    ]
    if not {"messages", "chosen", "rejected", "response"} & found.keys():
        named = [name for usual in _ANSWERS for name in texts if name.strip().lower() == usual]
        if "prompt" in found and (named or len(texts) == 1):
            answer = (named or texts)[0]
            guess = f"'{answer}' as the response is a guess: see whether it is"
            return {**found, "response": answer}, guess
        if "prompt" not in found and len(texts) == 2:
            first, second = reversed(texts) if texts[0] in named else texts
            guess = f"'{first}' as the prompt, '{second}' as the response are guesses: see whether they are"
            return {**found, "prompt": first, "response": second}, guess
        if "prompt" in found and texts:
            return found, f"they may stand in one of the columns {', '.join(texts)}"
    if _field(found)[0] is None:
        return found, f"none: no column is known to hold a prompt, so say which does with {_HINT}"
    return found, ""


def _all_texts(values: list[Any]) -> bool:
    there = [value for value in values if value is not None]
    return bool(there) and all(isinstance(value, str) for value in there)


def _field(mapping: dict[str, str]) -> tuple[str | None, str]:
    """The recipe's field that such columns are for, and what else is to be said of them.

    _ANY where the columns do not say it. Harmful is only what calls itself so: on a guess a recipe would train on
    answers to it, or learn to refuse a product's own prompts.
    """
    prompt, response = (mapping.get(name, "").strip().lower() for name in ("prompt", "response"))
    if {"chosen", "rejected"} & mapping.keys():
        return "data.safety", ""
    if _HARMFUL.fullmatch(prompt) or (prompt == _GOAL and response in ("", _OPENING)):
        alone = "" if response else "prompts alone: "
        return (
            "data.harmful",
            f"{alone}for data.safety, data.refusals and evaluate.harmful as well; "
            f"'{mapping['prompt']}' is what harmful data sets call their prompts",
        )
    if "messages" in mapping or {"prompt", "response"} <= mapping.keys():
        return "data.task", ""
    return (_ANY if "prompt" in mapping else None), ""


def _prompts_alone(source: SourceSection, mapping: dict[str, str], remark: str) -> list[str]:
    """What is said of prompts of which nothing tells the field. remark: of columns that may hold the response."""
    lines = ["prompts alone, and data.task needs responses as well"]
    if remark:
        answered = ", ".join(f"{name}: {column}" for name, column in mapping.items())
        lines = [
            f"{lines[0]}: {remark}",
            f"where one does, say so with --columns '{{{answered}, response: COLUMN}}'",
        ]
    return [
        *lines,
        "paste this below the field that the prompts are for, which is one of",
        ", ".join(_OF_PROMPTS[:5]) + ",",
        ", ".join(_OF_PROMPTS[5:]) + ":",
        *(line.removeprefix(" " * 12) for line in _yaml(source, "data.any", mapping)[2:]),
    ]


def _named(title: str, lines: list[str]) -> list[str]:
    return [f"{title if number == 0 else '':<11} {line}" for number, line in enumerate(lines)]


def _column(name: str, values: list[Any]) -> str:
    there = [value for value in values if value is not None and value != ""]
    kinds = Counter(_KINDS.get(type(value).__name__, type(value).__name__) for value in there)
    said = ", ".join(
        kind if len(kinds) == 1 else f"{kind} {number}" for kind, number in kinds.most_common()
    )
    where = "all" if len(there) == len(values) else f"{len(there)} of {len(values)}"
    return f"{name}: {said}, in {where} rows" if there else f"{name}: nothing in any row"


def _yaml(source: SourceSection, field: str, mapping: dict[str, str]) -> list[str]:
    section, name = field.split(".")
    set_ = {
        key: value
        for key, value in source.model_dump(exclude_defaults=True).items()
        if key not in ("source", "columns")
    }
    content = {"source": source.source.replace("$", "$$"), "columns": mapping} | set_
    text = yaml.safe_dump(
        {section: {name: content}},
        sort_keys=False,
        default_flow_style=None,
        width=1000,
        allow_unicode=True,
    )
    return [f"            {line}" for line in text.splitlines()]


def _lengths(rows: list[Row], count: Count, unit: str) -> list[str]:
    texts: dict[str, list[str]] = {
        "prompts": [
            "\n".join(str(message["content"]) for message in row["messages"]) for row in rows
        ]
    }
    for name in ("response", "chosen", "rejected"):
        texts[f"{name}{'s' if name == 'response' else ''}"] = [
            row[name] for row in rows if row.get(name)
        ]
    lengths = {name: count(found) for name, found in texts.items() if found}
    lines = [f"{name}: {_spread(found)}" for name, found in lengths.items()]
    longest = DataSection.model_fields["max_length"].default
    if rows and unit.startswith("tokens") and len(lengths.get("responses", ())) == len(rows):
        full = sum(one >= longest for one in lengths["prompts"])
        over = sum(
            one + other > longest
            for one, other in zip(lengths["prompts"], lengths["responses"], strict=True)
        )
        limit = f"with data.max_length {longest}, its default"
        lines.append(
            f"{limit}: {over - full} responses would be cut, {full} rows dropped because none of it is left"
        )
    return _named("lengths", [f"in {unit}", *lines]) if lines else []


def _spread(lengths: list[int]) -> str:
    found = sorted(lengths)
    middle, high = found[len(found) // 2], found[min(len(found) - 1, len(found) * 95 // 100)]
    return f"{found[0]} to {found[-1]}, median {middle}, 95% up to {high}"


def _duplicates(rows: list[Row]) -> list[str]:
    """How many rows repeat another one word for word, and how many its conversation up to the answer alone."""
    whole = len({json.dumps(row, sort_keys=True, default=str) for row in rows})
    asked = len({json.dumps(row["messages"], sort_keys=True, default=str) for row in rows})
    return [
        f"duplicates  rows like another one: {len(rows) - whole}, other answers to the same prompt: {whole - asked}"
    ]


def _dropped(bad: list[Bad], total: int, field: str) -> list[str]:
    if not bad:
        return ["malformed   none: every row can be used"]
    lines = [f"{len(bad)} of {total} rows: {field} is refused unless they are mended"]
    if len(bad) < total:
        lines[0] += f", or left out with max_bad_rows: {share_above(len(bad), total):g}"
    for reason in dict.fromkeys(item.reason for item in bad):
        alike = [item for item in bad if item.reason == reason]
        said = "" if alike[0].said == reason else f" ({alike[0].said})"
        lines.append(by_reason(alike) + said)
    return _named("malformed", lines)
