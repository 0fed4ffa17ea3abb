"""Queries about a workflow's lifecycle: its decisions, the use of its pods, and its past runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, and_, case, func, literal, select, true, type_coerce, union_all
from sqlmodel import col

from gateway.http import limits
from models.audit import AuditAction, AuditEntry
from models.column_types import TimestampColumn, build_row
from models.deployment import Deployment, LifecycleDecision
from models.execution import Execution, ExecutionData
from models.lifecycle_forecast import PastRun

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.parameters import PageBounds
    from models.workflow import Workflow

USAGE_TIME: Final = timedelta(days=7)
"""Time over which the use of pods is measured."""
DAY: Final = timedelta(days=1)
DAY_SECONDS: Final = 86_400
CHANGES: Final = (
    AuditAction.WORKFLOW_LIFECYCLE_SET,
    AuditAction.WORKFLOW_KEPT_AWAKE,
    AuditAction.WORKFLOW_HOLD_ENDED,
)
"""Entries of the audit trail that explain later starts and stops."""
LISTED_DECISIONS: Final = 1_000
"""Number of decisions that are read for a time, the newest."""
_SECOND_MICROSECONDS: Final = 1_000_000
_INSTANT: Final = TimestampColumn()


@dataclass(frozen=True, slots=True)
class TimeRange:
    """Time from an instant up to another."""

    since: datetime
    until: datetime

    def overlap(self, since: datetime, until: datetime) -> timedelta:
        """Return the length of the part of this time that lies between two instants."""
        return max(min(self.until, until) - max(self.since, since), timedelta())


def start_of_day(moment: datetime) -> datetime:
    """Return midnight of the moment's day in its time zone."""
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


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


@dataclass(frozen=True, slots=True)
class PodChange:
    """Part of the row of a decision: a thousand rows with their inputs would take most of the time of a page."""

    id: str
    workflow_id: str
    at: datetime
    action: str
    reason: str
    replicas: int
    """Desired number of pods after it."""
    user_id: str | None
    """Author of the decision, if it was a user."""


_CHANGE_COLUMNS: Final = tuple(getattr(LifecycleDecision, one.name) for one in fields(PodChange))


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
    return count or 0, [build_row(LifecycleDecision, row) for row in rows.mappings()]


def changes_statement(organization_id: str, workflow_id: str, span: TimeRange) -> Select[*tuple[Any, ...]]:
    """Return the statement that reads changes of a workflow's policy, and of holds, within a time, newest first."""
    return (
        select(AuditEntry)
        .where(
            col(AuditEntry.organization_id) == organization_id,
            col(AuditEntry.object_id) == workflow_id,
            col(AuditEntry.created_at) >= span.since,
            col(AuditEntry.created_at) < span.until,
            col(AuditEntry.action).in_(CHANGES),
        )
        .order_by(col(AuditEntry.created_at).desc(), col(AuditEntry.id).desc())
        .limit(limits.LIFECYCLE_CHANGES)
    )


async def list_changes(
    connection: AsyncConnection, workflow: Workflow, span: TimeRange
) -> Sequence[AuditEntry]:
    """Return changes of a workflow's policy, and of holds, within a time, newest first, at most 100."""
    rows = (
        await connection.execute(changes_statement(workflow.organization_id, workflow.id, span))
    ).mappings()
    return [build_row(AuditEntry, row) for row in rows]


async def read_decisions(
    connection: AsyncConnection, workflow_ids: Sequence[str], since: datetime
) -> Sequence[PodChange]:
    """Return decisions since a time (the newest 1,000), and the last one of each workflow before these, by
    workflow and time.

    The earlier one tells whether its pods ran at that time.
    """
    if not workflow_ids:
        return []
    of_workflows = col(LifecycleDecision.workflow_id).in_(workflow_ids)
    newest = await connection.execute(
        select(*_CHANGE_COLUMNS)
        .where(of_workflows, col(LifecycleDecision.at) >= since)
        .order_by(col(LifecycleDecision.at).desc())
        .limit(LISTED_DECISIONS)
    )
    after = [PodChange(*row) for row in newest]
    if len(after) == LISTED_DECISIONS:
        # Others are left out: pods that ran at `since` may have been stopped and started between.
        since = after[-1].at
    earlier = (
        select(col(LifecycleDecision.workflow_id), func.max(col(LifecycleDecision.at)).label("at"))
        .where(of_workflows, col(LifecycleDecision.at) < since)
        .group_by(col(LifecycleDecision.workflow_id))
        .subquery()
    )
    is_earlier = and_(
        earlier.c.workflow_id == col(LifecycleDecision.workflow_id),
        earlier.c.at == col(LifecycleDecision.at),
    )
    before = await connection.execute(select(*_CHANGE_COLUMNS).join(earlier, is_earlier))
    found = [*(PodChange(*row) for row in before), *after]
    return sorted(found, key=lambda one: (one.workflow_id, one.at, one.id))


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


async def sum_pod_time(
    connection: AsyncConnection, workflow_ids: Sequence[str], ranges: Sequence[TimeRange]
) -> Sequence[float]:
    """Return the pod time of some workflows together within each of some consecutive times, in seconds.

    It is the desired number of pods over time, by the decisions; pods that fail to start count too.
    """
    found: Mapping[int, int] = {}
    if workflow_ids and ranges:
        rows = await connection.execute(pod_time_statement(workflow_ids, ranges))
        found = {row.number: row.pod_microseconds for row in rows}
    return [float(found.get(number, 0)) / _SECOND_MICROSECONDS for number in range(len(ranges))]


def pod_time_statement(workflow_ids: Sequence[str], ranges: Sequence[TimeRange]) -> Select[Any]:
    """Return the statement that sums the desired pods of some workflows over each of some consecutive times.

    A row has the `number` of the time and `pod_microseconds`. The last decision before the first time gives the
    number of pods at its start.
    """
    since, until = ranges[0].since, ranges[-1].until
    decision = LifecycleDecision
    bounds = union_all(
        *(
            select(literal(number, BigInteger).label("number"), literal(one.since, _INSTANT).label("at"))
            for number, one in enumerate(ranges)
        )
    ).subquery()
    before = (
        select(col(decision.replicas))
        .where(col(decision.workflow_id) == col(Deployment.workflow_id), col(decision.at) < bounds.c.at)
        .order_by(col(decision.at).desc(), col(decision.id).desc())
        .limit(1)
        .correlate(Deployment, bounds)
        .scalar_subquery()
    )
    # Each of the times begins with a step of its own, so that no time between two steps is in two of them: a join of
    # the steps with the times would compare each with each.
    passed = [case((col(decision.at) >= literal(one.since, _INSTANT), 1), else_=0) for one in ranges[1:]]
    steps = union_all(
        select(
            col(Deployment.workflow_id).label("workflow_id"),
            bounds.c.at.label("at"),
            literal("").label("id"),
            func.coalesce(before, 0).label("replicas"),
            bounds.c.number.label("number"),
        )
        .select_from(Deployment)
        .join(bounds, true())
        .where(col(Deployment.workflow_id).in_(workflow_ids)),
        select(
            *(col(decision.workflow_id), col(decision.at), col(decision.id), col(decision.replicas)),
            reduce(add, passed, literal(0, BigInteger)),
        ).where(
            col(decision.workflow_id).in_(workflow_ids), col(decision.at) >= since, col(decision.at) < until
        ),
    ).subquery()
    following = func.lead(steps.c.at).over(
        partition_by=steps.c.workflow_id, order_by=(steps.c.at, steps.c.id)
    )
    spans = select(
        steps.c.number,
        type_coerce(steps.c.at, BigInteger).label("start"),
        type_coerce(func.coalesce(following, literal(until, _INSTANT)), BigInteger).label("end"),
        steps.c.replicas,
    ).subquery()
    length = spans.c.end - spans.c.start
    return select(spans.c.number, func.sum(spans.c.replicas * length).label("pod_microseconds")).group_by(
        spans.c.number
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
