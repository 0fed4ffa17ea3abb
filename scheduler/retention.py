"""Deletion of expired rows, in batches that block no other transaction for long."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import delete, select, tuple_
from sqlmodel import SQLModel, col

from models import ids
from models.database_time import DatabaseTime
from models.execution import Idempotency, ThrottleRow
from models.ingest import Delivery, EventRecord
from models.model_hour import ModelHour

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from models.database import Database
    from scheduler.settings import SchedulerSettings

BATCH_ROWS: Final = 1_000
DECISION_DAYS: Final = 30
"""Days for which decisions of the system about data are kept."""
BULK_OPERATION_DAYS: Final = 30
"""Days for which ended bulk operations are kept; the audit trail has their numbers for good."""
MODEL_HOUR_DAYS: Final = 91
"""Days for which metrics of language models are kept: the longest window, and the rest of its first day."""


async def forget_expired_keys(database: Database) -> None:
    """Delete idempotency keys that have expired, in batches, so that they may be used again. Raises
    `DatabaseUnavailable`.
    """
    identity = (col(Idempotency.shard), col(Idempotency.scope), col(Idempotency.key))
    await _forget(database, Idempotency, identity, col(Idempotency.expires_at))


async def forget_expired_throttles(database: Database) -> None:
    """Delete the rows of throttles whose next slot is in the past, which equal having no row. Raises
    `DatabaseUnavailable`.
    """
    identity = (col(ThrottleRow.organization_id), col(ThrottleRow.key))
    await _forget(database, ThrottleRow, identity, col(ThrottleRow.next_at))


async def forget_deliveries(settings: SchedulerSettings, database: Database) -> None:
    """Delete events and deliveries that are older than `retention_event_days`, in batches. Raises
    `DatabaseUnavailable`.
    """
    before = database.clock.now() - timedelta(days=settings.retention_event_days)
    for table, prefix in ((EventRecord, "event"), (Delivery, "dlv")):
        # By their IDs, which begin with the time and so need no further index.
        forget = partial(_forget_earlier, table, ids.earliest_id(prefix, before))
        while await database.transaction(forget) == BATCH_ROWS:
            pass


async def forget_model_hours(database: Database) -> None:
    """Delete counts of calls of language models that are over 91 days old, in batches; raises `DatabaseUnavailable`."""
    names = ("organization_id", "model_id", "starts_at", "error", "bucket")
    identity = [col(getattr(ModelHour, name)) for name in names]
    before = database.clock.now() - timedelta(days=MODEL_HOUR_DAYS)
    await _forget(database, ModelHour, identity, col(ModelHour.starts_at), before)


async def forget_system_decisions(database: Database) -> None:
    """Delete audit records of automatic actions, such as the deletion of old executions, that are over 30 days old.

    Raises `DatabaseUnavailable`.
    """
    from models.audit import SystemDecision  # noqa: PLC0415 - loaded by the first turn of the duty

    before = database.clock.now() - timedelta(days=DECISION_DAYS)
    await _forget(database, SystemDecision, [col(SystemDecision.id)], col(SystemDecision.at), before)


async def forget_bulk_operations(database: Database) -> None:
    """Delete bulk operations that have ended over 30 days ago; raises `DatabaseUnavailable`."""
    from models.bulk_operation import BulkOperation  # noqa: PLC0415 - loaded by the first turn of the duty

    before = database.clock.now() - timedelta(days=BULK_OPERATION_DAYS)
    await _forget(database, BulkOperation, [col(BulkOperation.id)], col(BulkOperation.ended_at), before)


async def _forget_earlier(
    table: type[EventRecord | Delivery], first_kept: str, connection: AsyncConnection
) -> int:
    """Delete up to 1,000 rows whose ids sort before an id, except locked ones; return their number."""
    over = (
        select(col(table.id))
        .where(col(table.id) < first_kept)
        .order_by(col(table.id))
        .limit(BATCH_ROWS)
        .with_for_update(skip_locked=True)
    )
    result = await connection.execute(delete(table).where(col(table.id).in_(over)))
    return result.rowcount


async def _forget(
    database: Database,
    table: type[SQLModel],
    identity: Sequence[SQLColumnExpression[Any]],
    ends_at: SQLColumnExpression[Any],
    before: datetime | None = None,
) -> None:
    """Delete the rows of a table whose time `ends_at` is before a time, None for now, in batches; `identity` has the
    columns of its key.
    """
    end = DatabaseTime() if before is None else before
    forget = partial(_forget_batch, table, identity, ends_at < end, ends_at)
    while await database.transaction(forget) >= BATCH_ROWS:
        pass


async def _forget_batch(
    table: type[SQLModel],
    identity: Sequence[SQLColumnExpression[Any]],
    has_ended: ColumnElement[bool],
    order: SQLColumnExpression[Any],
    connection: AsyncConnection,
) -> int:
    """Delete up to 1,000 rows of a table that satisfy `has_ended`, the first in `order`, except locked ones; return
    their number.
    """
    over = (
        select(*identity)
        .where(has_ended)
        .order_by(order)
        .limit(BATCH_ROWS)
        # Rows that a request is renewing are skipped: two transactions that lock several rows in different
        # orders would deadlock.
        .with_for_update(skip_locked=True)
    )
    result = await connection.execute(delete(table).where(tuple_(*identity).in_(over)))
    return result.rowcount
