"""What can go wrong while a workflow runs, by what follows from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from engine.run_records import FailureCause


class HttpRequestName(NamedTuple):
    """An HTTP request as errors name it."""

    method: str
    url: str
    """With secrets hidden; empty where the URL is unusable."""


class NodeError(Exception):
    """A node could not do its work; `retryable` says whether another attempt may succeed.

    `request` is the HTTP request that failed, `cause` the error inside a sub-workflow that made the node fail.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "node-error",
        retryable: bool = False,
        request: HttpRequestName | None = None,
        cause: FailureCause | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.request = request
        self.cause = cause


class LeaseLost(Exception):
    """Somebody else may hold this execution now: stop at once and write nothing more."""


class InvalidDefinition(ValueError):
    """The stored graph can't be run; `message` says what to mend."""
