"""Nodes that wait for events: each gets the first matching event, even if processes die in between.

A wait is committed before it looks for earlier events, and an event is committed before its waits are looked
up. So the second of the two always finds the first. Events that a dead process has not delivered are found by
their rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct
from sqlalchemy import and_, delete, or_, select, tuple_, type_coerce, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from engine.node_api import OUTPUT, AnswerSource
from journal.store import ExecutionKey
from journal.waits import node_answers
from models import database_time
from models.column_types import TimestampColumn, build_row
from models.database_time import DatabaseTime
from models.event_wait import EventWait
from models.execution import Execution, SpanRow
from models.ingest import EventRecord
from models.workflow_triggers import matching_patterns

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.services import EventWaitRequest, RunCaller
    from journal.waits.node_answers import AnswerResult

BATCH_WAITS: Final = 500
BATCH_EVENTS: Final = 500
BATCH_DELETED: Final = 1_000
BATCH_SCANNED: Final = 50
"""Events may be large."""
MAX_CLOCK_SKEW: Final = timedelta(seconds=0.5)
"""Time before a wait in which events still match, since the clock of the node's process may be this slow."""
UNDELIVERED_SECONDS: Final = 5
"""Time that the process which stored an event has to deliver it, before others do."""
_encode = msgspec.json.Encoder().encode
_SECOND_MICROSECONDS: Final = 1_000_000
_AFTER_A_DOT: Final = "/"
"""Character after the dot: types that begin with `order.` sort before `order/`."""


class EventAnnouncement(Struct, frozen=True):
    """Attributes of an event by which waits are matched."""

    event_id: str
    organization_id: str
    event_type: str
    created_at: datetime


async def add_wait(
    connection: AsyncConnection, caller: RunCaller, wanted: EventWaitRequest, node_id: str, iteration: str
) -> EventWait | None:
    """Store in the caller's transaction that a node waits for an event; return the wait, an existing one as it was.

    The wait also covers the earlier events of the period for which it looks back. None if the node has its answer
    already, the run is gone, or the node never started.
    """
    of_run = (
        col(Execution.id) == caller.execution_id,
        col(Execution.organization_id) == caller.organization_id,
    )
    shard = await connection.scalar(select(col(Execution.shard)).where(*of_run))
    if shard is None:
        return None
    key = ExecutionKey(caller.execution_id, shard)
    if await node_answers.is_answered(connection, key, node_id, iteration):
        return None
    now = await database_time.read_database_time(connection)
    reached_at = await connection.scalar(
        select(col(SpanRow.started_at)).where(*_is_node(SpanRow, caller.execution_id, node_id, iteration))
    )
    if reached_at is None:
        return None
    began_at = min(now, reached_at)
    timeout = wanted.timeout_seconds
    wait = EventWait(
        execution_id=caller.execution_id,
        node_id=node_id,
        iteration=iteration,
        shard=shard,
        organization_id=caller.organization_id,
        pattern=wanted.event_type,
        condition=wanted.condition,
        given=wanted.given,
        since=began_at - timedelta(seconds=wanted.look_back_seconds) - MAX_CLOCK_SKEW,
        expires_at=None if timeout is None else began_at + timedelta(seconds=timeout),
    )
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    await connection.execute(insert(EventWait).values(wait.model_dump()).on_conflict_do_nothing())
    kept = select(EventWait).where(*_is_node(EventWait, caller.execution_id, node_id, iteration))
    return EventWait(**(await connection.execute(kept)).mappings().one())


async def list_events_since(
    connection: AsyncConnection, wait: EventWait, after: tuple[datetime, str] | None
) -> Sequence[EventRecord]:
    """Return up to 50 next events in the period of a wait whose type matches it, earliest first; its condition is not
    checked.

    `after` are time and id of the last event of the batch before, None at first.
    """
    conditions: list[ColumnElement[bool]] = [
        col(EventRecord.organization_id) == wait.organization_id,
        matches_pattern(wait.pattern),
        col(EventRecord.created_at) >= wait.since,
    ]
    if wait.expires_at is not None:
        conditions.append(col(EventRecord.created_at) < wait.expires_at)
    if after is not None:
        created_at, event_id = after
        conditions.append(
            or_(
                col(EventRecord.created_at) > created_at,
                and_(col(EventRecord.created_at) == created_at, col(EventRecord.id) > event_id),
            )
        )
    statement = (
        select(EventRecord)
        .where(*conditions)
        .order_by(col(EventRecord.created_at), col(EventRecord.id))
        .limit(BATCH_SCANNED)
    )
    return [build_row(EventRecord, row) for row in (await connection.execute(statement)).mappings()]


def matches_pattern(pattern: str) -> ColumnElement[bool]:
    """Return the SQL condition that an event's type matches a pattern: the exact type, or a prefix that ends
    in `.*`.
    """
    if not pattern.endswith(".*"):
        return col(EventRecord.event_type) == pattern
    beginning = pattern.removesuffix(".*")
    return and_(
        col(EventRecord.event_type) >= f"{beginning}.", col(EventRecord.event_type) < beginning + _AFTER_A_DOT
    )


async def filter_awaited(
    connection: AsyncConnection, event_ids: Collection[str]
) -> Sequence[EventAnnouncement]:
    """Return those events in whose organization any node waits for any event, earliest first."""
    anybody = select(col(EventWait.organization_id)).where(
        col(EventWait.organization_id) == col(EventRecord.organization_id)
    )
    statement = (
        select(
            col(EventRecord.id),
            col(EventRecord.organization_id),
            col(EventRecord.event_type),
            col(EventRecord.created_at),
        )
        .where(col(EventRecord.id).in_(event_ids), anybody.exists())
        .order_by(col(EventRecord.created_at), col(EventRecord.id))
    )
    return [EventAnnouncement(*row) for row in await connection.execute(statement)]


async def list_waits(
    connection: AsyncConnection, event: EventAnnouncement, after: tuple[str, str, str] | None
) -> Sequence[EventWait]:
    """Return up to 500 next waits of an event's organization that match it by type and time; their conditions are not
    checked.

    `after` is the key of the last wait of the batch before (see `wait_key`), None at first.
    """
    conditions: list[ColumnElement[bool]] = [
        col(EventWait.organization_id) == event.organization_id,
        col(EventWait.pattern).in_(matching_patterns(event.event_type)),
        col(EventWait.since) <= event.created_at,
        or_(col(EventWait.expires_at).is_(None), col(EventWait.expires_at) > event.created_at),
    ]
    if after is not None:
        execution_id, node_id, iteration = after
        is_same_run = col(EventWait.execution_id) == execution_id
        is_same_node = and_(is_same_run, col(EventWait.node_id) == node_id)
        conditions.append(
            or_(
                col(EventWait.execution_id) > execution_id,
                and_(is_same_run, col(EventWait.node_id) > node_id),
                and_(is_same_node, col(EventWait.iteration) > iteration),
            )
        )
    statement = (
        select(EventWait)
        .where(*conditions)
        .order_by(col(EventWait.execution_id), col(EventWait.node_id), col(EventWait.iteration))
        .limit(BATCH_WAITS)
    )
    return [build_row(EventWait, row) for row in (await connection.execute(statement)).mappings()]


async def read_event_data(connection: AsyncConnection, event_id: str) -> str | None:
    """Return the data of an event as JSON text; None if it is deleted."""
    return await connection.scalar(select(col(EventRecord.data)).where(col(EventRecord.id) == event_id))


async def answer_waits(
    connection: AsyncConnection, waits: Sequence[EventWait], data: str
) -> list[AnswerResult]:
    """Answer waiting nodes with an event's data, in the caller's transaction, and delete their waits; return the
    results.

    The results are in the order of `wait_key`. A wait is deleted even if its node doesn't accept the answer.
    """
    payload = _encode({"output": msgspec.Raw(data.encode()), "port": OUTPUT})
    given: list[AnswerResult] = []
    for wait in sorted(waits, key=wait_key):  # sorted, so that concurrent transactions can't deadlock
        key = ExecutionKey(wait.execution_id, wait.shard)
        given.append(
            await node_answers.store_answer(
                connection, key, wait.node_id, wait.iteration, payload, kind=AnswerSource.EVENT
            )
        )
        await connection.execute(
            delete(EventWait).where(*_is_node(EventWait, wait.execution_id, wait.node_id, wait.iteration))
        )
    return given


async def mark_delivered(connection: AsyncConnection, event_ids: Collection[str]) -> None:
    """Mark events as delivered to all nodes that waited for them; those that are marked keep their time."""
    await connection.execute(
        update(EventRecord)
        .where(col(EventRecord.id).in_(event_ids), col(EventRecord.delivered_at).is_(None))
        .values(delivered_at=type_coerce(DatabaseTime(), TimestampColumn))
    )


async def list_undelivered(connection: AsyncConnection) -> Sequence[str]:
    """Return the ids of up to 500 events that were stored over 5 seconds ago and not delivered, earliest first."""
    statement = (
        select(col(EventRecord.id))
        .where(
            col(EventRecord.delivered_at).is_(None),
            col(EventRecord.created_at) < DatabaseTime() - UNDELIVERED_SECONDS * _SECOND_MICROSECONDS,
        )
        .order_by(col(EventRecord.created_at))
        .limit(BATCH_EVENTS)
    )
    return list(await connection.scalars(statement))


async def delete_finished_waits(connection: AsyncConnection, after: str | None) -> str | None:
    """Delete the waits for events of ended or deleted runs, among the next 1,000 waits in the order of run ids.

    `after` is the last run id of the batch before, None at first. Return that of this batch; None at the end. Locked
    waits are left for the next sweep.
    """
    condition = () if after is None else (col(EventWait.execution_id) > after,)
    statement = (
        select(col(EventWait.execution_id), col(Execution.id), col(Execution.ended_at))
        .outerjoin(Execution, col(Execution.id) == col(EventWait.execution_id))
        .where(*condition)
        .order_by(col(EventWait.execution_id))
        .limit(BATCH_DELETED)
    )
    rows = (await connection.execute(statement)).all()
    over = {row[0] for row in rows if row[1] is None or row[2] is not None}
    if over:
        unlocked = (
            select(col(EventWait.execution_id), col(EventWait.node_id), col(EventWait.iteration))
            .where(col(EventWait.execution_id).in_(over))
            .with_for_update(skip_locked=True)
        )
        identity_ = tuple_(col(EventWait.execution_id), col(EventWait.node_id), col(EventWait.iteration))
        await connection.execute(delete(EventWait).where(identity_.in_(unlocked)))
    return str(rows[-1][0]) if len(rows) == BATCH_DELETED else None


def wait_key(wait: EventWait) -> tuple[str, str, str]:
    """Return the key of a wait, by which locks are ordered: execution id, node id and iteration."""
    return wait.execution_id, wait.node_id, wait.iteration


def _is_node(
    table: type[EventWait | SpanRow], execution_id: str, node_id: str, iteration: str
) -> Sequence[ColumnElement[bool]]:
    return (
        col(table.execution_id) == execution_id,
        col(table.node_id) == node_id,
        col(table.iteration) == iteration,
    )
