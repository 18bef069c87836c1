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

from pipeline.data.rendering import SECONDS, Message, Renderer, Tools
from pipeline.data.thoughts import AT_THE_END, CLOSED, EMPTY, OPENED, THOUGHTS
from pipeline.data.time_limit import time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# private-use characters: in no data, and of no case
_MARKS = ("\ue000\ue001", "\ue002\ue003", "\ue004\ue005")
# Ends of turn of the usual templates, for models whose configs do not name them.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<turn|>")
_PARAMETERS = {"type": "object", "properties": {}}
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": _PARAMETERS},
}


class ChatTemplate:
    """tokenizer: with a chat template. configured: end-of-sequence ids of the model's configs.

    stops: ids at which generation stops. notes: what was done otherwise than the template does since it was last
    emptied. Raises ValueError, one sentence, for a template that cannot be held to the contract.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        configured: Iterable[int] = (),
        name: str = "the chat template",
    ):
        self.tokenizer, self.name = tokenizer, name
        self.renderer = Renderer(tokenizer, name)
        self.notes = self.renderer.notes
        self.stops = frozenset(
            token for token in (tokenizer.eos_token_id, *configured) if token is not None
        )
        self._stop_texts = [
            text for text in tokenizer.convert_ids_to_tokens(sorted(self.stops)) if text
        ]
        # All of it, since it tries several ways, and each rendering has a limit of its own.
        with time_limit(
            SECONDS, f"{name} takes longer than {SECONDS} s for two messages: it does not end"
        ):
            self._examine()

    def prompt(self, messages: list[Message], tools: Tools = None) -> str:
        """What inference puts before the assistant's answer to `messages`. ValueError where it leaves something out."""
        if tools and not self._knows_tools():
            raise ValueError(
                f"{self.name} leaves out `tools`: set model.chat_template to one that knows them, "
                "or map columns without them"
            )
        text = self.renderer.render(messages, tools, generation=True)
        for message in messages:
            if (
                message["role"] == "system"
                and _squeezed(message["content"]).casefold() not in _squeezed(text).casefold()
            ):
                self.notes.add(
                    "the chat template leaves out the system prompt, as it will at inference"
                )
            elif message["role"] == "tool" and not _written(message["content"], text):
                raise ValueError(
                    f"{self.name} leaves out what a tool returns: set model.chat_template to one that knows tools"
                )
            self._check_calls(message, text)
        return text

    def whole(self, messages: list[Message], tools: Tools = None) -> str:
        """The conversation as the template renders it where it ends with the last message."""
        return self.renderer.render(messages, tools)

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
        content = last["content"]
        head, tail = self._around(before, last, tools)
        whole = self.renderer.render([*before, last], tools)
        if CLOSED.search(content) and whole != head + content + tail:
            # The template takes content apart into thought and answer, and puts them together in its own way.
            said = whole[len(prompt) : len(whole) - len(tail)]
            parts = [_squeezed(part) for part in CLOSED.split(content)]
            if (
                whole.startswith(prompt)
                and whole.endswith(tail)
                and all(part in _squeezed(said) for part in parts)
            ):
                return said + self._end(tail)
        if whole != head + content + tail:
            self.notes.add(
                "the chat template changes answers (white space, or more): they are trained as the data have them"
            )
        lead = self._lead(before, {**last, "content": _MARKS[0]}, tools, prompt)
        return self._after_thought(lead, content, last, prompt) + self._end(tail)

    def _called(self, before: list[Message], last: Message, tools: Tools, prompt: str) -> str:
        """The rendering of an answer that calls tools."""
        content = last.get("content")
        try:
            return self._calls(before, last, tools, prompt)
        except ValueError as error:
            if content:
                raise
            # some templates render calls only where there is no content, others only where it is text
            try:
                return self._calls(
                    before, last | {"content": "" if content is None else None}, tools, prompt
                )
            except ValueError as other:
                raise (other if content is None else error) from None

    def _calls(self, before: list[Message], last: Message, tools: Tools, prompt: str) -> str:
        """The rendering of calls: with the text beside them, every name and argument, or the template is refused."""
        whole = self.renderer.render([*before, last], tools)
        named = _changed_call(last, 0, name=_MARKS[0])
        head, _, rest = self.renderer.render([*before, named], tools).partition(_MARKS[0])
        ended = _changed_call(last, -1, arguments={_MARKS[0]: _MARKS[0]})
        tail = self.renderer.render([*before, ended], tools).rpartition(_MARKS[0])
        if not tail[1] or not whole.startswith(head) or _MARKS[0] in rest:
            raise ValueError(
                f"{self.name} leaves out tool calls: "
                "set model.chat_template to one that knows tools, or leave such rows out"
            )
        kept, appended = self._kept(tail[2])
        left_out = tail[2][kept:]
        said = whole[len(head) : len(whole) - len(left_out)] + appended
        lead = self._after_thought(self._lead(before, named, tools, prompt), "", last, prompt)
        self._check_calls(last, said)
        if not whole.endswith(left_out) or _squeezed(last.get("content") or "") not in _squeezed(
            lead + said
        ):
            raise ValueError(
                f"{self.name} leaves out what an answer says beside its tool calls: "
                "set model.chat_template to one that renders both, or leave such rows out"
            )
        return lead + said

    def _check_calls(self, message: Message, said: str) -> None:
        """ValueError where a name or an argument of the message's calls is not in what is rendered."""
        for call in message.get("tool_calls") or ():
            for value in (call["function"]["name"], *_leaves(call["function"]["arguments"])):
                if not _written(value, said):
                    raise ValueError(
                        f"{self.name} leaves out arguments of tool calls: "
                        "set model.chat_template to one that renders them, or leave such rows out"
                    )

    def _around(self, before: list[Message], last: Message, tools: Tools) -> tuple[str, str]:
        """What the template puts before and after the content of the last message, the assistant's."""
        rendered = self.renderer.render([*before, {**last, "content": _MARKS[0]}], tools)
        if rendered.count(_MARKS[0]) != 1:
            how = "leaves out" if _MARKS[0] not in rendered else "repeats"
            raise ValueError(
                f"{self.name} {how} what the assistant says: set model.chat_template to a template that renders it once"
            )
        head, _, tail = rendered.partition(_MARKS[0])
        return head, tail

    def _lead(self, before: list[Message], marked: Message, tools: Tools, prompt: str) -> str:
        """What the template puts between the prompt and the mark in the answer, or in the name of its first call.

        Only what stands after the last thing said is compared, so that nobody's text can become part of it.
        """
        mark = {"content": _MARKS[1]}
        place = max(
            (number for number, message in enumerate(before) if message.get("content")), default=-1
        )
        asked = [
            message | mark if number == place else message for number, message in enumerate(before)
        ]
        opening = self.renderer.render(asked, tools, generation=True).rpartition(_MARKS[1])
        between = (
            self.renderer.render([*asked, marked], tools)
            .partition(_MARKS[0])[0]
            .rpartition(_MARKS[1])
        )
        if opening[1] and between[1]:
            lead = _after(opening[2], between[2])
        else:  # the template does not say it as it is
            lead = _after(
                prompt, self.renderer.render([*before, marked], tools).partition(_MARKS[0])[0]
            )
        if lead is None:
            raise ValueError(
                f"{self.name} begins answers otherwise than its generation prompt does: "
                "set model.chat_template to one that begins both alike"
            )
        if any(stop in lead.replace(marked.get("content") or "", "") for stop in self._stop_texts):
            raise ValueError(
                f"{self.name} ends a turn inside of an answer: set model.chat_template to one that does not, "
                "or leave such rows out"
            )
        return lead

    def _after_thought(self, lead: str, content: str, message: Message, prompt: str) -> str:
        """Lead and content after the prompt, with the message's reasoning;
        a thought that the prompt opens is closed.
        """
        reasoning = (message.get("reasoning_content") or "").strip("\n")
        opened = OPENED.search(prompt) if not CLOSED.search(lead) else None
        opened = opened or (OPENED.search(lead) if lead else None)
        if opened is None:
            if reasoning and _squeezed(reasoning) not in _squeezed(lead):
                raise ValueError(
                    f"{self.name} leaves out reasoning_content: set `reasoning` of the source to drop, "
                    "or model.chat_template to a template that renders it"
                )
            return lead + content
        if CLOSED.search(content):  # the data's own thought, which the prompt has opened already
            own = content.lstrip()
            return lead + (
                own[len(opened[1]) :].lstrip("\n") if own.startswith(opened[1]) else content
            )
        if not reasoning:
            self.notes.add(f"the generation prompt opens {opened[1]}: answers close it first")
        gap = "" if opened[0].endswith("\n") else "\n"
        closing = f"{gap}{reasoning}\n{THOUGHTS[opened[1]]}\n\n"
        return f"{lead}{closing}{content}" if OPENED.search(lead) else f"{closing}{lead}{content}"

    def _end(self, tail: str) -> str:
        """The end of a turn, of what the template puts after an answer: up to the first token that stops generation."""
        kept, appended = self._kept(tail)
        return tail[:kept] + appended

    def _kept(self, tail: str) -> tuple[int, str]:
        """How much of what stands after an answer is its end, and what has to be put behind that."""
        places = [tail.find(stop) + len(stop) for stop in self._stop_texts if stop in tail]
        if places:
            return min(places), ""
        header = self._user_header
        shared = next(
            (
                size
                for size in range(min(len(tail), len(header)), 0, -1)
                if tail.endswith(header[-size:])
            ),
            0,
        )
        self.notes.add(
            "the chat template ends no turn with a token that stops generation: "
            f"{self.tokenizer.eos_token} is put after answers"
        )
        return len(tail[: len(tail) - shared].rstrip()), self.tokenizer.eos_token

    def _examine(self) -> None:
        """How the template wants content, system prompt and tools, on a conversation of marks."""
        user = {"role": "user", "content": _MARKS[1]}
        text = self._tried(user)
        if _MARKS[1] not in text:
            raise ValueError(
                f"{self.name} leaves out what the user says: set model.chat_template to a template that renders it"
            )
        tools = [_TOOL] if self.renderer.needs_tools else None
        self._user_header = self.renderer.render([user], tools).partition(_MARKS[1])[0]
        try:
            self.renderer.render(
                [{"role": "system", "content": _MARKS[2]}, user], tools, generation=True
            )
        except ValueError:
            self.renderer.folds_system = True
        _, tail = self._around([user], {"role": "assistant", "content": ""}, tools)
        if not any(stop in tail for stop in self._stop_texts):
            known = self.tokenizer.get_vocab()
            ends = [end for end in _ENDS if end in tail and end in known]
            self.stops |= {known[end] for end in ends}
            self._stop_texts += ends
        self.notes.clear()

    def _tried(self, user: Message) -> str:
        """The user's message rendered as the template wants it: content as text or parts, with tools or without."""
        failure, wanted = None, self.renderer
        for wanted.needs_tools, wanted.wants_parts in (
            (False, False),
            (False, True),
            (True, False),
            (True, True),
        ):
            try:
                text = wanted.render(
                    [user], [_TOOL] if wanted.needs_tools else None, generation=True
                )
            except ValueError as error:
                failure = failure or error
                continue
            if _MARKS[1] in text:
                return text
        wanted.needs_tools = wanted.wants_parts = False
        if failure:
            raise failure
        return ""

    def _knows_tools(self) -> bool:
        """Whether tools make a difference to a prompt."""
        if self.__dict__.get("_tools_known") is None:
            user = {"role": "user", "content": _MARKS[1]}
            asked = ([user], [{"role": "system", "content": _MARKS[2]}, user])
            with_tools, without = (
                [self._rendered_or_not(messages, tools) for messages in asked]
                for tools in ([_TOOL], None)
            )
            self._tools_known = with_tools != without
        return self._tools_known

    def _rendered_or_not(self, messages: list[Message], tools: Tools) -> str | None:
        try:
            return self.renderer.render(messages, tools, generation=True)
        except ValueError:
            return None


def _after(opening: str, between: str) -> str | None:
    """What is left of `between`, which stands before an answer that is rendered, after the opening of inference.

    Both are the template's own text. A thought that the opening opens, or opens and closes, need not be there. None
    where they begin in different ways.
    """
    if between.startswith(opening):
        return between[len(opening) :]
    thought = AT_THE_END.search(opening)
    base = opening[: thought.start()] if thought else opening
    if thought and between.startswith(base):
        left = between[len(base) :]
        if thought[2]:
            return EMPTY.sub("", left, count=1) if EMPTY.match(left) else left
        if left.lstrip().startswith(thought[1]):
            left = left.lstrip()[len(thought[1]) :]
            return left.removeprefix("\n") if opening.endswith("\n") else left
        return left
    # White space alone may differ: the prompt of inference is the one that counts.
    there, here = "".join(opening.split()), "".join(between.split())
    if there.startswith(here):
        return ""
    if not here.startswith(there):
        return None
    seen = place = 0
    while seen < len(there):
        seen += not between[place].isspace()
        place += 1
    return between[place:].lstrip()


def _changed_call(message: Message, number: int, **changes: Any) -> Message:
    calls = list(message["tool_calls"])
    calls[number] = calls[number] | {"function": calls[number]["function"] | changes}
    return message | {"tool_calls": calls}


def _written(value: str, text: str) -> bool:
    """Whether a text stands in a rendering: as it is, but for white space, or as JSON writes it."""
    said = _squeezed(text)
    forms = (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
    return any(_squeezed(form) in said for form in forms)


def _leaves(value: Any) -> list[str]:
    """Names and values of a call's arguments as they must stand in a rendering."""
    if isinstance(value, dict):
        return [leaf for name, inner in value.items() for leaf in (name, *_leaves(inner))]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return (
        [value]
        if isinstance(value, str)
        else []
        if value is None or isinstance(value, bool)
        else [json.dumps(value)]
    )


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
