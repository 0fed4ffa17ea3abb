"""Leaves the trace of a change, in the transaction that makes it: either both are there, or neither."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import insert

from models import ids
from models.audit import Action, AuditEntry

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import Caller


async def record(
    connection: AsyncConnection,
    caller: Caller,
    action: Action,
    object_id: str,
    *,
    before: str | None,
    after: str | None,
) -> None:
    """Write who did what to an object, with the hashes of what it was and what it became."""
    entry = AuditEntry(
        id=ids.new("audit"),
        organization_id=caller.organization_id,
        lane=caller.lane,
        user_id=caller.user_id,
        key_id=caller.key_id,
        action=action,
        object_id=object_id,
        before_hash=before,
        after_hash=after,
        created_at=datetime.now(UTC),
    )
    await connection.execute(insert(AuditEntry).values(entry.model_dump()))
