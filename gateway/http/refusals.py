"""Error codes of the API: status, meaning, and `Retry-After`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

from msgspec import Struct

from gateway.http import limits
from gateway.http.errors import (
    CONCURRENCY_RETRY_SECONDS,
    MAX_RETRY_SECONDS,
    NOT_READY_RETRY_SECONDS,
    START_RETRY_SECONDS,
    TRIGGER_RETRY_SECONDS,
)
from gateway.http.wire import WireStruct


class ErrorDetail(WireStruct):
    """One fault of a request. Findings of a validation have more fields."""

    path: str
    """The field, node or query parameter at fault, such as `tags.0` or `nodes.start`."""
    code: str
    message: str


class ErrorReason(WireStruct):
    """Reason of a refusal: `code` is stable and for programs, `message` is for people and may change."""

    code: str
    message: str
    details: Sequence[ErrorDetail]


class ErrorResponse(WireStruct):
    """Body of every error response."""

    success: Literal[False]
    error: ErrorReason
    request_id: str
    """Id of the request in the server's log; also in the header `X-Request-Id`."""


class ErrorCode(Struct, frozen=True):
    """Status and meaning of an error code."""

    status: int
    meaning: str
    retry_after_seconds: int | None = None
    """Greatest value of `Retry-After`, where it is sent and known."""


JSON_CODES: Final = (
    "malformed-json",
    "duplicate-key",
    "not-finite",
    "number-too-long",
    "lone-surrogate",
    "nul-character",
    "too-deep",
)
BODY_CODES: Final = (
    *JSON_CODES,
    "malformed-body",
    "payload-too-large",
    "unsupported-media-type",
    "validation-failed",
)
"""Codes that any operation with a body can return."""

ERROR_CODES: Final[Mapping[str, ErrorCode]] = {
    "malformed-request": ErrorCode(400, "The request is not valid HTTP/1.1."),
    "disconnected": ErrorCode(
        400, "The client disconnected before its request was complete. Appears in the log only."
    ),
    "malformed-body": ErrorCode(400, "The body is not compressed as `Content-Encoding` declares."),
    "malformed-json": ErrorCode(400, "The body is not JSON in UTF-8."),
    "duplicate-key": ErrorCode(400, "An object of the body has the same key twice."),
    "not-finite": ErrorCode(400, "The body contains NaN, Infinity or a number too large for a double."),
    "number-too-long": ErrorCode(400, "The body contains an integer of more than 308 digits."),
    "lone-surrogate": ErrorCode(400, "The body contains a lone surrogate."),
    "nul-character": ErrorCode(400, "The body contains the character NUL."),
    "too-deep": ErrorCode(400, "Objects and lists of the body are nested more than 64 deep."),
    "invalid-query": ErrorCode(400, "A query parameter is unknown or has an invalid value."),
    "invalid-idempotency-key": ErrorCode(
        400,
        "`Idempotency-Key` is sent twice, or isn't 1 to "
        f"{limits.IDEMPOTENCY_KEY_LENGTH} visible ASCII characters.",
    ),
    "invalid-event": ErrorCode(400, "The request is not an event, or not one of its sender."),
    "malformed-form": ErrorCode(400, "The body is not a form of the declared `Content-Type`."),
    "malformed-mail": ErrorCode(400, "The mail service's data about the mail is malformed."),
    "malformed-message": ErrorCode(
        400, "The body is not a message of Amazon SNS, or SNS does not confirm the subscription."
    ),
    "unknown-mail": ErrorCode(400, "The form matches no supported mail service."),
    "raw-delivery": ErrorCode(400, "The subscription uses raw message delivery: disable it."),
    "unknown-topic": ErrorCode(400, "The message belongs to another topic than the trigger's."),
    "untrusted-certificate": ErrorCode(
        400, "The message refers to a certificate that is not from Amazon SNS."
    ),
    "invalid-certificate": ErrorCode(400, "The certificate of the message is invalid or has expired."),
    "duplicate-header": ErrorCode(400, "A header that may appear once is sent several times."),
    "invalid-last-event-id": ErrorCode(400, "`Last-Event-ID` is not the id of an event of this stream."),
    "unauthorized": ErrorCode(401, "The header `X-API-Key` has no valid key."),
    "invalid-signature": ErrorCode(
        401, "The request is unsigned, its signature matches no secret, or the signature is too old."
    ),
    "scope-required": ErrorCode(403, "The key lacks the scope that `details` names."),
    "admin-required": ErrorCode(403, "Only an admin of the organization may do this."),
    "sign-in-refused": ErrorCode(
        401, "The key is unknown, expired or revoked, or the sign-in code was used."
    ),
    "https-required": ErrorCode(
        403, "Browsers sign in over HTTPS, or over plain HTTP on the server's own machine."
    ),
    "cross-site-request": ErrorCode(
        403,
        "A page of another site requests a change with the session of a browser: send `X-API-Key` instead.",
    ),
    "network-not-allowed": ErrorCode(403, "The trigger does not accept requests from this address."),
    "model-not-usable": ErrorCode(
        403,
        "The workflow names a language model that the user of the run may not use, or that doesn't exist."
        " `details` lists the nodes.",
    ),
    "not-owner": ErrorCode(403, "Only the object's owner and admins of the organization may do this."),
    "not-found": ErrorCode(404, "The object does not exist, or the caller may not see it."),
    "method-not-allowed": ErrorCode(405, "The path has other methods: see the header `Allow`."),
    "mail-refused": ErrorCode(
        406,
        "Final refusal for Mailgun, which retries after every other status. The message has the code and the reason.",
    ),
    "edit-conflict": ErrorCode(409, "Another request changed the object at the same time: try again."),
    "data-source-in-use": ErrorCode(
        409,
        "Workflows or language models use the data source; `details` lists those that the caller may see."
        " `force=true` deletes it anyway.",
    ),
    "model-in-use": ErrorCode(
        409,
        "Workflows use the language model; `details` lists those that the caller may see. `force=true` deletes it, "
        "replaces it or takes it from its users anyway.",
    ),
    "model-name-taken": ErrorCode(409, "The organization has another model of this name."),
    "too-many-models": ErrorCode(409, "The organization has the maximum number of models."),
    "data-source-name-taken": ErrorCode(409, "The owner has another data source of this name."),
    "duplicate-connection": ErrorCode(
        409, "The workflow already has this connection, or another with this id."
    ),
    "duplicate-node-id": ErrorCode(409, "Another node of the workflow has this id."),
    "email-taken": ErrorCode(409, "The organization has a user with this address."),
    "already-resumed": ErrorCode(
        409,
        "It was resumed, replayed or redriven already; `executionId` in `details` is the newest of its chain.",
    ),
    "count-changed": ErrorCode(
        409, "Fewer objects match the filter than `count` says; the message has the present number."
    ),
    "too-many-bulk-operations": ErrorCode(409, "The organization has too many open bulk operations."),
    "execution-not-ended": ErrorCode(409, "Only an ended execution can be replayed."),
    "plan-changed": ErrorCode(
        409,
        "The plan of the replay is no longer the one with this hash; `plan` in `details` is the present one.",
    ),
    "confirmation-required": ErrorCode(
        409,
        "The replay would repeat writes, and `confirm` does not name all of them; `details` has the `plan`.",
    ),
    "not-assigned": ErrorCode(403, "The question is assigned to other people."),
    "self-approval": ErrorCode(403, "The user who started the run may not answer its question."),
    "already-answered": ErrorCode(409, "The node already has its answer."),
    "input-expired": ErrorCode(409, "The node's wait has expired, and it continues without an answer."),
    "no-input-pending": ErrorCode(409, "No node with this id waits for input."),
    "callback-expired": ErrorCode(409, "The node has stopped waiting for its callback."),
    "no-callback-pending": ErrorCode(409, "The node does not wait for a callback: it or its run has ended."),
    "execution-ended": ErrorCode(409, "The execution has ended, and receives no more signals."),
    "too-many-signals": ErrorCode(
        409, f"The execution has {limits.UNREAD_SIGNALS:,} signals that no node has received."
    ),
    "node-type-in-use": ErrorCode(
        409, "Workflows have the node type; `details` lists those that the caller may see."
    ),
    "task-ended": ErrorCode(409, "The task has ended: resume or replay its execution."),
    "task-runs-once": ErrorCode(409, "A worker performs the task, which runs at most once."),
    "worker-stopped": ErrorCode(409, "The worker has said that it stops: start with a new id."),
    "worker-id-taken": ErrorCode(
        409, "Another key has claimed tasks under this worker id: choose another id."
    ),
    "lease-lost": ErrorCode(409, "The worker no longer holds the task."),
    "node-type-not-allowed": ErrorCode(403, "The key may not perform tasks of this node type."),
    "version-exists": ErrorCode(409, "The version of the node type exists with another content."),
    "too-many-node-types": ErrorCode(
        409, f"An organization may have at most {limits.NODE_TYPES:,} versions of custom node types."
    ),
    "not-deployed": ErrorCode(409, "The workflow is not deployed: deploy it first."),
    "not-redrivable": ErrorCode(
        409,
        "The body of the delivery is not stored or was not understood, or its execution can be repeated another way.",
    ),
    "outside-window": ErrorCode(
        409, "The schedule of the workflow is closed; `opensAt` in `details` is the time when it opens."
    ),
    "stopped-manually": ErrorCode(409, "The workflow is always on and was stopped manually: start it first."),
    "execution-not-failed": ErrorCode(409, "Only a failed execution can be resumed."),
    "too-many-data-sources": ErrorCode(
        409, f"An organization may have at most {limits.DATA_SOURCES:,} data sources."
    ),
    "too-many-shares": ErrorCode(409, f"An object may be shared with at most {limits.SHARES:,} users."),
    "too-many-versions": ErrorCode(409, f"A workflow may have at most {limits.VERSIONS:,} versions."),
    "version-tag-taken": ErrorCode(409, "Another version of the workflow has this tag."),
    "replayed-delivery": ErrorCode(409, "The signature belongs to another delivery."),
    "apply-conflict": ErrorCode(
        409,
        "Workflows were edited since they were applied, were never applied, belong to another set or share a name;"
        " nothing was changed.",
    ),
    "workflow-archived": ErrorCode(409, "The workflow is archived: set it to draft or active to run it."),
    "workflow-changed": ErrorCode(409, "The workflow is being changed: try again."),
    "workflow-deleted": ErrorCode(409, "The execution's workflow is deleted."),
    "workflow-deployed": ErrorCode(409, "The workflow is deployed: undeploy it first, or use `force=true`."),
    "workflow-not-active": ErrorCode(
        409, "The workflow accepts no requests: set its status to active, or deploy it."
    ),
    "workflow-paused": ErrorCode(409, "The workflow is paused: set it to active to run it."),
    "workflow-running": ErrorCode(
        409, "Executions of the workflow have not ended: wait for them, or cancel them with `force=true`."
    ),
    "precondition-failed": ErrorCode(412, "The object's state does not match `If-Match`."),
    "payload-too-large": ErrorCode(413, "The body is larger than the server accepts."),
    "unsupported-media-type": ErrorCode(
        415,
        "The body is not declared as `application/json`, or its `Content-Encoding` is neither gzip nor deflate.",
    ),
    "validation-failed": ErrorCode(
        422, "Fields or the graph are invalid; `details` has an entry for each fault."
    ),
    "unresolved-model-placeholder": ErrorCode(
        422,
        "Nodes name no language model: a placeholder such as `{{AI_MODEL_ID}}`, nothing, or `default` in an"
        " organization without a default model. `details` lists the nodes.",
    ),
    "idempotency-mismatch": ErrorCode(422, "The `Idempotency-Key` was already used with another body."),
    **{
        f"no-{kind}-trigger": ErrorCode(422, f"The workflow has no {kind} trigger: add one.")
        for kind in ("queue", "email", "event", "webhook")
    },
    "no-verification": ErrorCode(
        422, "The trigger has no method to authenticate senders: set `verification` in its config."
    ),
    "trigger-not-ready": ErrorCode(
        503,
        "The trigger's data source is not usable by the workflow's owner, or does not contain the mail. The request"
        " is listed among the deliveries; send it again.",
        retry_after_seconds=TRIGGER_RETRY_SECONDS,
    ),
    "no-signing-secret": ErrorCode(
        422,
        "The organization has no signing secret: create it with `POST /api/v1/auth/signing-secret`.",
    ),
    "concurrency-limit": ErrorCode(
        429,
        "The workflow has reached its limit of concurrent executions, and its settings refuse more.",
        CONCURRENCY_RETRY_SECONDS,
    ),
    "queue-full": ErrorCode(
        429,
        "The queue of pending executions of the workflow or of the organization is full.",
        MAX_RETRY_SECONDS,
    ),
    "rate-limited": ErrorCode(
        429,
        "Too many requests with this key, for this workflow, or from this address without a valid key; or too many"
        " data source tests.",
    ),
    "execution-failed": ErrorCode(500, "The execution failed or was canceled, so it has no answer."),
    "internal-error": ErrorCode(
        500, "Internal fault of the server; its log has the details under the request's id."
    ),
    "start-failed": ErrorCode(
        503,
        "The pods of the workflow cannot start; the message has the reason. The execution was accepted and"
        " runs once they start: repeat the request with the same `Idempotency-Key` to wait for it.",
        START_RETRY_SECONDS,
    ),
    "not-ready": ErrorCode(
        503,
        "A dependency of the server is unavailable or at capacity: try again. For a trigger also: the pods wait for"
        " capacity in the cluster, such as a quota; the execution was accepted, and runs once they start.",
        NOT_READY_RETRY_SECONDS,
    ),
}
"""Ordered by status."""


def example(code: str) -> ErrorResponse:
    """Return an example of a refusal with this error code, for the OpenAPI document."""
    reason = ErrorReason(code=code, message=ERROR_CODES[code].meaning, details=[])
    return ErrorResponse(success=False, error=reason, request_id="req_01jx7v2m9e5t8w3q6r4y0z1abc")
