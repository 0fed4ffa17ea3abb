"""Events: emitted by senders and dispatched to every subscribed workflow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec.structs import replace
from sqlalchemy import func, select
from sqlmodel import col

from concurrency import offload
from engine.values import fingerprint
from gateway.http import errors, idempotency, keyset, limits, text_rules
from gateway.http.keyset import AFTER, KeysetPage, ListPage, RowSource
from gateway.http.parameters import LIMIT, OFFSET, TextParameter, TimeParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent, location
from gateway.http.sender import RequestSender, refuse_sender
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import (
    GuardedWire,
    Instant,
    StrictWire,
    WireStruct,
    body_of,
    decode_body,
    instant,
    json_of,
)
from gateway.ingest import delivery_log, event_dispatch, event_signatures
from gateway.ingest.ingest import RunInput
from journal.store import AcceptanceVerdict, InboundRequest
from journal.waits import event_waits
from json_text import decoding
from models.column_types import build_row
from models.ingest import Delivery, IngestRoute, SenderTokenKind
from models.ingest import EventRecord as EventRow
from senders import event_senders
from senders import sender_event as sent_events
from senders.request_refusal import RequestRefused
from senders.sender_event import EventBatch, SenderEvent, UrlChallenge
from senders.sender_request import SenderRequest

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import FromClause

    from engine.values import Json
    from gateway.ingest.event_dispatch import EventDispatchResult, WorkflowEventOutcome
    from gateway.ingest.ingest import RunTarget
    from journal.store import IdempotencyKey
    from models.access import ApiCaller
    from senders.event_senders import EventSender as Provider

SOURCE: Final = "platform"
EVENT: Final = "event"
EVENT_TYPE: Final = TextParameter(
    "eventType", "Only events of this type; `user.*` matches all types with this prefix."
)
FROM: Final = TextParameter("source", "Only events of this source.")
SINCE: Final = TimeParameter("since", "Only events from this time on.")
UNTIL: Final = TimeParameter("until", "Only events before this time.")
LISTED: Final = (EVENT_TYPE, FROM, SINCE, UNTIL, LIMIT, OFFSET, AFTER)
_ORIGIN: Final = re.compile(r"[A-Za-z0-9*.:_-]{1,255}")


class EmitEventRequest(GuardedWire):
    """Request body with one event."""

    event_type: Annotated[str, text_rules.describe_length(limits.EVENT_TYPE_LENGTH, min_length=1)] = (
        msgspec.field(name="event_type")
    )
    event_data: dict[str, Any] | None = msgspec.field(default=None, name="event_data")
    source: Annotated[str, text_rules.describe_length(limits.SOURCE_LENGTH, min_length=1)] = SOURCE


class EventFailure(WireStruct):
    """Reason why a workflow could not run."""

    code: str
    message: str


class EventResult(WireStruct, omit_defaults=True):
    """Outcome of an event for one workflow."""

    workflow_id: str
    workflow_name: str
    execution_id: str | None = None
    error: EventFailure | None = None
    """Present instead of an execution."""


class EmitEventResult(WireStruct):
    """Outcomes of an event."""

    event_type: str = msgspec.field(name="event_type")
    workflows_triggered: int = msgspec.field(name="workflows_triggered")
    workflows_failed: int = msgspec.field(name="workflows_failed")
    results: Sequence[EventResult]
    event_id: str = msgspec.field(name="event_id")
    """Id with which the event can be read and replayed."""


class EmitEventResults(WireStruct):
    """Outcomes of a batch of events, in their order."""

    results: Sequence[EmitEventResult]


class EndpointChallenge(WireStruct):
    """Challenge that a sender wants back, as proof that the address is ours."""

    challenge: str


class EventSummary(WireStruct):
    """Event without its data."""

    id: str
    event_type: str
    source: str
    user_id: str
    """Author of the event, or creator of the token it was sent with."""
    created_at: Instant


class EventList(KeysetPage, kw_only=True):
    """Page of the events; `count` is the number of all, with `after` up to 10,000."""

    count: int
    limit: int
    offset: int
    events: Sequence[EventSummary]


class EventShape(WireStruct):
    """Event with its data and outcomes."""

    id: str
    event_type: str
    source: str
    user_id: str
    """Author of the event, or creator of the token it was sent with."""
    created_at: Instant
    event_data: Any
    attributes: dict[str, Any]
    """Additional attributes of a CloudEvent."""
    results: Sequence[EventResult]


class ReplayEvent(StrictWire):
    """Request body that names the workflow to run on an event."""

    workflow_id: Annotated[
        str, msgspec.Meta(pattern="^[A-Za-z0-9_-]{1,64}$", description="the id of a workflow")
    ]


class EventReplayResult(WireStruct):
    """Run that replays an event."""

    execution_id: str
    trigger_type: str = msgspec.field(default=EVENT, name="trigger_type")


async def emit(request: GatewayRequest) -> JsonResponse:
    """Emit an event to the organization: each active workflow that subscribes to it runs.

    Accepts the body below; CloudEvents 1.0, structured, binary or as a batch, which gets a list `results` of
    such answers; and requests of GitHub, Stripe, Slack and senders of Standard Webhooks to the URL of an
    event token. A workflow that can't run has an `error` in `results`.
    """
    gateway, sender = request.gateway, request.sender
    if sender.token is not None and sender.token.kind is not SenderTokenKind.EVENT:
        raise refuse_sender()
    content = await request.body()
    sent = request.to_sender_request(content, path=request.url.path)
    provider = await event_signatures.verify_event(sent, sender, gateway.vault)
    inbound = await delivery_log.describe_request(IngestRoute.EVENTS, sender, content)
    async with gateway.deliveries.refusals(inbound):
        await gateway.rates.take(request)
        meaning = await _parse_request(request, sent, provider)
        if isinstance(meaning, UrlChallenge):
            await gateway.acceptances.ingest(msgspec.structs.replace(inbound, status=event_dispatch.ANSWERED))
            return JsonResponse(EndpointChallenge(challenge=meaning.text))
        if isinstance(meaning, SenderEvent):
            idempotency_key = await offload.run(_idempotency_key, request, sender, meaning)
            emission = await gateway.events.dispatch(inbound, meaning, idempotency_key)
            headers = idempotency.REPLAYED if emission.is_repeated else None
            return JsonResponse(_show_emission(emission), headers=headers)
        return await _ingest_batch(request, inbound, meaning)


async def index(request: GatewayRequest) -> JsonResponse:
    """List the events of the organization, the newest first; admins see all, others their own.

    With `after`, one request examines 10,000 events for `source`, a prefix of types, and the own events of a
    member, so that a page may be shorter than `limit` although another follows.
    """
    query = request.query
    part = query.page()
    is_of_organization, is_in_shard, *residual = _visible_to(request.caller)
    within = [is_of_organization, is_in_shard]
    if pattern := query[EVENT_TYPE]:
        # A prefix is a range of types, in which the index has no order by time.
        of_type = residual if pattern.endswith(".*") else within
        of_type.append(event_waits.matches_pattern(pattern))
    if source := query[FROM]:
        residual.append(col(EventRow.source) == source)
    if since := query[SINCE]:
        within.append(col(EventRow.created_at) >= since)
    if until := query[UNTIL]:
        within.append(col(EventRow.created_at) < until)
    columns = (
        *(col(EventRow.id), col(EventRow.event_type), col(EventRow.source)),
        *(col(EventRow.user_id), col(EventRow.created_at)),
    )
    bounds = keyset.read_bounds(query)
    created_at, item_id = col(EventRow.created_at), col(EventRow.id)
    async with request.gateway.database.read() as connection:
        if bounds is None:
            conditions = [*within, *residual]
            count = await connection.scalar(select(func.count()).select_from(EventRow).where(*conditions))
            rows = await connection.execute(
                select(*columns)
                .where(*conditions)
                .order_by(created_at.desc(), item_id.desc())
                .limit(part.limit)
                .offset(part.offset)
            )
            page = ListPage(count or 0, rows.mappings().all())
        else:
            table: FromClause = EventRow.__table__  # type: ignore[attr-defined]  # SQLModel adds it
            source_rows = RowSource(table, created_at, item_id, within, residual)
            page = await keyset.list_examined(connection, columns, source_rows, bounds)
    return JsonResponse(
        EventList(
            count=page.count,
            count_is_lower_bound=page.is_lower_bound,
            limit=part.limit,
            offset=part.offset,
            next=page.next_cursor,
            events=[EventSummary(**{**row, "created_at": instant(row["created_at"])}) for row in page.items],
        )
    )


async def show(request: GatewayRequest) -> JsonResponse:
    """Show an event with its outcomes.

    An outcome has the run of a subscribing workflow, or the reason why it has none. Members see the events that they
    sent, and admins all; raises a 404 error for an event that the caller may not see.
    """
    async with request.gateway.database.read() as connection:
        event, delivery = await _find_readable(connection, request)
        outcomes = await event_dispatch.read_outcomes(connection, delivery) if delivery is not None else []
    content: dict[str, Any] = decoding.decode(event.data)
    shape = EventShape(
        id=event.id,
        event_type=event.event_type,
        source=event.source,
        user_id=event.user_id,
        created_at=instant(event.created_at),
        event_data=content["event_data"],
        attributes=content.get("attributes", {}),
        results=[_show_outcome(one) for one in outcomes],
    )
    return JsonResponse(shape)


async def replay(request: GatewayRequest) -> JsonResponse:
    """Run one workflow on an earlier event, even if it doesn't subscribe to it.

    The workflow must be active and have an event trigger; the trigger's event types and filter are ignored.
    """
    body = await decode_body(request, ReplayEvent)
    gateway, caller, workflow_id = request.gateway, request.caller, body.workflow_id
    async with gateway.database.read() as connection:
        event, delivery = await _find_readable(connection, request)
    idempotency_key = request.idempotency_key({"event": event.id}, workflow_id=workflow_id)
    inbound = InboundRequest(
        delivery_id=delivery_log.new_delivery_id(),
        route=IngestRoute.EVENTS,
        shard=caller.shard,
        organization_id=caller.organization_id,
        user_id=caller.user_id,
        sender=f"api-key:{caller.key_id}",
        content_hash=delivery.content_hash if delivery else "",
        content_bytes=delivery.content_bytes if delivery else len(event.data),
        workflow_id=workflow_id,
        redriven_from=delivery.id if delivery else None,
    )

    async def plan(target: RunTarget) -> RunInput:
        await gateway.capacity.require_not_paused(caller, target)
        return RunInput(decoding.decode(event.data), event.data, idempotency_key=idempotency_key)

    async with gateway.deliveries.refusals(inbound):
        accepted = await gateway.ingestor.ingest_request(caller, inbound, EVENT, plan, idempotency_key)
    headers = location(gateway.settings, accepted.execution_id)
    if accepted.verdict is AcceptanceVerdict.REPEATED:
        headers |= idempotency.REPLAYED
    return JsonResponse(EventReplayResult(execution_id=accepted.execution_id), status=201, headers=headers)


async def handshake(request: GatewayRequest) -> NoContent:
    """Allow a sender of CloudEvents to send events, as its validation handshake requests."""
    headers = {"Allow": "OPTIONS, POST"}
    origin = request.headers.get("webhook-request-origin", "")
    if _ORIGIN.fullmatch(origin):
        rate = request.gateway.settings.rate_per_key
        headers["WebHook-Allowed-Origin"] = origin
        headers["WebHook-Allowed-Rate"] = str(max(int(rate * 60), 1)) if rate else "*"
    return NoContent(headers)


async def _ingest_batch(request: GatewayRequest, inbound: InboundRequest, batch: EventBatch) -> JsonResponse:
    """Ingest the events of a batch in order, each in a commit of its own, and return the answer with the outcomes of
    each.

    Each event has a key of its own, so that a repetition ingests only the missing ones. An error is raised for the
    request, and the events before it stay ingested.
    """
    if not batch.events:
        await request.gateway.acceptances.ingest(
            msgspec.structs.replace(inbound, status=event_dispatch.ANSWERED)
        )
    whole: Json = [event_dispatch.build_event_input(one) for one in batch.events]
    given = await offload.run(request.idempotency_key, whole)
    emissions: list[EventDispatchResult] = []
    for place, event in enumerate(batch.events):
        of_event = msgspec.structs.replace(inbound, delivery_id=delivery_log.new_delivery_id())
        idempotency_key = _derive_event_key(inbound.organization_id, event)
        if given is not None:
            idempotency_key = replace(given, key=fingerprint([given.key, place]))
        emissions.append(await request.gateway.events.dispatch(of_event, event, idempotency_key))
    is_repeated = bool(emissions) and all(emission.is_repeated for emission in emissions)
    shape = EmitEventResults(results=[_show_emission(emission) for emission in emissions])
    return JsonResponse(shape, headers=idempotency.REPLAYED if is_repeated else None)


async def _parse_request(
    request: GatewayRequest, sent: SenderRequest, provider: Provider | None
) -> SenderEvent | EventBatch | UrlChallenge:
    if provider is None:
        return _parse_native_event(body_of(request, await json_of(request, sent.body), EmitEventRequest))
    try:
        return await offload.run(event_senders.parse_event, sent, provider)
    except RequestRefused as error:
        raise event_signatures.refusal_error(error) from error


def _visible_to(caller: ApiCaller) -> Sequence[ColumnElement[bool]]:
    own = (col(EventRow.organization_id) == caller.organization_id, col(EventRow.shard) == caller.shard)
    return own if caller.is_admin else (*own, col(EventRow.user_id) == caller.user_id)


async def _find_readable(
    connection: AsyncConnection, request: GatewayRequest
) -> tuple[EventRow, Delivery | None]:
    """Return the event of the path, and its delivery, None if that is no longer kept.

    Raises a 404 error unless the caller may see it: admins see all events of the organization, others their own.
    """
    statement = select(EventRow).where(
        col(EventRow.id) == request.path_params["id"], *_visible_to(request.caller)
    )
    row = (await connection.execute(statement)).mappings().first()
    if row is None:
        raise errors.not_found("event")
    event = EventRow(**row)
    brought = select(Delivery).where(
        col(Delivery.organization_id) == event.organization_id,
        # Event and delivery were committed together, and these two columns have an index.
        col(Delivery.created_at) == event.created_at,
        col(Delivery.event_id) == event.id,
    )
    delivery = (await connection.execute(brought)).mappings().first()
    return event, None if delivery is None else build_row(Delivery, delivery)


def _parse_native_event(body: EmitEventRequest) -> SenderEvent:
    """Return an event from a body in the API's own format; raises a 422 error for an invalid type or source."""
    problems = ProblemCollector()
    try:
        sent_events.require_type(body.event_type)
    except RequestRefused as error:
        problems.add("event_type", "invalid-value", error.message)
    source = text_rules.check_line(body.source, "source", problems, max_length=limits.SOURCE_LENGTH)
    problems.raise_any()
    return SenderEvent(body.event_type, source, body.event_data or {})


def _idempotency_key(
    request: GatewayRequest, sender: RequestSender, event: SenderEvent
) -> IdempotencyKey | None:
    return request.idempotency_key(event_dispatch.build_event_input(event)) or _derive_event_key(
        sender.caller.organization_id, event
    )


def _derive_event_key(organization_id: str, event: SenderEvent) -> IdempotencyKey | None:
    if event.key is None:
        return None
    return idempotency.derive_key(EVENT, organization_id, event.key)


def _show_emission(emission: EventDispatchResult) -> EmitEventResult:
    """Return the outcomes of an event as the API shows them, with the number of workflows that run and that can't."""
    failed = sum(one.execution_id is None for one in emission.outcomes)
    return EmitEventResult(
        event_type=emission.event_type,
        workflows_triggered=len(emission.outcomes) - failed,
        workflows_failed=failed,
        results=[_show_outcome(one) for one in emission.outcomes],
        event_id=emission.event_id,
    )


def _show_outcome(outcome: WorkflowEventOutcome) -> EventResult:
    """Return the outcome of an event for one workflow as the API shows it."""
    error = EventFailure(code=outcome.error[0], message=outcome.error[1]) if outcome.error else None
    return EventResult(
        workflow_id=outcome.workflow_id,
        workflow_name=outcome.workflow_name,
        execution_id=outcome.execution_id,
        error=error,
    )
