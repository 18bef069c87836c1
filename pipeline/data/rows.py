"""Rows of a source as conversations: what is asked, what is answered, in an order that depends on the rows alone.

    rows = ordered_rows("data.task", recipe.data.task, seed=0)

Every mistake of the user is a ValueError that names the recipe's field.
"""

from __future__ import annotations

import hashlib
import json
from numbers import Number
from typing import Any

from pipeline.data.messages import Message, parse_messages, parse_tools
from pipeline.data.sources import read_source
from pipeline.redaction import redact
from pipeline.sections import DataSection, SourceSection

Row = dict[str, Any]


def ordered_rows(
    field: str, source: SourceSection, seed: int, required: tuple[str, ...] = ("prompt",), pairs: bool = False
) -> list[Row]:
    """Rows: messages (up to the answer), prompt, response (pairs: chosen, rejected), ordered by a hash with the seed.

    Raises ValueError naming the field where there is no row with a prompt.
    """
    make, stand_in = (_pair, ("messages", "chosen")) if pairs else (_row, ("messages",))
    found = (make(raw, field) for raw in read_source(source, field, required, stand_in))
    rows = [row for row in found if row is not None]
    if not rows:
        raise ValueError(f"{field}: {source.source} holds no row with a prompt: check {field}.columns")

    def place(row: Row) -> tuple[bytes, str]:
        digest = hashlib.sha256(f"{seed}\0{row['prompt']}\0{row['response']}".encode()).digest()
        return digest, json.dumps(row)  # conversations may end alike

    return sorted(rows, key=place)[: source.limit]


def task_rows(data: DataSection) -> list[Row]:
    """Rows of the task that have a response, ordered as `ordered_rows`."""
    return [row for row in ordered_rows("data.task", data.task, data.seed, ("prompt", "response")) if row["response"]]


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """The tools that a row of a prepared set may call."""
    return json.loads(row["tools"]) if row.get("tools") else None


def _row(raw: Row, field: str) -> Row | None:
    """messages up to the last answer, the last user turn as prompt, the last answer as response ('' where there is none).

    answer: the last answer as a message, where it is more than text. tools: what the conversation may call, where there
    are any. None without a prompt. Raises ValueError naming the field for values that are no text.
    """
    answer: Message = {}
    if raw.get("messages"):
        messages, response = parse_messages(raw["messages"], f"{field}: messages"), ""
        if messages and messages[-1]["role"] == "assistant":
            answer = messages.pop()
            response = answer["content"] or json.dumps([call["function"] for call in answer["tool_calls"]])
    else:
        texts = {name: _text(raw.get(name), f"{field}: {name}") for name in ("prompt", "input", "system", "response")}
        prompt = "\n\n".join(text for text in (texts["prompt"], texts["input"]) if text.strip())
        messages = [{"role": "system", "content": texts["system"]}] if texts["system"].strip() else []
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


def _pair(raw: Row, field: str) -> Row | None:
    """A `_row` with chosen and rejected: texts ('' where there is none), or lists of messages whose last assistant's turns they are.

    What both lists share is the prompt. Both are None where the lists part before those turns: then the two do not answer the same.
    """
    answers, prompts = {}, []
    for side in ("chosen", "rejected"):
        value, where = raw.get(side), f"{field}: {side}"
        if isinstance(value, list) and value:
            messages = parse_messages(value, where)
            while messages and messages[-1]["role"] != "assistant":
                messages.pop()
            if not messages:
                raise ValueError(f"{where} is a list of messages without an assistant's turn: map another column with {field}.columns")
            answer = messages.pop()
            if answer.get("tool_calls"):
                raise ValueError(f"{where} ends with a tool call, and pairs are of texts: leave such rows out")
            answers[side] = answer["content"]
            prompts.append(messages)
        else:
            text = _text(None if value == [] else value, where)
            answers[side] = text if text.strip() else ""
    if any(prompt != prompts[0] for prompt in prompts):
        answers = {"chosen": None, "rejected": None}
    if prompts and any(message["role"] == "user" for message in prompts[0]):  # answers alone leave the prompt to its own column
        raw = {**raw, "messages": prompts[0]}
    row = _row(raw, field)
    return row and row | answers


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
