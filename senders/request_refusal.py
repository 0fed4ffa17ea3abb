"""What keeps a request from being taken in."""

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
    """The request is not taken in, and wouldn't be if it came again as it is; `message` names no secret."""

    def __init__(self, code: RefusalCodeName, message: str) -> None:
        super().__init__(message)
        self.code: RefusalCodeName = code
        self.message = message
