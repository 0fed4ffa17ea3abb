"""Errors of runs and nodes, distinguished by their consequence."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class FailureCause(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Error of the node that made a run fail; fields without a value are omitted."""

    code: str
    message: str
    node_id: str | None
    method: str | None = None
    """Method of the failed HTTP request."""
    url: str | None = None
    """URL of the failed HTTP request, with secrets hidden."""
    execution_id: str | None = None
    """Execution of the sub-workflow that contains the node; None for the execution that shows the error."""


class HttpRequestName(NamedTuple):
    """HTTP request as named in errors."""

    method: str
    url: str
    """URL with secrets hidden; empty if it is unusable."""


class NodeError(Exception):
    """Failure of a node; `retryable` says whether another attempt may succeed.

    `request` is the HTTP request that failed, `cause` the error inside a sub-workflow that made the node
    fail. `retry_after_seconds` is the time after which another attempt may succeed; None if it is unknown. `attempt` is
    the number of the failed attempt at a task; None for attempts that the run counts itself.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "node-error",
        retryable: bool = False,
        request: HttpRequestName | None = None,
        cause: FailureCause | None = None,
        retry_after_seconds: float | None = None,
        attempt: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.request = request
        self.cause = cause
        self.retry_after_seconds = retry_after_seconds
        self.attempt = attempt


class LeaseLost(Exception):
    """Lease of this execution lost: another process may hold it, so stop at once and write nothing more."""


class InvalidDefinition(ValueError):
    """Stored graph that can't be run; `message` names the problem."""
