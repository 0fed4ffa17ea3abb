"""What is kept for a time only, and deleted in batches that hold up nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import delete, select, tuple_
from sqlmodel import col

from models.database_time import DatabaseTime
from models.execution import Idempotency

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

BATCH_ROWS: Final = 1_000


async def forget_expired_keys(database: Database) -> None:
    """Delete the idempotency keys whose day is over; raises `DatabaseUnavailable`."""
    while await database.transaction(_forget_batch) == BATCH_ROWS:
        pass


async def _forget_batch(connection: AsyncConnection) -> int:
    identity = (col(Idempotency.lane), col(Idempotency.scope), col(Idempotency.key))
    expired = (
        select(*identity)
        .where(col(Idempotency.expires_at) < DatabaseTime())
        .order_by(col(Idempotency.expires_at))
        .limit(BATCH_ROWS)
        # What a request is just renewing is left alone: two that lock several rows in different orders would deadlock.
        .with_for_update(skip_locked=True)
    )
    result = await connection.execute(delete(Idempotency).where(tuple_(*identity).in_(expired)))
    return result.rowcount
