"""Deliveries: what senders have sent, what became of it, and what is run once more from here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from gateway.http import errors, idempotency, limits
from gateway.http.parameters import LIMIT, OFFSET, ChoiceParameter, TimeParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, location
from gateway.http.wire import Instant, StrictWire, WireStruct, decode_body, instant
from gateway.ingest import delivery_rows, redrive_runs
from gateway.ingest.delivery_rows import DeliveryFilter
from gateway.openapi.refusals import ErrorReason
from gateway.workflows import editing, workflow_rows
from journal.store import AcceptanceResult, AcceptanceVerdict, IdempotencyKey
from json_text import decoding
from models.ingest import DeliveryOutcome, IngestRoute

if TYPE_CHECKING:
    from models.ingest import Delivery

OUTCOME: Final = ChoiceParameter("outcome", "Only what came to this.", DeliveryOutcome)
ROUTE: Final = ChoiceParameter("route", "Only what came this way.", IngestRoute)
SINCE: Final = TimeParameter("since", "Only what came from this moment on.")
UNTIL: Final = TimeParameter("until", "Only what came before this moment.")
LISTED: Final = (OUTCOME, ROUTE, SINCE, UNTIL, LIMIT, OFFSET)


class DeliveryShape(WireStruct):
    """One request of a sender."""

    id: str
    workflow_id: str | None
    """Null for an event, which is nobody's own."""
    route: IngestRoute
    sender: str
    """`api-key:`, `trigger-token:` or `event-token:` and its id, or a provider whose signature was good."""
    content_hash: str
    """SHA-256 of the body."""
    content_bytes: int
    outcome: DeliveryOutcome
    status: int
    """Of the answer."""
    reason: ErrorReason | None
    """Why it was refused."""
    execution_id: str | None
    """Of its run, where it brought one alone; a duplicate has the first one's."""
    execution_ids: list[str]
    """Of the runs that it brought, where these were several."""
    event_id: str | None
    redriven_from: str | None
    """The delivery that it repeats."""
    created_at: Instant


class DeliveryList(WireStruct):
    """A part of the deliveries, the newest first; `count` tells how many there are in all."""

    count: int
    limit: int
    offset: int
    deliveries: Sequence[DeliveryShape]


class DeliveryRedriveResult(WireStruct):
    """A run that was given once more what a delivery, or a run before, was given."""

    execution_id: str
    trigger_type: str = msgspec.field(name="trigger_type")


class RedriveDeliveries(StrictWire):
    """Which deliveries are to be run once more; those that were already, or can't be, are left out.

    A field that isn't known is refused: it might have been meant to spare something.
    """

    outcome: DeliveryOutcome | None = None
    """Unless it is given: any but `duplicate`."""
    route: IngestRoute | None = None
    since: datetime | None = None
    until: datetime | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=limits.REDRIVEN_AT_ONCE)] = limits.REDRIVEN_AT_ONCE
    dry_run: bool = False
    """Only tell how many there are."""


class DeliveryRedriveResults(WireStruct):
    """What became of them."""

    matched: int
    redriven: int
    failed: int
    """Of those, the reasons are in `errors`, by the ids of what was to be run."""
    remaining: int
    """What is left for the next request."""
    execution_ids: list[str]
    errors: dict[str, ErrorReason]


async def index(request: GatewayRequest) -> JsonResponse:
    """List what was sent to a workflow, and what became of it."""
    query = request.query
    part = query.page()
    wanted = DeliveryFilter(query[OUTCOME], query[ROUTE], query[SINCE], query[UNTIL])
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request)
        count, found = await delivery_rows.list_deliveries(connection, stored.workflow, wanted, part)
    shown = [_shape(one) for one in found]
    return JsonResponse(DeliveryList(count=count, limit=part.limit, offset=part.offset, deliveries=shown))


async def show(request: GatewayRequest) -> JsonResponse:
    """Show one request of a sender, and what became of it."""
    return JsonResponse(_shape(await _readable(request, request.path_params["id"])))


async def redrive(request: GatewayRequest) -> JsonResponse:
    """Run a workflow once more on what a delivery has brought, as the workflow is now.

    What was refused runs too, where it was understood. With an `Idempotency-Key` a repeated request runs it once.
    """
    delivery = await _readable(request, request.path_params["id"])
    idempotency_key = idempotency.requested_key(
        request, {"delivery": delivery.id}, workflow_id=str(delivery.workflow_id)
    )
    accepted, kind = await redrive_runs.redrive_delivery(request, delivery, idempotency_key)
    headers = location(request.gateway.settings, accepted.execution_id)
    if accepted.verdict is AcceptanceVerdict.REPEATED:
        headers |= idempotency.REPLAYED
    return JsonResponse(
        DeliveryRedriveResult(execution_id=accepted.execution_id, trigger_type=kind),
        status=201,
        headers=headers,
    )


async def redrive_many(request: GatewayRequest) -> JsonResponse:
    """Run a workflow once more on what deliveries have brought, each once however often this is asked for.

    At most 1,000 at a time, the oldest first.
    """
    body = await decode_body(request, RedriveDeliveries)
    wanted = DeliveryFilter(body.outcome, body.route, body.since, body.until)
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request)
        count, found = await delivery_rows.find_not_redriven(connection, stored.workflow, wanted, body.limit)

    async def again(delivery_id: str, idempotency_key: IdempotencyKey) -> tuple[AcceptanceResult, str]:
        return await redrive_runs.redrive_delivery(
            request, await _readable(request, delivery_id), idempotency_key
        )

    done = await redrive_runs.redrive_each(request, [] if body.dry_run else found, again)
    return JsonResponse(counted(count, done))


def counted(matched: int, done: redrive_runs.RedriveResult) -> DeliveryRedriveResults:
    """Return what became of what matched."""
    return DeliveryRedriveResults(
        matched=matched,
        redriven=len(done.execution_ids),
        failed=len(done.errors),
        remaining=matched - len(done.execution_ids),
        execution_ids=done.execution_ids,
        errors={
            key: ErrorReason(code=error.code, message=error.message, details=[])
            for key, error in done.errors.items()
        },
    )


async def _readable(request: GatewayRequest, delivery_id: str) -> Delivery:
    """Return a delivery; raises 404 for one of a workflow that the caller may not read."""
    caller = request.caller
    async with request.gateway.database.read() as connection:
        found = await delivery_rows.find_delivery(connection, delivery_id, caller)
        if found is None:
            raise errors.not_found("delivery")
        if found.workflow_id is None:
            may_read = caller.is_admin or found.user_id == caller.user_id
        else:
            may_read = await workflow_rows.is_readable(connection, found.workflow_id, caller)
    if not may_read:
        raise errors.not_found("delivery")
    return found


def _shape(delivery: Delivery) -> DeliveryShape:
    reason = None
    if delivery.reason is not None:
        code, _, message = delivery.reason.partition(": ")
        reason = ErrorReason(code=code, message=message, details=[])
    return DeliveryShape(
        id=delivery.id,
        workflow_id=delivery.workflow_id,
        route=IngestRoute(delivery.route),
        sender=delivery.sender,
        content_hash=delivery.content_hash,
        content_bytes=delivery.content_bytes,
        outcome=DeliveryOutcome(delivery.outcome),
        status=delivery.status,
        reason=reason,
        execution_id=delivery.execution_id,
        execution_ids=_brought(delivery),
        event_id=delivery.event_id,
        redriven_from=delivery.redriven_from,
        created_at=instant(delivery.created_at),
    )


def _brought(delivery: Delivery) -> list[str]:
    """Return the runs of a delivery that has brought several."""
    if delivery.answer is None or delivery.route != IngestRoute.ENQUEUE_BATCH:
        return []
    return decoding.decode(delivery.answer, list[str])
