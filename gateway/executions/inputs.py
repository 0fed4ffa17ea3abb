"""Human input: list the nodes of an execution that wait for a person, and answer them once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import structlog
from msgspec import Meta

from concurrency import offload
from engine.node_api import OUTPUT, AnswerSource
from gateway.executions import acceptance, input_checks
from gateway.http import errors, idempotency, limits
from gateway.http.errors import ApiError
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, StrictWire, WireStruct, body_of, instant, optional_instant, read_json
from journal import concurrency_limits
from journal.store import AcceptanceVerdict
from journal.waits import node_answers
from journal.waits.node_answers import AnswerReception, AnswerResult
from models import ids

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from journal.store import ExecutionKey, IdempotencyKey
    from journal.waits.node_answers import WaitingNode

log = structlog.get_logger()

SHOWN_TURNS: Final = 20


class PendingInput(WireStruct):
    """Node that waits for a person."""

    node_id: str
    iteration: str
    """Turn of the enclosing loops; empty outside of loops."""
    node_label: str
    title: str
    description: str
    schema: Mapping[str, Any] | None
    """JSON Schema of `data` in the answer; null allows any value."""
    choices: Sequence[Any]
    """Allowed values of `choice` in the answer; empty if the answer has no choice."""
    requested_at: Instant | None
    expires_at: Instant | None


class PendingInputs(WireStruct):
    """Nodes of an execution that wait for a person."""

    count: int
    inputs: Sequence[PendingInput]


class InputAnswer(StrictWire):
    """Answer of a person to a waiting node."""

    node_id: Annotated[str, Meta(min_length=1, max_length=64)]
    iteration: Annotated[str, Meta(max_length=limits.LABEL_LENGTH)] | None = None
    """Required if several turns of a loop wait."""
    choice: str | None = None
    data: Any = None


class InputAnswerResult(WireStruct):
    """Accepted answer, with which the execution continues."""

    execution_id: str
    node_id: str
    status: Literal["accepted"]


async def index(request: GatewayRequest) -> JsonResponse:
    """List the nodes of an execution that wait for a person."""
    key = await request.gateway.access.key(request.path_params["id"], request.caller)
    async with request.gateway.database.read() as connection:
        found = await node_answers.list_input_waits(connection, key)
    return JsonResponse(PendingInputs(count=len(found), inputs=[_shown(one) for one in found]))


async def answer(request: GatewayRequest) -> JsonResponse:
    """Answer a node that waits for a person; the first answer counts."""
    gateway, caller = request.gateway, request.caller
    key = await gateway.access.key(request.path_params["id"], caller)
    value = await read_json(request)
    body = body_of(request, value, InputAnswer)
    idempotency_key = await offload.run(request.idempotency_key, value, workflow_id=key.execution_id)
    if await _is_repeated(request, key, idempotency_key):
        return _accepted_response(key, body, idempotency.REPLAYED)
    try:
        async with gateway.database.read() as connection:
            asked = await _find_waiting_node(connection, key, body)
    except ApiError:
        # A node that no longer waits may have been answered by an earlier copy of this request.
        if await _is_repeated(request, key, idempotency_key):
            return _accepted_response(key, body, idempotency.REPLAYED)
        raise
    await input_checks.require_valid_inputs(
        gateway.forms, caller.organization_id, asked.request, body.choice, body.data
    )
    given = await _store_answer(request, key, asked, body, idempotency_key)
    if given is None:
        return _accepted_response(key, body, idempotency.REPLAYED)
    if given.concurrency_key is not None:
        await concurrency_limits.admit_waiting_runs(gateway.database, given.concurrency_key)
    if given.is_woken:
        gateway.acceptances.wake_workers()
    log.info("input answered", execution_id=key.execution_id, node_id=asked.node_id, user_id=caller.user_id)
    return _accepted_response(key, body, {})


async def _is_repeated(
    request: GatewayRequest, key: ExecutionKey, idempotency_key: IdempotencyKey | None
) -> bool:
    """Tell whether an earlier request with this idempotency key was answered; raises 422 if its body differs."""
    if idempotency_key is None:
        return False
    earlier = await acceptance.find_earlier(request.gateway.database, key.shard, idempotency_key)
    if earlier is not None and earlier.verdict is AcceptanceVerdict.MISMATCH:
        raise idempotency.mismatch_error()
    return earlier is not None


async def _find_waiting_node(
    connection: AsyncConnection, key: ExecutionKey, body: InputAnswer
) -> WaitingNode:
    """Return the waiting node of an answer; raises 409 if none waits, and 422 if several turns of a loop do."""
    waiting = [
        one
        for one in await node_answers.list_input_waits(connection, key)
        if one.node_id == body.node_id and body.iteration in {None, one.iteration}
    ]
    if len(waiting) > 1:
        turns = ", ".join(one.iteration for one in waiting[:SHOWN_TURNS])
        message = f"iteration is required: {len(waiting)} turns of a loop wait, {turns}"
        raise errors.invalid([errors.problem("iteration", "required", message)])
    if not waiting:
        is_answered = await node_answers.is_answered(connection, key, body.node_id, body.iteration)
        raise _refusal(AnswerReception.LATE if is_answered else AnswerReception.UNAWAITED)
    return waiting[0]


async def _store_answer(
    request: GatewayRequest,
    key: ExecutionKey,
    asked: WaitingNode,
    body: InputAnswer,
    idempotency_key: IdempotencyKey | None,
) -> AnswerResult | None:
    """Store the answer; None if an earlier request with the same key did.

    Raises 409, and 422 if the body of that request differs.
    """
    user_id = request.caller.user_id
    answered_at = request.gateway.clock()
    answer_value: Json = {"data": body.data, "choice": body.choice, "by": user_id, "at": instant(answered_at)}
    give = partial(
        node_answers.store_answer,
        key=key,
        node_id=asked.node_id,
        iteration=asked.iteration,
        payload=node_answers.encode_output_answer(answer_value, body.choice or OUTPUT),
        kind=AnswerSource.INPUT,
        user_id=user_id,
    )
    answer_id = ids.new_id("answer")

    async def work(connection: AsyncConnection) -> AnswerResult | None:
        if idempotency_key is not None:
            bound = await idempotency.reserve_key(
                connection, idempotency_key, shard=key.shard, resource_id=answer_id, now=answered_at
            )
            if bound != answer_id:
                return None
        given = await give(connection)
        if given.reception is not AnswerReception.TAKEN:
            raise _refusal(given.reception)
        return given

    return await request.gateway.database.transaction(work, locks=key.execution_id)


def _refusal(reception: AnswerReception) -> ApiError:
    if reception is AnswerReception.LATE:
        return errors.conflict("already-answered", "This node was answered already")
    if reception is AnswerReception.EXPIRED:
        return errors.conflict(
            "input-expired", "The node has stopped waiting at its deadline and continued without input"
        )
    message = "No node with this id waits for input: `pending-inputs` of the execution lists those that do"
    return errors.conflict("no-input-pending", message)


def _accepted_response(key: ExecutionKey, body: InputAnswer, headers: Mapping[str, str]) -> JsonResponse:
    taken = InputAnswerResult(execution_id=key.execution_id, node_id=body.node_id, status="accepted")
    return JsonResponse(taken, headers=headers)


def _shown(one: WaitingNode) -> PendingInput:
    schema = one.request.get("schema")
    return PendingInput(
        node_id=one.node_id,
        iteration=one.iteration,
        node_label=one.label,
        title=str(one.request.get("title") or ""),
        description=str(one.request.get("description") or ""),
        schema=schema if isinstance(schema, dict) else None,
        choices=input_checks.read_choices(one.request),
        requested_at=optional_instant(one.started_at),
        expires_at=optional_instant(one.expires_at),
    )
