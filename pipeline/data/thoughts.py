"""Thoughts before answers: what opens and closes them, in templates and in answers."""

from __future__ import annotations

import re

# What opens a thought, and what closes it.
THOUGHTS = {
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
    "<|channel>thought": "<channel|>",
}
_OPEN = "|".join(map(re.escape, THOUGHTS))
_CLOSE = "|".join(map(re.escape, THOUGHTS.values()))
OPENED = re.compile(rf"({_OPEN})\s*\Z")  # at the end of a text
# opened, or opened and closed with nothing in it
AT_THE_END = re.compile(rf"({_OPEN})\s*(?:({_CLOSE})\s*)?\Z")
EMPTY = re.compile(rf"\s*(?:{_OPEN})\s*(?:{_CLOSE})\s*")
CLOSED = re.compile(_CLOSE)


def without_thought(answer: str) -> str:
    """What an answer says after its thoughts."""
    closed = list(CLOSED.finditer(answer))
    return answer[closed[-1].end() :].strip() if closed else answer
