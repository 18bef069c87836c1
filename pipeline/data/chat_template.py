"""A tokenizer's chat template, held to one contract: what is trained is what inference will have to produce.

    template = ChatTemplate(tokenizer, configured=[2])
    template.prompt(messages[:-1])              # what inference puts before the answer
    prompt, answer = template.turn(messages)    # and what has to follow it: the last message, and an end that stops

At every assistant's turn the prompt of training is the prompt of inference: the conversation so far, rendered with
the generation prompt. What follows is what the template puts between that prompt and the answer, the answer as the
data have it, and the end of the turn up to a token at which generation stops. Many templates render a past turn
otherwise than a present one, open `<think>`, end only the conversation, or write the next header; what is done about
it is said in `template.notes`, and a template that cannot be held to the contract is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from pipeline.data.time_limit import time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[
    str, Any
]  # role, content; of an assistant also tool_calls, reasoning_content; of a tool name, tool_call_id
Tools = list[dict[str, Any]] | None

_MARKS = ("\ue000\ue001", "\ue002\ue003", "\ue004\ue005")  # private-use characters: in no data, and of no case
_OWN = frozenset(("train",))  # keys of a message that are ours and not the template's
# A thought that the generation prompt opens, and what closes it.
_THOUGHTS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "◁think▷": "◁/think▷",
}
_OPENED = re.compile(rf"({'|'.join(map(re.escape, _THOUGHTS))})\s*\Z")
_CLOSED = re.compile("|".join(map(re.escape, _THOUGHTS.values())))
# Ends of turn of the usual templates, for models whose configs do not name them.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<|im_sep_end|>", "<turn|>")
_PARAMETERS = {"type": "object", "properties": {}}
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": _PARAMETERS}}
_SECONDS = 20  # for a template's first rendering: one that loops for ever has to end


def stop_ids(tokenizer: PreTrainedTokenizerBase, configured: Iterable[int] = ()) -> frozenset[int]:
    """Ids at which generation stops: the tokenizer's eos, those that configs name, and the usual ends of turn."""
    known = tokenizer.get_vocab()
    found = {tokenizer.eos_token_id, *configured, *(known[token] for token in _ENDS if token in known)}
    return frozenset(token for token in found if token is not None)


def without_thought(answer: str) -> str:
    """What an answer says after its thoughts."""
    closed = list(_CLOSED.finditer(answer))
    return answer[closed[-1].end() :].strip() if closed else answer


class ChatTemplate:
    """tokenizer: with a chat template. configured: end-of-sequence ids of the model's configs.

    notes: what was done otherwise than the template does since it was last emptied. Raises ValueError, one sentence,
    for a template that cannot be held to the contract.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, configured: Iterable[int] = (), name: str = "the chat template"
    ):
        self.tokenizer, self.name = tokenizer, name
        self.stops = stop_ids(tokenizer, configured)
        self.notes: set[str] = set()
        self.wants_parts = self.folds_system = self.needs_tools = False
        self._stop_texts = [text for text in tokenizer.convert_ids_to_tokens(sorted(self.stops)) if text]
        with time_limit(_SECONDS, f"{name} takes longer than {_SECONDS} s for two messages: it does not end"):
            self._examine()

    def prompt(self, messages: list[Message], tools: Tools = None) -> str:
        """What inference puts before the assistant's answer to `messages`."""
        text = self._render(messages, tools, generation=True)
        if not any(message["role"] in ("system", "tool") for message in messages):
            return text
        said = _squeezed(text)
        for message in messages:
            content = _squeezed(message.get("content") or "")
            if message["role"] == "system" and content not in said:
                self.notes.add("the chat template leaves out the system prompt, as it will at inference")
            elif message["role"] == "tool" and content not in said and _squeezed(json.dumps(content))[1:-1] not in said:
                raise ValueError(
                    f"{self.name} leaves out what a tool returns: set model.chat_template to one that knows tools"
                )
        return text

    def whole(self, messages: list[Message], tools: Tools = None) -> str:
        """The conversation as the template renders it where it ends with the last message."""
        return self._render(messages, tools)

    def turn(self, messages: list[Message], tools: Tools = None) -> tuple[str, str]:
        """`prompt(messages[:-1])`, and what has to follow: the last message, the assistant's, up to an end that stops.

        ValueError where the template cannot say it.
        """
        *before, last = messages
        prompt = self.prompt(before, tools)
        answer = self._called if last.get("tool_calls") else self._said
        return prompt, answer(before, last, tools, prompt)

    def _said(self, before: list[Message], last: Message, tools: Tools, prompt: str) -> str:
        """The rendering of an answer in words."""
        head, tail = self._around(before, last, tools)
        whole = self._render([*before, last], tools)
        content, lead = last.get("content") or "", _lead(head, prompt)
        end = self._end(tail)
        if whole == head + content + tail:
            return self._thought(lead, content, last, prompt) + end
        if _CLOSED.search(content) and whole.startswith(prompt) and whole.endswith(tail):
            # The template takes content apart into thought and answer, and puts them together in its own way.
            said = whole[len(prompt) : len(whole) - len(tail)]
            if all(_squeezed(part) in _squeezed(said) for part in _CLOSED.split(content)):
                return said + end
        self.notes.add(
            "the chat template changes answers (white space, or more): they are trained as the data have them"
        )
        return self._thought(lead, content, last, prompt) + end

    def _thought(self, lead: str, content: str, message: Message, prompt: str) -> str:
        """Lead and content after the prompt, with the message's reasoning; a thought that the prompt opens is closed."""
        reasoning = (message.get("reasoning_content") or "").strip("\n")
        opened = _OPENED.search(prompt + lead) if not _CLOSED.search(lead) else None
        if opened is None:
            if reasoning and _squeezed(reasoning) not in _squeezed(lead):
                raise ValueError(
                    f"{self.name} leaves out reasoning_content: set `reasoning` of the source to drop, "
                    "or model.chat_template to a template that renders it"
                )
            return lead + content
        if _CLOSED.search(content):  # the data's own thought, which the prompt has opened already
            own = content.lstrip()
            return lead + (own[len(opened[1]) :].lstrip("\n") if own.startswith(opened[1]) else content)
        if not reasoning:
            self.notes.add(f"the generation prompt opens {opened[1]}: answers close it first")
        gap = "" if opened[0].endswith("\n") else "\n"
        return f"{lead}{gap}{reasoning}\n{_THOUGHTS[opened[1]]}\n\n{content}"

    def _around(self, before: list[Message], last: Message, tools: Tools) -> tuple[str, str]:
        """What the template puts before and after the content of the last message, the assistant's."""
        rendered = self._render([*before, {**last, "content": _MARKS[0]}], tools)
        if rendered.count(_MARKS[0]) != 1:
            how = "leaves out" if _MARKS[0] not in rendered else "repeats"
            raise ValueError(
                f"{self.name} {how} what the assistant says: set model.chat_template to a template that renders it once"
            )
        head, _, tail = rendered.partition(_MARKS[0])
        return head, tail

    def _called(self, before: list[Message], last: Message, tools: Tools, prompt: str) -> str:
        """The rendering of an answer that calls tools."""
        content = last.get("content")
        try:
            return self._calls(before, last, tools, prompt)
        except ValueError as error:
            if content:
                raise
            try:  # some templates render calls only where there is no content, others only where it is text
                return self._calls(before, last | {"content": "" if content is None else None}, tools, prompt)
            except ValueError as other:
                raise (other if content is None else error) from None

    def _calls(self, before: list[Message], last: Message, tools: Tools, prompt: str) -> str:
        """The rendering of an answer that calls tools: its arguments are in it, or the template is refused."""
        first = last["tool_calls"][0]
        whole = self._render([*before, last], tools)
        named = {**first, "function": {**first["function"], "name": _MARKS[0]}}
        marked = self._render([*before, {**last, "tool_calls": [named, *last["tool_calls"][1:]]}], tools)
        head = marked.partition(_MARKS[0])[0]
        if _MARKS[0] not in marked or not whole.startswith(head):
            raise ValueError(
                f"{self.name} leaves out tool calls: "
                "set model.chat_template to one that knows tools, or leave such rows out"
            )
        said = whole[len(head) :]
        for call in last["tool_calls"]:
            for value in (call["function"]["name"], *_leaves(call["function"].get("arguments"))):
                if not any(
                    form in said
                    for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
                ):
                    raise ValueError(
                        f"{self.name} leaves out arguments of tool calls: "
                        "set model.chat_template to one that renders them"
                    )
        lead = self._thought(_lead(head, prompt), "", last, prompt)
        places = [said.rfind(stop) + len(stop) for stop in self._stop_texts if stop in said]
        return lead + (said[: max(places)] if places else said.rstrip() + self._appended())

    def _end(self, tail: str) -> str:
        """The end of a turn, of what the template puts after an answer: up to the first token that stops generation."""
        places = [tail.find(stop) + len(stop) for stop in self._stop_texts if stop in tail]
        if places:
            return tail[: min(places)]
        header = self._user_header
        shared = next((size for size in range(min(len(tail), len(header)), 0, -1) if tail.endswith(header[-size:])), 0)
        return tail[: len(tail) - shared].rstrip() + self._appended()

    def _appended(self) -> str:
        self.notes.add(
            "the chat template ends no turn with a token that stops generation: "
            f"{self.tokenizer.eos_token} is put after answers"
        )
        return self.tokenizer.eos_token

    def _examine(self) -> None:
        """How the template wants content, system prompt and tools, on a conversation of marks."""
        user = {"role": "user", "content": _MARKS[1]}
        text = self._tried(user)
        if _MARKS[1] not in text:
            raise ValueError(
                f"{self.name} leaves out what the user says: set model.chat_template to a template that renders it"
            )
        tools = [_TOOL] if self.needs_tools else None
        self._user_header = self._render([user], tools).partition(_MARKS[1])[0]
        try:
            self._render([{"role": "system", "content": _MARKS[2]}, user], tools, generation=True)
        except ValueError:
            self.folds_system = True
        self._around([user], {"role": "assistant", "content": ""}, tools)
        self.notes.clear()

    def _tried(self, user: Message) -> str:
        """The user's message rendered as the template wants it: content as text or parts, with tools or without."""
        failure = None
        for self.needs_tools, self.wants_parts in ((False, False), (False, True), (True, False), (True, True)):
            try:
                text = self._render([user], [_TOOL] if self.needs_tools else None, generation=True)
            except ValueError as error:
                failure = failure or error
                continue
            if _MARKS[1] in text:
                return text
        self.needs_tools = self.wants_parts = False
        if failure:
            raise failure
        return ""

    def _render(self, messages: list[Message], tools: Tools = None, generation: bool = False) -> str:
        """The template's text. ValueError, one sentence, for what it refuses."""
        if self.needs_tools and not tools:
            raise ValueError(
                f"{self.name} needs `tools`: give every row a tools column, or set model.chat_template to another"
            )
        if self.folds_system and (folded := _folded(messages)) is not messages:
            self.notes.add("the chat template takes no system prompt: it is put before what the user says first")
            messages = folded
        given = [self._as_wanted(message) for message in messages]
        try:
            return self._applied(given, tools, generation)
        except TemplateSyntaxError as error:
            raise ValueError(f"{self.name} has a syntax error in line {error.lineno}: {_line(error)}") from None
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            roles = [message["role"] for message in messages]
            raise ValueError(
                f"{self.name} refuses the roles {roles} ({_line(error)}): "
                "set model.chat_template to one that takes them"
            ) from None

    def _as_wanted(self, message: Message) -> Message:
        found = {key: value for key, value in message.items() if key not in _OWN}
        if found.get("reasoning_content"):  # by the other names that templates know it
            found |= dict.fromkeys(("reasoning", "thinking"), found["reasoning_content"])
        if self.wants_parts:
            found["content"] = [{"type": "text", "text": found["content"]}] if found.get("content") else []
        return found

    def _applied(self, messages: list[Message], tools: Tools, generation: bool) -> str:
        apply = lambda given: self.tokenizer.apply_chat_template(  # noqa: E731
            given, tools=tools, tokenize=False, add_generation_prompt=generation
        )
        if not any(message.get("tool_calls") for message in messages):
            return apply(messages)
        try:
            return apply(messages)
        except (
            TypeError,
            TemplateError,
        ):  # some templates put arguments after text, as the JSON that OpenAI's API gives
            return apply([_with_json_arguments(message) for message in messages])


def _lead(head: str, prompt: str) -> str:
    """What the template puts between the generation prompt and the answer.

    head: what stands before the answer when it is rendered. Where head and prompt differ earlier (a system prompt that
    moved, a date), it is what is left of head after the end that they have in common.
    """
    if head.startswith(prompt):
        return head[len(prompt) :]
    opened = _OPENED.search(prompt)
    base = prompt[: opened.start()] if opened else prompt
    if base.startswith(head):
        return ""
    if head.startswith(base):
        return head[len(base) :].removeprefix(prompt[len(base) :])
    shared, lead = 0, ""
    for size in range(len(head)):
        kept = head[: len(head) - size]
        same = _same_end(kept, base)
        if same > shared:
            shared, lead = same, head[len(kept) :]
    return lead


def _same_end(one: str, other: str) -> int:
    size = 0
    while size < min(len(one), len(other)) and one[-1 - size] == other[-1 - size]:
        size += 1
    return size


def _folded(messages: list[Message]) -> list[Message]:
    """A system message moved into the first user message."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return messages
    first = messages[1] | {"content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _with_json_arguments(message: Message) -> Message:
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"].get("arguments"))}}
        for call in message.get("tool_calls") or ()
    ]
    return message | {"tool_calls": calls} if calls else message


def _leaves(value: Any) -> list[str]:
    """Names and values of a call's arguments as they must stand in a rendering."""
    if isinstance(value, dict):
        return [leaf for name, inner in value.items() for leaf in (name, *_leaves(inner))]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return (
        [value] if isinstance(value, str) else [] if value is None or isinstance(value, bool) else [json.dumps(value)]
    )


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text).casefold()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
