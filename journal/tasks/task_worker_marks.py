"""Workers that take no more tasks, or are asked to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, text

from journal.tasks.task_clock import NOW, host_time

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.tasks.task_polls import TaskPoll
    from models.database import Database

FORGOTTEN_MICROSECONDS: Final = 7 * 86_400_000_000


class TaskWorkerMarks:
    """Marks of workers in the database of a process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def stop(self, organization_id: str, worker_id: str) -> bool:
        """Store that a worker takes no more tasks; returns False for an unknown one."""
        return await self._mark(organization_id, worker_id, "stopped_at = coalesce(stopped_at, {now})")

    async def drain(self, organization_id: str, worker_id: str) -> bool:
        """Store that a worker is asked to stop; returns False for an unknown one."""
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
        """Delete workers that have not polled for a week: each start of a process has a row of its own."""

        async def work(connection: AsyncConnection) -> None:
            now = NOW[connection.dialect.name]
            statement = text(f"DELETE FROM task_worker WHERE last_seen_at < {now} - {FORGOTTEN_MICROSECONDS}")
            await connection.execute(statement, host_time(connection))

        await self._database.transaction(work)


async def read_leaving(connection: AsyncConnection, polls: Sequence[TaskPoll]) -> dict[tuple[str, str], bool]:
    """Return the workers that stop or are asked to, by organization and id; true for those that stop."""
    statement = text(
        "SELECT organization_id, id, stopped_at FROM task_worker WHERE organization_id IN :organizations"
        " AND id IN :workers AND (is_draining OR stopped_at IS NOT NULL)"
    ).bindparams(bindparam("organizations", expanding=True), bindparam("workers", expanding=True))
    values = {
        "organizations": sorted({poll.organization_id for poll in polls}),
        "workers": sorted({poll.worker_id for poll in polls}),
    }
    rows = await connection.execute(statement, values)
    return {(row[0], row[1]): row[2] is not None for row in rows}
