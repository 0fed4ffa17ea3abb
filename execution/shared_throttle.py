"""Rate limits that all runs of an organization share: each call reserves the next slot in one row."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import BigInteger, case, type_coerce
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from engine.run_errors import NodeError
from execution.retry import until_available
from models import ids
from models.database_time import DatabaseTime
from models.execution import ThrottleRow

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.services import RunCaller
    from models.database import Database


class SharedThrottle:
    """Rate limiter with evenly spaced slots by the database's clock; implements
    `engine.services.ThrottleService`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def reserve(
        self, caller: RunCaller, key: str, *, limit: int, per_seconds: float, max_wait_seconds: float
    ) -> datetime:
        """Reserve the next free slot of a rate of `limit` runs per `per_seconds`, shared by the key's users;
        return its time.

        Slots are evenly spaced per organization and key. The caller waits for its slot; each call takes another one,
        and an unused one stays empty. Raises `NodeError` (retryable) if the slot is over `max_wait_seconds` away.
        Waits while the database is unavailable.
        """
        interval = timedelta(seconds=per_seconds / limit)
        max_wait = timedelta(seconds=max_wait_seconds)
        reserve_slot = partial(_reserve_slot, caller.organization_id, key, interval, max_wait)
        row = f"throttle:{caller.organization_id}:{key}"
        slot = await until_available(lambda: self._database.transaction(reserve_slot, locks=row))
        if slot is None:
            message = f"Rate limit of {limit} per {per_seconds:g} s: the next slot is over {max_wait_seconds:g} s away"
            raise NodeError(message, code="throttled", retryable=True)
        return slot


async def _reserve_slot(
    organization_id: str, key: str, interval: timedelta, max_wait: timedelta, connection: AsyncConnection
) -> datetime | None:
    """Reserve the first free slot and return its time; None if it is further away than `max_wait`."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    now, step = DatabaseTime(), interval // timedelta(microseconds=1)
    next_at = type_coerce(col(ThrottleRow.next_at), BigInteger)
    first = {"organization_id": organization_id, "key": key, "shard": ids.shard_of(organization_id)}
    statement = (
        insert(ThrottleRow)
        .values(**first, next_at=now + step)
        .on_conflict_do_update(
            index_elements=["organization_id", "key"],
            set_={"next_at": case((next_at > now, next_at), else_=now) + step},
            where=next_at <= now + max_wait // timedelta(microseconds=1),
        )
        .returning(col(ThrottleRow.next_at))
    )
    free_from: datetime | None = await connection.scalar(statement)
    return None if free_from is None else free_from - interval
