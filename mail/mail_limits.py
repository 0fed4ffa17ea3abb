"""Limits of a mail, which bound the time and memory of its parsing."""

from __future__ import annotations

from msgspec import Struct


class InvalidMail(ValueError):
    """A mail that can't be parsed, or exceeds a limit; a retry would fail too."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class MailLimits(Struct, frozen=True):
    """Limits of one mail."""

    max_depth: int = 20
    """Maximum depth of nested multipart containers."""
    max_parts: int = 1_000
    max_header_bytes: int = 262_144
    """Maximum size of all headers of the mail, or of one part."""
    max_headers_bytes: int = 2_097_152
    """Maximum size of the headers of all parts together."""
    max_text_bytes: int = 5_000_000
    """Maximum encoded size of all body texts; a text beyond it becomes an attachment."""
    max_attachments: int = 250
    max_attachment_bytes: int = 40_000_000
    max_attachments_bytes: int = 40_000_000
    """Maximum decoded size of all attachments together."""


DEFAULT_LIMITS = MailLimits()
