"""Queries of deliveries and dead letters for lists. Every WHERE clause names the organization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct
from sqlalchemy import and_, exists, func, literal_column, or_, select
from sqlmodel import col

from gateway.http import idempotency, keyset
from gateway.http.keyset import ListPage, RowSource
from journal.dead_letters import IS_OPEN, OF_INTAKE
from json_text import decoding
from models.column_types import build_row
from models.execution import Execution, ExecutionData, Idempotency
from models.ingest import Delivery, DeliveryOutcome, IngestRoute
from models.workflow import Workflow, is_readable_by

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import FromClause, SQLColumnExpression

    from gateway.http.keyset import KeysetBounds
    from gateway.http.parameters import PageBounds
    from models.access import ApiCaller

SHOWN_CHARACTERS: Final = 100_000
"""Length limit of a run's input in lists; longer inputs are left out."""
KINDS: Final = {
    IngestRoute.ENQUEUE: "queue",
    IngestRoute.EMAIL: "email",
    IngestRoute.HOOK: "webhook",
}
"""Kind of trigger for each route with one run per request."""
LISTED: Final = [
    column
    for column in Delivery.__table__.columns  # type: ignore[attr-defined]  # SQLModel adds it
    if column.name != "payload"
]
"""Payloads may be large, so lists leave them out."""
_IS_KEPT: Final = or_(
    col(Delivery.payload).is_not(None),
    exists().where(col(ExecutionData.execution_id) == col(Delivery.execution_id)).correlate(Delivery),
)
"""The content can still be redriven."""


class DeliveryFilter(Struct, frozen=True):
    """Filter of a list of deliveries."""

    outcome: DeliveryOutcome | None
    route: IngestRoute | None
    since: datetime | None
    until: datetime | None
    """Arrival times: `since` is inclusive, `until` is exclusive."""
    workflow_id: str | None = None
    reason: str | None = None
    """Code of the reason of a refusal or deferral."""
    delivery_ids: Sequence[str] = ()
    """Only these; empty: all."""


class MailHead(msgspec.Struct, frozen=True):
    """Fields of a mail by which a person recognizes it."""

    from_: str = msgspec.field(name="from")
    subject: str = ""
    attachments: Sequence[msgspec.Raw] = ()


_decode_head: Final = decoding.build_decoder(MailHead).decode


async def find_delivery(connection: AsyncConnection, delivery_id: str, caller: ApiCaller) -> Delivery | None:
    """Return a delivery of the caller's organization; None if it doesn't exist there. The workflow's
    visibility is not checked.
    """
    statement = select(Delivery).where(
        col(Delivery.id) == delivery_id, col(Delivery.organization_id) == caller.organization_id
    )
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else build_row(Delivery, row)


async def list_deliveries(
    connection: AsyncConnection,
    workflow: Workflow,
    wanted: DeliveryFilter,
    part: PageBounds,
    bounds: KeysetBounds | None,
) -> ListPage[Delivery]:
    """Return a page of the matching deliveries of a workflow, without payloads and the newest first, with their number.

    With `bounds`, the page follows its cursor, the number is counted up to 10,000, and a page of one outcome, route or
    reason examines at most 10,000 rows. With None, limit and offset of `part` count, and the number is that of all.
    """
    if bounds is not None:
        within = [*_select_workflow(workflow), *_time_conditions(wanted)]
        residual = [*_outcome_conditions(wanted), *_residual_conditions(wanted)]
        return await _list_examined(connection, within, residual, bounds)
    of_list = [*_select_workflow(workflow), *conditions(wanted)]
    created_at, item_id = col(Delivery.created_at), col(Delivery.id)
    count = await connection.scalar(select(func.count()).select_from(Delivery).where(*of_list))
    rows = await connection.execute(
        select(*LISTED)
        .where(*of_list)
        .order_by(created_at.desc(), item_id.desc())
        .limit(part.limit)
        .offset(part.offset)
    )
    return ListPage(count or 0, [build_row(Delivery, row) for row in rows.mappings()])


async def list_of_organization(
    connection: AsyncConnection, caller: ApiCaller, wanted: DeliveryFilter, bounds: KeysetBounds
) -> ListPage[Delivery]:
    """Return a page of the matching deliveries that the caller may see, in the order of `bounds`, with a count that may
    be a lower bound.

    A page examines 10,000 rows at most, so it may be short or empty although `next_cursor` names another one.
    """
    within = [col(Delivery.organization_id) == caller.organization_id, *_outcome_conditions(wanted)]
    residual = [*_residual_conditions(wanted), *visible_conditions(caller)]
    if wanted.workflow_id is not None:
        # By the index of the workflow, with another organization checked once.
        is_own = exists().where(
            col(Workflow.id) == wanted.workflow_id, col(Workflow.organization_id) == caller.organization_id
        )
        within = [col(Delivery.workflow_id) == wanted.workflow_id, is_own]
        residual += _outcome_conditions(wanted)
    within += _time_conditions(wanted)
    return await _list_examined(connection, within, residual, bounds)


async def _list_examined(
    connection: AsyncConnection,
    within: Sequence[ColumnElement[bool]],
    residual: Sequence[ColumnElement[bool]],
    bounds: KeysetBounds,
) -> ListPage[Delivery]:
    """Return a page of deliveries that meet both lists of conditions: an index decides `within`, a look at each row
    `residual`.

    At most 10,000 rows are examined, so that a page may be short although another one follows.
    """
    table: FromClause = Delivery.__table__  # type: ignore[attr-defined]  # SQLModel adds it
    source = RowSource(table, col(Delivery.created_at), col(Delivery.id), within, residual)
    page = await keyset.list_examined(connection, LISTED, source, bounds)
    return page.convert(lambda row: build_row(Delivery, row))


def visible_conditions(caller: ApiCaller) -> Iterable[ColumnElement[bool]]:
    """Yield the SQL condition for deliveries that a caller may see: of readable workflows, and of events sent by the
    caller.

    Nothing is yielded for admins, who see all of their organization, which the caller's statement must restrict.
    """
    if caller.is_admin:
        return
    workflow = exists().where(col(Workflow.id) == col(Delivery.workflow_id), is_readable_by(caller))
    own_event = and_(col(Delivery.workflow_id).is_(None), col(Delivery.user_id) == caller.user_id)
    yield or_(own_event, workflow.correlate(Delivery))


def redrivable_conditions() -> Iterable[ColumnElement[bool]]:
    """Yield the SQL conditions for deliveries of one run each whose content is kept and that are no redrives
    themselves.
    """
    yield col(Delivery.route).in_(list(KINDS))
    yield col(Delivery.redriven_from).is_(None)
    yield _IS_KEPT


async def find_not_redriven(
    connection: AsyncConnection, workflow: Workflow, wanted: DeliveryFilter, limit: int
) -> tuple[int, list[str]]:
    """Return the number of deliveries that a bulk redrive can run and has not run, and the ids of the oldest, at most
    `limit`.

    Redrives themselves are left out; duplicates too, unless the filter names them.
    """
    of_list = [
        *_select_workflow(workflow),
        *conditions(wanted),
        *redrivable_conditions(),
        ~_is_settled(workflow, col(Delivery.id)).correlate(Delivery),
    ]
    if wanted.outcome is None:
        of_list.append(col(Delivery.outcome) != DeliveryOutcome.DUPLICATE)
    count = await connection.scalar(select(func.count()).select_from(Delivery).where(*of_list))
    oldest = select(col(Delivery.id)).where(*of_list).order_by(col(Delivery.created_at), col(Delivery.id))
    return count or 0, [*await connection.scalars(oldest.limit(limit))]


async def list_dead_letters(
    connection: AsyncConnection, workflow: Workflow, part: PageBounds, only: Sequence[str] = ()
) -> tuple[int, list[Execution]]:
    """Return the number of dead letters of a workflow, and the page `part` of them, the first to fail first.

    Dead letters are failed runs of inbound requests; redriven, resumed, replayed and purged ones are left out. With
    `only`, just runs with these ids are counted and listed.
    """
    conditions = [
        col(Execution.workflow_id) == workflow.id,
        col(Execution.organization_id) == workflow.organization_id,
        *OF_INTAKE,
        *IS_OPEN,
        ~_is_settled(workflow, col(Execution.id)).correlate(Execution),
    ]
    if only:
        conditions.append(col(Execution.id).in_(only))
    count = await connection.scalar(select(func.count()).select_from(Execution).where(*conditions))
    rows = await connection.execute(
        select(Execution)
        .where(*conditions)
        .order_by(col(Execution.ended_at), col(Execution.id))
        .limit(part.limit)
        .offset(part.offset)
    )
    return count or 0, [build_row(Execution, row) for row in rows.mappings()]


async def read_input(connection: AsyncConnection, execution_ids: Sequence[str]) -> dict[str, str]:
    """Return the trigger outputs of runs as JSON text, by execution id; those over 100,000 characters are left out.

    Visibility is not checked: pass ids that the caller may see.
    """
    if not execution_ids:
        return {}
    statement = select(col(ExecutionData.execution_id), col(ExecutionData.trigger)).where(
        col(ExecutionData.execution_id).in_(execution_ids),
        func.length(col(ExecutionData.trigger)) <= SHOWN_CHARACTERS,
    )
    return {row.execution_id: row.trigger for row in await connection.execute(statement)}


async def read_mail_heads(connection: AsyncConnection, deliveries: Sequence[Delivery]) -> dict[str, MailHead]:
    """Return sender, subject and attachments (as raw JSON) of the mails among deliveries, by delivery id.

    Mails are left out if they are not parsed yet, no longer stored, or stored with over 100,000 characters of JSON.
    """
    mails = [one for one in deliveries if one.route == IngestRoute.EMAIL]
    if not mails:
        return {}
    given = await read_input(connection, [one.execution_id for one in mails if one.execution_id is not None])
    texts = {one.id: given[one.execution_id] for one in mails if one.execution_id in given}
    statement = select(col(Delivery.id), col(Delivery.payload)).where(
        col(Delivery.id).in_([one.id for one in mails if one.execution_id is None]),
        func.length(col(Delivery.payload)) <= SHOWN_CHARACTERS,
    )
    texts |= {row.id: row.payload for row in await connection.execute(statement)}
    heads = {}
    for delivery_id, text in texts.items():
        with suppress(msgspec.DecodeError):  # not parsed yet
            heads[delivery_id] = _decode_head(text)
    return heads


def _select_workflow(workflow: Workflow) -> Iterable[ColumnElement[bool]]:
    yield col(Delivery.workflow_id) == workflow.id
    # Checked once, not row by row: the organization is in another index, which has the same order.
    yield exists().where(
        col(Workflow.id) == workflow.id, col(Workflow.organization_id) == workflow.organization_id
    )


def conditions(wanted: DeliveryFilter) -> Iterable[ColumnElement[bool]]:
    """Yield the SQL conditions of a filter of deliveries; fields that are None filter nothing."""
    yield from _outcome_conditions(wanted)
    yield from _residual_conditions(wanted)
    yield from _time_conditions(wanted)
    if wanted.workflow_id is not None:
        yield col(Delivery.workflow_id) == wanted.workflow_id


def _outcome_conditions(wanted: DeliveryFilter) -> Iterable[ColumnElement[bool]]:
    """Yield the SQL conditions of the filter's outcome; none without one.

    They are literal, so that the index of all but accepted deliveries is used.
    """
    if wanted.outcome is None:
        return
    yield col(Delivery.outcome) == literal_column(f"'{wanted.outcome}'")
    if wanted.outcome is not DeliveryOutcome.ACCEPTED:
        yield col(Delivery.outcome) != literal_column(f"'{DeliveryOutcome.ACCEPTED}'")


def _residual_conditions(wanted: DeliveryFilter) -> Iterable[ColumnElement[bool]]:
    """Yield the SQL conditions of the filter's route, reason and ids, which no index supports."""
    if wanted.route is not None:
        yield col(Delivery.route) == wanted.route
    if wanted.reason is not None:
        yield col(Delivery.reason).startswith(f"{wanted.reason}: ", autoescape=True)
    if wanted.delivery_ids:
        yield col(Delivery.id).in_(wanted.delivery_ids)


def _time_conditions(wanted: DeliveryFilter) -> Iterable[ColumnElement[bool]]:
    if wanted.since is not None:
        yield col(Delivery.created_at) >= wanted.since
    if wanted.until is not None:
        yield col(Delivery.created_at) < wanted.until


def _is_settled(workflow: Workflow, resource: SQLColumnExpression[Any]) -> Any:  # noqa: ANN401 - a correlated condition
    """Return the SQL condition that a delivery or run has a used redrive key: it was run by a bulk redrive, or (runs
    only) resumed, replayed or purged.

    `resource` is the column with the id of the delivery or run.
    """
    return exists().where(
        and_(
            col(Idempotency.shard) == workflow.shard,
            col(Idempotency.scope) == idempotency.redrive_key(workflow.id, "").scope,
            col(Idempotency.key) == resource,
        )
    )
