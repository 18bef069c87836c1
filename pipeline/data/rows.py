"""Rows of a source as conversations: what is asked, what is answered, in an order that depends on the rows alone.

    rows = ordered_rows("data.task", recipe.data.task, seed=0)

Every mistake of the user is a ValueError that names the recipe's field.
"""

from __future__ import annotations

import hashlib
import json
from numbers import Number
from typing import Any

from pipeline.data.chat import Messages
from pipeline.data.sources import read_source
from pipeline.redaction import redact
from pipeline.sections import DataSection, SourceSection

Row = dict[str, Any]


def ordered_rows(
    field: str, source: SourceSection, seed: int, required: tuple[str, ...] = ("prompt",), pairs: bool = False
) -> list[Row]:
    """Rows: messages (up to the answer), prompt, response (pairs: chosen, rejected), ordered by a hash with the seed.

    row: the row's number in its source, from 1 on. Raises ValueError naming the field where no row has a prompt.
    """
    make, stand_in = (_pair, ("messages", "chosen")) if pairs else (_row, ("messages",))
    found = (make(raw, field) for raw in read_source(source, field, required, stand_in))
    numbered = [(number, row) for number, row in enumerate(found, 1) if row is not None]
    if not numbered:
        raise ValueError(f"{field}: {source.source} holds no row with a prompt: check {field}.columns")

    def place(item: tuple[int, Row]) -> tuple[bytes, str]:
        _, row = item
        # All turns: conversations that end alike would come in one block, and most of it fall into one split.
        turns = [message["content"] for message in row["messages"] if message["role"] != "system"]
        said = "\0".join([str(seed), *turns, row["response"]])
        return hashlib.sha256(said.encode()).digest(), json.dumps(row)  # a prompt's pairs or systems are placed alike

    return [{**row, "row": number} for number, row in sorted(numbered, key=place)[: source.limit]]


def task_rows(data: DataSection) -> list[Row]:
    """Rows of the task that have a response, ordered as `ordered_rows`."""
    return [row for row in ordered_rows("data.task", data.task, data.seed, ("prompt", "response")) if row["response"]]


def _row(raw: Row, field: str) -> Row | None:
    """messages up to the last answer, the last user turn as prompt, the last answer as response ('' where there is none).

    None without a prompt. Raises ValueError naming the field for values that are no text.
    """
    if raw.get("messages"):
        messages, response = _messages(raw["messages"], f"{field}: messages"), ""
        if messages and messages[-1]["role"] == "assistant":
            response = messages.pop()["content"]
    else:
        texts = {name: _text(raw.get(name), f"{field}: {name}").strip() for name in ("prompt", "input", "system", "response")}
        prompt = "\n\n".join(text for text in (texts["prompt"], texts["input"]) if text)
        messages = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
        messages, response = [*messages, {"role": "user", "content": prompt}], texts["response"]
    last = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    label = {"harmful": _truth(raw["harmful"], f"{field}: harmful")} if "harmful" in raw else {}
    return {"messages": messages, "prompt": last, "response": response, **label} if last.strip() else None


def _pair(raw: Row, field: str) -> Row | None:
    """A `_row` with chosen and rejected: texts ('' where there is none), or lists of messages whose last assistant's turns they are.

    What both lists share is the prompt. Both are None where the lists part before those turns: then the two do not answer the same.
    """
    answers, prompts = {}, []
    for side in ("chosen", "rejected"):
        value, where = raw.get(side), f"{field}: {side}"
        if isinstance(value, list) and value:
            messages = _messages(value, where)
            while messages and messages[-1]["role"] != "assistant":
                messages.pop()
            if not messages:
                raise ValueError(f"{where} is a list of messages without an assistant's turn: map another column with {field}.columns")
            answers[side] = messages.pop()["content"].strip()
            prompts.append(messages)
        else:
            answers[side] = _text(None if value == [] else value, where).strip()
    if any(prompt != prompts[0] for prompt in prompts):
        answers = {"chosen": None, "rejected": None}
    if prompts and any(message["role"] == "user" for message in prompts[0]):  # answers alone leave the prompt to its own column
        raw = {**raw, "messages": [*prompts[0], {"role": "assistant", "content": ""}]}
    row = _row(raw, field)
    return row and row | answers


_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}


def _messages(given: Any, where: str) -> Messages:
    """A conversation of role (or from) and content (or value), a list or its JSON. ValueError names the field for any other."""
    try:
        given = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} holds text that is no JSON list of messages ({error.msg}): map prompt and response instead") from None
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise ValueError(f"{where} holds a {type(given).__name__} that is no list of messages with a role and a content")
    messages = []
    for message in given:
        role = str(message.get("role") or message.get("from"))
        if role not in _ROLES:
            raise ValueError(f"{where} holds the role '{role}', which is not known: leave such rows out, or use {', '.join(_ROLES)}")
        content = message.get("content")
        messages.append({"role": _ROLES[role], "content": _text(message.get("value") if content is None else content, where)})
    return messages


def _truth(value: Any, where: str) -> bool | None:
    """True, false, or None where nothing is said. ValueError names the field for anything else."""
    known = {"": None, "true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    text = "" if value is None else str(value).strip().lower()
    if text not in known:
        raise ValueError(f"{where} holds {redact(str(value))[:40]!r}: it takes true, false, 1, 0 or nothing, whether the sample is harmful")
    return known[text]


def _text(value: Any, where: str) -> str:
    """Text and numbers as text, nothing as ''. ValueError names the field for anything else."""
    if value is None or isinstance(value, str | Number):
        return "" if value is None else str(value)
    hint = "map a list of messages to messages, and texts" if isinstance(value, list) else "map a column of texts"
    raise ValueError(f"{where} holds a {type(value).__name__}, which is no text: {hint} with {where.split(':')[0]}.columns")
