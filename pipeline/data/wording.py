"""What of a prompt's wording makes it another prompt.

    normalise("“How do I open it ?”") == normalise("how do i open it")
    normalise("What is 7 + 3?") == normalise("what is 7+3") != normalise("What is 7 - 3?")

Two prompts are one where a reader would not count them as two questions. Letters, digits, combining marks and symbols
of every script make another prompt. These do not:

- letter case, and full and half width (NFKC); raised and lowered digits and fractions stay: 10² is no 102;
- which of the characters for a quote or a dash was typed, and characters that nobody sees;
- white space, as far as it is more than one space, stands beside an operator, a bracket or Chinese or Japanese
  characters, or before a comma or stop;
- quotes around the whole, what ends a sentence at the end of the whole, and an inverted mark at its beginning.

A prompt of which nothing would be left, such as "?", is what it is.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

_LOOK_ALIKE = {"'": "‘’‚‛‹›ʻʼ′", '"': "“”„‟«»″", "-": "‐‑‒–—―−﹘︱︲"}
# Soft hyphen, zero-width space, word joiner, byte order mark, directions of writing, text or emoji style. The joiners
# of emoji and of Indic and Persian letters are seen, so they stay.
_UNSEEN = "\u00ad\u200b\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff\ufe0e\ufe0f"
_VARIANTS = str.maketrans(
    {typed: kept for kept, variants in _LOOK_ALIKE.items() for typed in variants}
    | dict.fromkeys(_UNSEEN)
)
_ACCENT_AS_APOSTROPHE = re.compile(r"[´`](?<=[^\W\d_].)(?=[^\W\d_])")
# digits, signs, fractions
_RAISED = re.compile("([\u00b2\u00b3\u00b9\u2070-\u209c\u00bc-\u00be\u2150-\u215f\u2189])")
# A comma between words says how they hang together, and is left out or put in at will: "Please, tell me". Within and
# after numbers and single letters it tells things apart: 1,5 and 15, f(a, b). Other marks inside a prompt stay: a full
# stop, a colon or a hyphen is as often part of a number, a name or code as it is punctuation.
_COMMA = re.compile("[,،](?= )")
_OPERATORS = r"+\-*/=<>&|^%~#@$\\()\[\]{}\"'×÷±\u2190-\u22ff"
_UNSPACED = "\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # scripts that put no spaces between words
_LOOSE_SPACE = re.compile(
    rf" (?:(?=[.,:;!?،؛؟{_OPERATORS}{_UNSPACED}])|(?<=[{_OPERATORS}{_UNSPACED}] ))"
)
_ENDS = " .?!;。؟۔।॥։።፧។၊။"  # a semicolon is the Greek question mark, and ends a line of code
# Every turn is asked for several times, and normalising takes a hundred times as long as this. sha256 of a prompt ->
# sha256 of what it is when normalised: the prompts themselves would stay in memory.
_known: dict[bytes, bytes] = {}
_KNOWN_AT_MOST = 1_000_000
_QUOTES = {"'": "'", '"': '"', "「": "」", "『": "』", "`": "`"}


def normalise(prompt: str) -> str:
    """The prompt without what makes no other prompt of it. Empty for white space alone."""
    typed = prompt if prompt.isascii() else prompt.translate(_VARIANTS)
    text = _ACCENT_AS_APOSTROPHE.sub("'", typed)
    text = "".join(
        part if _RAISED.fullmatch(part) else _folded(part) for part in _RAISED.split(text)
    )
    text = _COMMA.sub(_comma, _LOOSE_SPACE.sub("", " ".join(text.split())))
    return _bare(text) or text


def wording(prompt: str) -> bytes:
    """sha256 of the normalised prompt."""
    raw = hashlib.sha256(_utf8(prompt)).digest()
    if raw not in _known:
        if len(_known) == _KNOWN_AT_MOST:
            _known.clear()
        _known[raw] = hashlib.sha256(_utf8(normalise(prompt))).digest()
    return _known[raw]


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _folded(text: str) -> str:
    """NFKC in one letter case. Folding the case may leave what NFKC changes again."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _comma(found: re.Match[str]) -> str:
    text, at = found.string, found.start()
    beside = text[max(at - 2, 0) : at] + text[at + 2 : at + 3]
    return (
        ""
        if len(beside) == 3 and all(unicodedata.category(char)[0] in "LM" for char in beside)
        else found[0]
    )


def _bare(text: str) -> str:
    """Without quotes around the whole and what ends its last sentence, in whatever order they stand."""
    while True:
        inner = text.rstrip(_ENDS).lstrip("¿¡ ")
        closing = _QUOTES.get(inner[:1])
        if (
            closing
            and len(inner) > 2
            and inner.endswith(closing)
            and not {inner[0], closing} & set(inner[1:-1])
        ):
            inner = inner[1:-1]
        if inner == text:
            return text
        text = inner
