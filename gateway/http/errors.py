"""Errors of the API: one shape for all of them, from an unknown route to a crash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from engine.values import Json
from gateway.http import limits
from gateway.http.responses import JsonResponse

MAX_RETRY_SECONDS = 60
"""Longest `Retry-After` that is computed from a backlog."""
NOT_READY_RETRY_SECONDS = 1
CONCURRENCY_RETRY_SECONDS = 5
BLOCKED_RETRY_SECONDS = 15
TRIGGER_RETRY_SECONDS = 60
START_RETRY_SECONDS = 60
"""Interval after which a failed start is retried anyway."""


class ApiError(Exception):
    """Refusal of a request, for clients to read; raised anywhere below a handler."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: Iterable[Mapping[str, Json]] = (),
        retry_after_seconds: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = list(details)
        self.headers = dict(headers or {})
        self.is_noted = False
        """Whether a delivery records the refusal."""
        if retry_after_seconds is not None:
            self.headers["Retry-After"] = str(retry_after_seconds)

    @property
    def is_for_owner(self) -> bool:
        """Whether the workflow's owner must correct something before the same request can succeed."""
        return self.code == "trigger-not-ready"

    @property
    def lacked_scope(self) -> str | None:
        """Scope that the key lacks; None for another refusal."""
        return str(self.details[0]["message"]) if self.code == "scope-required" else None

    def response(self, request_id: str) -> JsonResponse:
        """Return the error as a JSON answer with its status, code, message, details and headers."""
        error = {"code": self.code, "message": self.message, "details": self.details}
        body = {"success": False, "error": error, "requestId": request_id}
        return JsonResponse(body, status=self.status, headers=self.headers)


def problem(path: str, code: str, message: str) -> dict[str, Json]:
    """Return one entry of an error's `details`: the field's path, the code of the violated rule, and a message.

    The message says how to correct it.
    """
    return {"path": path, "code": code, "message": message}


def invalid_query(path: str, code: str, message: str) -> ApiError:
    """Return the 400 error for a query parameter, `path` being its name."""
    return ApiError(400, "invalid-query", message, details=[problem(path, code, message)])


def invalid(details: Iterable[Mapping[str, Json]]) -> ApiError:
    """Return the 422 error for a JSON body with invalid fields, with one entry per field, at most 100.

    Its message is that of a single entry.
    """
    found = list(details)[: limits.FINDINGS]
    message = str(found[0]["message"]) if len(found) == 1 else "Several fields are invalid: see details"
    return ApiError(422, "validation-failed", message, details=found)


def unauthorized() -> ApiError:
    """Return the common 401 error for a missing, unknown, expired or revoked key."""
    message = "Send a valid API key in the X-API-Key header"
    return ApiError(401, "unauthorized", message, headers={"WWW-Authenticate": "ApiKey"})


def scope_required(scope: str) -> ApiError:
    message = f"This needs a key with the scope {scope}"
    return ApiError(403, "scope-required", message, details=[problem("X-API-Key", "scope-required", scope)])


def admin_required() -> ApiError:
    """Return the 403 error for an operation that only admins may use."""
    return ApiError(403, "admin-required", "Only an admin of the organization may do this")


def not_found(what: str = "route") -> ApiError:
    """Return the common 404 error for a missing object and for another owner's, which must look the same.

    `what` names the kind of object in the message.
    """
    return ApiError(404, "not-found", f"There is no such {what}")


def method_not_allowed(allowed: Iterable[str]) -> ApiError:
    methods = ", ".join(sorted(allowed))
    return ApiError(405, "method-not-allowed", f"This path accepts {methods}", headers={"Allow": methods})


def conflict(code: str, message: str, *, details: Iterable[Mapping[str, Json]] = ()) -> ApiError:
    """Return the 409 error for a request that contradicts the present state; `code` names the reason."""
    return ApiError(409, code, message, details=details)


def too_large(limit_bytes: int, setting: str) -> ApiError:
    """Return the 413 error for a body over a limit in bytes; the message names `setting` unless it is empty."""
    limit = f"{limit_bytes:,} bytes, the limit of {setting}" if setting else f"{limit_bytes:,} bytes"
    return ApiError(413, "payload-too-large", f"The body is larger than {limit}")


def not_ready(message: str, *, details: Iterable[Mapping[str, Json]] = ()) -> ApiError:
    """Return the 503 error for a lack that passes, with the advice to repeat the request after a second."""
    return ApiError(503, "not-ready", message, details=details, retry_after_seconds=NOT_READY_RETRY_SECONDS)


def trigger_not_ready(message: str) -> ApiError:
    """Return the 503 error for a request that can't succeed until the workflow's owner corrects the trigger.

    The sender retries after 60 seconds, and the stored delivery informs the owner.
    """
    return ApiError(503, "trigger-not-ready", message, retry_after_seconds=TRIGGER_RETRY_SECONDS)


def busy(message: str, *, closes: bool = False) -> ApiError:
    """Return the 503 error for lack of capacity in this process, to repeat after a second; `closes` also ends
    the connection.
    """
    headers = {"Connection": "close"} if closes else None
    return ApiError(
        503,
        "not-ready",
        f"{message}: try again",
        retry_after_seconds=NOT_READY_RETRY_SECONDS,
        headers=headers,
    )


def concurrency_limit() -> ApiError:
    """Return the 429 error for a run over its workflow's concurrency limit, to repeat after five seconds."""
    message = "The workflow has as many runs in progress as settings.concurrency allows: try again"
    return ApiError(429, "concurrency-limit", message, retry_after_seconds=CONCURRENCY_RETRY_SECONDS)


def queue_full(whose: str, limit: int, retry_after_seconds: int) -> ApiError:
    """Return the 429 error for runs over the backlog limit (pending runs) of a workflow or an organization.

    `whose` is "the workflow" or "the organization" in the message.
    """
    message = f"The backlog of {whose} has its maximum of {limit:,} pending runs: try again later"
    return ApiError(429, "queue-full", message, retry_after_seconds=retry_after_seconds)


def workflow_not_active() -> ApiError:
    return conflict(
        "workflow-not-active", "The workflow is not active: set its status to active, or deploy it"
    )


def workflow_paused() -> ApiError:
    return conflict("workflow-paused", "The workflow is paused: set it to active to run it")


def no_such_trigger(kind: str) -> ApiError:
    """Return the 422 error for a request that needs a trigger node of this kind, if the workflow has none."""
    return ApiError(422, f"no-{kind}-trigger", f"The workflow has no {kind} trigger node: add one")


def not_deployed() -> ApiError:
    return conflict("not-deployed", "The workflow is not deployed: deploy it first")


def outside_window(opens_at: str | None) -> ApiError:
    """Return the 409 error for a run outside the windows of a schedule.

    Its details have the time of the next opening, `opens_at`, unless that is None.
    """
    message = "The workflow's schedule is closed: try again when it opens, or start it"
    details = [{**problem("", "outside-window", f"It opens at {opens_at}"), "opensAt": opens_at}]
    return ApiError(409, "outside-window", message, details=details if opens_at else ())


def stopped_manually() -> ApiError:
    return conflict("stopped-manually", "A user has stopped the workflow: start it first")


def start_failed(reason: str, execution_id: str) -> ApiError:
    """Return the 503 error for an accepted run whose pods can't start; it names the run, which remains.

    The client may retry after 60 seconds.
    """
    message = f"The workflow's pods can't start: {reason}. {execution_id} was accepted and runs once they can"
    return ApiError(503, "start-failed", message, retry_after_seconds=START_RETRY_SECONDS)


def start_blocked(reason: str, execution_id: str) -> ApiError:
    """Return the 503 error for an accepted run whose pods wait for capacity in the cluster; it names the run,
    which remains.

    The client may retry after 15 seconds.
    """
    message = (
        f"The workflow's pods wait for their start: {reason}. {execution_id} was accepted and runs after it"
    )
    return ApiError(503, "not-ready", message, retry_after_seconds=BLOCKED_RETRY_SECONDS)


def execution_failed(execution_id: str) -> ApiError:
    """Return the 500 error for a sender that awaits a response of a run that failed.

    Only the owner learns the reason.
    """
    return ApiError(500, "execution-failed", f"The execution {execution_id} has not completed")


def internal() -> ApiError:
    """Return the 500 error, which refers to the server's log by the request id and says nothing else."""
    message = "Internal error: the log of the server has the details under this request id"
    return ApiError(500, "internal-error", message)
