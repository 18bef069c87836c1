"""Conversations -> token ids and labels, through the model's chat template.

    chat = Chat(tokenizer, configured=[2])
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    (encoded,) = chat.encode(messages, max_length=128)

Only what the assistant has to say is supervised, the token included at which generation stops. At every turn that is
trained, the ids before it are `prompt_ids`, what inference puts there, token for token (chat_template.py). One sequence
holds all turns where the template and the tokenizer allow that; else every turn has a sequence of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.data.chat_template import ChatTemplate
from pipeline.data.rendering import Message, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
Messages = list[Message]
_ANCHORS = ("\n", ".", "a")


@dataclass(frozen=True)
class Encoded:
    """input_ids and labels of equal length; labels are -100 where nothing is supervised.

    turn: index of the last supervised message.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    turn: int = -1


class Chat:
    """A tokenizer with a chat template. configured: ids of the model's configs at which generation stops.

    notes: what was done otherwise than the template does -> in how many conversations. Raises ValueError for a slow
    tokenizer, and for a template that cannot be held to its contract.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        configured: Iterable[int] = (),
        name: str = "the chat template",
    ):
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is a slow tokenizer: use a model with a fast one (tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, configured, name)
        self.notes: Counter[str] = Counter()
        added = tokenizer.added_tokens_decoder.values()
        self._specials = tuple(token.content for token in added if token.special and token.content)

    def prompt_ids(self, messages: Messages, tools: Tools = None) -> list[int]:
        """Token ids of a conversation that waits for the assistant's answer."""
        return self._ids(self.template.prompt(messages, tools))

    def encode(
        self,
        messages: Messages,
        max_length: int,
        last_turn_only: bool = False,
        given: str = "",
        tools: Tools = None,
    ) -> list[Encoded]:
        """Sequences of at most max_length tokens, each with a supervised one; none where none is left.

        last_turn_only: of several assistant's turns only the last is supervised.
        given: what the last answer begins with and is not trained on.

        Turns whose `train` is false are not supervised, nor is what the assistant says before the user does. The first
        token never is: nothing precedes it. Raises ValueError where the template cannot render the conversation.
        """
        # of prompts that were asked for, and of conversations that were refused
        self.template.notes.clear()
        turns = _trained(messages)[-1 if last_turn_only else 0 :]
        found: list[tuple[list[int], list[int], int]] = []
        for turn in turns:
            prompt, answer = self._turn(messages[: turn + 1], tools)
            labels = list(answer)
            if given and turn == turns[-1]:
                labels = self._after(given, answer)
            if found and prompt[: len(found[-1][0])] == found[-1][0]:
                ids, before, _ = found.pop()
                supervised = before + [IGNORE] * (len(prompt) - len(ids)) + labels
            else:
                supervised = [IGNORE] * len(prompt) + labels
            found.append((prompt + answer, supervised, turn))
        said = "\0".join(
            message.get("content") or "" for message in messages if message["role"] != "assistant"
        )
        if any(token in said for token in self._specials):
            self.template.notes.add(
                "what users, systems or tools say holds special tokens, which are read as such"
            )
        if len(found) > 1:
            self.template.notes.add(
                "past turns are rendered differently from present ones: each is trained in a sequence of its own"
            )
        if found:
            found[-1] = self._whole(messages, tools, *found[-1])
        self.notes.update(self.template.notes)
        self.template.notes.clear()
        cut = [
            Encoded(ids[:max_length], labels[:max_length], len(ids) > max_length, turn)
            for ids, labels, turn in found
        ]
        return [encoded for encoded in cut if any(label != IGNORE for label in encoded.labels[1:])]

    def _turn(self, messages: Messages, tools: Tools) -> tuple[list[int], list[int]]:
        """Ids of the prompt before the last message and of the answer that it is."""
        prompt, answer = self.template.turn(messages, tools)
        before, whole = self._ids(prompt), self._ids(prompt + answer)
        found = whole[len(before) :]
        # a merge crosses the border, which it cannot at inference
        if whole[: len(before)] != before:
            found = self._continued(before, answer, self._text(whole))
        elif _changed(answer, self._text(found)):
            self.template.notes.add(
                "the tokenizer changes answers (white space, or characters that it does not know)"
            )
        if any(token in self.template.stops for token in found[:-1]):
            raise ValueError(
                "an answer holds text at which generation stops, as an end of turn: leave it out of the data"
            )
        if found[-1] not in self.template.stops:
            raise ValueError(
                f"{self.template.name} ends an answer with text that is not a single token: "
                "set eos_token in tokenizer_config.json"
            )
        return before, found

    def _continued(self, before: list[int], answer: str, wanted: str) -> list[int]:
        """Ids of an answer after those before it: no merge with them,
        and no mark of a beginning, as SentencePiece's.
        """
        for anchor in ("", *_ANCHORS):
            start, whole = self._ids(anchor), self._ids(anchor + answer)
            found = whole[len(start) :]
            if whole[: len(start)] == start and self._text(before + found) == wanted:
                return found
        raise ValueError(
            f"{self.template.name} puts an answer where the tokenizer cannot begin one: "
            "set model.chat_template to one whose generation prompt ends with a token of its own"
        )

    def _after(self, given: str, answer: list[int]) -> list[int]:
        """Labels of an answer of which `given`, and what the template puts before it, is not supervised."""
        for size in range(1, len(answer) + 1):
            text = self._text(answer[:size])
            if given in text:
                size -= not text.endswith(given)  # a token that goes on after it is
                return [IGNORE] * size + answer[size:]
        return list(answer)

    def _whole(
        self, messages: Messages, tools: Tools, ids: list[int], labels: list[int], turn: int
    ) -> tuple[list[int], list[int], int]:
        """With what the template puts after the last turn, unsupervised, where that goes on from these ids."""
        rendered = self._ids(self.template.whole(messages[: turn + 1], tools))
        if rendered[: len(ids)] != ids:
            return ids, labels, turn
        return rendered, labels + [IGNORE] * (len(rendered) - len(ids)), turn

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _changed(wanted: str, found: str) -> bool:
    """Whether a text came back from the tokenizer as another one.

    SentencePiece puts spaces after special tokens, and loses one at a beginning.
    """
    return wanted.replace(" ", "") != found.replace(" ", "") or len(found) < len(wanted) - 1


def _trained(messages: Messages) -> list[int]:
    """Places of the assistant's turns that are trained."""
    asked = next(
        (place for place, message in enumerate(messages) if message["role"] == "user"),
        len(messages),
    )
    return [
        place
        for place, message in enumerate(messages)
        if message["role"] == "assistant" and place > asked and message.get("train", True)
    ]
