"""Hourly counts of runs, derived from the rows of all runs that were accepted within an hour.

A count is exact at its time, and counting again corrects it: nothing is added up from single events, so a lost
or a repeated one does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    and_,
    case,
    delete,
    func,
    insert,
    literal_column,
    select,
    text,
    true,
    type_coerce,
)
from sqlmodel import col

from journal.explanations.blockers import BlockerCode
from models.access import Organization
from models.blocked_interval import BlockedInterval
from models.column_types import column_values
from models.database import share_transaction
from models.deployment import Deployment
from models.duration_histogram import bucket_of
from models.execution import LIVE_CONDITION, Execution, ExecutionData
from models.execution_status import ExecutionStatus
from models.run_hour import ALL_WORKFLOWS, RunHour
from models.timestamps import from_microseconds, hour_of

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

HOUR: Final = timedelta(hours=1)
HOUR_MICROSECONDS: Final = 3_600_000_000
HOURS: Final = 24
"""Hours that statistics show, the present one included."""
_SUCCESSFUL_OR_FAILED: Final = frozenset({ExecutionStatus.COMPLETED.value, ExecutionStatus.FAILED.value})
_COUNTED: Final = frozenset(
    {
        *_SUCCESSFUL_OR_FAILED,
        ExecutionStatus.STOPPED.value,
        ExecutionStatus.CANCELLED.value,
    }
)
"""Statuses with a column of their own; the rest of the accepted runs are unfinished."""
INSERTED_ROWS: Final = 1_000
BATCH_ORGANIZATIONS: Final = 500


def first_hour(now: datetime) -> datetime:
    """Return the begin of the earliest of the 24 hours that statistics show."""
    return hour_of(now) - (HOURS - 1) * HOUR


async def list_organizations(connection: AsyncConnection) -> Sequence[Sequence[str]]:
    """Return the ids of all organizations, in batches whose runs one statement counts."""
    found = [*await connection.scalars(select(col(Organization.id)).order_by(col(Organization.id)))]
    return [found[start : start + BATCH_ORGANIZATIONS] for start in range(0, len(found), BATCH_ORGANIZATIONS)]


async def count_unfinished(connection: AsyncConnection, since: datetime) -> dict[datetime, int]:
    """Return the number of unfinished runs of all organizations by the hour of their acceptance, from `since` on."""
    found: dict[datetime, int] = {}
    for organization_ids in await list_organizations(connection):
        for row in await connection.execute(unfinished_statement(organization_ids, since)):
            hour = from_microseconds(row.hour * HOUR_MICROSECONDS)
            found[hour] = found.get(hour, 0) + row.number
    return found


def unfinished_statement(organization_ids: Sequence[str], since: datetime) -> Select[*tuple[Any, ...]]:
    """Return the statement that counts the unfinished runs of organizations by the hour of their acceptance, from
    `since` on.

    It reads the index of live runs alone. `hour` is in hours since 1970.
    """
    hour = type_coerce(col(Execution.created_at), BigInteger) // literal_column(str(HOUR_MICROSECONDS))
    return (
        select(hour.label("hour"), func.count().label("number"))
        .where(
            text(f"execution.{LIVE_CONDITION}"),
            col(Execution.organization_id).in_(organization_ids),
            col(Execution.created_at) >= since,
        )
        .group_by(text("1"))
    )


async def count_hour(connection: AsyncConnection, starts_at: datetime) -> Sequence[RunHour]:
    """Return the counts of the runs that were accepted within the hour from `starts_at` on: of each workflow, and the
    sums of each organization.

    Workflows and organizations without runs are left out. On PostgreSQL, the transaction uses neither parallel workers
    nor JIT from then on.
    """
    if connection.dialect.name == "postgresql":
        await share_transaction(connection)
        await connection.execute(_IN_BACKGROUND)
    found: dict[tuple[str, str], RunHour] = {}
    for organization_ids in await list_organizations(connection):
        for row in await connection.execute(runs_statement(organization_ids, starts_at)):
            for hour in _find_rows(found, row.organization_id, row.workflow_id, starts_at):
                _add_runs(hour, row)
        for row in await connection.execute(wakes_statement(organization_ids, starts_at)):
            if row.bucket is not None:
                for hour in _find_rows(found, row.organization_id, row.workflow_id, starts_at):
                    _add(hour.wake_times, row.bucket, row.number)
    return list(found.values())


# One core is enough, and the binary search of buckets would take longer to compile than to run.
_IN_BACKGROUND: Final = select(
    func.set_config("max_parallel_workers_per_gather", "0", true()), func.set_config("jit", "off", true())
)


def _find_rows(
    found: dict[tuple[str, str], RunHour], organization_id: str, workflow_id: str, starts_at: datetime
) -> Sequence[RunHour]:
    """Return the rows of a workflow and of its organization; missing ones are added to `found`."""
    rows = []
    for key in ((organization_id, workflow_id), (organization_id, ALL_WORKFLOWS)):
        if key not in found:
            found[key] = RunHour(organization_id=organization_id, workflow_id=key[1], starts_at=starts_at)
        rows.append(found[key])
    return rows


def _add_runs(hour: RunHour, row: Any) -> None:  # noqa: ANN401 - a row of `runs_statement`
    """Add the runs of a row to the counts and histograms of an hour."""
    hour.accepted += row.number
    if row.status in _COUNTED:
        setattr(hour, row.status, getattr(hour, row.status) + row.number)
    if row.status in _SUCCESSFUL_OR_FAILED and row.bucket is not None:
        _add(hour.run_times, row.bucket, row.number)
    if row.queue_bucket is not None:
        _add(hour.queue_times, row.queue_bucket, row.number)


def _add(histogram: dict[str, int], bucket: int, number: int) -> None:
    histogram[str(bucket)] = histogram.get(str(bucket), 0) + number


def runs_statement(organization_ids: Sequence[str], starts_at: datetime) -> Select[*tuple[Any, ...]]:
    """Return the statement that counts the runs of an hour by workflow, status, time in the queue and time of work.

    It follows the index of lists: a child of a run has an id with the time of its parent, so ids alone don't
    tell the hour. Private runs, such as node tests, don't count: few may see them, and they say nothing about a
    workflow's work.
    """
    has_started = col(Execution.started_at).is_not(None)
    bucket = case((has_started, bucket_of("execution.ended_at - execution.started_at")))
    queued = case((has_started, bucket_of("execution.started_at - execution_data.created_at")))
    return (
        select(
            *(col(ExecutionData.organization_id), col(ExecutionData.workflow_id), col(Execution.status)),
            bucket.label("bucket"),
            queued.label("queue_bucket"),
            func.count().label("number"),
        )
        .select_from(ExecutionData)
        .join(Execution, col(Execution.id) == col(ExecutionData.execution_id))
        .where(*_is_within(organization_ids, starts_at), col(Execution.is_private) == literal_column("false"))
        .group_by(text("1, 2, 3, 4, 5"))
    )


def wakes_statement(organization_ids: Sequence[str], starts_at: datetime) -> Select[*tuple[Any, ...]]:
    """Return the statement that counts the waits of an hour's runs for pods to start, by workflow and time.

    Runs without such a wait have no time. Runs of workflows that were never deployed are not examined.
    """
    interval = BlockedInterval
    # An outer join: it can't be reversed, to begin with all intervals.
    of_run = and_(
        col(interval.execution_id) == col(ExecutionData.execution_id),
        col(interval.code) == BlockerCode.WAKING.value,
    )
    deployed = select(col(Deployment.workflow_id)).where(
        col(Deployment.organization_id).in_(organization_ids)
    )
    waited = bucket_of("blocked_interval.ended_at - blocked_interval.started_at")
    bucket = case((col(interval.ended_at).is_not(None), waited))
    return (
        select(
            *(col(ExecutionData.organization_id), col(ExecutionData.workflow_id)),
            bucket.label("bucket"),
            func.count().label("number"),
        )
        .select_from(ExecutionData)
        .outerjoin(interval, of_run)
        .where(*_is_within(organization_ids, starts_at), col(ExecutionData.workflow_id).in_(deployed))
        .group_by(text("1, 2, 3"))
    )


def _is_within(organization_ids: Sequence[str], starts_at: datetime) -> Sequence[ColumnElement[bool]]:
    accepted_at = col(ExecutionData.created_at)
    return (
        col(ExecutionData.organization_id).in_(organization_ids),
        accepted_at >= starts_at,
        accepted_at < starts_at + HOUR,
    )


async def replace_hour(connection: AsyncConnection, starts_at: datetime, rows: Sequence[RunHour]) -> None:
    """Replace all counts of an hour, those of every organization, in the caller's transaction."""
    await connection.execute(delete(RunHour).where(col(RunHour.starts_at) == starts_at))
    for start in range(0, len(rows), INSERTED_ROWS):
        part = [column_values(row) for row in rows[start : start + INSERTED_ROWS]]
        await connection.execute(insert(RunHour), part)


async def delete_hours(connection: AsyncConnection, before: datetime) -> None:
    """Delete the counts of all hours that began before a time."""
    await connection.execute(delete(RunHour).where(col(RunHour.starts_at) < before))
