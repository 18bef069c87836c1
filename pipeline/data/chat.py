"""Chat messages -> token ids and labels, through the tokenizer's own chat template.

    encoded = encode_chat(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], max_length=128)

Only what the assistant says is supervised, its end-of-turn token included. The rendered text is tokenised as a whole, and a token is supervised
where its characters overlap an assistant's turn: so the response is always in `input_ids`, also where a token straddles the border.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
_MARK = "\ue000\ue001"  # private-use characters: no data and no template hold them
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Encoded:
    """input_ids and labels of equal length; labels are -100 where nothing is supervised."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int, last_turn_only: bool = False, given: str = ""
) -> Encoded | None:
    """Token ids and labels of a conversation, cut at max_length tokens; None where no supervised token is left.

    last_turn_only: of several assistant's turns only the last is supervised.
    given: what the last answer begins with and is not trained on.

    The first token is never supervised: nothing precedes it. Raises ValueError for a slow tokenizer, or a template that refuses the
    messages or changes what the assistant says.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets: use a model with a fast tokenizer (tokenizer.json)")
    text = render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = assistant_spans(tokenizer, messages, text)[-1 if last_turn_only else 0 :]
    if given:
        start, end = spans[-1]
        spans[-1] = (text.index(given, start, end) + len(given), end)
    labels = [
        token if any(start < end_ and begin_ < end for begin_, end_ in spans) else IGNORE
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    input_ids, labels = encoded["input_ids"][:max_length], labels[:max_length]
    if all(label == IGNORE for label in labels[1:]):
        return None
    return Encoded(list(input_ids), labels, truncated=len(encoded["input_ids"]) > max_length)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of a conversation that waits for the assistant's answer."""
    return list(tokenizer(render(tokenizer, messages, add_generation_prompt=True), add_special_tokens=False)["input_ids"])


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False) -> str:
    """The chat template's text. A system message moves into the first user message where the template knows no system role."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        if len(messages) < 2 or messages[0]["role"] != "system":
            raise ValueError(f"the chat template refuses the roles {[m['role'] for m in messages]}: {error}") from None
        first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        return render(tokenizer, [first, *messages[2:]], add_generation_prompt)


def assistant_spans(tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str) -> list[tuple[int, int]]:
    """Character spans of the assistant's turns in the rendered text: from where generation would begin to the end-of-turn marker.

    A turn begins where the conversation so far, rendered with the generation prompt, ends, and it ends where the conversation rendered up
    to it does. Templates that render a past turn otherwise than a present one (stripped reasoning, a date, a system prompt in the last user
    turn) have no such common prefix; there the turn is what changes when a mark stands in its place.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], add_generation_prompt=True)
        until = render(tokenizer, messages[: index + 1])
        if text.startswith(before) and text.startswith(until):
            start, end = len(before), len(until)
        else:
            start, end = _marked(tokenizer, messages, index, text)
            start = len(before) if text.startswith(before) else start
        end = start + len(text[start:end].rstrip())  # the line break that some templates put between turns is not the assistant's
        spans.append((start, end))
    return spans


def _marked(tokenizer: PreTrainedTokenizerBase, messages: Messages, index: int, text: str) -> tuple[int, int]:
    """Span of turn `index` in `text`: what a mark in the place of its content leaves in common is the template's, or other turns'.

    The end-of-turn marker belongs to it: what follows the mark where the conversation ends with this turn. Searching for the content itself
    could find it in what the user or the template says.
    """
    marked = [*messages[:index], {"role": "assistant", "content": _MARK}, *messages[index + 1 :]]
    head, found, tail = render(tokenizer, marked).partition(_MARK)
    start, end = len(head), len(text) - len(tail)
    if not found or start > end or not (text.startswith(head) and text.endswith(tail)):
        raise ValueError(
            "the chat template does not render the assistant's answer as it stands: set model.chat_template to a template that does"
        )
    marker = render(tokenizer, marked[: index + 1]).partition(_MARK)[2]
    return start, end + len(marker) if tail.startswith(marker) else end
