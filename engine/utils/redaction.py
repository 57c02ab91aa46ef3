"""Hide values of secret keys, passwords in URLs, and Authorization headers.

Applied before a configuration is saved, printed or sent to a logger, and to every message that the command prints.
"""

from __future__ import annotations

import re
from typing import Any

REDACTED = "<redacted>"

_SECRET_WORDS = {"secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential", "credentials"}
# A key that ends in `token` is secret, except tokens of a vocabulary: stop_token and eos_token are plain text.
_VOCABULARY_WORDS = {"bos", "eos", "pad", "unk", "stop", "mask", "sep", "cls", "image", "special", "end", "start"}
_ACCESS_WORDS = {"api", "access", "auth", "private", "signing", "encryption", "hub", "bearer", "refresh"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SCHEME = r"[a-zA-Z][a-zA-Z0-9+.-]*"
_RULES = (
    (re.compile(rf"({_SCHEME}://)[^\s/?#'\"@]+@"), rf"\1{REDACTED}@"),
    (
        re.compile(r"(?i)\b(authorization['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic|token)\s+)?[^\s'\",;]+"),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"(?i)\b((?:bearer|basic)\s+)[A-Za-z0-9._~+/-]{6,}=*"), rf"\1{REDACTED}"),
)
_ASSIGNMENT = re.compile(r"([\w.\[\]-]*\w)=('[^']*'|\"[^\"]*\"|[^\s&;,'\"`)]+)")


def is_secret(name: object) -> bool:
    """Return whether a key of this name holds a secret.

    `hub_token`, `api_key` and `password` do; `token_budget`, `max_new_tokens` and `label_key` do not.
    """
    words = [word.lower() for word in _WORD.findall(str(name))]
    if not words:
        return False
    last, second_last = words[-1], words[-2] if len(words) > 1 else ""
    if _SECRET_WORDS & set(words):
        return True
    if last == "token":
        return second_last not in _VOCABULARY_WORDS
    return last in ("tokens", "key", "keys", "apikey") and (second_last in _ACCESS_WORDS or last == "apikey")


def redact_text(text: str) -> str:
    """Return `text` with passwords in URLs, Authorization headers and values of `secret_key=value` replaced."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return _ASSIGNMENT.sub(_without_value, text)


def redact(value: Any, name: object = "") -> Any:
    """Return plain data with secrets replaced: the complete text under a secret key, parts of any other text."""
    if isinstance(value, dict):
        return {key: redact(item, name if is_secret(name) else key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return REDACTED if is_secret(name) else redact_text(value)


def _without_value(match: re.Match) -> str:
    return f"{match[1]}={REDACTED}" if is_secret(match[1].rpartition(".")[2]) else match[0]
