"""How much a mail may hold: what is beyond is no mail of anybody's, and takes time and memory from others."""

from __future__ import annotations

from dataclasses import dataclass


class InvalidMail(ValueError):
    """A mail can't be read, or holds more than it may; reading it again changes nothing."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class MailLimits:
    """Of one mail."""

    max_depth: int = 20
    """Containers in containers."""
    max_parts: int = 1_000
    max_headers: int = 1_000
    """Of the mail, or of one part."""
    max_header_bytes: int = 262_144
    """Of all headers of the mail, or of one part."""
    max_headers_bytes: int = 2_097_152
    """Of those of all parts."""
    max_text_bytes: int = 5_000_000
    """Of all texts of the body, as they are encoded; a longer one is kept as an attachment."""
    max_attachments: int = 250
    max_attachment_bytes: int = 40_000_000
    max_attachments_bytes: int = 40_000_000
    """Of all of them, decoded."""


DEFAULT_LIMITS = MailLimits()
