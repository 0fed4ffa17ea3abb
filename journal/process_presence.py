"""Presence of gateways, schedulers and deployers: each process stores at an interval that it lives, and its version."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy import delete, or_, select
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
from models.execution import Leadership
from models.process_presence import ProcessPresence
from models.worker_presence import WorkerPresence
from models.worker_processes import ALL_IN_ONE_OWNER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database


def report_process(database: Database, role: str) -> AbstractAsyncContextManager[None]:
    """Report this process as present, with its role, such as `gateway`, for as long as the context lasts."""
    owner = f"{role}:{uuid4().hex}"
    return report_regularly(
        database,
        lambda lag_ms, activity: partial(
            store_process, owner=owner, role=role, loop_lag_ms=lag_ms, activity=activity
        ),
        partial(forget_process, owner=owner),
    )


async def store_process(
    connection: AsyncConnection,
    *,
    owner: str,
    role: str,
    loop_lag_ms: int = 0,
    activity: Mapping[str, Any] | None = None,
) -> None:
    """Insert the row of a living process, named by `owner`, or set the time, event loop lag and activity of its row."""
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(ProcessPresence).values(
        owner=owner,
        role=role,
        version=program_version(),
        host=host_name(),
        loop_lag_ms=loop_lag_ms,
        activity=activity,
        started_at=DatabaseTime(),
        seen_at=DatabaseTime(),
    )
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=[col(ProcessPresence.owner)],
            set_={
                "seen_at": statement.excluded.seen_at,
                "loop_lag_ms": statement.excluded.loop_lag_ms,
                "activity": statement.excluded.activity,
            },
        )
    )


async def forget_process(connection: AsyncConnection, *, owner: str) -> None:
    """Delete the row of a process that ends."""
    await connection.execute(delete(ProcessPresence).where(col(ProcessPresence.owner) == owner))


async def has_leader(connection: AsyncConnection) -> bool:
    """Return whether a process does the duties of the scheduler: one whose lead has not expired, or one with all roles
    that has reported within 15 seconds.
    """
    is_held = select(col(Leadership.name)).where(col(Leadership.lease_until) > DatabaseTime())
    has_all_roles = select(col(WorkerPresence.owner)).where(
        col(WorkerPresence.owner).startswith(ALL_IN_ONE_OWNER),
        col(WorkerPresence.ended_at).is_(None),
        col(WorkerPresence.seen_at) > DatabaseTime() - ABSENT_MICROSECONDS,
    )
    return bool(await connection.scalar(select(or_(is_held.exists(), has_all_roles.exists()))))


async def forget_absent_processes(database: Database) -> None:
    """Delete processes that have not reported for a day; raises `DatabaseUnavailable`."""

    async def work(connection: AsyncConnection) -> None:
        is_old = col(ProcessPresence.seen_at) < DatabaseTime() - FORGET_MICROSECONDS
        await connection.execute(delete(ProcessPresence).where(is_old))

    await database.transaction(work)
