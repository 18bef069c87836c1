"""Rows of a source as conversations: what is asked, what is answered, in an order that depends on the rows alone.

    rows = ordered_rows("data.task", recipe.data.task, seed=0)

Every mistake of the user is a ValueError that names the recipe's field.
"""

from __future__ import annotations

import hashlib
import json
import re
from numbers import Number
from typing import Any

from pipeline.data.malformed import Bad, Place, Skipped, named
from pipeline.data.messages import Message, parse_messages, parse_tools
from pipeline.data.shapes import as_conversation
from pipeline.data.sources import FIELDS, Found, read_source
from pipeline.recipe.redaction import redact
from pipeline.recipe.sections import DataSection, SourceSection

Row = dict[str, Any]
NO_PROMPT, NO_RESPONSE = "no prompt", "no response"
# What exports of databases, spreadsheets and pandas write where there is no value.
_NOTHING = frozenset(
    ("NULL", "null", "\\N", "NaN", "nan", "<NA>", "#N/A", "N/A", "None", "NaT", "undefined")
)


def ordered_rows(
    field: str,
    source: SourceSection,
    seed: int,
    required: tuple[str, ...] = ("prompt",),
    pairs: bool = False,
    skipped: Skipped | None = None,
) -> list[Row]:
    """Rows: messages (up to the answer), prompt, response (pairs: chosen, rejected), ordered by a hash with the seed.

    row: where the row stands in its source. Malformed rows (without a prompt, without a response where it is required,
    with values that are no text) are left out, and kept in `skipped`. Raises ValueError naming the field where their
    share is above the source's max_bad_rows, and where there is no row with a prompt.
    """
    skipped = skipped or Skipped()
    found = read_source(source, field, required, ("messages", "chosen") if pairs else ("messages",))
    placed, bad = made_rows(field, found, required, pairs)
    if not placed and all(item.reason == NO_PROMPT for item in bad):
        raise ValueError(
            f"{field}: {source.source} holds no row with a prompt: check {field}.columns"
        )
    if source.reasoning == "drop":
        skipped.thoughts[field] = sum(_without_reasoning(row) for _, row in placed)
    skipped.leave_out(field, source, bad, len(placed) + len(bad))
    said = [f"{field}: {sentence}" for sentence in doubts(found, placed)]
    skipped.note(field, _unmapped(field, source, found) + said)

    def drawn(item: tuple[Place, Row]) -> tuple[bytes, str]:
        _, row = item
        # All turns: conversations that end alike would come in one block, and most of it fall into one split.
        turns = [
            message["content"] or "" for message in row["messages"] if message["role"] != "system"
        ]
        said = "\0".join([str(seed), *turns, row["response"]])
        # a prompt's pairs or systems are placed alike
        return hashlib.sha256(said.encode()).digest(), json.dumps(row)

    return [{**row, "row": place} for place, row in sorted(placed, key=drawn)[: source.limit]]


def _unmapped(field: str, source: SourceSection, found: Found) -> list[str]:
    """What is to be said of a source's columns that no field takes."""
    if source.source.startswith("builtin:"):
        return []
    parts = ", ".join(found.unmapped)
    rest = ", ".join(column for column in found.unused if column not in found.unmapped)
    where = redact(source.source)
    said = (
        [f"{field}: {field}.columns leaves out what may be part of a prompt in {where}: {parts}"]
        if parts
        else []
    )
    return said + ([f"{field}: columns of {where} that are not used: {rest}"] if rest else [])


def doubts(found: Found, placed: list[tuple[Place, Row]]) -> list[str]:
    """Sentences on what may not be meant as it is read, and may well be: its rows stay."""
    return _of_several_lines(found) + _of_nothing(placed) + _of_nobody(found)


def _of_nobody(found: Found) -> list[str]:
    if not found.unwanted:
        return []
    return [
        f"label is false in {len(found.unwanted)} rows ({named(found.unwanted)}), and their answers are trained as the "
        "others: leave the rows out if it says that nobody wants them"
    ]


def _of_several_lines(found: Found) -> list[str]:
    places = sorted(found.doubtful, key=lambda place: (place.part, place.number))
    if not places:
        return []
    return [
        f"a field in quotes holds lines that look like rows in {len(places)} rows "
        f"({named(places)}): see whether a quote closes too late there"
    ]


def _of_nothing(placed: list[tuple[Place, Row]]) -> list[str]:
    """Answers that databases and spreadsheets write where there is none."""
    found: dict[str, list[Place]] = {}
    for place, row in placed:
        for name in ("response", "chosen", "rejected"):
            text = (row.get(name) or "").strip()
            if text in _NOTHING:
                found.setdefault(text, []).append(place)
    return [
        f"'{text}' is the whole answer of {len(places)} rows ({named(places)}), and is trained as any other: "
        "leave the rows out if it stands for nothing"
        for text, places in found.items()
    ]


def task_rows(data: DataSection, skipped: Skipped | None = None) -> list[Row]:
    """Rows of the task, all of which have a response, ordered as `ordered_rows`."""
    return ordered_rows("data.task", data.task, data.seed, ("prompt", "response"), skipped=skipped)


def made_rows(
    field: str, found: Found, required: tuple[str, ...], pairs: bool = False
) -> tuple[list[tuple[Place, Row]], list[Bad]]:
    """Rows as `ordered_rows` makes them, in the order and with the places of the source, and all malformed ones."""
    rows, bad = [], list(found.bad)
    for place, raw in found.rows:
        row, problem = _made(raw, field, place, pairs, "response" in required)
        if problem is None:
            rows.append((place, row))
        else:
            bad.append(problem)
    return rows, bad


def _made(
    raw: Row, field: str, place: Place, pairs: bool, answered: bool
) -> tuple[Row, Bad | None]:
    """A row, or what is wrong with it. answered: whether it must have a response."""
    try:
        raw = as_conversation(raw)
        row = (_pair if pairs else _row)(raw, field)
    except ValueError as error:
        said = str(error).removeprefix(f"{field}: ")
        name = re.split(r"\W", said, maxsplit=1)[0]
        return {}, Bad(place, f"unusable {name if name in FIELDS else 'value'}", said)
    if row is None:
        return {}, Bad(place, NO_PROMPT, NO_PROMPT)
    if answered and not row["response"].strip():
        said = "the conversation ends without an answer" if raw.get("messages") else NO_RESPONSE
        return {}, Bad(place, NO_RESPONSE, said)
    return row, None


def _without_reasoning(row: Row) -> bool:
    """Whether the row had reasoning, which is now gone."""
    messages = [*row["messages"], row.get("answer") or {}]
    return any([message.pop("reasoning_content", None) is not None for message in messages])


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """The tools that a row of a prepared set may call."""
    return json.loads(row["tools"]) if row.get("tools") else None


def _row(raw: Row, field: str) -> Row | None:
    """messages up to the last answer, the last user turn as prompt, the last answer as response ('' for none).

    answer: the last answer as a message, where it is more than text. tools: what the conversation may call, where there
    are any. None without a prompt. Raises ValueError naming the field for values that are no text.
    """
    answer: Message = {}
    if raw.get("messages"):
        messages, response = parse_messages(raw["messages"], f"{field}: messages"), ""
        _check_beside(raw, messages, field)
        if messages and messages[-1]["role"] != "assistant" and raw.get("response"):
            messages.append(
                {"role": "assistant", "content": _text(raw["response"], f"{field}: response")}
            )
        if messages and messages[-1]["role"] == "assistant":
            answer = messages.pop()
            response = answer["content"] or json.dumps(
                [call["function"] for call in answer["tool_calls"]]
            )
    else:
        texts = {
            name: _text(raw.get(name), f"{field}: {name}")
            for name in ("prompt", "input", "system", "response")
        }
        prompt = "\n\n".join(text for text in (texts["prompt"], texts["input"]) if text.strip())
        messages = (
            [{"role": "system", "content": texts["system"]}] if texts["system"].strip() else []
        )
        messages, response = [*messages, {"role": "user", "content": prompt}], texts["response"]
    last = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    if not last.strip():
        return None
    row = {"messages": messages, "prompt": last, "response": response if response.strip() else ""}
    if answer.keys() - {"role", "content"}:
        row["answer"] = answer
    if raw.get("tools"):
        row["tools"] = parse_tools(raw["tools"], f"{field}: tools")
    if "harmful" in raw:
        row["harmful"] = _truth(raw["harmful"], f"{field}: harmful")
    return row


def _check_beside(raw: Row, messages: list[Message], field: str) -> None:
    """ValueError where a text beside a conversation says what the conversation does not."""
    said = [" ".join((message["content"] or "").split()) for message in messages]
    for name in ("prompt", "input", "response"):
        text = " ".join(_text(raw.get(name), f"{field}: {name}").split())
        answers = name == "response" and messages and messages[-1]["role"] != "assistant"
        if text and not answers and not any(text in content for content in said):
            raise ValueError(
                f"{field}: {name} stands beside a conversation that does not hold it: "
                f"name the columns to use in {field}.columns"
            )


def _pair(raw: Row, field: str) -> Row | None:
    """A `_row` with chosen and rejected: texts ('' for none), or lists of messages whose last
    assistant's turns they are.

    What both lists share is the prompt. Both are None where the lists part before those turns: they do not answer the
    same.
    """
    answers, prompts = {}, []
    for side in ("chosen", "rejected"):
        value, where = raw.get(side), f"{field}: {side}"
        if isinstance(value, list) and value:
            messages = parse_messages(value, where)
            if all(message["role"] != "assistant" for message in messages):
                raise ValueError(
                    f"{where} is a list of messages without an assistant's turn: map another "
                    f"column with {field}.columns"
                )
            answer = messages.pop()
            if answer["role"] != "assistant":
                raise ValueError(
                    f"{where} ends with a turn of the {answer['role']}: end it with the answer"
                )
            more = next(
                (key for key in ("tool_calls", "reasoning_content", "train") if key in answer), None
            )
            if more is not None:
                raise ValueError(
                    f"{where} ends with a message that has {more}, and pairs are of texts: leave it out"
                )
            answers[side] = answer["content"]
            prompts.append(messages)
        else:
            text = _text(None if value == [] else value, where)
            answers[side] = text if text.strip() else ""
    if any(prompt != prompts[0] for prompt in prompts):
        answers = {"chosen": None, "rejected": None}
    # Answers alone leave the prompt to its own column.
    if prompts and any(message["role"] == "user" for message in prompts[0]):
        raw = {**raw, "messages": prompts[0]}
    row = _row(raw, field)
    return row and row | answers


def _truth(value: Any, where: str) -> bool | None:
    """True, false, or None where nothing is said. ValueError names the field for anything else."""
    known = {
        "": None,
        "true": True,
        "1": True,
        "1.0": True,
        "false": False,
        "0": False,
        "0.0": False,
    }
    text = "" if value is None else str(value).strip().lower()
    if text not in known:
        raise ValueError(
            f"{where} holds {redact(str(value))[:40]!r}: "
            "it takes true, false, 1, 0 or nothing, whether the sample is harmful"
        )
    return known[text]


def _text(value: Any, where: str) -> str:
    """Text and numbers as text, nothing as ''. ValueError names the field for anything else."""
    if value is None or isinstance(value, str | Number):
        return "" if value is None else str(value)
    hint = (
        "map a list of messages to messages, and texts"
        if isinstance(value, list)
        else "map a column of texts"
    )
    columns = f"{where.split(':')[0]}.columns"
    raise ValueError(
        f"{where} holds a {type(value).__name__}, which is not text: {hint} with {columns}"
    )
