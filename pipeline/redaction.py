"""What must never be printed, logged or written: secrets, found by the name they stand under or by how they look.

    redact({"hf_token": 5, "uri": "http://ann:pw@host"})  # {"hf_token": "[redacted]", "uri": "http://[redacted]@host"}
"""

from __future__ import annotations

import re
from typing import Any

REDACTED = "[redacted]"

# "token" only in the singular: max_new_tokens is a number, not a secret. "key" alone is none either.
_NAME = re.compile(r"(token|secrets?|passwords?|passwd|passphrase|(api|access|private|secret)[_-]?keys?|credentials?|authorization)$", re.I)
_PARAMETER = re.compile(r"([?&;#][^=&\s]*(?:password|passwd|token|secret|key|credential|signature|\bsig\b)[^=&\s]*=)[^&\s]+", re.I)
_ADDRESS = re.compile(r"(?<!sqlite)(?<!file)://(\S+)@(\S*)")  # the greedy \S+ ends at the last @; paths of local files may hold one
_SCHEME = re.compile(r"\b((?i:bearer)|Basic)(\s+)\S+")
_TOKEN = re.compile(r"\b(?:(?:hf|gh[opusr])_[A-Za-z0-9]{8,}|github_pat_\w{8,}|sk-[\w-]{8,}|A[KS]IA[0-9A-Z]{12,})")


def secret_name(name: Any) -> bool:
    """Whether what stands under this name is a secret, whatever it looks like."""
    return bool(_NAME.search(str(name)))


def redact(value: Any) -> Any:
    """A copy with secrets replaced: whatever stands under a secret-looking key, and logins, parameters and tokens inside text."""
    if isinstance(value, dict):
        return {key: REDACTED if secret_name(key) and item is not None else redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return _redact_text(value) if isinstance(value, str) else value


def _redact_text(text: str) -> str:
    text = _ADDRESS.sub(_redact_address, text)
    text = _PARAMETER.sub(rf"\1{REDACTED}", text)
    text = _SCHEME.sub(rf"\1\2{REDACTED}", text)
    return _TOKEN.sub(REDACTED, text)


def _redact_address(match: re.Match[str]) -> str:
    """Hide the login and keep the host; where a secret parameter comes before the @, what follows it may be the secret's end."""
    return f"://{REDACTED}" if _PARAMETER.search(match[1]) else f"://{REDACTED}@{match[2]}"
