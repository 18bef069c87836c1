"""What must never be printed, logged or written: secrets, found by the name they stand under or by how they look.

    redact({"hf_token": 5, "uri": "http://ann:pw@host"})  # {"hf_token": "[redacted]", "uri": "http://[redacted]@host"}
    with shielded(): print(error)                         # whatever is printed inside is redacted

Looks are: logins and parameters of addresses, tokens of services that mark theirs, and words of letters and digits as
only a generator makes them. The values of the environment's own secrets are known, and found as they are.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

REDACTED = "[redacted]"

# "token" only in the singular: max_new_tokens is a number, not a secret. "key" alone is none either.
_NAME = re.compile(
    r"(token|secrets?|passwords?|passwd|passphrase|(api|access|private|secret|signing)[_-]?keys?"
    r"|credentials?|authorization)$",
    re.I,
)
_PARAMETER = re.compile(
    r"([?&;#][^=&\s]*(?:password|passwd|token|secret|key|credential|signature|\bsig\b)[^=&\s]*=)[^&\s]+",
    re.I,
)
# The greedy \S+ ends at the last @; paths of local files may hold one. One slash is enough:
# so pathlib leaves an address.
_ADDRESS = re.compile(r"(?<!sqlite)(?<!file)(?<=[a-z]):(//?)([^\s/]\S*)@(\S*)", re.I)
_SCHEME = re.compile(r"\b((?i:bearer)|Basic)(\s+)\S+")
_TOKEN = re.compile(
    r"\b(?:(?:hf|api_org|gh[opusr]|npm|dop_v1|pypi|xapp|ya29|lin_api|shpat|r8|gsk|pplx|nvapi)[_.-][A-Za-z0-9_-]{8,}"
    r"|github_pat_\w{8,}"
    r"|glpat-[\w-]{8,}|xox[abeoprs]-[\w-]{8,}|[sr]k[-_][\w-]{8,}|A[KS]IA[0-9A-Z]{12,}|AIza[\w-]{30,}|GOCSPX-[\w-]{8,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|SG\.[\w-]{16,}\.[\w-]{16,})"
)
# A word by itself, in no path and no name of a model: as long as a key, of both cases and digits.
_WORD = re.compile(r"(?<![\w/.+-])[A-Za-z0-9+]{24,}={0,2}(?![\w/.-])")
# characters of an environment's secret that is looked for: a shorter one would be found in any text
_SHORTEST = 8


def secret_name(name: Any) -> bool:
    """Whether what stands under this name is a secret, whatever it looks like."""
    return bool(_NAME.search(str(name)))


def token_in(text: str) -> bool:
    """Whether a text holds a token of a service that marks its own."""
    return bool(_TOKEN.search(text))


def redact(value: Any) -> Any:
    """A copy with secrets replaced: whatever stands under a secret-looking key, and logins,
    parameters and tokens inside text.
    """
    if isinstance(value, dict):
        return {
            key: REDACTED if secret_name(key) and item is not None else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return _redact_text(value) if isinstance(value, str) else value


def _redact_text(text: str) -> str:
    text = _ADDRESS.sub(_redact_address, text)
    text = _PARAMETER.sub(rf"\1{REDACTED}", text)
    text = _SCHEME.sub(rf"\1\2{REDACTED}", text)
    text = _TOKEN.sub(REDACTED, text)
    text = _WORD.sub(lambda match: REDACTED if _generated(match[0]) else match[0], text)
    for secret in _of_the_environment():
        text = text.replace(secret, REDACTED)
    return text


def _generated(word: str) -> bool:
    """Whether a word looks drawn at random: its kinds of characters change at every second place or so."""
    kinds = ["A" if c.isupper() else "a" if c.islower() else "0" for c in word.rstrip("=")]
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    return len(set(kinds)) == 3 and changes >= len(kinds) / 3


def _of_the_environment() -> list[str]:
    return [
        value for name, value in os.environ.items() if secret_name(name) and len(value) >= _SHORTEST
    ]


class _Shield:
    """A text stream that redacts what is written to it; in all else the stream itself."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Inside the block what this process prints is redacted, whoever prints it:
    also loggers that were set up before.
    """
    before = sys.stdout, sys.stderr
    shields = [stream if isinstance(stream, _Shield) else _Shield(stream) for stream in before]
    sys.stdout, sys.stderr = shields
    held = [
        (handler, shields[before.index(handler.stream)])
        for handler in _handlers()
        if handler.stream in before
    ]
    for handler, shield in held:
        handler.setStream(shield)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for handler, shield in held:
            if handler.stream is shield:
                handler.setStream(before[shields.index(shield)])


def _handlers() -> list[logging.StreamHandler]:
    """Those of all loggers that there are. In a forked job they were made while its parent imported."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
    }
    return [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]


def _redact_address(match: re.Match[str]) -> str:
    """Hide the login and keep the host; where a secret parameter comes before the @,
    what follows it may be the secret's end.
    """
    return (
        f":{match[1]}{REDACTED}"
        if _PARAMETER.search(match[2])
        else f":{match[1]}{REDACTED}@{match[3]}"
    )
