"""Blocked intervals of runs, written by the commits that block a run, release it and claim it again.

Runs that start without a wait have none. Starts are known from the rows: acceptance, and the last change of a
blocked run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, func, literal, null, select, type_coerce, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from journal.explanations.blockers import BlockerCode
from models.blocked_interval import BlockedInterval
from models.column_types import TimestampColumn
from models.database_time import DatabaseTime
from models.execution import Execution

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime

    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression


LEAST_MICROSECONDS: Final = 250_000
"""Shortest wait for a slot or a pod that is kept. Shorter ones count as time in the queue."""
_COLUMNS: Final = (
    *("execution_id", "started_at", "shard", "organization_id", "code", "ended_at"),
    "pod_started_at",
)
INTERVAL_COLUMNS_SQL: Final = "execution_id, started_at, shard, organization_id, code, node_id, ended_at"


async def add_ended_intervals(
    connection: AsyncConnection,
    code: BlockerCode | ColumnElement[str],
    *conditions: ColumnElement[bool],
    since: SQLColumnExpression[Any],
) -> None:
    """Add a blocked interval that ends now to each run that meets the conditions, before a statement lets
    them continue.

    `code` is the reason of the block, and `since` the column with its start. Intervals under a quarter of a
    second are left out. An interval with the same start gets the new end.
    """
    start = type_coerce(since, BigInteger)
    rows = select(
        col(Execution.id),
        start,
        col(Execution.shard),
        col(Execution.organization_id),
        literal(code.value) if isinstance(code, BlockerCode) else code,
        DatabaseTime(),
        null(),
    ).where(*conditions, start <= DatabaseTime() - LEAST_MICROSECONDS)
    await _insert_blocked_intervals(connection, rows)


async def add_waking_intervals(
    connection: AsyncConnection, execution_ids: Collection[str], pod_started_at: datetime
) -> None:
    """Add an interval of waking to runs that a pod has claimed and that were accepted before the pod started.

    It begins at the acceptance of the run, or at the end of its last interval, and ends at the claim.
    Intervals under a quarter of a second are left out.
    """
    earlier = (
        select(func.max(type_coerce(col(BlockedInterval.ended_at), BigInteger)))
        .where(col(BlockedInterval.execution_id) == col(Execution.id))
        .correlate(Execution)
        .scalar_subquery()
    )
    start = func.coalesce(earlier, type_coerce(col(Execution.created_at), BigInteger))
    claimed_at = type_coerce(col(Execution.started_at), BigInteger)
    rows = select(
        col(Execution.id),
        start,
        col(Execution.shard),
        col(Execution.organization_id),
        literal(BlockerCode.WAKING.value),
        claimed_at,
        literal(pod_started_at, TimestampColumn),
    ).where(
        col(Execution.id).in_(execution_ids),
        col(Execution.created_at) < pod_started_at,
        start <= claimed_at - LEAST_MICROSECONDS,
    )
    await _insert_blocked_intervals(connection, rows)


async def _insert_blocked_intervals(connection: AsyncConnection, rows: Select[*tuple[Any, ...]]) -> None:
    """Insert the rows of a query with the columns `_COLUMNS`, in this order, as blocked intervals of runs; an interval
    with the same run and start gets the new end instead.
    """
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(BlockedInterval).from_select(_COLUMNS, rows)
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=[col(BlockedInterval.execution_id), col(BlockedInterval.started_at)],
            set_={"ended_at": statement.excluded.ended_at},
        )
    )


async def end_interval(connection: AsyncConnection, execution_id: str) -> None:
    """Set the end of a run's open blocked interval, if it has one, to now; for a run that was just made claimable."""
    await connection.execute(
        update(BlockedInterval)
        .where(col(BlockedInterval.execution_id) == execution_id, col(BlockedInterval.ended_at).is_(None))
        .values(ended_at=type_coerce(DatabaseTime(), BigInteger))
    )
