"""Deliveries: stored records of inbound requests with their outcomes, and their redrive."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from gateway.http import errors, idempotency, keyset, limits
from gateway.http.keyset import AFTER, KeysetBounds, KeysetPage, PageCursor
from gateway.http.parameters import LIMIT, OFFSET, ChoiceParameter, TextParameter, TimeParameter
from gateway.http.refusals import ErrorReason
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, location
from gateway.http.wire import Instant, StrictWire, WireStruct, decode_body, instant, optional_instant
from gateway.ingest import dead_letter_rows, delivery_rows, redrive_runs
from gateway.ingest.delivery_rows import DeliveryFilter
from gateway.workflows import editing, workflow_rows
from journal.store import AcceptanceResult, AcceptanceVerdict, IdempotencyKey
from json_text import decoding
from models.audit import AuditAction
from models.ingest import DeliveryOutcome, IngestRoute

if TYPE_CHECKING:
    from gateway.ingest.delivery_rows import MailHead
    from models.ingest import Delivery

OUTCOME: Final = ChoiceParameter("outcome", "Only deliveries with this outcome.", DeliveryOutcome)
ROUTE: Final = ChoiceParameter("route", "Only deliveries of this route.", IngestRoute)
REASON: Final = TextParameter(
    "reason", "Only deliveries with this code of a refusal or deferral, such as `outside-window`."
)
SINCE: Final = TimeParameter("since", "Only deliveries from this time on.")
UNTIL: Final = TimeParameter("until", "Only deliveries before this time.")
LISTED: Final = (OUTCOME, ROUTE, REASON, SINCE, UNTIL, LIMIT, OFFSET, AFTER)
WORKFLOW: Final = TextParameter("workflow_id", "Only deliveries of this workflow.")
LISTED_ALL: Final = (WORKFLOW, OUTCOME, ROUTE, REASON, SINCE, UNTIL, LIMIT, AFTER)
FIRST_PAGE: Final = PageCursor()


class MailSummary(WireStruct):
    """Mail of a delivery in a list."""

    from_: str = msgspec.field(name="from")
    subject: str
    attachments: int
    """Number of attached files."""


class DeliveryShape(WireStruct):
    """Delivery as the API shows it."""

    id: str
    workflow_id: str | None
    """Null for an event, which belongs to no single workflow."""
    route: IngestRoute
    sender: str
    """`api-key:`, `trigger-token:` or `event-token:` with an id, or the provider with a verified signature.
    """
    content_hash: str
    """SHA-256 of the body."""
    content_bytes: int
    outcome: DeliveryOutcome
    status: int
    """HTTP status of the answer."""
    reason: ErrorReason | None
    """Reason of a refusal or deferral: of these `workflow-paused`, `outside-window`, `stopped-manually` or
    `not-deployed`.
    """
    not_before: Instant | None
    """Earliest start of the run, as known at the arrival; null for a start at once, or at an unknown time."""
    execution_id: str | None
    """Run of the delivery when it has exactly one; a duplicate has the run of the first delivery."""
    execution_ids: list[str]
    """Runs of the delivery when it has several."""
    event_id: str | None
    redriven_from: str | None
    """Delivery that this one redrives."""
    mail: MailSummary | None
    """Null unless it is a mail whose content is parsed and kept, with at most 100,000 characters."""
    created_at: Instant


class DeliveryList(KeysetPage, kw_only=True):
    """Page of the deliveries, the newest first; `count` is the number of all, with `after` up to 10,000."""

    count: int
    limit: int
    offset: int
    deliveries: Sequence[DeliveryShape]


class OrganizationDelivery(DeliveryShape, kw_only=True):
    """Delivery in a list of the whole organization."""

    workflow_name: str | None
    """Null for an event."""


class OrganizationDeliveryList(WireStruct):
    """Page of the deliveries of the organization, the newest first; `count` goes up to 10,000."""

    count: int
    count_is_lower_bound: bool
    """Whether more deliveries match than `count` says."""
    limit: int
    next: str | None
    """Cursor of the next page; null on the last page."""
    deliveries: Sequence[OrganizationDelivery]


class DeliverySelection(StrictWire):
    """Filter of the deliveries of an organization to redrive; unlike a list, it names the outcome or the deliveries."""

    outcome: DeliveryOutcome | None = None
    delivery_ids: (
        Annotated[list[str], msgspec.Meta(min_length=1, max_length=limits.REDRIVEN_AT_ONCE)] | None
    ) = None
    """Only these; required without `outcome`. An empty list is refused, since it might be an empty choice."""
    workflow_id: str | None = None
    route: IngestRoute | None = None
    created_after: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    """Arrived at this time or later."""
    created_before: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


class RedriveOrganizationDeliveries(StrictWire):
    """Selection of deliveries of an organization to redrive, the oldest first."""

    filter: DeliverySelection
    limit: Annotated[int, msgspec.Meta(ge=1, le=limits.REDRIVEN_AT_ONCE)] = limits.REDRIVEN_AT_ONCE
    dry_run: bool = False
    """Only count the deliveries, without a redrive."""


class DeliveryRedriveResult(WireStruct):
    """Run that redrives the input of a delivery or of an earlier run."""

    execution_id: str
    trigger_type: str = msgspec.field(name="trigger_type")


class RedriveDeliveries(StrictWire):
    """Selection of deliveries to redrive; those already redriven, or not redrivable, are left out.

    An unknown field is refused, since it might be meant to narrow the selection.
    """

    outcome: DeliveryOutcome | None = None
    """Default: every outcome but `duplicate`."""
    route: IngestRoute | None = None
    since: datetime | None = None
    until: datetime | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=limits.REDRIVEN_AT_ONCE)] = limits.REDRIVEN_AT_ONCE
    dry_run: bool = False
    """Only count the deliveries, without a redrive."""


class DeliveryRedriveResults(WireStruct):
    """Numbers of matching, redriven, failed and remaining objects."""

    matched: int
    redriven: int
    failed: int
    """Number of failures; their reasons are in `errors`, by the ids of the selected objects."""
    remaining: int
    """Number left for the next request."""
    execution_ids: list[str]
    errors: dict[str, ErrorReason]


async def index(request: GatewayRequest) -> JsonResponse:
    """List the deliveries of a workflow with their outcomes.

    With `after`, one request examines 10,000 deliveries for `outcome` and `route`, so that a page may be shorter
    than `limit` although another follows.
    """
    query = request.query
    part = query.page()
    wanted = DeliveryFilter(query[OUTCOME], query[ROUTE], query[SINCE], query[UNTIL], reason=query[REASON])
    bounds = keyset.read_bounds(query)
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        page = await delivery_rows.list_deliveries(connection, workflow, wanted, part, bounds)
        mails = await delivery_rows.read_mail_heads(connection, page.items)
    return JsonResponse(
        DeliveryList(
            count=page.count,
            count_is_lower_bound=page.is_lower_bound,
            limit=part.limit,
            offset=part.offset,
            next=page.next_cursor,
            deliveries=[_show_delivery(one, mails.get(one.id)) for one in page.items],
        )
    )


async def index_all(request: GatewayRequest) -> JsonResponse:
    """List the deliveries of the organization with their outcomes, the newest first.

    Members see those of workflows that they may read, and events that they have sent themselves. One request
    examines 10,000 deliveries, so that a page may be shorter than `limit` although another follows.
    """
    query = request.query
    wanted = DeliveryFilter(
        query[OUTCOME], query[ROUTE], query[SINCE], query[UNTIL], query[WORKFLOW], query[REASON]
    )
    bounds = KeysetBounds(query[LIMIT], is_descending=True, cursor=query[AFTER] or FIRST_PAGE)
    if bounds.cursor.is_descending is False:
        raise errors.invalid_query(AFTER.name, "invalid-cursor", "after must be a cursor of this list")
    async with request.gateway.database.read() as connection:
        page = await delivery_rows.list_of_organization(connection, request.caller, wanted, bounds)
        workflow_ids = [one.workflow_id for one in page.items if one.workflow_id is not None]
        names = await dead_letter_rows.read_workflow_names(connection, workflow_ids)
        mails = await delivery_rows.read_mail_heads(connection, page.items)
    shown = [
        OrganizationDelivery(
            **msgspec.structs.asdict(_show_delivery(one, mails.get(one.id))),
            workflow_name=names.get(one.workflow_id or ""),
        )
        for one in page.items
    ]
    return JsonResponse(
        OrganizationDeliveryList(
            count=page.count,
            count_is_lower_bound=bool(page.is_lower_bound),
            limit=bounds.limit,
            next=page.next_cursor or None,
            deliveries=shown,
        )
    )


async def redrive_all(request: GatewayRequest) -> JsonResponse:
    """Run workflows again on the content of deliveries of the organization, by outcome or by id, the oldest first.

    At most 1,000 are redriven at a time; `remaining` counts others, up to 2,000 in all. The oldest 100,000
    deliveries that match are examined. Repeated requests run each delivery once.
    """
    body = await decode_body(request, RedriveOrganizationDeliveries)
    chosen = body.filter
    if chosen.outcome is None and not chosen.delivery_ids:
        message = "filter needs outcome or deliveryIds: without them it would select all deliveries"
        raise errors.invalid([errors.problem("filter", "required", message)])
    wanted = DeliveryFilter(
        chosen.outcome,
        chosen.route,
        chosen.created_after,
        chosen.created_before,
        chosen.workflow_id,
        delivery_ids=chosen.delivery_ids or (),
    )
    bounds = KeysetBounds(limits.REDRIVE_COUNT, is_descending=False, cursor=FIRST_PAGE)
    async with request.gateway.database.read() as connection:
        found = await dead_letter_rows.find_deliveries(
            connection, request.caller, wanted, bounds, examined=limits.EXAMINED_FOR_REDRIVE
        )
    rows = {one.id: one for one in found.rows[: body.limit]}

    async def again(delivery_id: str) -> AcceptanceResult:
        delivery = rows[delivery_id]
        key = idempotency.redrive_key(str(delivery.workflow_id), delivery_id)
        full = await _find_readable(request, delivery_id)
        accepted, _ = await request.gateway.redriver.redrive_delivery(request.caller, full, key)
        return accepted

    if rows and not body.dry_run:
        subject = chosen.workflow_id or request.caller.organization_id
        await redrive_runs.record_redrive(
            request.gateway.database,
            request.caller,
            AuditAction.DELIVERIES_REDRIVEN,
            subject,
            list(rows),
            chosen,
        )
    done = await redrive_runs.redrive_all([] if body.dry_run else list(rows), again)
    return JsonResponse(summarize_redrive(len(found.rows), done))


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a delivery with its outcome."""
    found = await _find_readable(request, request.path_params["id"])
    async with request.gateway.database.read() as connection:
        mails = await delivery_rows.read_mail_heads(connection, [found])
    return JsonResponse(_show_delivery(found, mails.get(found.id)))


async def redrive(request: GatewayRequest) -> JsonResponse:
    """Run the current workflow again on the content of a delivery.

    A refused delivery can run too, if its content could be parsed. With an `Idempotency-Key`, repeated
    requests run it once.
    """
    delivery = await _find_readable(request, request.path_params["id"])
    idempotency_key = request.idempotency_key(
        {"delivery": delivery.id}, workflow_id=str(delivery.workflow_id)
    )
    accepted, kind = await request.gateway.redriver.redrive_delivery(
        request.caller, delivery, idempotency_key
    )
    headers = location(request.gateway.settings, accepted.execution_id)
    if accepted.verdict is AcceptanceVerdict.REPEATED:
        headers |= idempotency.REPLAYED
    return JsonResponse(
        DeliveryRedriveResult(execution_id=accepted.execution_id, trigger_type=kind),
        status=201,
        headers=headers,
    )


async def redrive_many(request: GatewayRequest) -> JsonResponse:
    """Run the current workflow again on the content of deliveries, at most 1,000 at a time, the oldest first.

    Repeated requests run each delivery once.
    """
    body = await decode_body(request, RedriveDeliveries)
    wanted = DeliveryFilter(body.outcome, body.route, body.since, body.until)
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        count, found = await delivery_rows.find_not_redriven(connection, workflow, wanted, body.limit)

    async def again(delivery_id: str, idempotency_key: IdempotencyKey) -> tuple[AcceptanceResult, str]:
        return await request.gateway.redriver.redrive_delivery(
            request.caller, await _find_readable(request, delivery_id), idempotency_key
        )

    done = await redrive_runs.redrive_each(request.path_params["id"], [] if body.dry_run else found, again)
    return JsonResponse(summarize_redrive(count, done))


def summarize_redrive(matched: int, done: redrive_runs.RedriveResult) -> DeliveryRedriveResults:
    """Return the answer to a redrive of a selection of `matched` objects: those redriven, those with an error, and
    those remaining.

    All that were not redriven remain, those with an error too.
    """
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


async def _find_readable(request: GatewayRequest, delivery_id: str) -> Delivery:
    """Return a delivery; raises a 404 error if it is missing, or of a workflow that the caller may not read.

    A delivery of an event is visible to its sender and admins.
    """
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


def _show_delivery(delivery: Delivery, mail: MailHead | None) -> DeliveryShape:
    """Return a delivery as the API shows it; `mail` is None unless it is a mail with stored, parsed content."""
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
        execution_ids=_list_batch_runs(delivery),
        event_id=delivery.event_id,
        not_before=optional_instant(delivery.not_before),
        redriven_from=delivery.redriven_from,
        mail=None
        if mail is None
        else MailSummary(from_=mail.from_, subject=mail.subject, attachments=len(mail.attachments)),
        created_at=instant(delivery.created_at),
    )


def _list_batch_runs(delivery: Delivery) -> list[str]:
    """Return the ids of the runs of a batch delivery; an empty list for other deliveries."""
    if delivery.answer is None or delivery.route != IngestRoute.ENQUEUE_BATCH:
        return []
    return decoding.decode(delivery.answer, list[str])
