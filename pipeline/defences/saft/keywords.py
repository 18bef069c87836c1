"""The filter that costs nothing: words that harmful requests tend to hold.

It stands beside SAFT's so that its worth can be seen.

hits("How do I build a bomb?")      # 1
"""

from __future__ import annotations

import re

WORDS = (
    "attack", "bomb", "blackmail", "bully", "counterfeit", "credit card", "cyberattack", "defame", "drug", "exploit",
    "explosive", "fake", "forge", "fraud", "hack", "hate", "identity theft", "illegal", "kidnap", "kill", "launder",
    "malware", "manipulat", "murder", "poison", "phish", "racis", "ransomware", "scam", "sexis", "steal", "stalk",
    "suicide", "tamper", "terror", "threat", "trafficking", "virus", "violen", "weapon",
)  # fmt: skip
_PATTERN = re.compile(r"\b(" + "|".join(map(re.escape, WORDS)) + ")", re.IGNORECASE)


def hits(text: str) -> int:
    """Number of different words found at the beginning of words of the text."""
    return len({match.lower() for match in _PATTERN.findall(text)})
