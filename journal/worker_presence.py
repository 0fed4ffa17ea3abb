"""Presence of workers: each worker process stores at an interval that it lives, and how many runs it holds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from journal.presence_reports import (
    ABSENT_MICROSECONDS,
    FORGET_MICROSECONDS,
    host_name,
    program_version,
    report_regularly,
)
from models.database_time import DatabaseTime
from models.worker_presence import WorkerPresence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database


def report_presence(
    database: Database, owner: str, concurrency: int, held_runs: Callable[[], int]
) -> AbstractAsyncContextManager[None]:
    """Report a worker as present every five seconds while the context lasts, and its end after it.

    `concurrency` is its number of slots, and `held_runs` returns the number of its runs. An unreachable database is no
    error.
    """
    return report_regularly(
        database,
        lambda lag_ms, activity: partial(
            store_presence,
            owner=owner,
            concurrency=concurrency,
            held_runs=held_runs(),
            loop_lag_ms=lag_ms,
            activity=activity,
        ),
        partial(end_presence, owner=owner),
    )


async def store_presence(
    connection: AsyncConnection,
    *,
    owner: str,
    concurrency: int,
    held_runs: int,
    loop_lag_ms: int = 0,
    activity: Mapping[str, Any] | None = None,
) -> None:
    """Insert or renew the row of a living worker process, with its number of slots (at its first report) and
    of held runs. `loop_lag_ms` is the delay of its event loop.
    """
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(WorkerPresence).values(
        owner=owner,
        concurrency=concurrency,
        held_runs=held_runs,
        started_at=DatabaseTime(),
        seen_at=DatabaseTime(),
        version=program_version(),
        host=host_name(),
        loop_lag_ms=loop_lag_ms,
        activity=activity,
    )
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=[col(WorkerPresence.owner)],
            set_={
                "seen_at": statement.excluded.seen_at,
                "held_runs": statement.excluded.held_runs,
                "loop_lag_ms": statement.excluded.loop_lag_ms,
                "activity": statement.excluded.activity,
            },
        )
    )


async def end_presence(connection: AsyncConnection, *, owner: str) -> None:
    """Record that the worker `owner`, named as in its leases, has stopped in an orderly way, so that it no longer
    counts as alive; nothing happens for an unknown one.
    """
    await connection.execute(
        update(WorkerPresence)
        .where(col(WorkerPresence.owner) == owner)
        .values(seen_at=DatabaseTime(), ended_at=DatabaseTime())
    )


async def count_present(connection: AsyncConnection) -> int:
    """Return the number of workers that have reported within 15 seconds and not ended."""
    statement = select(func.count()).where(
        col(WorkerPresence.ended_at).is_(None),
        col(WorkerPresence.seen_at) > DatabaseTime() - ABSENT_MICROSECONDS,
    )
    return await connection.scalar(statement) or 0


async def forget_absent_workers(database: Database) -> None:
    """Delete workers that have not reported for a day, but keep the last one that reported; raises
    `DatabaseUnavailable`.
    """

    async def work(connection: AsyncConnection) -> None:
        newest = select(func.max(col(WorkerPresence.seen_at))).scalar_subquery()
        await connection.execute(
            delete(WorkerPresence).where(
                col(WorkerPresence.seen_at) < DatabaseTime() - FORGET_MICROSECONDS,
                col(WorkerPresence.seen_at) < newest,
            )
        )

    await database.transaction(work)
