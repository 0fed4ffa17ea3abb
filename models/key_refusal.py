"""Counts of requests that were refused because their key lacks a scope, by day."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import BigInteger, Column, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Field, SQLModel, col

from models.column_types import TimestampColumn, build_row

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

KEPT_DAYS: Final = 7
"""Days that are counted, today among them."""


class KeyRefusal(SQLModel, table=True):
    """Number of refusals of one key for one scope on one day."""

    __tablename__ = "key_refusal"

    day: datetime = Field(sa_column=Column(TimestampColumn, primary_key=True, autoincrement=False))
    """Begin of the day, in UTC."""
    key_id: str = Field(primary_key=True)
    scope: str = Field(primary_key=True)
    count: int = Field(sa_column=Column(BigInteger, nullable=False))
    last_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    last_route: str
    """Method and path template of the last one, such as `POST /api/v1/workflows`."""


class RefusedScope(Struct, frozen=True):
    """Refusals of a key for one scope in the last seven days."""

    scope: str
    count: int
    last_at: datetime
    last_route: str


def begin_of_day(now: datetime) -> datetime:
    """Return the midnight before `now`, which must be in UTC."""
    return now.replace(hour=0, minute=0, second=0, microsecond=0)


def first_day(now: datetime) -> datetime:
    """Return the begin, in UTC, of the first of the seven days, today among them, whose refusals are counted."""
    return begin_of_day(now) - timedelta(days=KEPT_DAYS - 1)


async def add_counts(connection: AsyncConnection, rows: Sequence[KeyRefusal]) -> None:
    """Add the counts of `rows` to the stored counts of the same day, key and scope, and replace their last time and
    route.

    Needs 1 to 5,000 rows, since it executes one statement.
    """
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    # Same order in every gateway: concurrent writers wait for one another without a deadlock.
    ordered = sorted((row.model_dump() for row in rows), key=lambda row: (row["key_id"], row["scope"]))
    added = dialect.insert(KeyRefusal).values(ordered)
    changes = {name: added.excluded[name] for name in ("last_at", "last_route")}
    changes["count"] = col(KeyRefusal.count) + added.excluded.count
    await connection.execute(
        added.on_conflict_do_update(index_elements=["day", "key_id", "scope"], set_=changes)
    )


async def delete_earlier(connection: AsyncConnection, first: datetime) -> None:
    """Delete the counts of days before `first`."""
    await connection.execute(delete(KeyRefusal).where(col(KeyRefusal.day) < first))


async def list_by_key(
    connection: AsyncConnection, key_ids: Collection[str], now: datetime
) -> dict[str, list[RefusedScope]]:
    """Return the refusals of API keys in the last seven days by key id, the most frequent scope first; keys without
    refusals are omitted.
    """
    if not key_ids:
        return {}
    statement = (
        select(KeyRefusal)
        .where(col(KeyRefusal.day) >= first_day(now), col(KeyRefusal.key_id).in_(sorted(key_ids)))
        .order_by(col(KeyRefusal.last_at))
    )
    found: dict[str, dict[str, RefusedScope]] = {}
    for row in (build_row(KeyRefusal, values) for values in (await connection.execute(statement)).mappings()):
        of_key = found.setdefault(row.key_id, {})
        before = of_key[row.scope].count if row.scope in of_key else 0
        of_key[row.scope] = RefusedScope(row.scope, before + row.count, row.last_at, row.last_route)
    return {
        key_id: sorted(scopes.values(), key=lambda one: (-one.count, one.scope))
        for key_id, scopes in found.items()
    }
