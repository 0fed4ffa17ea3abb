"""Texts of failed connections that operators may see: short, and without credentials."""

from __future__ import annotations

import re
from typing import Final

LONGEST_TEXT: Final = 300
HIDDEN: Final = "[hidden]"
_CREDENTIALS: Final = (
    # In URLs, also where a password has slashes: all up to the last @ before a blank or quote.
    (re.compile(r"(?<=://)[^\s\"'@]*(?:@[^\s\"'@]*)*@"), f"{HIDDEN}@"),
    (
        # Also within longer names, such as `client_secret` and `PGPASSWORD`.
        re.compile(
            r"(?i)((?:password|passwd|pwd|secret|token|api[-_]?key|access[-_]?key|authorization)\w*)"
            r"(\\?[\"']?\s*[=:]\s*)(?:(?:bearer|basic|digest|token)\s+)?"
            r"(?:\\\"(?:[^\"\\]|\\[^\"])*\\\"|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|[^\s,;&)]+)"
        ),
        rf"\1\2{HIDDEN}",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+[^\s,;\"']+"), rf"\1 {HIDDEN}"),
    # Kubernetes repeats refused values, such as those of a Secret: texts with escaped quotes, or whole objects.
    (re.compile(r"(?i)(invalid value: )(?:\"(?:\\.|[^\"\\])*\"|.+)"), rf"\1{HIDDEN}"),
)
"""Patterns of credentials, each with its replacement."""


def describe_failure(error: BaseException) -> str:
    """Return the innermost error as `Type: message`, in one line of at most 300 characters, without credentials.

    Errors of SQLAlchemy have statements and their values in their texts: the error of the driver is used in their
    place.
    """
    found = error
    # The cause of a time limit is a cancellation, which tells less.
    while isinstance(deeper := getattr(found, "orig", None) or found.__cause__, Exception):
        found = deeper
    text = " ".join(str(found).split())
    for pattern, replacement in _CREDENTIALS:
        text = pattern.sub(replacement, text)
    shown = f"{type(found).__name__}: {text}" if text else type(found).__name__
    return shown if len(shown) <= LONGEST_TEXT else f"{shown[: LONGEST_TEXT - 1]}…"
