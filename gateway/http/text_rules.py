"""What clients call things, as it is kept: texts composed (NFC) and without control characters, ids as they are."""

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


def is_allowed_text(max_length: int, *, min_length: int = 0) -> Meta:
    """Say in the document of the API what is checked below, where the check can say better what is wrong."""
    return Meta(extra_json_schema={"minLength": min_length, "maxLength": max_length})


class ProblemCollector:
    """Collects what is wrong with a body, so that all of it can be told at once."""

    def __init__(self) -> None:
        self.found: list[Mapping[str, Json]] = []

    def add(self, path: str, code: str, message: str) -> None:
        self.found.append(errors.problem(path, code, message))

    @property
    def is_full(self) -> bool:
        """Tell whether there is more than an answer lists: the rest needn't be looked for."""
        return len(self.found) >= limits.FINDINGS

    def raise_any(self) -> None:
        """Raise 422 `validation-failed` where anything was found."""
        if self.found:
            raise errors.invalid(self.found)


def check_line(
    value: str, path: str, problems: ProblemCollector, *, max_length: int, may_be_empty: bool = False
) -> str:
    """Return a text of one line as it is kept."""
    kept = unicodedata.normalize("NFC", value).strip()
    if not kept and not may_be_empty:
        problems.add(path, "required", f"{path} must not be empty")
    if len(kept) > max_length:
        problems.add(path, "too-long", f"{path} may have at most {max_length:,} characters")
    # Most texts are printable throughout, which is far quicker to see.
    if not kept.isprintable() and any(unicodedata.category(one) in {"Cc", "Zl", "Zp"} for one in kept):
        problems.add(path, "control-character", f"{path} must not hold control characters")
    return kept


def check_identifier(value: str, path: str, problems: ProblemCollector) -> str:
    """Return an id that a client has chosen."""
    if not ids.is_id(value):
        problems.add(path, "invalid-id", f"{path} must have 1 to 64 of the characters A-Z a-z 0-9 _ -")
    return value


def check_paragraphs(value: str, path: str, problems: ProblemCollector, *, max_length: int) -> str:
    """Return a text of several lines as it is kept."""
    kept = unicodedata.normalize("NFC", value)
    if len(kept) > max_length:
        problems.add(path, "too-long", f"{path} may have at most {max_length:,} characters")
    if any(unicodedata.category(character) == "Cc" for character in kept if character not in _LINES):
        problems.add(path, "control-character", f"{path} must not hold control characters")
    return kept
