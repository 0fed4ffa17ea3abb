"""What can keep a message from being handed over, by what is to be done about it."""

from __future__ import annotations


class BridgeError(Exception):
    """Anything that a source or the gateway has against it."""


class BridgeUnavailable(BridgeError):
    """It did not answer, or not now; the same call may succeed later."""

    def __init__(self, message: str, *, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        """What whoever would not said itself about when to come again."""


class BridgeRefused(BridgeError):
    """It would not, and will not the next time either: the text tells an operator what to mend."""


class ContentRefused(BridgeError):
    """The gateway takes none of the messages, because of what stands in at least one of them."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BridgeStopped(BridgeError):
    """The process was told to stop while it waited."""
