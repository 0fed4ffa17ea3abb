"""Queries about a workflow's lifecycle: its decisions, the use of its pods, and its past runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec import Struct
from sqlalchemy import BigInteger, and_, bindparam, func, literal, select, true, type_coerce, union_all
from sqlalchemy.orm import aliased
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from gateway.http import limits
from models.audit import AuditAction, AuditEntry
from models.column_types import TimestampColumn, build_row
from models.deployment import LifecycleDecision
from models.execution import Execution, ExecutionData
from models.lifecycle_forecast import PastRun
from models.workflow import Workflow

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import ColumnElement, Select, SQLColumnExpression
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.parameters import PageBounds

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
ENDED_TIME: Final = timedelta(hours=1)
"""Time after the end of a day in which transactions that were begun on it have ended."""
_SECOND_MICROSECONDS: Final = 1_000_000
_INSTANT: Final = TimestampColumn()


class TimeRange(Struct, frozen=True):
    """Time from an instant up to another."""

    since: datetime
    until: datetime

    def overlap(self, since: datetime, until: datetime) -> timedelta:
        """Return the length of the part of this time that lies between two instants."""
        return max(min(self.until, until) - max(self.since, since), timedelta())


_ended_days: Final = TTLCache[tuple[int, str, TimeRange], float](600.0, 10_000)
"""Pod time of days that are over, in seconds, by the database and the workflow."""


def start_of_day(moment: datetime) -> datetime:
    """Return midnight of the moment's day in its time zone."""
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


class PodUsage(Struct, frozen=True):
    """Use of a workflow's pods in a period."""

    since: datetime
    until: datetime
    pod_seconds: float

    @property
    def pod_seconds_per_day(self) -> float:
        seconds = (self.until - self.since).total_seconds()
        return self.pod_seconds / seconds * DAY_SECONDS if seconds > 0 else 0.0


class PodChange(NamedTuple):
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


_CHANGE_COLUMNS: Final = tuple(getattr(LifecycleDecision, name) for name in PodChange._fields)


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
    """Return the statement that reads changes of a workflow's policy within a time, newest first, at most 100.

    Changes of holds count too: times until which users keep the deployment awake.
    """
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
    """Return changes of a workflow's policy, and of holds by users, within a time, newest first, at most 100."""
    rows = (
        await connection.execute(changes_statement(workflow.organization_id, workflow.id, span))
    ).mappings()
    return [build_row(AuditEntry, row) for row in rows]


async def read_decisions(
    connection: AsyncConnection, workflow_ids: Sequence[str], since: datetime
) -> Sequence[PodChange]:
    """Return the decisions about workflows since a time, and the last earlier one of each, ordered by workflow and
    time.

    The earlier one shows whether pods ran at that time. Of more than 1,000 decisions since then, only the newest 1,000
    are returned, and the earlier one of each workflow is the last before the oldest of these.
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
    after = [PodChange._make(row) for row in newest]
    if len(after) == LISTED_DECISIONS:
        # Others are left out: pods that ran at `since` may have been stopped and started between.
        since = after[-1].at
    before = await connection.execute(_last_statement(), {"workflow_ids": workflow_ids, "since": since})
    found = [*(PodChange._make(row) for row in before), *after]
    return sorted(found, key=lambda one: (one.workflow_id, one.at, one.id))


@cache
def _last_statement() -> Select[Any]:
    """Return the statement of the last decision about each of `workflow_ids` before `since`. Built once."""
    previous = aliased(LifecycleDecision)
    last = (
        select(col(previous.id))
        .where(
            col(previous.workflow_id) == col(Workflow.id),
            col(previous.at) < bindparam("since", type_=_INSTANT),
        )
        .order_by(col(previous.at).desc(), col(previous.id).desc())
        .limit(1)
        .correlate(Workflow)
        .scalar_subquery()
    )
    return (
        select(*_CHANGE_COLUMNS)
        .select_from(Workflow)
        .join(LifecycleDecision, col(LifecycleDecision.id) == last)
        .where(col(Workflow.id).in_(bindparam("workflow_ids", expanding=True)))
    )


async def read_usage(connection: AsyncConnection, workflow_id: str, now: datetime) -> PodUsage | None:
    """Return the use of a workflow's pods in the last seven days, or since its first pods; None if it never
    had any.
    """
    since = now - USAGE_TIME
    first = await connection.scalar(
        select(func.min(col(LifecycleDecision.at))).where(col(LifecycleDecision.workflow_id) == workflow_id)
    )
    if first is None:
        return None
    by_day = await sum_pod_time_by_day(connection, workflow_id, since, now)
    return PodUsage(max(first, since), now, sum(by_day))


async def sum_pod_time_by_day(
    connection: AsyncConnection, workflow_id: str, since: datetime, now: datetime
) -> Sequence[float]:
    """Return the pod time of a workflow in seconds on each day in UTC, from `since` until now.

    Days that ended over an hour ago are cached for ten minutes, since no decision is dated back.
    """
    begin = start_of_day(since.astimezone(UTC))
    days = [begin + number * DAY for number in range((now - begin) // DAY + 1)]
    ranges = [TimeRange(max(day, since), min(day + DAY, now)) for day in days]
    keys = {one: (id(connection.dialect), workflow_id, one) for one in ranges}
    found = {one: seconds for one in ranges if (seconds := _ended_days.get(keys[one])) is not None}
    missing = [one for one in ranges if one not in found]
    read = await sum_pod_time(connection, [workflow_id], missing)
    for one, seconds in zip(missing, read, strict=True):
        found[one] = seconds
        if one.until - one.since == DAY and one.until <= now - ENDED_TIME:
            _ended_days.put(keys[one], seconds)
    return [found[one] for one in ranges]


async def sum_pod_time(
    connection: AsyncConnection, workflow_ids: Sequence[str], ranges: Sequence[TimeRange]
) -> Sequence[float]:
    """Return the pod time of some workflows together within each of some times, in seconds.

    It is the desired number of pods over time, by the decisions; pods that fail to start count too.
    """
    found: Mapping[int, int] = {}
    if workflow_ids and ranges:
        values: dict[str, object] = {"workflow_ids": workflow_ids}
        for number, one in enumerate(ranges):
            values |= {f"since_{number}": one.since, f"until_{number}": one.until}
        rows = await connection.execute(pod_time_statement(len(ranges)), values)
        found = {row.number: row.pod_microseconds for row in rows}
    return [float(found.get(number, 0)) / _SECOND_MICROSECONDS for number in range(len(ranges))]


@cache
def pod_time_statement(count: int) -> Select[Any]:
    """Return the statement that sums the desired pods of `workflow_ids` over each of some times, `since_0` to `until_0`
    and so on. Built once for each number of times.

    A row has the `number` of the time and `pod_microseconds`. The last decision before a time gives the number of pods
    at its start.
    """
    numbered = union_all(
        *(
            select(
                literal(number, BigInteger).label("number"),
                bindparam(f"since_{number}", type_=_INSTANT).label("since"),
                bindparam(f"until_{number}", type_=_INSTANT).label("until"),
            )
            for number in range(count)
        )
    ).subquery()
    decision, at = LifecycleDecision, col(LifecycleDecision.at)
    of_workflow = col(decision.workflow_id) == col(Workflow.id)
    is_within = and_(of_workflow, at >= numbered.c.since, at < numbered.c.until)
    before = (
        select(col(decision.replicas))
        .where(of_workflow, at < numbered.c.since)
        .order_by(at.desc(), col(decision.id).desc())
        .limit(1)
        .correlate(Workflow, numbered)
        .scalar_subquery()
    )
    first = select(func.min(at)).where(is_within).correlate(Workflow, numbered).scalar_subquery()
    # Each time is read by itself, in the order of the index: the decisions of all would be sorted, and grouped by time.
    following = func.lead(at, 1, numbered.c.until).over(order_by=(at, col(decision.id)))
    steps = (
        select(col(decision.replicas).label("replicas"), _length(at, following).label("length"))
        .where(is_within)
        .correlate(Workflow, numbered)
        .subquery()
    )
    within = select(func.sum(steps.c.replicas * steps.c.length)).scalar_subquery()
    begun = func.coalesce(before, 0) * _length(numbered.c.since, func.coalesce(first, numbered.c.until))
    return (
        select(numbered.c.number, func.sum(begun + func.coalesce(within, 0)).label("pod_microseconds"))
        .select_from(Workflow)
        .join(numbered, true())
        .where(col(Workflow.id).in_(bindparam("workflow_ids", expanding=True)))
        .group_by(numbered.c.number)
    )


def _length(begin: SQLColumnExpression[Any], end: SQLColumnExpression[Any]) -> ColumnElement[int]:
    """Return the time between two instants, in microseconds."""
    return type_coerce(end, BigInteger) - type_coerce(begin, BigInteger)


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
