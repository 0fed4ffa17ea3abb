"""Deletion of expired executions, found by the rows of their data, which are deleted last."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import structlog
from msgspec import Struct
from sqlalchemy import and_, false, insert, or_, select
from sqlmodel import col

from journal.blobs import orphan_blobs
from journal.blobs.blob_storage import BlobOwner, BlobsUnavailable
from journal.blobs.blob_store_factory import open_blobs
from journal.run_deletion import IS_DELETABLE, delete_runs
from models import ids
from models.database_time import DatabaseTime
from models.errors import LockWaitTimeout
from models.execution import Execution, ExecutionData
from models.workflow import Workflow

if TYPE_CHECKING:
    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database
    from scheduler.settings import SchedulerSettings

log = structlog.get_logger()

KEPT_HOURS: Final = 24
"""Minimum age: within this time, a repeated request gets the execution of the first one."""
BATCH_WORKFLOWS: Final = 100
PRUNED: Final = "executions.pruned"
"""Action of the audit trail."""
BATCH_RUNS: Final = 100
_HOUR_MICROSECONDS: Final = 3_600_000_000


class RetentionPeriods(Struct, frozen=True):
    """Retention of executions."""

    days: int
    """Days after their end."""
    runs: int
    """Maximum number per workflow; the oldest beyond it are deleted."""


async def delete_old_executions(settings: SchedulerSettings, database: Database) -> None:
    """Delete executions beyond the retention (in days, or runs per workflow) with their blobs, and log their
    number.

    If the blob storage is unavailable, blobs are left to the sweep of orphaned ones, and executions that are not
    deleted yet to the next call. Raises `DatabaseUnavailable`.
    """
    retention = RetentionPeriods(settings.retention_days, settings.retention_runs)
    blobs = open_blobs(settings)
    deleted = 0
    try:
        async for owners in _delete_batches(database, retention):
            deleted += len(owners)
            await orphan_blobs.delete_unused(blobs, database, owners)
    except BlobsUnavailable as error:
        log.warning(
            "blobs of old executions not deleted", error=str(error)
        )  # the sweep of orphaned blobs finds them
    finally:
        await blobs.close()
    if deleted:
        log.info("old executions deleted", executions=deleted)


async def _delete_batches(
    database: Database, retention: RetentionPeriods
) -> AsyncIterator[Sequence[BlobOwner]]:
    """Delete expired executions in batches, and yield the owners of each batch's blobs; the audit trail gets a record
    for each workflow.

    A locked row ends the deletions of its workflow, with a warning. Raises `DatabaseUnavailable`.
    """
    after: str | None = ""
    while after is not None:
        async with database.read() as connection:
            found = (await connection.execute(workflows_statement(after, retention))).all()
        after = found[-1].id if len(found) == BATCH_WORKFLOWS else None
        for workflow in found:
            if not _may_have_old(workflow, retention, database.clock.now()):
                continue
            deleted = 0
            try:
                async for owners in _delete_of_workflow(database, workflow.id, workflow.beyond, retention):
                    deleted += len(owners)
                    yield owners
            except LockWaitTimeout as error:
                log.warning("old executions locked", workflow_id=workflow.id, error=str(error))
            if deleted:
                await _record_deletion(database, workflow, deleted, retention)


async def _record_deletion(
    database: Database, workflow: Row[Any], deleted: int, retention: RetentionPeriods
) -> None:
    """Insert a record for the audit trail: a sweep has deleted this number of executions of a workflow."""
    from models.audit import SystemDecision  # noqa: PLC0415 - loaded by the first deletion

    decision = SystemDecision(
        id=ids.new_id("pruning"),
        organization_id=workflow.organization_id,
        shard=workflow.shard,
        workflow_id=workflow.id,
        at=database.clock.now(),
        action=PRUNED,
        reason="retention",
        inputs={
            "executions": deleted,
            "retentionDays": retention.days,
            "retentionRuns": retention.runs,
            "isOverRuns": workflow.beyond is not None,
        },
    )

    async def store(connection: AsyncConnection) -> None:
        await connection.execute(insert(SystemDecision).values(decision.model_dump()))

    await database.transaction(store)


def workflows_statement(after: str, retention: RetentionPeriods) -> Select[*tuple[Any, ...]]:
    """Return the statement that lists up to 100 workflows after an id, with times that show whether executions may be
    expired.

    Besides `id`, `organization_id` and `shard`, its columns are the acceptance of a workflow's oldest run (`oldest`,
    NULL without runs), and of the newest one beyond the limit of runs (`beyond`, NULL within it).
    """
    of_workflow = col(ExecutionData.workflow_id) == col(Workflow.id)
    accepted_at = select(col(ExecutionData.created_at)).where(of_workflow).correlate(Workflow)
    oldest = accepted_at.order_by(col(ExecutionData.created_at)).limit(1)
    beyond = accepted_at.order_by(col(ExecutionData.created_at).desc()).offset(retention.runs).limit(1)
    return (
        select(
            *(col(Workflow.id), col(Workflow.organization_id), col(Workflow.shard)),
            oldest.scalar_subquery().label("oldest"),
            beyond.scalar_subquery().label("beyond"),
        )
        .where(col(Workflow.id) > after)
        .order_by(col(Workflow.id))
        .limit(BATCH_WORKFLOWS)
    )


def _may_have_old(workflow: Row[Any], retention: RetentionPeriods, now: datetime) -> bool:
    if workflow.oldest is None:
        return False
    return bool(workflow.beyond is not None or workflow.oldest < now - timedelta(days=retention.days))


async def _delete_of_workflow(
    database: Database, workflow_id: str, beyond: datetime | None, retention: RetentionPeriods
) -> AsyncIterator[Sequence[BlobOwner]]:
    """Delete the expired executions of a workflow in batches, and yield the owners of each batch's blobs.

    Raises `LockWaitTimeout` and `DatabaseUnavailable`.
    """
    statement = expired_statement(workflow_id, beyond, retention)
    while True:
        async with database.read() as connection:
            found = (await connection.execute(statement)).all()
        if not found:
            return
        left_over = {row.execution_id for row in found if row.id is None}
        gone = await delete_runs(database, {row.id for row in found if row.id is not None}, left_over)
        if not gone and not left_over:
            return  # the executions have changed meanwhile and are not deletable any more
        yield list(gone.values())


def expired_statement(
    workflow_id: str, beyond: datetime | None, retention: RetentionPeriods
) -> Select[*tuple[Any, ...]]:
    """Return the statement that lists up to 100 deletable executions of a workflow, the oldest first.

    They are over a day old, and ended before the retention or were accepted no later than `beyond`, the acceptance of
    the newest run above the limit of runs. Unfinished executions, those with pending completion actions, and those with
    an unfinished parent are left out. Data without an execution is listed too, with a NULL as `id`.
    """
    is_over = col(Execution.ended_at) < DatabaseTime() - retention.days * 24 * _HOUR_MICROSECONDS
    is_superfluous = col(ExecutionData.created_at) <= beyond if beyond is not None else false()
    may_go = and_(IS_DELETABLE, or_(is_over, is_superfluous))
    same_run = and_(
        col(Execution.id) == col(ExecutionData.execution_id), col(Execution.shard) == col(ExecutionData.shard)
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
