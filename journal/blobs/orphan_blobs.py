"""Deletion of blobs that belong to no run: left by retention, or by a process that died after writing them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import structlog
from sqlalchemy import or_, select
from sqlmodel import col

from models.execution import Execution

if TYPE_CHECKING:
    from journal.blobs.blob_storage import BlobOwner
    from journal.blobs.blob_store import BlobStore
    from models.database import Database

log = structlog.get_logger()

MIN_AGE_HOURS: Final = 24
"""Minimum age before deletion: a process that writes a blob has a row, or has lost it only just now."""
BATCH_OWNERS: Final = 500


async def delete_orphans(blobs: BlobStore, database: Database) -> None:
    """Delete the blobs of owners that no execution names, and that got no new blob for 24 hours; log how many
    owners.

    Raises `BlobsUnavailable` and `DatabaseUnavailable`.
    """
    deleted = 0
    async for owners in blobs.backend.idle_owners(timedelta(hours=MIN_AGE_HOURS)):
        deleted += await delete_unused(blobs, database, owners)
    if deleted:
        log.info("orphaned blobs deleted", runs=deleted)


async def delete_unused(blobs: BlobStore, database: Database, owners: Sequence[BlobOwner]) -> int:
    """Delete the blobs of those owners that no execution refers to any more; return the number of these owners.

    Call it after the commit that deletes the rows: a run that was resumed from a deleted run keeps their
    shared blobs. Raises `BlobsUnavailable` and `DatabaseUnavailable`.
    """
    unused = await find_unused(database, owners)
    await blobs.delete_all(unused)
    return len(unused)


async def find_unused(database: Database, owners: Sequence[BlobOwner]) -> Sequence[BlobOwner]:
    """Return those owners that no execution refers to any more, so that their blobs may be deleted.

    Raises `DatabaseUnavailable`.
    """
    unused: list[BlobOwner] = []
    for begin in range(0, len(owners), BATCH_OWNERS):
        batch = owners[begin : begin + BATCH_OWNERS]
        named = await _find_referenced_ids(database, {owner.key_id for owner in batch})
        unused += [owner for owner in batch if owner.key_id not in named]
    return unused


async def _find_referenced_ids(database: Database, key_ids: Collection[str]) -> set[str]:
    """Return those of the ids that name blobs of an execution: as its own id, or as its `key_id` if it resumed or
    replayed another one.
    """
    # Each part has an index of its own.
    resumed = col(Execution.resumed_from).is_not(None) & col(Execution.key_id).in_(key_ids)
    replayed = col(Execution.replay_of).is_not(None) & col(Execution.key_id).in_(key_ids)
    named = or_(col(Execution.id).in_(key_ids), resumed, replayed)
    statement = select(col(Execution.key_id)).where(named).distinct()
    async with database.read() as connection:
        return set(await connection.scalars(statement))
