"""Every code that a refusal can carry: its status, and what it means to a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from gateway.executions.backlog import MAX_RETRY_SECONDS
from gateway.http import limits
from gateway.http.errors import (
    CONCURRENCY_RETRY_SECONDS,
    NOT_READY_RETRY_SECONDS,
    START_RETRY_SECONDS,
    TRIGGER_RETRY_SECONDS,
)
from gateway.http.wire import WireStruct


class ErrorDetail(WireStruct):
    """One thing that is wrong; findings of a validation have more fields."""

    path: str
    """The field, or what else it is about: `tags.0`, `nodes.start`, or a name of the query."""
    code: str
    message: str


class ErrorReason(WireStruct):
    """Why a request was refused: `code` is for programs and stays, `message` is for people and may change."""

    code: str
    message: str
    details: Sequence[ErrorDetail]


class ErrorResponse(WireStruct):
    """What every refusal looks like, whatever refused it."""

    success: Literal[False]
    error: ErrorReason
    request_id: str
    """The id under which the server's log has it; also in the header `X-Request-Id`."""


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """One code."""

    status: int
    meaning: str
    retry_after_seconds: int | None = None
    """What `Retry-After` says at most, where it is sent and that is known."""


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
"""What any operation with a body can answer."""

GENERAL: Final = frozenset(
    {*BODY_CODES, "unauthorized", "scope-required", "rate-limited", "internal-error", "not-ready"}
) - {"validation-failed"}
"""What most operations can answer, none of them in a way of its own."""

ERROR_CODES: Final[Mapping[str, ErrorCode]] = {
    "malformed-request": ErrorCode(400, "What was sent is not HTTP/1.1."),
    "disconnected": ErrorCode(400, "The client was gone before its request was whole; only the log has it."),
    "malformed-body": ErrorCode(400, "The body is not compressed as its `Content-Encoding` says."),
    "malformed-json": ErrorCode(400, "The body is not JSON in UTF-8."),
    "duplicate-key": ErrorCode(400, "The body gives a key twice in one object."),
    "not-finite": ErrorCode(400, "The body holds NaN, Infinity or a number too large for a double."),
    "number-too-long": ErrorCode(400, "The body holds a whole number of more than 308 digits."),
    "lone-surrogate": ErrorCode(400, "The body holds half of a surrogate pair."),
    "nul-character": ErrorCode(400, "The body holds the character NUL."),
    "too-deep": ErrorCode(400, "The body's objects and lists stand more than 64 deep inside one another."),
    "invalid-query": ErrorCode(400, "A parameter of the query has a value that it doesn't allow."),
    "invalid-idempotency-key": ErrorCode(
        400,
        "`Idempotency-Key` is given twice, or isn't 1 to "
        f"{limits.IDEMPOTENCY_KEY_LENGTH} visible ASCII characters.",
    ),
    "invalid-event": ErrorCode(400, "What was sent is no event, or none that its sender sends."),
    "malformed-form": ErrorCode(400, "The body is not the form that it is said to be."),
    "malformed-mail": ErrorCode(400, "What a mail service says of a mail can't be read."),
    "malformed-message": ErrorCode(400, "The body is no message of Amazon SNS, or one that it takes back."),
    "unknown-mail": ErrorCode(400, "The form has the fields of no mail service that is known here."),
    "raw-delivery": ErrorCode(400, "The subscription of the topic delivers messages raw: switch that off."),
    "unknown-topic": ErrorCode(400, "The trigger names another topic than that of the message."),
    "untrusted-certificate": ErrorCode(400, "The message names a certificate that is not one of Amazon SNS."),
    "invalid-certificate": ErrorCode(400, "The certificate of the message can't be used, or not any more."),
    "duplicate-header": ErrorCode(400, "A header that may stand there once is given several times."),
    "invalid-last-event-id": ErrorCode(400, "`Last-Event-ID` is not the id of an event of this stream."),
    "unauthorized": ErrorCode(401, "There is no valid key in the header `X-API-Key`."),
    "invalid-signature": ErrorCode(
        401, "The request is not signed, or not with a secret that is known here, or it was signed long ago."
    ),
    "scope-required": ErrorCode(403, "The key lacks the scope that `details` names."),
    "admin-required": ErrorCode(403, "Only an admin of the organisation may do this."),
    "network-not-allowed": ErrorCode(
        403, "The trigger takes nothing from the address that the request came from."
    ),
    "not-owner": ErrorCode(403, "Only the object's owner and admins of the organisation may do this."),
    "not-found": ErrorCode(404, "There is no such object, or it is none that the caller may see."),
    "method-not-allowed": ErrorCode(405, "The path takes other methods: see the header `Allow`."),
    "mail-refused": ErrorCode(
        406, "To Mailgun, which takes this alone as final: the message has the code and says why."
    ),
    "edit-conflict": ErrorCode(409, "Somebody else changed the object at the same moment: try again."),
    "data-source-in-use": ErrorCode(
        409,
        "Workflows name the data source: `details` has those that the caller may see. Or use `force=true`.",
    ),
    "data-source-name-taken": ErrorCode(409, "The owner has another data source of this name."),
    "duplicate-connection": ErrorCode(
        409, "The workflow has such a connection, or one with this id, already."
    ),
    "duplicate-node-id": ErrorCode(409, "Another node of the workflow has this id."),
    "email-taken": ErrorCode(409, "The organisation has a user with this address."),
    "already-resumed": ErrorCode(
        409,
        "The execution was resumed before: `details` has, as `executionId`, the newest that goes on from it.",
    ),
    "already-answered": ErrorCode(409, "Somebody has given the node its answer already."),
    "input-expired": ErrorCode(
        409, "The node has waited for input as long as it was to, and goes on without."
    ),
    "no-input-pending": ErrorCode(409, "No node of this id waits for input."),
    "not-deployed": ErrorCode(409, "The workflow is not deployed: deploy it first."),
    "not-redrivable": ErrorCode(
        409, "What the delivery has brought is not kept, was not understood, or is run once more another way."
    ),
    "outside-window": ErrorCode(
        409, "The schedule of the workflow is closed: `details` says by `opensAt` when it opens."
    ),
    "stopped-manually": ErrorCode(
        409, "Somebody has stopped the workflow, which is always on: start it first."
    ),
    "execution-not-failed": ErrorCode(409, "Only an execution that has failed can be resumed."),
    "too-many-data-sources": ErrorCode(
        409, f"An organisation may have at most {limits.DATA_SOURCES:,} data sources."
    ),
    "too-many-shares": ErrorCode(409, f"An object may be shared with at most {limits.SHARES:,} users."),
    "too-many-versions": ErrorCode(409, f"A workflow may have at most {limits.VERSIONS:,} versions."),
    "version-tag-taken": ErrorCode(409, "Another version of the workflow has this tag."),
    "replayed-delivery": ErrorCode(409, "What was signed for one delivery was put to another."),
    "workflow-archived": ErrorCode(409, "The workflow is archived: set it to draft or active to run it."),
    "workflow-changed": ErrorCode(409, "The workflow is being changed: try again."),
    "workflow-deleted": ErrorCode(409, "The execution's workflow is deleted."),
    "workflow-deployed": ErrorCode(409, "The workflow is deployed: undeploy it first, or use `force=true`."),
    "workflow-not-active": ErrorCode(
        409, "The workflow takes nothing in: set its status to active, or deploy it."
    ),
    "workflow-paused": ErrorCode(409, "The workflow is paused: set it to active to run it."),
    "workflow-running": ErrorCode(
        409, "Executions have not ended: wait for them, or cancel them by `force=true`."
    ),
    "precondition-failed": ErrorCode(
        412, "The object is in another state than the one that `If-Match` names."
    ),
    "payload-too-large": ErrorCode(413, "The body is larger than the server accepts."),
    "unsupported-media-type": ErrorCode(
        415,
        "The body is not declared as `application/json`, or its `Content-Encoding` is neither gzip nor deflate.",
    ),
    "validation-failed": ErrorCode(
        422, "A field is wrong, or the graph is: `details` has an entry for each."
    ),
    "idempotency-mismatch": ErrorCode(422, "The `Idempotency-Key` was used before, with another body."),
    **{
        f"no-{kind}-trigger": ErrorCode(
            422, f"The workflow does not begin with a trigger for this: add a {kind} trigger."
        )
        for kind in ("queue", "email", "event", "webhook")
    },
    "no-verification": ErrorCode(
        422, "The trigger doesn't say how its senders are told from others: set `verification` in its config."
    ),
    "trigger-not-ready": ErrorCode(
        503,
        "The trigger names a data source that the workflow's owner can't use, or that holds no such mail. The owner"
        " finds the request among the deliveries; send it again.",
        retry_after_seconds=TRIGGER_RETRY_SECONDS,
    ),
    "no-signing-secret": ErrorCode(
        422,
        "The organisation has no secret to sign messages with: `POST /api/v1/auth/signing-secret` makes it.",
    ),
    "concurrency-limit": ErrorCode(
        429,
        "As many runs of the workflow go on as its settings allow, and further ones are to be refused.",
        CONCURRENCY_RETRY_SECONDS,
    ),
    "queue-full": ErrorCode(
        429,
        "As many runs of the workflow, or of the organisation, wait to be begun as may.",
        MAX_RETRY_SECONDS,
    ),
    "rate-limited": ErrorCode(
        429,
        "Too many requests with this key or for this workflow, or from this address without a valid key, or too many"
        " tests of data sources.",
    ),
    "execution-failed": ErrorCode(500, "The execution whose answer was waited for has not completed."),
    "internal-error": ErrorCode(
        500, "Something went wrong in the server; its log has it under the request's id."
    ),
    "start-failed": ErrorCode(
        503,
        "The pods of the workflow can't start, for the reason that the message tells. The execution was accepted, and"
        " runs when they can: the same `Idempotency-Key` waits on it.",
        START_RETRY_SECONDS,
    ),
    "not-ready": ErrorCode(
        503,
        "A part that the server needs doesn't answer, or it is full: try again. Of a trigger also: the pods wait for"
        " room in the cluster, as over a quota; the execution was accepted, and runs when they start.",
        NOT_READY_RETRY_SECONDS,
    ),
}
"""In the order of their status."""


def example(code: str) -> ErrorResponse:
    """Return a refusal with this code."""
    reason = ErrorReason(code=code, message=ERROR_CODES[code].meaning, details=[])
    return ErrorResponse(success=False, error=reason, request_id="req_01jx7v2m9e5t8w3q6r4y0z1abc")
