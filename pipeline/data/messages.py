"""Conversations as people write them -> messages as chat templates know them.

    messages = parse_messages(raw["messages"], "data.task: messages")

Known are OpenAI's (role, content, tool_calls) and ShareGPT's (from, value). A message is a dict of role (system, user,
assistant, tool) and content (text; None of an assistant that only calls tools), and where the data have them
tool_calls, reasoning_content, name, tool_call_id and train. What is not known is a ValueError that names the field:
nothing is left out.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from numbers import Complex
from typing import Any

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_CONTENT = ("content", "value")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TRAIN = ("train", "trainable", "weight", "loss")
_KEPT = ("name", "tool_call_id")
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_CALL = {"id", "type", "index", "function", "name", *_ARGUMENTS}
_PART = {"type", "text", "thinking", "signature", "annotations", "cache_control"}
# What a message says about itself beside what is said: no part of a conversation.
_ABOUT = frozenset(
    (
        "id",
        "index",
        "timestamp",
        "created_at",
        "model",
        "lang",
        "language",
        "metadata",
        "type",
        "status",
    )
)


def parse_messages(given: Any, where: str) -> list[Message]:
    """A conversation, a list or its JSON. Raises ValueError, which begins with `where`."""
    try:
        given = json.loads(given) if isinstance(given, str) else given
    except (json.JSONDecodeError, RecursionError) as error:
        why = getattr(error, "msg", "nested too deep")
        raise ValueError(
            f"{where} holds text that is not a JSON list of messages ({why}): map prompt and response instead"
        ) from None
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise ValueError(
            f"{where} holds a {type(given).__name__} that is not a list of messages with a role and a content"
        )
    return [
        _message(message, f"{where}: message {number}") for number, message in enumerate(given, 1)
    ]


def _message(given: dict[str, Any], where: str) -> Message:
    given = {
        key: value
        for key, value in given.items()
        if value is not None and value != [] and value != {}
    }
    name = str(given.get("role") or given.get("from"))
    if name not in ROLES:
        raise ValueError(
            f"{where} has the role '{name}', which is not known: leave such rows out, or use {', '.join(ROLES)}"
        )
    role = ROLES[name]
    known = {
        "role",
        "from",
        *_CONTENT,
        *_KEPT,
        *_ABOUT,
        *(("tool_calls", "function_call", *_REASONING) if role == "assistant" else ()),
    }
    other = next((key for key in given if key not in known and key not in _TRAIN), None)
    if other is not None:
        raise ValueError(
            f"{where} has the field '{other}', which is not known for the role {role}: leave it out of the data"
        )
    content, thought = _content(_one(given, _CONTENT, where), where)
    calls = _calls(name, content, given, where)
    if name == "function_call":
        content = None
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    elif content is None or (not content.strip() and role != "system"):
        what = "no content" if content is None else "an empty content"
        raise ValueError(
            f"{where}, of role {role}, has {what}: leave such rows out, or say what it says"
        )
    said = _one(given, _REASONING, where) if role == "assistant" else None
    if thought is not None and (role != "assistant" or said not in (None, thought)):
        raise ValueError(
            f"{where}, of role {role}, has a thought among the parts of its content that is none of its own"
        )
    thought = thought if said is None else said
    if thought is not None:
        if not isinstance(thought, str):
            raise ValueError(
                f"{where} has reasoning that is a {type(thought).__name__} and no text"
            )
        message["reasoning_content"] = thought
    message |= {key: given[key] for key in _KEPT if key in given}
    train = _train(given, where)
    return message if train is None else message | {"train": train}


def _one(given: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    """The value that a message has under any of these names; ValueError where two say different things."""
    found = {name: given[name] for name in names if name in given}
    values = list(found.values())
    if any(value != values[0] for value in values[1:]):
        raise ValueError(f"{where} has {' and '.join(found)}, which differ: leave one of them")
    return values[0] if values else None


def _content(value: Any, where: str) -> tuple[str | None, str | None]:
    """Text of a content, and the thought among its parts. Parts of text are joined; numbers become text."""
    if value is None or isinstance(value, str):
        return value, None
    if (
        not isinstance(value, bool)
        and isinstance(value, Complex | Decimal)
        and value == value
        and abs(value) != math.inf
    ):
        return str(value), None
    if not isinstance(value, list):
        raise ValueError(f"{where} has a content that is a {type(value).__name__} and no text")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in value:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = (
            part.get("thinking" if kind == "thinking" else "text")
            if isinstance(part, dict)
            else None
        )
        if kind == "thinking" and isinstance(text, list):  # Magistral's, of parts
            text = _content(text, where)[0]
        if kind not in ("text", "thinking") or not isinstance(text, str):
            raise ValueError(
                f"{where} has a part of type '{kind}' in its content, and only text can be trained on: "
                "leave such rows out"
            )
        other = next((key for key in part if key not in _PART and part[key] is not None), None)
        if other is not None:
            raise ValueError(
                f"{where} has a part with the field '{other}', which is not known: leave it out of the data"
            )
        (texts if kind == "text" else thoughts).append(text)
    return "".join(texts), "".join(thoughts) or None


def _calls(
    name: str, content: str | None, given: dict[str, Any], where: str
) -> list[dict[str, Any]]:
    """Calls as {type, function: {name, arguments}}, the arguments read from their JSON where they are given as text."""
    calls = given.get("tool_calls", [])
    calls = _parsed(calls) if isinstance(calls, str) else calls
    if "function_call" in given:  # OpenAI's older form
        if calls:
            raise ValueError(f"{where} has tool_calls and function_call: leave one of them")
        calls = [given["function_call"]]
    if name == "function_call":  # ShareGPT's
        calls = _parsed(content or "")
        calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise ValueError(
            f"{where} has tool calls that are no list of calls with a name and arguments"
        )
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"{where} has a tool call without a function's name: give {{function: {{name, arguments}}}}"
            )
        other = next((key for key in (*call, *function) if key not in _CALL), None)
        if other is not None:
            raise ValueError(
                f"{where} has a tool call with the field '{other}', which is not known: leave it out of the data"
            )
        arguments = _one(function, _ARGUMENTS, where)
        arguments = (
            _parsed(arguments) if isinstance(arguments, str) and arguments.strip() else arguments
        )
        arguments = {} if arguments in (None, "") else arguments
        _check_json(arguments, f"{where} has a tool call whose arguments")
        rest = {key: call[key] for key in ("id",) if call.get(key)}
        found.append(
            rest
            | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return found


def _parsed(text: str) -> Any:
    """What JSON says, or the text where it is none."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text


def _train(given: dict[str, Any], where: str) -> bool | None:
    """Whether the turn is trained, by any of the names for it; None where nothing is said."""
    flags = {key: given[key] for key in _TRAIN if key in given}
    for key, value in flags.items():
        if value not in (0, 1):
            raise ValueError(
                f"{where} has {key} {str(value)[:20]!r}, which must be true, false, 1 or 0: "
                "a turn is trained or it is not"
            )
    return _one({key: bool(value) for key, value in flags.items()}, _TRAIN, where)


def parse_tools(given: Any, where: str) -> list[dict[str, Any]]:
    """Definitions of tools, a list or its JSON. Raises ValueError, which begins with `where`."""
    given = _parsed(given) if isinstance(given, str) else given
    tools = (
        [_parsed(tool) if isinstance(tool, str) else tool for tool in given]
        if isinstance(given, list)
        else None
    )
    if tools is None or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(
            f"{where} holds a {type(given).__name__} that is no list of definitions of tools"
        )
    _check_json(tools, f"{where} holds tools that")
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]


def _check_json(value: Any, what: str) -> None:
    """ValueError for what JSON cannot say: templates write it as that."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{what} are not JSON ({str(error)[:80]}): write them as text and numbers"
        ) from None
