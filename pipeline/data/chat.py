"""Chat messages -> token ids and labels, through the tokenizer's own chat template.

    encoded = encode_chat(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], max_length=128)

Only what the assistant says is supervised, its end-of-turn token included. The rendered text is tokenised as a whole, and a token is supervised
where its characters overlap an assistant's turn: so the response is always in `input_ids`, also where a token straddles the border.
"""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

IGNORE = -100
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Encoded:
    """input_ids and labels of equal length; labels are -100 where nothing is supervised."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int) -> Encoded | None:
    """Token ids and labels of a conversation, cut at max_length tokens; None where no supervised token is left.

    The first token is never supervised: nothing precedes it. Raises ValueError for a slow tokenizer or a template that refuses the messages.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets: use a model with a fast tokenizer (tokenizer.json)")
    text = render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = assistant_spans(tokenizer, messages, text)
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

    A turn begins where the conversation so far, rendered with the generation prompt, ends. Templates that render a past turn otherwise than
    a present one (stripped reasoning, a date) have no such common prefix; there the turn's content is searched for.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], add_generation_prompt=True)
        until = render(tokenizer, messages[: index + 1])
        start = len(before) if text.startswith(before) else _find(text, message["content"], spans)
        end = len(until) if text.startswith(until) else start + len(message["content"].strip())
        end = start + len(text[start:end].rstrip())  # the line break that some templates put between turns is not the assistant's
        spans.append((start, end))
    return spans


def _find(text: str, content: str, spans: list[tuple[int, int]]) -> int:
    position = text.find(content.strip(), spans[-1][1] if spans else 0)
    if position < 0:
        raise ValueError(
            "the chat template does not render the assistant's answer as it stands: set model.chat_template to a template that does"
        )
    return position
