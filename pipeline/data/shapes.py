"""Shapes in which data sets keep a conversation, brought to the one that rows.py reads: a list of messages.

    as_conversation({"prompt": "c", "response": "d", "history": [["a", "b"]]})   # {"messages": [...four messages]}

A system prompt in a column of its own stands before the conversation beside it. `history` of Alpaca's kind are the
turns before the prompt. A prompt, and a response, may be lists of messages (TRL's conversational form). What a message
may be is not looked at here. Every mistake is a ValueError of half a sentence, which begins with the field's name.
"""

from __future__ import annotations

import json
from typing import Any, TypeGuard

Row = dict[str, Any]
Turns = list[dict[str, Any]]
_LISTS = ("prompt", "response", "chosen", "rejected")  # may be lists of messages, or their JSON


def as_conversation(row: Row) -> Row:
    """The row with `messages` where its conversation stands in other fields, without those; else as it is."""
    row = row | {name: _parsed(row[name]) for name in _LISTS if name in row}
    history = _history(row.get("history"))
    row = {name: value for name, value in row.items() if name != "history"}
    if row.get("messages"):
        if history:
            raise ValueError(
                "history stands beside a conversation, and may be part of it or not: map one of the two"
            )
    elif history or _is_messages(row.get("prompt")) or _is_messages(row.get("response")):
        asked = _asked(row)
        if asked:  # else there is no prompt, whatever was said before
            messages = [*history, *asked, *_answered(row.get("response"))]
            row = {
                name: value
                for name, value in row.items()
                if name not in ("prompt", "input", "response")
            }
            row["messages"] = messages
    system = row.get("system")
    if not _blank(system):
        for name in ("messages", "chosen", "rejected"):
            row = {**row, name: _after_system(row.get(name), system)} if row.get(name) else row
    if row.get("messages"):
        row.pop("system", None)
    return row


def _parsed(value: Any) -> Any:
    """A list of messages that is written as JSON; other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if _is_messages(found) else value


def _is_messages(value: Any) -> TypeGuard[Turns]:
    return isinstance(value, list) and bool(value) and all(_is_message(item) for item in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and not {"role", "from"}.isdisjoint(value)


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _asked(row: Row) -> Turns:
    prompt, more = row.get("prompt"), row.get("input")
    if _is_messages(prompt):
        if not _blank(more):
            raise ValueError(
                "input stands beside a prompt of several messages: map no column to input"
            )
        return list(prompt)
    for name, value in (("prompt", prompt), ("input", more)):
        if not isinstance(value, str | int | float | None):
            raise ValueError(
                f"{name} holds a {type(value).__name__}, which is not text: map a column of texts"
            )
    texts = [str(text) for text in (prompt, more) if not _blank(text)]
    return [{"role": "user", "content": "\n\n".join(texts)}] if texts else []


def _answered(response: Any) -> Turns:
    if _is_messages(response):
        return list(response)
    return (
        [] if _blank(response) or response == [] else [{"role": "assistant", "content": response}]
    )


def _history(value: Any) -> Turns:
    """Earlier turns: pairs of what was asked and answered, or messages; a list or its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise ValueError(
                "history holds text that is not a JSON list: give [question, answer] pairs, or map other columns"
            ) from None
    if value is None or value == []:
        return []
    if _is_messages(value):
        return list(value)
    pairs: list[Any] = value if isinstance(value, list) else [None]
    for pair in pairs:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or any(not isinstance(t, str) or not t.strip() for t in pair)
        ):
            raise ValueError(
                "history holds other than [question, answer] pairs of texts: give a list of such pairs"
            )
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


def _after_system(value: Any, system: Any) -> Any:
    """The conversation with the system prompt before it, unless it has the same; other values as they are."""
    try:
        messages = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value  # a text, as chosen and rejected are in most data sets
    if not _is_messages(messages) or all(_role(message) == "assistant" for message in messages):
        return value  # answers alone: the prompt, and its system prompt, stand elsewhere
    if not isinstance(system, str):
        raise ValueError(
            f"system holds a {type(system).__name__}, which is not text: map a column of texts"
        )
    own = [message for message in messages if _role(message) == "system"]
    if not own:
        return [{"role": "system", "content": system}, *messages]
    said = own[0].get("content") if own[0].get("content") is not None else own[0].get("value")
    if isinstance(said, str) and said.strip() == system.strip():
        return messages
    raise ValueError(
        "system says something other than the system message of the conversation beside it: leave one of them"
    )


def _role(message: dict[str, Any]) -> str:
    role = str(message.get("role") or message.get("from"))
    return {"human": "user", "gpt": "assistant", "model": "assistant"}.get(role, role)
