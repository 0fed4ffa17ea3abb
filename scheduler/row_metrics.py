"""Metrics of rows, which the leading scheduler counts once for all processes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, func, select
from sqlmodel import col

from doctor import deployment_checks, row_checks
from doctor.findings import DriftClass
from journal import dead_letters, queue_delays
from journal.explanations import run_counts
from journal.explanations.blockers import BlockerCode
from models.deployment import Deployment
from models.drift_fix_count import DriftFixCount
from models.execution_status import ExecutionStatus
from telemetry import instruments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from doctor.findings import DriftFinding
    from models.database import Database

COUNT_SECONDS: Final = 15.0
_STATUS_OF: Final = {
    BlockerCode.NODE_RUNNING: ExecutionStatus.RUNNING,
    BlockerCode.WORKER_LOST: ExecutionStatus.RUNNING,
    BlockerCode.CANCEL_REQUESTED: ExecutionStatus.RUNNING,
    BlockerCode.TIMER: ExecutionStatus.WAITING,
    BlockerCode.RETRY_AT: ExecutionStatus.WAITING,
    BlockerCode.AWAITING_EVENT: ExecutionStatus.WAITING,
    BlockerCode.AWAITING_INPUT: ExecutionStatus.WAITING,
    BlockerCode.AWAITING_TASK: ExecutionStatus.WAITING,
    BlockerCode.AWAITING_CALLBACK: ExecutionStatus.WAITING,
    BlockerCode.AWAITING_SIGNAL: ExecutionStatus.WAITING,
    BlockerCode.WORKFLOW_PAUSED: ExecutionStatus.WAITING,
    BlockerCode.WINDOW_CLOSED: ExecutionStatus.WAITING,
    BlockerCode.STOPPED_MANUALLY: ExecutionStatus.WAITING,
}
"""Status of most runs with a code; those with any other code are pending."""

instruments.declare(
    *("executions", "pending_oldest_seconds", "waiting", "dead_letters", "schedule_lag_seconds"),
    *("deferred_oldest_overdue_seconds", "deployments", "pod_seconds_total", "pod_seconds_saved_total"),
    *("drift", "doctor_fixes_total", "leader"),
)


class RowMetrics:
    """Counter of rows; each count is one read of a snapshot."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._counted_at: float | None = None
        self._fixed: dict[str, int] = {}
        self._dead_letters_due_at = 0.0

    async def count_rows(self) -> None:
        """Set the metrics of runs, schedules, dead letters, deployments and drift from one snapshot of the
        database.

        Raises `DatabaseUnavailable`.
        """
        async with self._database.read_snapshot() as connection:
            counts = await run_counts.count_runs(connection)
            oldest = {
                "shared": await queue_delays.read_oldest_pending_age(connection, queue_delays.SHARED),
                "pod": await queue_delays.read_oldest_pending_age(connection, queue_delays.OF_PODS),
            }
            lag = await queue_delays.read_schedule_lag(connection)
            overdue = await queue_delays.read_deferred_delay(connection)
            await self._count_dead_letters(connection, counts.now)
            drift = [
                *await row_checks.find_overdue_rows(connection),
                *deployment_checks.check_deployments(await deployment_checks.read_deployments(connection)),
            ]
            deployments = (await connection.execute(_deployments_statement())).all()
            fixes = select(col(DriftFixCount.drift_class), col(DriftFixCount.fixed))
            fixed = {row.drift_class: row.fixed for row in await connection.execute(fixes)}
        _set_runs(counts)
        for target, seconds in oldest.items():
            instruments.gauge("pending_oldest_seconds", target).set(seconds)
        instruments.gauge("schedule_lag_seconds").set(lag)
        instruments.gauge("deferred_oldest_overdue_seconds").set(overdue)
        _set_drift(drift)
        self._count_fixes(fixed)
        instruments.gauge("leader").set(1)
        self._set_deployments(deployments)

    async def _count_dead_letters(self, connection: AsyncConnection, now: datetime) -> None:
        """Set the metric of dead letters, which takes a second for 100,000: at most a twentieth of the time."""
        begin = time.monotonic()
        if begin >= self._dead_letters_due_at:
            instruments.gauge("dead_letters").set(await dead_letters.count_unmuted(connection, now))
            self._dead_letters_due_at = begin + 20 * (time.monotonic() - begin)

    def _count_fixes(self, fixed: Mapping[str, int]) -> None:
        """Add the fixes of drift since the last turn to their counter; at the first turn those of all times.

        `fixed` has the number of all fixes so far by class of drift.
        """
        for drift_class in DriftClass:
            total = fixed.get(drift_class.value, 0)
            added = total - self._fixed.get(drift_class.value, 0)
            instruments.counter("doctor_fixes_total", drift_class.value).inc(max(added, 0))
        self._fixed = dict(fixed)

    def _set_deployments(self, rows: Sequence[Row[*tuple[Any, ...]]]) -> None:
        """Set the metrics of deployments by desired and observed state, and add the seconds of pods since the last
        turn.

        Saved seconds are those of the usual pods of stopped deployments.
        """
        for wanted in ("up", "down"):
            for observed in _OBSERVED:
                instruments.gauge("deployments", wanted, observed).set(0)
        ready = asleep = 0
        for row in rows:
            instruments.gauge("deployments", "up" if row.is_up else "down", row.observed).inc(row.number)
            ready += row.ready
            asleep += 0 if row.is_up else row.usual
        now = time.monotonic()
        if self._counted_at is not None:
            seconds = now - self._counted_at
            instruments.counter("pod_seconds_total").inc(ready * seconds)
            instruments.counter("pod_seconds_saved_total").inc(asleep * seconds)
        self._counted_at = now


_OBSERVED: Final = (
    *("absent", "stopped", "starting", "running"),
    *("stopping", "failed", "outdated", "unknown"),
)


def _set_runs(counts: run_counts.RunCounts) -> None:
    """Set the metrics of unfinished runs by reason and by status."""
    statuses = dict.fromkeys(("pending", "running", "waiting"), 0)
    for code in BlockerCode:
        found = counts.by_code.get(code)
        number = 0 if found is None else found.count
        instruments.gauge("waiting", code.value).set(number)
        statuses[_STATUS_OF.get(code, ExecutionStatus.PENDING).value] += number
    for status, number in statuses.items():
        instruments.gauge("executions", status).set(number)


def _set_drift(findings: Sequence[DriftFinding]) -> None:
    """Set the metrics of overdue rows by class of drift; they are zero as long as sweeps work."""
    for drift_class in DriftClass:
        number = sum(finding.drift_class is drift_class for finding in findings)
        instruments.gauge("drift", drift_class.value).set(number)


def _deployments_statement() -> Select[*tuple[Any, ...]]:
    is_up = and_(col(Deployment.replicas) > 0, col(Deployment.drain_until).is_(None)).label("is_up")
    return (
        select(
            is_up,
            col(Deployment.observed),
            func.count().label("number"),
            func.sum(col(Deployment.ready_replicas)).label("ready"),
            func.sum(col(Deployment.last_replicas)).label("usual"),
        )
        .where(col(Deployment.is_deployed))
        .group_by(is_up, col(Deployment.observed))
    )
