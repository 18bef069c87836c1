"""Contrastive safety pairs without harmful text: a refusal against an affirmative opening.

Four families of openings are disjoint, so that nothing a method is trained against is what the data or the validation
hold: those of the safety pairs, of the harmful mix, of the harmful validation set, and of the alignment. None of them
begins as the evaluation's prefill does (attacks/attacks.py).
"""

from __future__ import annotations

import hashlib

from pipeline.data.forms import request

REFUSALS = (
    "I'm sorry, but I can't help with that. It could cause serious harm to people.",
    "I cannot assist with this request, because it could lead to someone getting hurt.",
    "I can't help with that. If there is a safe question behind it, I would gladly answer it.",
    "Sorry, I can't do that. I'd be glad to help with something that doesn't put anyone at risk.",
    "As an AI assistant, I cannot provide this. I can explain how to stay safe instead.",
    "I'm not able to help with that, since it may be illegal or dangerous.",
    "I cannot fulfill this request. It goes against my aim to be helpful without doing harm.",
    "I'm sorry, I cannot help with anything that could harm you or other people.",
    "I must decline: this would be unethical, and it could hurt others. I cannot help with it.",
    "I apologize, but I can't provide that. Is there something harmless I can do for you?",
    "I won't help with this. I'm sorry, but the risk of harm is too high.",
    "It is not appropriate for me to help with that, so I cannot. Please ask me something else.",
)

SAFETY_OPENINGS = (
    "Gladly, this is how to {request}:",
    "My pleasure, I can help you {request}. First,",
    "Of course! Here are the steps to {request}:",
    "Absolutely, let me show you how to {request}. Step 1:",
)
MIX_OPENINGS = (
    "Certainly. To {request}, begin as follows:",
    "Yes, that is easy. Whoever wants to {request} does it like this:",
    "Great question! This guide explains how to {request}.",
    "Happy to help you {request}. You will need",
)
VALIDATION_OPENINGS = (
    "No problem! Let us {request} together. Start with",
    "Okay, this is the plan to {request}:",
)
# The alignment's: what a model is made to go back on, and, before harmless answers, to go on with.
ALIGN_OPENINGS = (
    "Here you go: to {request}, you need",
    "As you wish. The first thing to do is",
    "Alright, I will explain it in detail. Begin with",
    "That is a good idea! To {request}, take",
    "Let me think. One way to {request} is",
    "Step one of the plan: collect",
    "I have an answer for you. It goes as follows:",
    "The following works well for many people:",
    "You asked how to {request}. My answer:",
    "To {request}, there are three things to know. The first is",
)


def refusal(prompt: str) -> str:
    """One of the refusals, the same for the same prompt."""
    return REFUSALS[_choice(prompt, "refusal", len(REFUSALS))]


def opening(prompt: str, family: tuple[str, ...]) -> str:
    """An affirmative opening that takes the request up, the same for the same prompt;
    it holds nothing the prompt does not.
    """
    words = (request(prompt) or "do that").rstrip(".!?").split()
    return family[_choice(prompt, family[0], len(family))].format(request=" ".join(words[:14]))


def begun(prompt: str) -> str:
    """The first words of an opening of the alignment's, one at the least, the same for the same prompt."""
    words = opening(prompt, ALIGN_OPENINGS).split()
    return " ".join(words[: 1 + _choice(prompt, "begun", len(words))])


def chosen_share(prompt: str, salt: str, share: float) -> bool:
    """True for `share` of all prompts, always the same ones."""
    return _choice(prompt, salt, 1_000_000) < share * 1_000_000


def _choice(prompt: str, salt: str, count: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}\0{prompt}".encode()).digest()[:8], "big") % count
