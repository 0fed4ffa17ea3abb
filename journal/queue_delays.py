"""Delays of the queue: for how long ready runs, schedules and waiting runs have been due."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import BigInteger, func, literal, literal_column, select, type_coerce, union_all
from sqlmodel import col

from journal.deployments import wakes
from journal.explanations import run_counts
from models.database_time import DatabaseTime
from models.execution import (
    DELAYED_TARGET,
    ISOLATED_TARGET,
    ISOLATED_UNPARSED_TARGET,
    LIMITED_TARGET,
    SHARED_TARGET,
    UNPARSED_TARGET,
    WORKERS_QUEUE,
    Execution,
)
from models.execution_status import ExecutionStatus
from models.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

MILLION: Final = 1_000_000
SHARED: Final = col(Execution.target) == SHARED_TARGET
"""Runs that any worker may claim."""
OF_PODS: Final = col(Execution.target) > SHARED_TARGET
"""Runs that pods of a deployment alone may claim."""

SPECIAL_TARGETS: Final = (
    LIMITED_TARGET,
    DELAYED_TARGET,
    UNPARSED_TARGET,
    ISOLATED_TARGET,
    ISOLATED_UNPARSED_TARGET,
)
"""Targets that are neither all workers nor the pods of a deployment."""


async def read_oldest_pending_age(connection: AsyncConnection, of_target: ColumnElement[bool]) -> float:
    """Return the seconds since the oldest pending run that satisfies `of_target` became claimable; 0 without one.

    Runs that wait for a slot or a delay are left out. Of more than 10,000 runs, any 10,000 are examined, so the result
    may be too small.
    """
    some = (
        select(col(Execution.updated_at).label("at"))
        .where(wakes.IS_PENDING, of_target, col(Execution.target).not_in([LIMITED_TARGET, DELAYED_TARGET]))
        .limit(run_counts.MAX_COUNTED)
        .subquery()
    )
    return await _read_seconds(
        connection, select(DatabaseTime() - type_coerce(func.min(some.c.at), BigInteger))
    )


async def count_pending(connection: AsyncConnection) -> Sequence[tuple[str, int, bool]]:
    """Return the queues of pending runs with their number, counted up to 10,000, and whether it reached that limit.

    The queues are `workers`, `pods` for all deployments together, and the special targets by their names.
    """
    queues = {
        WORKERS_QUEUE: SHARED,
        "pods": OF_PODS,
        **{target: col(Execution.target) == target for target in SPECIAL_TARGETS},
    }
    statements = []
    for name, of_target in queues.items():
        some = (
            select(literal_column("1")).where(wakes.IS_PENDING, of_target).limit(run_counts.MAX_COUNTED)
        ).subquery()
        statements.append(select(literal(name).label("name"), func.count().label("number")).select_from(some))
    rows = await connection.execute(union_all(*statements))
    return [(row.name, row.number, row.number >= run_counts.MAX_COUNTED) for row in rows]


async def read_schedule_lag(connection: AsyncConnection) -> float:
    """Return the seconds since the due time of the schedule that has been due longest; 0 if none is due."""
    due_at = type_coerce(func.min(col(Schedule.due_at)), BigInteger)
    return await _read_seconds(
        connection, select(DatabaseTime() - due_at).where(col(Schedule.due_at) <= DatabaseTime())
    )


async def read_deferred_delay(connection: AsyncConnection) -> float:
    """Return the seconds since the due time of the waiting run that has been due longest; 0 if none is due."""
    is_waiting = col(Execution.status) == literal_column(f"'{ExecutionStatus.WAITING}'")
    due_at = type_coerce(func.min(col(Execution.due_at)), BigInteger)
    return await _read_seconds(
        connection,
        select(DatabaseTime() - due_at).where(is_waiting, col(Execution.due_at) <= DatabaseTime()),
    )


async def _read_seconds(connection: AsyncConnection, microseconds: Select[int]) -> float:
    """Return the result of a statement, which is in microseconds, in seconds; 0 for NULL and for a negative one."""
    return max(await connection.scalar(microseconds) or 0, 0) / MILLION
