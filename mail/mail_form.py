"""Posted form of a mail service, independent of its encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mail.headers import Raw


@dataclass(frozen=True, slots=True)
class FormFile:
    """Part of a form with a file name."""

    field: str
    filename: str
    content_type: str
    content: Raw


@dataclass(frozen=True, slots=True)
class MailForm:
    fields: Mapping[str, Sequence[Raw]] = field(default_factory=dict)
    """Values in their order, by case-sensitive names: `from` and `From` are two fields."""
    files: Sequence[FormFile] = ()

    def first(self, name: str) -> Raw:
        """Return the first value of a field; empty without one."""
        values = self.fields.get(name)
        return values[0] if values else b""
