"""Enqueue of many messages at once: all valid ones are ingested in one transaction."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import select
from sqlmodel import col

from concurrency import offload
from engine.values import fingerprint
from gateway.executions import acceptance, run_labels
from gateway.http import errors, idempotency, limits, text_rules
from gateway.http.errors import ApiError
from gateway.http.refusals import ErrorDetail
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import StrictWire, WireStruct, body_of, json_of
from gateway.ingest import delivery_log
from gateway.ingest.enqueue import QUEUE, BatchMessage, QueueMessage, check_message, find_signed_key
from gateway.ingest.ingest import describe_deferral
from journal.store import AcceptanceResult, AcceptanceVerdict, IdempotencyKey, InboundRequest
from json_text import decoding
from models.ingest import Delivery, IngestRoute

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine.values import Json
    from gateway.ingest.verification import VerifiedSignature
    from journal.store import InboundRequest, IngestedRun


class EnqueueBatch(StrictWire):
    """Request body with messages, each as `enqueue` accepts it."""

    messages: Annotated[list[BatchMessage], msgspec.Meta(min_length=1, max_length=limits.BATCH_MESSAGES)]
    callback_url: (
        Annotated[str, text_rules.describe_length(limits.CALLBACK_URL_LENGTH, min_length=1)] | None
    ) = None
    """URL for a callback after each of the runs."""


class _UncheckedBatch(StrictWire):
    """Batch before validation, since each message is validated separately."""

    messages: Annotated[list[Any], msgspec.Meta(min_length=1, max_length=limits.BATCH_MESSAGES)]
    callback_url: (
        Annotated[str, text_rules.describe_length(limits.CALLBACK_URL_LENGTH, min_length=1)] | None
    ) = None


class WrongMessage(WireStruct):
    """Reason of a message's refusal."""

    code: str
    message: str
    details: list[ErrorDetail] = msgspec.field(default_factory=list)


class BatchResult(WireStruct, omit_defaults=True):
    """Outcome of one message."""

    status: Literal["accepted", "duplicate", "refused"]
    execution_id: str | None = None
    """Run of the message, or of the message that it repeats."""
    error: WrongMessage | None = None


class EnqueueBatchResult(WireStruct):
    """Outcomes of the messages, in their order."""

    results: list[BatchResult]
    accepted: int
    duplicates: int
    refused: int


class PlannedMessage(Struct, frozen=True):
    """Valid message with its place in the batch."""

    place: int
    body: QueueMessage
    idempotency_key: IdempotencyKey | None


class BatchAnswers(Struct, frozen=True):
    """Results of the valid messages, in their order."""

    accepted: Sequence[AcceptanceResult]
    is_repeated: bool = False
    """Repetition: the results are those of the first request."""


NO_PLACE: Final = AcceptanceResult(AcceptanceVerdict.FULL, "")


async def enqueue(request: GatewayRequest) -> JsonResponse:
    """Run a workflow on each of up to 1,000 messages, through its queue trigger.

    One commit ingests all valid messages, or none. An invalid message is refused by itself; if all are
    invalid, the whole batch is refused. Repeated with the same `Idempotency-Key`, every message gets its
    first answer.
    """
    gateway, workflow_id = request.gateway, request.path_params["id"]
    sender = request.sender
    content = await request.body()
    signature = await gateway.verifier.verify_message(
        sender, workflow_id, QUEUE, request.to_sender_request(content)
    )
    inbound = await delivery_log.describe_request(
        IngestRoute.ENQUEUE_BATCH, sender, content, workflow_id=workflow_id
    )
    async with gateway.deliveries.refusals(inbound):
        value = await json_of(request, content)
        batch = body_of(request, value, _UncheckedBatch)
        if batch.callback_url is not None:
            await request.gateway.callbacks.require_permitted(
                batch.callback_url, request.caller.organization_id, has_key=request.has_key
            )
        own_key = find_signed_key(signature, workflow_id)
        given = await offload.run(request.idempotency_key, value, workflow_id=workflow_id)
        given = given or own_key
        planned, refused = await offload.run(
            _plan_messages, batch.messages, workflow_id, given, gateway.clock()
        )
        if not planned:
            raise _refuse_batch(refused)
        first, repeats = _split_repeats(planned)
        answers = await _ingest_messages(
            request, inbound, signature, first, batch.callback_url, own_key or given
        )
    results = dict(refused)
    for one, answer in zip(first, answers.accepted, strict=True):
        results[one.place] = _show_result(answer)
    for place, origin in repeats.items():
        repeated = results[origin]
        results[place] = repeated if repeated.error else _duplicate_of(repeated)
    shape = _count_results([results[place] for place in range(len(batch.messages))])
    if answers.is_repeated or (not shape.accepted and shape.duplicates):
        await gateway.ingestor.note_repetition(inbound, status=201, execution_id=None)
    return JsonResponse(shape, status=201, headers=idempotency.REPLAYED if answers.is_repeated else None)


async def _ingest_messages(
    request: GatewayRequest,
    inbound: InboundRequest,
    signature: VerifiedSignature | None,
    planned: Sequence[PlannedMessage],
    callback_url: str | None,
    key: IdempotencyKey | None,
) -> BatchAnswers:
    """Ingest all valid messages in one commit, or find the results of the first request with the same key; `planned`
    has no repetitions.

    `key` None means that repetitions of the batch aren't detected. Raises a 422 error when the first request, or an
    earlier message with the same key, had another content; also 403, 404, 409, 429, 503, and the errors of
    verification.
    """
    gateway, now = request.gateway, request.gateway.clock()
    runs: list[IngestedRun] = []

    async def plan_write() -> InboundRequest:
        target = await gateway.ingestor.resolve_target(request.sender.caller, str(inbound.workflow_id), QUEUE)
        if signature is not None:
            await gateway.verifier.verify_again(signature, target)
        await gateway.ingestor.require_models(request.sender.caller, target)
        await gateway.capacity.require(request, target, len(planned))
        runs[:] = [
            gateway.ingestor.build_run(target, one.body.to_run_input(now, one.idempotency_key, callback_url))
            for one in planned
        ]
        deferred = describe_deferral(target.deferral)
        return msgspec.structs.replace(inbound, runs=runs, status=201, idempotency=key, **deferred)

    accepted: Sequence[AcceptanceResult] = ()
    try:
        taken = await gateway.ingestor.ingest_batch(plan_write)
        verdict, accepted, delivery_id = taken.verdict, taken.runs, taken.delivery_id
    except ApiError:
        # A request that was answered before gets the same answer, even if the workflow has changed since.
        earlier = key and await acceptance.find_earlier(gateway.database, inbound.shard, key)
        if not earlier:
            raise
        verdict, delivery_id = earlier.verdict, earlier.execution_id
    if AcceptanceVerdict.MISMATCH in {verdict, *(one.verdict for one in accepted)}:
        raise idempotency.mismatch_error()
    if verdict is AcceptanceVerdict.REPEATED:
        return BatchAnswers(await _first_results(request, planned, delivery_id), is_repeated=True)
    gateway.ingestor.wake_deployments(runs, accepted)
    return BatchAnswers(accepted)


async def _first_results(
    request: GatewayRequest, planned: Sequence[PlannedMessage], delivery_id: str
) -> Sequence[AcceptanceResult]:
    """Return the results that the same messages got in the first request with the same key, which has the delivery
    `delivery_id`.

    The verdict is `ACCEPTED` for runs that this delivery has started, `REPEATED` for earlier ones, and `FULL` for a
    message without a run, which had no free concurrency slot then.
    """
    database = request.gateway.database
    idempotency_keys = [one.idempotency_key for one in planned if one.idempotency_key is not None]
    found = await acceptance.find_all_earlier(database, request.caller.shard, idempotency_keys)
    async with database.read() as connection:
        answer = await connection.scalar(
            select(col(Delivery.answer)).where(
                col(Delivery.id) == delivery_id,
                col(Delivery.organization_id) == request.caller.organization_id,
            )
        )
    made = {*decoding.decode(answer or "[]", list[str])}
    then = [found.get(one.idempotency_key, NO_PLACE) if one.idempotency_key else NO_PLACE for one in planned]
    accepted = AcceptanceVerdict.ACCEPTED
    return [AcceptanceResult(accepted, one.execution_id) if one.execution_id in made else one for one in then]


def _plan_messages(
    messages: Sequence[Json], workflow_id: str, given: IdempotencyKey | None, now: datetime
) -> tuple[list[PlannedMessage], dict[int, BatchResult]]:
    """Split a batch into its valid messages and the answers to the invalid ones, by their index in the batch.

    A valid message gets an idempotency key: of its deduplication id, else derived from the batch's key `given` and
    its index, else None. Starts more than a year after `now` are invalid.
    """
    planned: list[PlannedMessage] = []
    refused: dict[int, BatchResult] = {}
    for place, value in enumerate(messages):
        try:
            body = check_message(value, BatchMessage, now, f"messages.{place}")
            run_labels.read_labels(body.tags, body.metadata, f"messages.{place}.")
            if body.payload is None:
                raise errors.invalid(
                    [errors.problem(f"messages.{place}.message", "required", "message is required")]
                )
        except ApiError as error:
            details = msgspec.convert(error.details, list[ErrorDetail])
            because = WrongMessage(code=error.code, message=error.message, details=details)
            refused[place] = BatchResult(status="refused", error=because)
            continue
        idempotency_key = None
        if body.deduplication_id is not None:
            idempotency_key = idempotency.sender_key(workflow_id, body.deduplication_id)
        elif given is not None:
            idempotency_key = replace(given, key=fingerprint([given.key, place]))
        planned.append(PlannedMessage(place, body, idempotency_key))
    return planned, refused


def _split_repeats(planned: Sequence[PlannedMessage]) -> tuple[list[PlannedMessage], Mapping[int, int]]:
    """Return the messages without repetitions of an idempotency key, and the index of the first message for each
    repetition.

    Keys and values of the mapping are indexes in the batch. Messages without a key are never repetitions.
    """
    first: list[PlannedMessage] = []
    places: dict[IdempotencyKey, int] = {}
    repeats: dict[int, int] = {}
    for one in planned:
        if one.idempotency_key is not None and one.idempotency_key in places:
            repeats[one.place] = places[one.idempotency_key]
            continue
        if one.idempotency_key is not None:
            places[one.idempotency_key] = one.place
        first.append(one)
    return first, repeats


def _show_result(accepted: AcceptanceResult) -> BatchResult:
    if accepted.verdict is AcceptanceVerdict.FULL:
        full = errors.concurrency_limit()
        return BatchResult(status="refused", error=WrongMessage(code=full.code, message=full.message))
    is_new = accepted.verdict is AcceptanceVerdict.ACCEPTED
    return BatchResult(status="accepted" if is_new else "duplicate", execution_id=accepted.execution_id)


def _duplicate_of(result: BatchResult) -> BatchResult:
    """Return the answer to a message that repeats another of its batch, from the answer to that one."""
    return BatchResult(status="duplicate", execution_id=result.execution_id)


def _count_results(results: list[BatchResult]) -> EnqueueBatchResult:
    """Return the answer to a batch, with the number of results in each status."""
    statuses = [one.status for one in results]
    return EnqueueBatchResult(
        results=results,
        accepted=statuses.count("accepted"),
        duplicates=statuses.count("duplicate"),
        refused=statuses.count("refused"),
    )


def _refuse_batch(refused: Mapping[int, BatchResult]) -> ApiError:
    details = [
        msgspec.to_builtins(detail) for one in refused.values() if one.error for detail in one.error.details
    ]
    return errors.invalid(details)
