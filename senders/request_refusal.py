"""Refusal of a request of a sender."""

from __future__ import annotations

from typing import Literal, TypeAlias

from engine.values import JsonErrorCode as JsonCode

RefusalCodeName: TypeAlias = Literal[
    JsonCode,
    "duplicate-header",
    "invalid-certificate",
    "invalid-event",
    "invalid-signature",
    "malformed-form",
    "malformed-mail",
    "malformed-message",
    "missing-signature",
    "no-secret",
    "raw-delivery",
    "stale-signature",
    "unknown-mail",
    "unknown-topic",
    "unsupported-media-type",
    "untrusted-certificate",
]


class RequestRefused(Exception):
    """Permanent refusal of a request: the same request would be refused again. `message` contains no secret."""

    def __init__(self, code: RefusalCodeName, message: str) -> None:
        super().__init__(message)
        self.code: RefusalCodeName = code
        self.message = message
