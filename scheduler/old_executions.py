"""Executions whose days are over: deleted with everything that belongs to them, a little at a time.

The row of an execution goes first, so that nobody sees, resumes or waits for what is only half there; the row of its
data, by which it was found, goes last, so that a deletion that breaks off is found again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
from sqlalchemy import and_, delete, false, or_, select, tuple_
from sqlalchemy.orm import aliased
from sqlmodel import SQLModel, col

from journal.blobs import orphans
from journal.blobs.backend import BlobsUnavailable, Owner
from journal.blobs.opening import open_blobs
from models.database_time import DatabaseTime
from models.execution import Execution, ExecutionData, LogRow, Signal, SpanRow
from models.workflow import Workflow

if TYPE_CHECKING:
    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from models.database import Database
    from scheduler.settings import SchedulerSettings

log = structlog.get_logger()

KEPT_HOURS: Final = 24
"""Whoever repeats a request within this time is told of the execution that the first one has started."""
BATCH_WORKFLOWS: Final = 100
BATCH_RUNS: Final = 100
BATCH_ROWS: Final = 2_000
_HOUR_MICROSECONDS: Final = 3_600_000_000

_parent = aliased(Execution)
_IS_FINISHED: Final = and_(col(Execution.ended_at).is_not(None), col(Execution.follow_up).is_(None))
_RECORDS: Final[Sequence[tuple[type[SQLModel], Sequence[SQLColumnExpression[Any]]]]] = (
    (SpanRow, (col(SpanRow.execution_id), col(SpanRow.node_id), col(SpanRow.iteration))),
    (LogRow, (col(LogRow.execution_id), col(LogRow.sequence))),
    (Signal, (col(Signal.execution_id), col(Signal.node_id), col(Signal.iteration))),
)
"""What belongs to an execution, and by what each row is known."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long executions are kept."""

    days: int
    """After their end."""
    runs: int
    """Of one workflow; of what is beyond, the oldest go."""


async def delete_old(settings: SchedulerSettings, database: Database) -> None:
    """Delete the executions whose days are over; raises `DatabaseUnavailable`."""
    retention = Retention(settings.retention_days, settings.retention_runs)
    blobs = open_blobs(settings)
    deleted = 0
    try:
        async for owners in _deleted(database, retention):
            deleted += len(owners)
            await orphans.delete_unused(blobs, database, owners)
    except BlobsUnavailable as error:
        log.warning("blobs of old executions not deleted", error=str(error))  # they are orphans from now on
    finally:
        await blobs.close()
    if deleted:
        log.info("old executions deleted", executions=deleted)


async def _deleted(database: Database, retention: Retention) -> AsyncIterator[Sequence[Owner]]:
    """Delete batch by batch, and tell whose contents are to go with each."""
    after: str | None = ""
    while after is not None:
        async with database.read() as connection:
            found = (await connection.execute(workflows(after, retention))).all()
        after = found[-1].id if len(found) == BATCH_WORKFLOWS else None
        for workflow in found:
            if _may_have_old(workflow, retention):
                async for owners in _deleted_of(database, workflow.id, workflow.beyond, retention):
                    yield owners


def workflows(after: str, retention: Retention) -> Select[*tuple[Any, ...]]:
    """Return the statement that finds workflows, and when their oldest and the last superfluous run were accepted."""
    of_workflow = col(ExecutionData.workflow_id) == col(Workflow.id)
    accepted_at = select(col(ExecutionData.created_at)).where(of_workflow).correlate(Workflow)
    oldest = accepted_at.order_by(col(ExecutionData.created_at)).limit(1)
    beyond = accepted_at.order_by(col(ExecutionData.created_at).desc()).offset(retention.runs).limit(1)
    return (
        select(
            col(Workflow.id),
            oldest.scalar_subquery().label("oldest"),
            beyond.scalar_subquery().label("beyond"),
        )
        .where(col(Workflow.id) > after)
        .order_by(col(Workflow.id))
        .limit(BATCH_WORKFLOWS)
    )


def _may_have_old(workflow: Row[Any], retention: Retention) -> bool:
    if workflow.oldest is None:
        return False
    return bool(
        workflow.beyond is not None or workflow.oldest < datetime.now(UTC) - timedelta(days=retention.days)
    )


async def _deleted_of(
    database: Database, workflow_id: str, beyond: datetime | None, retention: Retention
) -> AsyncIterator[Sequence[Owner]]:
    statement = old(workflow_id, beyond, retention)
    while True:
        async with database.read() as connection:
            found = (await connection.execute(statement)).all()
        if not found:
            return
        left_over = {row.execution_id for row in found if row.id is None}
        owners = await _delete(database, {row.id for row in found if row.id is not None}, left_over)
        if not owners and not left_over:
            return  # what was old a moment ago is not any more
        yield owners


def old(workflow_id: str, beyond: datetime | None, retention: Retention) -> Select[*tuple[Any, ...]]:
    """Return the statement that finds the oldest executions of a workflow that may go.

    Live ones are kept, those that somebody is still to be told of, and those whose parent goes on.
    """
    is_over = col(Execution.ended_at) < DatabaseTime() - retention.days * 24 * _HOUR_MICROSECONDS
    is_superfluous = col(ExecutionData.created_at) <= beyond if beyond is not None else false()
    parent_goes_on = (
        select(col(_parent.id))
        .where(col(_parent.id) == col(Execution.parent_id), col(_parent.ended_at).is_(None))
        .exists()
    )
    may_go = and_(_IS_FINISHED, or_(is_over, is_superfluous), ~parent_goes_on)
    same_run = and_(
        col(Execution.id) == col(ExecutionData.execution_id), col(Execution.lane) == col(ExecutionData.lane)
    )
    return (
        select(col(ExecutionData.execution_id), col(Execution.id))
        .outerjoin(Execution, same_run)
        .where(
            col(ExecutionData.workflow_id) == workflow_id,
            col(ExecutionData.created_at) < DatabaseTime() - KEPT_HOURS * _HOUR_MICROSECONDS,
            or_(col(Execution.id).is_(None), may_go),
        )
        .order_by(col(ExecutionData.created_at))
        .limit(BATCH_RUNS)
    )


async def _delete(
    database: Database, execution_ids: Collection[str], left_over: Collection[str]
) -> Sequence[Owner]:
    """Delete executions, and what is left of others; returns whose contents belong to them."""

    async def delete_runs(connection: AsyncConnection) -> dict[str, Owner]:
        statement = (
            delete(Execution)
            .where(col(Execution.id).in_(sorted(execution_ids)), _IS_FINISHED)
            .returning(col(Execution.id), col(Execution.organization_id), col(Execution.key_id))
        )
        rows = await connection.execute(statement)
        return {row.id: Owner(row.organization_id, row.key_id) for row in rows}

    gone = await database.transaction(delete_runs) if execution_ids else {}
    run_ids = sorted({*left_over, *gone})
    for table, identity in _RECORDS:
        while await database.transaction(partial(_delete_records, table, identity, run_ids)) == BATCH_ROWS:
            pass

    async def delete_data(connection: AsyncConnection) -> None:
        await connection.execute(delete(ExecutionData).where(col(ExecutionData.execution_id).in_(run_ids)))

    await database.transaction(delete_data)
    return list(gone.values())


async def _delete_records(
    table: type[SQLModel],
    identity: Sequence[SQLColumnExpression[Any]],
    run_ids: Sequence[str],
    connection: AsyncConnection,
) -> int:
    some = select(*identity).where(identity[0].in_(run_ids)).limit(BATCH_ROWS)
    result = await connection.execute(delete(table).where(tuple_(*identity).in_(some)))
    return result.rowcount
