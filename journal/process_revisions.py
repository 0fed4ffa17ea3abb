"""Revisions of the tables that the present processes know: a new form of rows waits until all can read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import or_, select
from sqlmodel import col

from journal.presence_reports import ABSENT_MICROSECONDS
from models.database_time import DatabaseTime
from models.process_presence import ProcessPresence
from models.worker_presence import WorkerPresence

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


PACKED_SPANS_REVISION: Final = "0051"
"""Revision of the tables from which on processes read packed spans."""


async def can_all_read_packed_spans(connection: AsyncConnection) -> bool:
    """Return whether no present process is of a release that does not know packed spans, by their reports."""
    for table in (WorkerPresence, ProcessPresence):
        is_present = col(table.seen_at) > DatabaseTime() - ABSENT_MICROSECONDS
        older = select(col(table.owner)).where(
            is_present, or_(col(table.revision).is_(None), col(table.revision) < PACKED_SPANS_REVISION)
        )
        if table is WorkerPresence:
            older = older.where(col(WorkerPresence.ended_at).is_(None))
        if await connection.scalar(older.limit(1)) is not None:
            return False
    return True
