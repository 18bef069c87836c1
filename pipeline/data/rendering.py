"""Messages rendered by a tokenizer's chat template, given to it as it wants them.

    renderer = Renderer(tokenizer, "the chat template")
    renderer.render(messages, tools, generation=True)

Some templates want content as parts, take no system prompt, or want the arguments of calls as JSON: `wants_parts` and
`folds_system` are set by who finds out (chat_template.py), the rest is tried. Whatever a template raises is a
ValueError of one sentence that names it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from pipeline.data.time_limit import time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[
    str, Any
]  # role, content; of an assistant also tool_calls, reasoning_content; of a tool name, tool_call_id
Tools = list[dict[str, Any]] | None
_OWN = frozenset(("train",))  # keys of a message that are ours and not the template's
# What templates raise: their own errors, and those of the Python behind them.
_RAISED = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError
)  # fmt: skip
SECONDS = 20  # for one rendering: one that loops for ever has to end
# characters that a template may have of its own, and times that it may write what it is given
_OWN_TEXT, _REPEATED = 1_000_000, 10


class Renderer:
    """name: how sentences call the template. notes: what was done otherwise than the template does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str):
        self.tokenizer, self.name = tokenizer, name
        self.notes: set[str] = set()
        self.wants_parts = self.folds_system = self.needs_tools = False

    def render(self, messages: list[Message], tools: Tools = None, generation: bool = False) -> str:
        """The template's text. generation: with what it puts before an answer.

        Raises ValueError for what it refuses.
        """
        if self.needs_tools and not tools:
            raise ValueError(
                f"{self.name} needs `tools`: give every row a tools column, or set model.chat_template to another"
            )
        if self.folds_system and (folded := _folded(messages)) is not messages:
            self.notes.add(
                "the chat template takes no system prompt: it is put before what the user says first"
            )
            messages = folded
        endless = f"{self.name} takes longer than {SECONDS} s for {len(messages)} messages: it does not end"
        with time_limit(SECONDS, endless):
            text = self._said([self._as_wanted(message) for message in messages], tools, generation)
        if len(text) > _OWN_TEXT and len(text) > _OWN_TEXT + _REPEATED * (
            given := len(str(messages)) + len(str(tools))
        ):
            raise ValueError(
                f"{self.name} makes {len(text):,} characters of {given:,}: set model.chat_template to another"
            )
        return text

    def _said(self, messages: list[Message], tools: Tools, generation: bool) -> str:
        try:
            return self._tried(messages, tools, generation)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"{self.name} has a syntax error in line {error.lineno}: {_line(error)}"
            ) from None
        except _RAISED as error:
            roles = [message["role"] for message in messages]
            raise ValueError(
                f"{self.name} refuses the roles {roles} ({_line(error)}): "
                "set model.chat_template to one that takes them"
            ) from None

    def _tried(self, messages: list[Message], tools: Tools, generation: bool) -> str:
        """The rendering in the first of the ways to write calls that the template takes."""
        ways = [messages]
        if any(message.get("tool_calls") for message in messages):
            # As the JSON that OpenAI's API gives; with an empty text where there is none.
            ways.append([_with_json_arguments(message) for message in messages])
            ways += [
                [message | {"content": message.get("content") or ""} for message in way]
                for way in ways
            ]
        failure: Exception | None = None
        for way in ways:
            try:
                return self.tokenizer.apply_chat_template(
                    way, tools=tools, tokenize=False, add_generation_prompt=generation
                )
            except _RAISED as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def _as_wanted(self, message: Message) -> Message:
        found = {key: value for key, value in message.items() if key not in _OWN}
        if found.get("reasoning_content"):  # by the other names that templates know it
            found |= dict.fromkeys(("reasoning", "thinking"), found["reasoning_content"])
        if self.wants_parts:
            found["content"] = (
                [{"type": "text", "text": found["content"]}] if found.get("content") else []
            )
        return found


def _folded(messages: list[Message]) -> list[Message]:
    """A system message moved into the first user message."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return messages
    said = [message["content"] for message in messages[:2] if message["content"].strip()]
    return [messages[1] | {"content": "\n\n".join(said)}, *messages[2:]]


def _with_json_arguments(message: Message) -> Message:
    calls = [
        call
        | {
            "function": call["function"]
            | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
        }
        for call in message.get("tool_calls") or ()
    ]
    return message | {"tool_calls": calls} if calls else message


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
