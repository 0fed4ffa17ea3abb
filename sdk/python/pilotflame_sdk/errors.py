"""Errors of the SDK. `PilotflameError` is the base of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

LONGEST_RETRY_SECONDS: Final = 86_400


class PilotflameError(Exception):
    """Base of all errors of the SDK."""


class ConfigurationError(PilotflameError):
    """The client has no valid server address or API key; the text says which variable to set."""


class LoginRequired(ConfigurationError):
    """No API key is configured."""


class TransportError(PilotflameError):
    """No answer: the server is unreachable, the connection was lost, or the answer is none of Pilotflame's."""


class APIError(PilotflameError):
    """Refusal by the server."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int,
        details: Sequence[Mapping[str, Any]] = (),
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        """Code for programs, such as `not-found`."""
        self.message = message
        self.status = status
        """Status of the HTTP response."""
        self.details = details
        """Entries with `path`, `code` and `message`, such as the fields of a body to correct."""
        self.request_id = request_id
        """Id by which the operator of the server finds the request in its log."""

    def __str__(self) -> str:
        # Refusals of one field often say the same twice.
        details = [text for text in map(_detail_text, self.details) if text != self.message]
        return "; ".join([f"{self.message} ({self.code})", *details])


class NotFound(APIError):
    """The object does not exist, or the key may not see it (404)."""


class Conflict(APIError):
    """The object is in a state that forbids the request, or has changed (409, 412)."""


class ValidationFailed(APIError):
    """The request has wrong fields (400, 422): `details` has an entry for each."""


class RateLimited(APIError):
    """Too many requests, or too many runs of the workflow (429)."""


class ScopeRequired(APIError):
    """The key is missing, unknown or revoked (401), or lacks a scope or right (403)."""


class RunError(PilotflameError):
    """A run has no result; `execution_id` is its id."""

    def __init__(self, message: str, execution_id: str) -> None:
        super().__init__(message)
        self.execution_id = execution_id


class RunFailed(RunError):
    """The run ended as `failed`, `stopped` or `cancelled`."""

    def __init__(self, execution_id: str, status: str, error: Mapping[str, Any] | None) -> None:
        found = error or {}
        cause: Mapping[str, Any] = found.get("cause") or {}
        self.status = status
        self.error = error
        """Error of the execution as the API has it; None for a run that was stopped or cancelled."""
        self.code: str = cause.get("code") or found.get("code") or status
        """Code of the failed node's error, such as that of a `TaskError`; else of the run's, else its status."""
        self.message: str = found.get("message") or f"The run is {status}"
        self.node_id: str | None = cause.get("nodeId") or found.get("nodeId")
        """Node that failed."""
        place = "" if self.node_id is None else f", node {self.node_id}"
        super().__init__(f"{execution_id} {status}: {self.message} ({self.code}{place})", execution_id)


class RunTimeout(RunError):
    """The run had not ended in time; it goes on."""

    def __init__(self, execution_id: str, seconds: float) -> None:
        super().__init__(f"{execution_id} had not ended after {seconds:g} s; it goes on", execution_id)


class TaskError(PilotflameError):
    """Failure of a task, raised by the code of a node.

    `retry` is False for a failure that no repetition mends, or the seconds until the next attempt; by default the
    retry rule of the node decides.
    """

    def __init__(self, code: str, message: str, *, retry: bool | float = True) -> None:
        super().__init__(f"{message} ({code})")
        if not isinstance(retry, bool) and not 0 <= retry <= LONGEST_RETRY_SECONDS:
            raise ValueError(f"retry is True, False or 0 to {LONGEST_RETRY_SECONDS:,} seconds, not {retry}")
        self.code = code
        self.message = message
        self.retry = retry


class TaskCancelled(PilotflameError):
    """The run was cancelled, the deadline of the task has passed, or its worker has to end: stop at once."""


class DeadlineExceeded(TaskCancelled):
    """The attempt has used the timeout of its node type: it counts as failed."""


class LeaseLost(TaskCancelled):
    """Another worker may run the task by now: its result will not be used."""


_BY_STATUS: Mapping[int, type[APIError]] = {
    400: ValidationFailed,
    401: ScopeRequired,
    403: ScopeRequired,
    404: NotFound,
    409: Conflict,
    412: Conflict,
    422: ValidationFailed,
    429: RateLimited,
}


def build_error(status: int, reason: str, body: object) -> APIError:
    """Return (not raise) the error for an answer with a status from 400 on; `body` is its decoded JSON.

    Its class depends on the status; other bodies than Pilotflame's give the code `http-<status>`.
    """
    answer = body if isinstance(body, Mapping) else {}
    found = answer.get("error")
    error: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    details = error.get("details")
    kind = _BY_STATUS.get(status, APIError)
    return kind(
        str(error.get("code", f"http-{status}")),
        str(error.get("message") or f"The server answered {status} {reason}".strip()),
        status=status,
        details=[one for one in details if isinstance(one, Mapping)] if isinstance(details, list) else (),
        request_id=answer.get("requestId"),
    )


def _detail_text(detail: Mapping[str, Any]) -> str:
    """Return the path and message of one detail of an error, or the message alone."""
    path, message = detail.get("path"), detail.get("message") or detail.get("code") or ""
    return f"{path}: {message}" if path and not str(message).startswith(path) else str(message)
