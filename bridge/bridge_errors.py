"""Errors of the bridge, by their handling: retry, exit, split the batch, or stop."""

from __future__ import annotations


class BridgeError(Exception):
    """Error of a message source or of the gateway."""


class BridgeUnavailable(BridgeError):
    """Temporary failure; the same call may succeed later."""

    def __init__(self, message: str, *, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        """Seconds to wait as the server asked for; 0 if it gave none."""


class BridgeRefused(BridgeError):
    """Permanent failure; the text tells an operator how to fix it."""


class ContentRefused(BridgeError):
    """Refusal of a whole request because of the content of at least one message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BridgeStopped(BridgeError):
    """Stop of the process during a wait."""
