"""What can go wrong while a workflow runs, by what follows from it."""

from __future__ import annotations


class NodeError(Exception):
    """A node could not do its work; `retryable` says whether another attempt may succeed."""

    def __init__(self, message: str, *, code: str = "node-error", retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable


class LeaseLost(Exception):
    """Somebody else may hold this execution now: stop at once and write nothing more."""


class InvalidDefinition(ValueError):
    """The stored graph can't be run; `message` says what to mend."""
