"""Redaction of secrets in texts from outside, such as responses that repeat them.

A secret of one to three characters occurs in half of all words, and redacting it there would reveal it. It is redacted
only between blanks, quotes, brackets or separators, or as the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from engine.run_errors import NodeError

if TYPE_CHECKING:
    from engine.values import Json

REDACTED: Final = "[hidden]"
SHORTEST_ANYWHERE: Final = 4
"""Minimum length of a secret that is redacted within words too."""
_BEFORE: Final = r"(?<![^\s\"'`=:,;&?/|(){}\[\]<>])"
_AFTER: Final = r"(?![^\s\"'`=:,;&?/|(){}\[\]<>.!])"
_QUOTED_OR_WHOLE: Final = r"(?<=\")%s(?=\")|(?<=')%s(?=')|(?<==)%s(?=[&;\s]|\Z)|\A%s\Z"
"""Positions in the body of a response, where `1` between blanks or after a colon is a number, and JSON without it is
invalid.
"""


def redact_text(text: str, secrets: Iterable[str]) -> str:
    """Return a text, such as an error message, with the secrets replaced by `[hidden]`.

    Secrets under four characters are replaced only as whole words.
    """
    for secret in _sort_longest_first(secrets):
        if len(secret) >= SHORTEST_ANYWHERE:
            text = text.replace(secret, REDACTED)
        else:
            text = re.sub(f"{_BEFORE}{re.escape(secret)}{_AFTER}", REDACTED, text)
    return text


class PieceRedactor:
    """Redaction of a text that arrives in pieces: the beginning of a secret at the end of a piece is held back.

    A secret under four characters at the beginning of a piece is redacted even within a word.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = _sort_longest_first(secrets)
        self._long = [secret for secret in self._secrets if len(secret) >= SHORTEST_ANYWHERE]
        self._held = ""

    def feed(self, piece: str) -> str:
        """Add a piece of the text, and return the next redacted part of it, without an end that may begin a secret;
        possibly empty.
        """
        if not self._secrets:
            return piece
        text = self._held + piece
        shown = self._find_held(text)
        self._held = text[shown:]
        return redact_text(text[:shown], self._secrets)

    def _find_held(self, text: str) -> int:
        """Return the position from which the end of a text is held back, since it may begin a secret.

        A complete secret may end with its own beginning: it is redacted as a whole, and only the text behind it may
        begin another one.
        """
        held = self._find_beginning(text, 0)
        for match in re.finditer("|".join(map(re.escape, self._long)), text) if self._long else ():
            if match.start() >= held:
                break
            if match.end() > held:
                held = self._find_beginning(text, match.end())
        return held

    def _find_beginning(self, text: str, start: int) -> int:
        """Return the first position from `start` at which the rest of a text may begin a secret; the length of the text
        for none.
        """
        return len(text) - max(_count_held(text[start:], secret) for secret in self._secrets)

    def finish(self) -> str:
        """Return the redacted rest of the text, which was held back; the text has ended."""
        rest, self._held = self._held, ""
        return redact_text(rest, self._secrets)


def _count_held(text: str, secret: str) -> int:
    """Return the length of the longest end of a text that is also the beginning of a secret; 0 for none.

    A short secret is held back as a whole, since the next character decides whether it is a word.
    """
    longest = len(secret) - 1 if len(secret) >= SHORTEST_ANYWHERE else len(secret)
    if secret[0] not in text[-longest:]:
        return 0
    return next((size for size in range(min(longest, len(text)), 0, -1) if text.endswith(secret[:size])), 0)


def redact_excerpt(text: str, secrets: Iterable[str]) -> str:
    """Return a text that may be truncated, such as a quoted error, with the secrets replaced by `[hidden]`.

    At its end, the first four or more characters of a secret are replaced, too.
    """
    found = list(secrets)
    text = redact_text(text, found)
    for secret in _sort_longest_first(found):
        for length in range(min(len(secret), len(text)), SHORTEST_ANYWHERE - 1, -1):
            if text.endswith(secret[:length]):
                return text[:-length] + REDACTED
    return text


def redact_value(value: Json, secrets: Iterable[str]) -> Json:
    """Return a JSON value with the secrets in its texts and names replaced by `[hidden]`.

    Its texts are searched, not their encoding: a server may escape the same secret in many ways. Raises
    `RecursionError` for deep nesting.
    """
    match value:
        case str():
            return redact_text(value, secrets)
        case list():
            return [redact_value(each, secrets) for each in value]
        case dict():
            return {redact_text(name, secrets): redact_value(each, secrets) for name, each in value.items()}
        case _:
            return value


@contextmanager
def redact_errors(secrets: Iterable[str]) -> Iterator[None]:
    """Redact secrets in the message of a `NodeError` that the block raises: a server may repeat secrets that
    it got. Its code and its retries stay.
    """
    try:
        yield
    except NodeError as error:
        shown = redact_excerpt(error.message, secrets)
        if shown == error.message:
            raise
        raise NodeError(
            shown, code=error.code, retryable=error.retryable, retry_after_seconds=error.retry_after_seconds
        ) from None


def redact_body(body: bytes, secrets: Iterable[str]) -> bytes:
    """Return the body of a response with the secrets replaced by `[hidden]`.

    Secrets under four characters are replaced only in quotes, as the value of a field, or as the whole body.
    """
    for secret in _sort_longest_first(secrets):
        if len(secret) >= SHORTEST_ANYWHERE:
            body = body.replace(secret.encode(), REDACTED.encode())
        else:
            escaped = re.escape(secret)
            pattern = (_QUOTED_OR_WHOLE % ((escaped,) * 4)).encode()
            body = re.sub(pattern, REDACTED.encode(), body)
    return body


def _sort_longest_first(secrets: Iterable[str]) -> list[str]:
    """Return each secret once, without empty ones, the longest first, so that a secret that contains another is
    redacted as a whole.
    """
    return sorted({secret for secret in secrets if secret}, key=len, reverse=True)
