"""Rules for names and texts of clients: stored in NFC, without control characters; ids are stored unchanged."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from msgspec import Meta

from gateway.http import errors, limits
from models import ids

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.values import Json

_LINES = frozenset("\n\r\t")


def describe_length(max_length: int, *, min_length: int = 0) -> Meta:
    """Return an annotation that documents the length of a text in OpenAPI; it checks nothing.

    The functions below check the limits, with better messages than those of msgspec.
    """
    return Meta(extra_json_schema={"minLength": min_length, "maxLength": max_length})


class ProblemCollector:
    """Collector of the problems of a body, so that one answer lists all of them."""

    def __init__(self) -> None:
        self.found: list[Mapping[str, Json]] = []

    def add(self, path: str, code: str, message: str) -> None:
        """Add a problem of the field at `path`: the code of the rule, and a message with the correction."""
        self.found.append(errors.problem(path, code, message))

    @property
    def is_full(self) -> bool:
        """Whether there are as many problems (100) as an answer lists, so that the check may end."""
        return len(self.found) >= limits.FINDINGS

    def raise_any(self) -> None:
        """Raise one 422 error `validation-failed` that lists all collected problems; do nothing without any."""
        if self.found:
            raise errors.invalid(self.found)


def check_line(
    value: str, path: str, problems: ProblemCollector, *, max_length: int, may_be_empty: bool = False
) -> str:
    """Return a one-line text in its stored form, also if it is invalid: normalized (NFC) and without surrounding
    spaces.

    A text that is empty (unless it may be) or too long, or has control characters, is added to `problems` with `path`.
    """
    kept = unicodedata.normalize("NFC", value).strip()
    if not kept and not may_be_empty:
        problems.add(path, "required", f"{path} must not be empty")
    if len(kept) > max_length:
        problems.add(path, "too-long", f"{path} may have at most {max_length:,} characters")
    # Most texts are printable, which is a much faster check.
    if not kept.isprintable() and any(unicodedata.category(one) in {"Cc", "Zl", "Zp"} for one in kept):
        problems.add(path, "control-character", f"{path} must not contain control characters")
    return kept


def check_identifier(value: str, path: str, problems: ProblemCollector) -> str:
    """Return a client's id unchanged; unless it has 1 to 64 letters, digits, `_` and `-`, a problem with `path` is
    added to `problems`.
    """
    if not ids.is_id(value):
        problems.add(path, "invalid-id", f"{path} must have 1 to 64 of the characters A-Z a-z 0-9 _ -")
    return value


def check_paragraphs(value: str, path: str, problems: ProblemCollector, *, max_length: int) -> str:
    """Return a text of several lines in its stored form, normalized (NFC), also if it is invalid.

    A text that is too long, or has control characters other than line breaks and tabs, is added to `problems` with
    `path`.
    """
    kept = unicodedata.normalize("NFC", value)
    if len(kept) > max_length:
        problems.add(path, "too-long", f"{path} may have at most {max_length:,} characters")
    if any(unicodedata.category(character) == "Cc" for character in kept if character not in _LINES):
        problems.add(path, "control-character", f"{path} must not contain control characters")
    return kept
