"""Deletion of blobs outside of the database that belong to no run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from journal.blobs import orphan_blobs
from journal.blobs.blob_storage import BlobsUnavailable
from journal.blobs.blob_store_factory import open_blobs

if TYPE_CHECKING:
    from models.database import Database
    from models.settings import ServerSettings

log = structlog.get_logger()


async def delete_orphaned_blobs(settings: ServerSettings, database: Database) -> None:
    """Delete blobs without a run that are at least a day old; an unavailable storage is logged.

    Raises `DatabaseUnavailable`.
    """
    blobs = open_blobs(settings)
    try:
        await orphan_blobs.delete_orphans(blobs, database)
    except BlobsUnavailable as error:
        log.warning("orphaned blobs not swept", error=str(error))
    finally:
        await blobs.close()
