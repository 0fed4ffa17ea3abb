"""Workers that take no more tasks, or are asked to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import text

from journal.tasks.task_sql import NOW, host_time

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

FORGOTTEN_MICROSECONDS: Final = 7 * 86_400_000_000
LEAVING_CONDITION: Final = "(is_draining OR stopped_at IS NOT NULL)"
"""Condition on a worker that stops, or that an operator has asked to."""


class TaskWorkerMarks:
    """Marks of task workers that stop, or are asked to, in the database of a process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def stop(self, organization_id: str, worker_id: str) -> bool:
        """Mark a task worker that says it stops, so that it gets no more tasks; return False for an unknown worker.

        A second call keeps the time of the first.
        """
        return await self._mark(organization_id, worker_id, "stopped_at = coalesce(stopped_at, {now})")

    async def drain(self, organization_id: str, worker_id: str) -> bool:
        """Mark a task worker that an operator asks to stop, so that it gets no more tasks; return False for an unknown
        worker.

        A second call changes nothing.
        """
        return await self._mark(organization_id, worker_id, "is_draining = :yes")

    async def _mark(self, organization_id: str, worker_id: str, change: str) -> bool:
        async def work(connection: AsyncConnection) -> bool:
            assignment = change.format(now=NOW[connection.dialect.name])
            values: dict[str, Any] = {"organization_id": organization_id, "worker_id": worker_id}
            if ":yes" in assignment:
                values["yes"] = True
            if ":now" in assignment:
                values |= host_time(connection)
            statement = text(
                f"UPDATE task_worker SET {assignment} WHERE organization_id = :organization_id AND id = :worker_id"
            )
            return (await connection.execute(statement, values)).rowcount == 1

        return await self._database.transaction(work)

    async def forget(self) -> None:
        """Delete the task workers of all organizations that have not polled for a week: each start of a process adds a
        row.
        """

        async def work(connection: AsyncConnection) -> None:
            now = NOW[connection.dialect.name]
            statement = text(f"DELETE FROM task_worker WHERE last_seen_at < {now} - {FORGOTTEN_MICROSECONDS}")
            await connection.execute(statement, host_time(connection))

        await self._database.transaction(work)
