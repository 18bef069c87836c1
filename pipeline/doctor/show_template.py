"""What a model's chat template makes of conversations, and what of them is trained: `sap template MODEL`.

    sap template Qwen/Qwen3-8B
    sap template ./model --chat-template mine.jinja

Prints a conversation with the supervised tokens marked, what is done otherwise than the template does, and what it
takes beside text. Reads the tokenizer alone, no weight.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.chat import IGNORE, Chat, Encoded, Messages
from pipeline.recipe.sections import ModelSection
from pipeline.system.system_errors import reading_input

_ASKED = {"role": "user", "content": "How many legs has a duck?"}
_CALL = {
    "type": "function",
    "function": {"name": "count", "arguments": {"what": "legs", "of": "duck"}},
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "Count parts of an animal.",
        "parameters": {
            "type": "object",
            "properties": {"what": {"type": "string"}, "of": {"type": "string"}},
        },
    },
}
_CONVERSATION: Messages = [
    {"role": "system", "content": "You know all about animals."},
    _ASKED,
    {"role": "assistant", "content": "A duck has two legs."},
    {"role": "user", "content": "And a cow?"},
    {"role": "assistant", "content": "Four."},
]
_EXTRAS: dict[str, Messages] = {
    "an assistant that speaks first": [
        {"role": "assistant", "content": "Hello, what is it?"},
        *_CONVERSATION[1:3],
    ],
    "reasoning_content": [
        _ASKED,
        {"role": "assistant", "content": "Two.", "reasoning_content": "Ducks are birds."},
    ],
    "tool calls": [
        _ASKED,
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {"role": "tool", "content": "2", "name": "count", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "Two."},
    ],
}


def main(argv: Sequence[str]) -> int:
    """`sap template`'s part of the command line; returns the exit code. ValueError for a template that is refused."""
    parser = argparse.ArgumentParser(
        prog="sap template",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder, hub id or builtin:NAME")
    parser.add_argument(
        "--chat-template",
        type=Path,
        help="Jinja file that replaces the model's own, as model.chat_template does",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    options = parser.parse_args(argv)
    # torch takes seconds to import, and --help is answered without it
    from pipeline.model.models import load_chat

    path = (
        str(Path(options.model).expanduser().absolute())
        if Path(options.model).expanduser().is_dir()
        else options.model
    )
    section = ModelSection(
        path=path, chat_template=options.chat_template, revision=options.revision
    )
    with reading_input():
        chat = load_chat(section)
    print(describe(chat, colour=sys.stdout.isatty()))
    return 0


def describe(chat: Chat, colour: bool = False) -> str:
    """The conversation as it is trained, and what the template takes beside text; ValueError where it is refused."""
    stops = ", ".join(chat.tokenizer.convert_ids_to_tokens(sorted(chat.template.stops)))
    tools = [_TOOL] if chat.template.renderer.needs_tools else None
    samples = chat.encode(_CONVERSATION, 10**6, tools=tools)
    lines = [
        f"{chat.template.name}: a system prompt and two turns, trained in {_sequences(len(samples))}"
    ]
    lines += ["supervised tokens are " + ("green" if colour else "between « and »"), ""]
    for sample in samples:
        lines += [marked(chat, sample, colour), ""]
    lines += [f"generation stops at {stops}"]
    lines += [f"- {note}" for note in sorted(chat.notes)] or ["- the template is rendered as it is"]
    lines += [f"- content is given as {'parts' if chat.template.renderer.wants_parts else 'text'}"]
    for name, messages in _EXTRAS.items():
        try:
            chat.encode(messages, 10**6, tools=[_TOOL] if name == "tool calls" else tools)
            lines.append(f"- {name}: taken")
        except ValueError as error:
            lines.append(
                f"- {name}: refused ({str(error).removeprefix(chat.template.name).strip()})"
            )
    return "\n".join(lines)


def marked(chat: Chat, sample: Encoded, colour: bool = False) -> str:
    """A sequence as text, its supervised tokens marked."""
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("«", "»")
    labels = sample.labels
    changes = [
        place
        for place in range(1, len(labels))
        if (labels[place] == IGNORE) != (labels[place - 1] == IGNORE)
    ]
    borders = [0, *changes, len(labels)]  # the first token is never supervised
    text = ""
    for number, (start, stop) in enumerate(itertools.pairwise(borders)):
        piece = chat.tokenizer.decode(
            sample.input_ids[start:stop], clean_up_tokenization_spaces=False
        )
        text += f"{begin}{piece}{end}" if number % 2 else piece
    return text


def _sequences(count: int) -> str:
    return "one sequence" if count == 1 else f"{count} sequences"
