"""Checks of rows: work that is due, and that nobody does.

Each threshold is far above the interval at which the server does this work by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import ColumnElement, Select, SQLColumnExpression, func, literal_column, select
from sqlmodel import col

from doctor.findings import DriftClass, DriftFinding, DriftSeverity, DriftSubject
from journal import concurrency_limits
from journal.deployments import wakes
from journal.presence_reports import ABSENT_SECONDS
from models.database_time import DatabaseTime
from models.execution import SHARED_TARGET, Execution
from models.execution_status import ExecutionStatus
from models.schedule import Schedule
from models.timestamps import format_timestamp
from models.worker_presence import WorkerPresence

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

OVERDUE_SECONDS: Final = 60
SHOWN_ROWS: Final = 100
"""Maximum number of findings of one class."""


class RowCheck(Struct, frozen=True):
    """Statement that selects overdue rows, and the finding about each; the statement has `id` and `since`."""

    drift_class: DriftClass
    subject_type: str
    message: str
    evidence: str
    """Name of the time since which the row is overdue."""
    statement: Select[*tuple[Any, ...]]


def before(seconds: float) -> ColumnElement[int]:
    """Return the SQL expression of the time `seconds` ago by the database's clock, in microseconds since 1970."""
    return DatabaseTime() - int(seconds * 1_000_000)


async def find_overdue_rows(connection: AsyncConnection) -> Sequence[DriftFinding]:
    """Return a critical finding for each row that should have been processed over 60 seconds ago, at most 100
    of a class.

    Pending runs count as overdue only while a running worker could claim more.
    """
    found: list[DriftFinding] = []
    for check in _CHECKS:
        if check.drift_class is DriftClass.PENDING_UNCLAIMED and not await _has_worker_capacity(connection):
            continue
        for row in await connection.execute(check.statement.limit(SHOWN_ROWS)):
            subject = DriftSubject(check.subject_type, row.id, row.organization_id)
            evidence = {check.evidence: format_timestamp(row.since)}
            found.append(
                DriftFinding(check.drift_class, subject, check.message, evidence, DriftSeverity.CRITICAL)
            )
    return found


async def _has_worker_capacity(connection: AsyncConnection) -> bool:
    """Return whether running workers (seen lately and not ended) can together hold more runs than they do."""
    free = select(func.sum(col(WorkerPresence.concurrency) - col(WorkerPresence.held_runs))).where(
        col(WorkerPresence.seen_at) > before(ABSENT_SECONDS), col(WorkerPresence.ended_at).is_(None)
    )
    return (await connection.scalar(free) or 0) > 0


def _select_runs(since: SQLColumnExpression[Any]) -> Select[*tuple[Any, ...]]:
    """Return the statement for runs of which the time `since` is over 60 seconds ago:
    id, organization and that time.
    """
    return select(col(Execution.id), col(Execution.organization_id), since.label("since")).where(
        since < before(OVERDUE_SECONDS)
    )


def _has_status(status: ExecutionStatus) -> ColumnElement[bool]:
    """Return the condition that a run has this status, with a literal in the SQL.

    The databases use a partial index only for a condition that they can read.
    """
    return col(Execution.status) == literal_column(f"'{status}'")


_CHECKS: Final = (
    RowCheck(
        DriftClass.LEASE_EXPIRED,
        "execution",
        "The lease of its worker has expired, and no other worker has taken the run over.",
        "leaseUntil",
        _select_runs(col(Execution.lease_until)).where(_has_status(ExecutionStatus.RUNNING)),
    ),
    RowCheck(
        DriftClass.PENDING_UNCLAIMED,
        "execution",
        "The run is ready, workers have free places, and none has claimed it.",
        "readySince",
        _select_runs(col(Execution.updated_at)).where(
            _has_status(ExecutionStatus.PENDING),
            col(Execution.target) == SHARED_TARGET,
            col(Execution.rank) < before(OVERDUE_SECONDS),
        ),
    ),
    RowCheck(
        DriftClass.SLOT_UNUSED,
        "execution",
        "The run waits for a slot of its concurrency limit, and one is free.",
        "waitsSince",
        concurrency_limits.idle_slots_statement().where(col(Execution.updated_at) < before(OVERDUE_SECONDS)),
    ),
    RowCheck(
        DriftClass.WAIT_OVERDUE,
        "execution",
        "The wait is over, and the run does not continue.",
        "dueAt",
        _select_runs(col(Execution.due_at)).where(
            _has_status(ExecutionStatus.WAITING),
            col(Execution.started_at).is_not(None),
            col(Execution.target) == SHARED_TARGET,
        ),
    ),
    RowCheck(
        DriftClass.DEFERRED_OVERDUE,
        "execution",
        "The run may start since the window of its deployment is open, and it does not.",
        "dueAt",
        _select_runs(col(Execution.due_at)).where(wakes.IS_DEFERRED),
    ),
    RowCheck(
        DriftClass.SCHEDULE_OVERDUE,
        "schedule",
        "The schedule is due, and has not started a run.",
        "dueAt",
        select(
            col(Schedule.workflow_id).label("id"),
            col(Schedule.organization_id),
            col(Schedule.due_at).label("since"),
        ).where(col(Schedule.due_at) < before(OVERDUE_SECONDS)),
    ),
)
