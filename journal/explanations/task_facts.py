"""Facts about the open tasks of a run: who performs them, and why nobody does."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import select
from sqlmodel import col

from journal.tasks import task_service
from models.task import Task
from models.task_states import HELD_STATES, TaskState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.execution import Execution

MAX_TASKS: Final = 200


class TaskFact(Struct, frozen=True):
    """Open task of a node."""

    id: str
    type: str
    version: str
    pool: str
    state: TaskState
    attempt: int
    worker_id: str | None
    claimed_at: datetime | None
    until: datetime | None
    """End of the lease, or time of the next attempt."""
    reported_seconds: float | None
    """Time since the last report of its worker; None without a report since the claim, and for others."""
    is_silent: bool
    """Whether more than half of its lease has passed without a report."""
    unserved: str | None
    """Why no worker performs it; None if one does or can."""

    @property
    def is_held(self) -> bool:
        return self.state in HELD_STATES


async def read_tasks(
    connection: AsyncConnection, run: Execution, now: datetime
) -> Mapping[tuple[str, str], TaskFact]:
    """Return the open tasks of a run, 200 at most, by node id and iteration, with the reason if no task
    worker serves them.
    """
    statement = (
        select(Task)
        .where(col(Task.execution_id) == run.id, col(Task.ended_at).is_(None))
        .order_by(col(Task.created_at))
        .limit(MAX_TASKS)
    )
    rows = (await connection.execute(statement)).all()
    if not rows:
        return {}
    workers = await task_service.read_workers(
        connection, run.organization_id, now, task_service.select_run(run.id)
    )
    return {
        (row.node_id, row.iteration): TaskFact(
            id=row.id,
            type=row.type,
            version=row.version,
            pool=row.pool,
            state=TaskState(row.state),
            attempt=row.failures + row.losses + 1,
            worker_id=row.worker_id,
            claimed_at=row.claimed_at,
            until=row.due_at or row.lease_until,
            reported_seconds=None if silence is None else silence.total_seconds(),
            is_silent=silence is not None and silence > _lease(row) / 2,
            unserved=None
            if row.state in HELD_STATES
            else task_service.find_service(workers, row.type, row.version, row.pool, now).explanation,
        )
        for row in rows
        for silence in [_find_silence(row, now)]
    }


def _find_silence(row: Row[Any], now: datetime) -> timedelta | None:
    """Return the time since the last report of a held task; None if its worker has not reported it since the claim,
    or no worker holds it.
    """
    if row.state not in HELD_STATES or row.lease_until is None or not row.is_acknowledged:
        return None
    silence: timedelta = now - (row.lease_until - _lease(row))
    return max(silence, timedelta())


def _lease(row: Row[Any]) -> timedelta:
    return timedelta(microseconds=row.lease_microseconds)
