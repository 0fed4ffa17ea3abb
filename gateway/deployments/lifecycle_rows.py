"""Queries about a workflow's lifecycle: its decisions, the use of its pods, and its past runs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, and_, case, func, literal, select, type_coerce
from sqlmodel import col

from gateway.http import limits
from models.column_types import TimestampColumn
from models.deployment import LifecycleDecision
from models.execution import Execution, ExecutionData
from models.lifecycle_forecast import PastRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.parameters import PageBounds

USAGE_TIME: Final = timedelta(days=7)
"""Time over which the use of pods is measured."""
DAY_SECONDS: Final = 86_400
_SECOND_MICROSECONDS: Final = 1_000_000
_INSTANT: Final = TimestampColumn()


@dataclass(frozen=True, slots=True)
class PodUsage:
    """Use of a workflow's pods in a period."""

    since: datetime
    until: datetime
    pod_seconds: float

    @property
    def pod_seconds_per_day(self) -> float:
        seconds = (self.until - self.since).total_seconds()
        return self.pod_seconds / seconds * DAY_SECONDS if seconds > 0 else 0.0


async def list_decisions(
    connection: AsyncConnection, workflow_id: str, part: PageBounds
) -> tuple[int, Sequence[LifecycleDecision]]:
    """Return the number of decisions about a workflow's deployment, and the rows `part` of them, newest first."""
    of_workflow = col(LifecycleDecision.workflow_id) == workflow_id
    count = await connection.scalar(select(func.count()).select_from(LifecycleDecision).where(of_workflow))
    rows = await connection.execute(
        select(LifecycleDecision)
        .where(of_workflow)
        .order_by(col(LifecycleDecision.at).desc(), col(LifecycleDecision.id).desc())
        .limit(part.limit)
        .offset(part.offset)
    )
    return count or 0, [LifecycleDecision(**row) for row in rows.mappings()]


async def read_usage(connection: AsyncConnection, workflow_id: str, now: datetime) -> PodUsage | None:
    """Return the use of a workflow's pods in the last seven days, or since its first pods; None if it never
    had any.
    """
    row = (await connection.execute(usage_statement(workflow_id, now))).one()
    if row.first is None:
        return None
    return PodUsage(max(row.first, now - USAGE_TIME), now, float(row.pod_microseconds) / _SECOND_MICROSECONDS)


def usage_statement(workflow_id: str, now: datetime) -> Select[Any]:
    """Return the statement that sums the desired pods of seven days over time, in microseconds of pods.

    The last decision before the period gives the number of pods at its start. `first` is null for a workflow
    without decisions.
    """
    since = now - USAGE_TIME
    of_workflow = col(LifecycleDecision.workflow_id) == workflow_id
    at = col(LifecycleDecision.at)
    before = select(func.max(at)).where(of_workflow, at <= since).scalar_subquery()
    steps = (
        select(
            at.label("at"),
            col(LifecycleDecision.replicas).label("replicas"),
            func.lead(at).over(order_by=(at, col(LifecycleDecision.id))).label("next_at"),
        )
        .where(of_workflow, at >= func.coalesce(before, literal(since, _INSTANT)))
        .subquery()
    )
    begin = case((steps.c.at < since, literal(since, _INSTANT)), else_=steps.c.at)
    end = func.coalesce(steps.c.next_at, literal(now, _INSTANT), type_=_INSTANT)
    length = case((end > begin, type_coerce(end, BigInteger) - type_coerce(begin, BigInteger)), else_=0)
    return select(
        func.min(steps.c.at).label("first"),
        func.coalesce(func.sum(steps.c.replicas * length), 0).label("pod_microseconds"),
    )


async def read_past_runs(
    connection: AsyncConnection, workflow_id: str, since: datetime, until: datetime
) -> Sequence[PastRun]:
    """Return a workflow's last runs since a time, at most 10,000, the oldest first, with acceptance and end.

    Runs that have not ended get `until` as their end.
    """
    same_run = and_(
        col(Execution.id) == col(ExecutionData.execution_id), col(Execution.shard) == col(ExecutionData.shard)
    )
    rows = await connection.execute(
        select(col(ExecutionData.created_at), col(Execution.ended_at))
        .join(Execution, same_run)
        .where(col(ExecutionData.workflow_id) == workflow_id, col(ExecutionData.created_at) >= since)
        .order_by(col(ExecutionData.created_at).desc())
        .limit(limits.PREVIEW_RUNS)
    )
    runs = [PastRun(row.created_at, row.ended_at or until) for row in rows]
    runs.reverse()
    return runs
