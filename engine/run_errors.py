"""What can go wrong while a workflow runs, by what follows from it."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class FailureCause(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The error of the node that made a run fail; fields without a value are left out."""

    code: str
    message: str
    node_id: str | None
    method: str | None = None
    """Of the HTTP request that failed."""
    url: str | None = None
    """Of the HTTP request that failed, with secrets hidden."""
    execution_id: str | None = None
    """The execution of a sub-workflow that the node belongs to; None: the execution that shows the error."""


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
