"""Callbacks: requests by which other systems answer nodes that have sent them a callback URL."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final, Literal

import structlog
from msgspec import Meta

from concurrency import offload
from engine import values
from engine.run_limits import RunLimits
from engine.values import InvalidJson
from gateway.executions import answered_runs
from gateway.http import errors, limits, wire
from gateway.http.errors import ApiError
from gateway.http.parameters import ChoiceParameter, TextParameter
from gateway.http.request import GatewayRequest
from gateway.http.request_origin import client_of_scope
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct
from journal.waits import callbacks, node_answers
from journal.waits.callbacks import CallbackPlace
from journal.waits.node_answers import AnswerReception

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from journal.waits.node_answers import AnswerResult

log = structlog.get_logger()

MAX_OUTPUT_BYTES: Final = RunLimits.max_output_bytes
TOKEN_LENGTH: Final = 64


class CallbackOutcome(StrEnum):
    """Outcome that a callback reports."""

    COMPLETED = "completed"
    FAILED = "failed"


NODE: Final = TextParameter("node", "Node that waits, as in the callback URL.")
ITERATION: Final = TextParameter("iteration", "Turn of the enclosing loops, as in the callback URL.")
TOKEN: Final = TextParameter("token", "Token of the callback URL.", max_length=TOKEN_LENGTH)
OUTCOME: Final = ChoiceParameter(
    "outcome", "`failed`: the node fails with `code` and `message` of the body.", CallbackOutcome
)
PARAMETERS: Final = (NODE, ITERATION, TOKEN, OUTCOME)


class CallbackFailure(WireStruct):
    """Error with which the node fails."""

    code: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=64,
            pattern="^[a-z0-9][a-z0-9-]*$",
            description="lower-case letters, digits and `-`, such as out-of-stock",
        ),
    ] = "callback-failed"
    message: Annotated[str, Meta(max_length=limits.DESCRIPTION_LENGTH)] = (
        "The receiver has reported a failure"
    )


class CallbackReceipt(WireStruct):
    """Stored answer, with which the execution continues."""

    execution_id: str
    node_id: str
    status: Literal["accepted"]


async def receive(request: GatewayRequest) -> JsonResponse:
    """Answer the node that has sent this callback URL; the first answer counts, and may be repeated, but another one
    gets 409.

    The body, JSON or a text, becomes `body` in the output of the node. The token in the URL replaces a key.
    """
    place = _require_place(request)
    content = await _read_content(request)
    payload = await _encode_answer(request, content)

    async def work(connection: AsyncConnection) -> AnswerResult | None:
        return await callbacks.store_callback(connection, place, payload)

    received = await request.gateway.database.transaction(work, locks=place.execution_id)
    if received is None:
        raise errors.not_found("execution")
    if received.reception is not AnswerReception.TAKEN:
        raise _refusal_of(received.reception)
    gateway = request.gateway
    await answered_runs.continue_run(
        gateway.database, gateway.acceptances, gateway.pod_services.poll_hub, received
    )
    log.info("callback received", execution_id=place.execution_id, node_id=place.node_id)
    return JsonResponse(
        CallbackReceipt(execution_id=place.execution_id, node_id=place.node_id, status="accepted")
    )


def _require_place(request: GatewayRequest) -> CallbackPlace:
    """Return the node of a callback URL.

    Raises a 404 error for a wrong token, and 429 for a client with too many of them.
    """
    query = request.query
    place = CallbackPlace(request.path_params["id"], query[NODE] or "", query[ITERATION] or "")
    settings = request.gateway.settings
    secrets = (settings.secret, *settings.previous_secrets)
    if callbacks.is_valid_token(secrets, place, query[TOKEN] or ""):
        return place
    unknown = errors.not_found("callback")
    raise request.gateway.callback_failures.fail(client_of_scope(request.scope), unknown)


async def _read_content(request: GatewayRequest) -> Json:
    """Return the body: JSON, a text, or None without one; raises 400, 413 and 415."""
    raw = await request.body()
    if len(raw) > MAX_OUTPUT_BYTES:
        raise errors.too_large(MAX_OUTPUT_BYTES, "PILOTFLAME_MAX_OUTPUT_BYTES")
    if not raw:
        return None
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not media_type.startswith("text/"):
        return await _decode_json(raw, media_type)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, "malformed-body", "The text is not valid UTF-8") from error
    if "\0" in text:
        raise ApiError(400, "nul-character", "The text contains the character NUL")
    return text


async def _decode_json(raw: bytes, media_type: str) -> Json:
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(415, "unsupported-media-type", "Send application/json or a text")
    try:
        return await offload.run(values.decode_json, raw)
    except InvalidJson as error:
        raise ApiError(400, error.code, error.message) from error


async def _encode_answer(request: GatewayRequest, content: Json) -> bytes:
    if request.query[OUTCOME] is CallbackOutcome.FAILED:
        failure = wire.convert({} if content is None else content, CallbackFailure)
        return node_answers.encode_error_answer(failure.code, failure.message)
    return await offload.run(node_answers.encode_output_answer, {"body": content})


def _refusal_of(reception: AnswerReception) -> ApiError:
    if reception is AnswerReception.LATE:
        return errors.conflict("already-answered", "The node already has another answer")
    if reception is AnswerReception.EXPIRED:
        return errors.conflict("callback-expired", "The node has stopped waiting at its deadline")
    message = "The node does not wait for this callback: it has failed, or its execution has ended"
    return errors.conflict("no-callback-pending", message)
