"""The trace of changes: left in the transaction that makes one, so that both are there or neither, and read again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import func, insert, select
from sqlmodel import col

from engine.values import fingerprint
from models import ids
from models.access import ApiCaller, ApiKey, User
from models.audit import AuditAction, AuditEntry
from models.database_time import PresentTime

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from gateway.http.query import PageBounds

OPERATOR: Final = "operator"
SORTABLE: Final[Mapping[str, SQLColumnExpression[Any]]] = {"createdAt": col(AuditEntry.created_at)}


@dataclass(frozen=True, slots=True)
class ServerOperator:
    """Whoever runs the server, at its command line or by its settings: no user of the organisation, and no key."""

    organization_id: str
    shard: int
    user_id: str = OPERATOR
    key_id: str = OPERATOR


async def record_change(
    connection: AsyncConnection,
    author: ApiCaller | ServerOperator,
    action: AuditAction,
    object_id: str,
    *,
    before: str | None,
    after: str | None,
) -> None:
    """Write who did what to an object, with the hashes of what it was and what it became; equal ones are no change."""
    if before == after:
        return
    statement = insert(AuditEntry).values(
        id=ids.new_id("audit"),
        organization_id=author.organization_id,
        shard=author.shard,
        user_id=author.user_id,
        key_id=author.key_id,
        action=action,
        object_id=object_id,
        before_hash=before,
        after_hash=after,
        created_at=PresentTime(),
    )
    await connection.execute(statement)


def hash_content(row: ApiKey | User) -> str:
    """Return the SHA-256 of a row, in hexadecimal, without what is secret in it and without what moves by itself."""
    return fingerprint(msgspec.to_builtins(row.model_dump(exclude={"hash", "secret_id", "last_used_at"})))


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries a list shows."""

    object_id: str | None
    action: AuditAction | None
    user_id: str | None
    since: datetime | None
    until: datetime | None
    """Made from `since` on, and before `until`."""


async def list_entries(
    connection: AsyncConnection,
    caller: ApiCaller,
    wanted: AuditFilter,
    part: PageBounds,
    order: ColumnElement[Any],
) -> tuple[int, list[AuditEntry]]:
    """Return how many entries the caller's organisation has, and a page of them."""
    conditions = [col(AuditEntry.organization_id) == caller.organization_id, *_conditions(wanted)]
    count = await connection.scalar(select(func.count()).select_from(AuditEntry).where(*conditions))
    rows = await connection.execute(
        select(AuditEntry)
        .where(*conditions)
        .order_by(order, col(AuditEntry.id).desc())
        .limit(part.limit)
        .offset(part.offset)
    )
    return count or 0, [AuditEntry(**row) for row in rows.mappings()]


def _conditions(wanted: AuditFilter) -> Iterable[ColumnElement[bool]]:
    if wanted.object_id is not None:
        yield col(AuditEntry.object_id) == wanted.object_id
    if wanted.action is not None:
        yield col(AuditEntry.action) == wanted.action
    if wanted.user_id is not None:
        yield col(AuditEntry.user_id) == wanted.user_id
    if wanted.since is not None:
        yield col(AuditEntry.created_at) >= wanted.since
    if wanted.until is not None:
        yield col(AuditEntry.created_at) < wanted.until
