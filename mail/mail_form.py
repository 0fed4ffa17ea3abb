"""A form that a mail service handed in, as far as it has been taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mail.headers import Raw


@dataclass(frozen=True, slots=True)
class FormFile:
    """A part of a form that has the name of a file."""

    field: str
    filename: str
    content_type: str
    content: Raw


@dataclass(frozen=True, slots=True)
class MailForm:
    fields: Mapping[str, Sequence[Raw]] = field(default_factory=dict)
    """Values in their order, by names in their own case: `from` and `From` are two."""
    files: Sequence[FormFile] = ()

    def first(self, name: str) -> Raw:
        """Return the first value of a field; empty: there is none."""
        values = self.fields.get(name)
        return values[0] if values else b""
