"""Timeline of an organization: times of schedules, windows, and the time for which pods were awake and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import BigInteger, and_, case, func, literal_column, not_, select, text, type_coerce, union
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from engine.triggers import SCHEDULE_KIND
from gateway.deployments import lifecycle_calendar, lifecycle_rows
from gateway.deployments.lifecycle_calendar import AwakeSpan, TimeSpan
from gateway.deployments.lifecycle_rows import PodChange, TimeRange
from gateway.http import limits
from gateway.http.parameters import OFFSET, IntegerParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from journal.explanations.blockers import BlockerCode
from journal.held_runs import UNTIL_RESUMED
from models import lifecycle_policy, schedule_timetable, weekly_windows
from models.blocked_interval import BlockedInterval
from models.column_types import build_row
from models.deployment import Deployment
from models.execution import DELAYED_TARGET, LIVE_CONDITION, Execution
from models.execution_status import ExecutionStatus
from models.lifecycle_policy import LifecycleAction, LifecycleReason, ScheduledWindowPolicy
from models.schedule import Schedule
from models.schedule_timetable import InvalidTimetable
from models.timestamps import from_microseconds
from models.workflow import Workflow, WorkflowStatus, is_listed_for
from models.workflow_triggers import WorkflowTrigger

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select, Subquery
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import ApiCaller
    from models.schedule_timetable import ScheduleTimetable

PAST_SHARE: Final = 4
"""The past that is shown is this fraction of the future."""
MAX_WAITING: Final = 10_000
"""Waiting runs of an organization that are examined."""
DUE_PARTS: Final = 100
SHOWN_TICKS: Final = 48
"""Times of one schedule: more are dense, and are shown as one band."""
LIMIT: Final = IntegerParameter(
    "limit", "Maximum number of workflows.", 20, minimum=1, maximum=limits.TIMELINE_LANES
)
HOURS: Final = IntegerParameter("hours", "Hours of the future that are shown.", 24, minimum=1, maximum=336)
LISTED: Final = (HOURS, LIMIT, OFFSET)
RECENT_SECONDS: Final = 1.0
"""Time for which the waiting runs of an organization are shown again."""
_MICROSECOND: Final = timedelta(microseconds=1)


class DueKind(StrEnum):
    """Kind of the wait that ends."""

    TIMER = "timer"
    """A node, or a delayed run, waits for a time."""
    RETRY = "retry"
    """A node is tried again."""
    DEFERRED = "deferred"
    """A run was deferred until pods of its workflow may start."""


class ScheduleTick(WireStruct):
    """Coming instant of a schedule."""

    at: Instant
    local_time: str
    """The same instant in the schedule's time zone, with its offset."""
    is_by_clock_change: bool
    """Whether the clocks of the zone change within the hour before."""


class DueRuns(WireStruct):
    """Runs of a workflow that become due at about the same time."""

    at: Instant
    """Earliest of them."""
    kind: DueKind
    count: int


class TimelineDecision(WireStruct):
    """Wake, start or stop of pods."""

    workflow_id: str
    workflow_name: str
    at: Instant
    action: LifecycleAction
    reason: LifecycleReason
    replicas: int
    user_id: str | None


class TimelineLane(WireStruct):
    """One workflow on the timeline."""

    workflow_id: str
    workflow_name: str
    is_deployed: bool
    ticks: Sequence[ScheduleTick]
    ticks_are_cut: bool
    """Whether more times follow within the timeline: the first 48 are listed."""
    last_run_at: Instant | None
    last_execution_id: str | None
    windows: Sequence[TimeSpan]
    """Windows of a `scheduled-window` policy."""
    awake: Sequence[AwakeSpan]
    due: Sequence[DueRuns]
    """Waiting runs that become due within the timeline, by time: those among the first 10,000 of the organization."""


class TimelineClockChange(WireStruct):
    """Change of the clocks in a time zone of a schedule or of windows."""

    at: Instant
    timezone: str
    local_time_before: str
    local_time_after: str


class ScheduleTimeline(WireStruct):
    """Past and future of schedules and pods; `count` is the number of all workflows that have either."""

    since: Instant
    now: Instant
    until: Instant
    count: int
    limit: int
    offset: int
    workflows: Sequence[TimelineLane]
    """The next time first, then workflows without one."""
    decisions: Sequence[TimelineDecision]
    """Wakes, starts and stops of these workflows since the begin, the newest first, at most 1,000."""
    clock_changes: Sequence[TimelineClockChange]
    """Changes of the clocks in the zones of these workflows, the earliest first."""


_recent: Final = TTLCache[tuple[int, str, int], Mapping[str, Sequence[DueRuns]]](RECENT_SECONDS, 100)
"""Last waiting runs by gateway, organization and hours. Only those of workflows that a caller may read are shown."""


class _LaneRow(Struct, frozen=True):
    workflow: Workflow
    schedule: Schedule | None
    trigger_config: Mapping[str, Any] | None
    deployment_id: str | None


class TimelineRange(Struct, frozen=True):
    """Range of a timeline: its begin, the present, and its end."""

    since: datetime
    now: datetime
    until: datetime


async def timeline(request: GatewayRequest) -> JsonResponse:
    """Show when schedules start runs, when windows are open, and when and why pods were awake.

    The past that is shown is a quarter of the future. Waiting runs (`due`) are at most a second old.
    """
    query, now = request.query, request.gateway.clock()
    shown = TimelineRange(
        now - timedelta(hours=query[HOURS]) / PAST_SHARE, now, now + timedelta(hours=query[HOURS])
    )
    async with request.gateway.database.read() as connection:
        due = await _read_recent_due_runs(connection, request, shown)
        count, rows = await _list_rows(connection, request.caller, due, query[LIMIT], query[OFFSET])
        decisions = await lifecycle_rows.read_decisions(
            connection, [row.workflow.id for row in rows], shown.since
        )
    by_workflow = {
        workflow_id: [*of_workflow]
        for workflow_id, of_workflow in groupby(decisions, key=lambda one: one.workflow_id)
    }
    names = {row.workflow.id: row.workflow.name for row in rows}
    ledger = [
        _show_decision(one, names[one.workflow_id])
        for one in sorted(decisions, key=lambda one: (one.at, one.id), reverse=True)
        if one.at >= shown.since
    ]
    return JsonResponse(
        ScheduleTimeline(
            since=instant(shown.since),
            now=instant(now),
            until=instant(shown.until),
            count=count,
            limit=query[LIMIT],
            offset=query[OFFSET],
            workflows=[
                _build_lane(row, by_workflow.get(row.workflow.id, ()), due.get(row.workflow.id, ()), shown)
                for row in rows
            ],
            decisions=ledger[: lifecycle_rows.LISTED_DECISIONS],
            clock_changes=list_clock_changes({zone for row in rows for zone in _list_zones(row)}, shown),
        )
    )


async def _list_rows(
    connection: AsyncConnection, caller: ApiCaller, waiting: Collection[str], limit: int, offset: int
) -> tuple[int, Sequence[_LaneRow]]:
    """Return the number of workflows with an active schedule, a deployment or waiting runs that the caller may read,
    and a page of them, the next to start first.

    `waiting` has the ids of the workflows with waiting runs.
    """
    listed = _listed_statement(caller, waiting)
    order = (col(Schedule.due_at).is_(None), col(Schedule.due_at), col(Workflow.id))
    page = listed.add_columns(func.count().over().label("total")).order_by(*order).limit(limit).offset(offset)
    found = (await connection.execute(page)).all()
    if found:
        return found[0].total, await _read_lane_rows(connection, [row.id for row in found])
    return await connection.scalar(select(func.count()).select_from(listed.subquery())) or 0, []


def _listed_statement(caller: ApiCaller, waiting: Collection[str]) -> Select[*tuple[Any, ...]]:
    """Return the statement of the ids of all workflows of a caller's timeline, joined with their schedules.

    It begins with the few tables that have them. A condition on all workflows of the organization, with `or`, would be
    checked for each.
    """
    parts = [
        select(col(Schedule.workflow_id))
        .join(Workflow, col(Workflow.id) == col(Schedule.workflow_id))
        .where(is_listed_for(caller), col(Schedule.next_run_at).is_not(None)),
        select(col(Deployment.workflow_id)).where(
            col(Deployment.organization_id) == caller.organization_id, col(Deployment.is_deployed)
        ),
    ]
    if waiting:
        parts.append(select(col(Workflow.id)).where(col(Workflow.id).in_(waiting)))
    candidates = union(*parts).subquery()
    return (
        select(col(Workflow.id))
        .join(candidates, candidates.c.workflow_id == col(Workflow.id))
        .outerjoin(Schedule, col(Schedule.workflow_id) == col(Workflow.id))
        .where(is_listed_for(caller))
    )


async def _read_lane_rows(connection: AsyncConnection, workflow_ids: Sequence[str]) -> Sequence[_LaneRow]:
    """Return the rows of workflows with their schedules and deployments, in the order of the ids; missing
    ones are left out.
    """
    is_schedule = and_(
        col(WorkflowTrigger.workflow_id) == col(Workflow.id), col(WorkflowTrigger.kind) == SCHEDULE_KIND
    )
    is_deployed = and_(col(Deployment.workflow_id) == col(Workflow.id), col(Deployment.is_deployed))
    statement = (
        select(Workflow, col(WorkflowTrigger.config).label("trigger_config"))
        .add_columns(col(Deployment.workflow_id).label("deployment_id"))
        .outerjoin(WorkflowTrigger, is_schedule)
        .outerjoin(Deployment, is_deployed)
        .where(col(Workflow.id).in_(workflow_ids))
    )
    schedules = await _read_schedules(connection, workflow_ids)
    rows: dict[str, _LaneRow] = {}
    for row in (await connection.execute(statement)).mappings():
        columns = dict(row)
        config, deployment_id = columns.pop("trigger_config"), columns.pop("deployment_id")
        workflow = build_row(Workflow, columns)
        rows[workflow.id] = _LaneRow(workflow, schedules.get(workflow.id), config, deployment_id)
    return [rows[workflow_id] for workflow_id in workflow_ids if workflow_id in rows]


async def _read_schedules(connection: AsyncConnection, workflow_ids: Sequence[str]) -> dict[str, Schedule]:
    rows = await connection.execute(select(Schedule).where(col(Schedule.workflow_id).in_(workflow_ids)))
    return {row["workflow_id"]: build_row(Schedule, row) for row in rows.mappings()}


def _select_waiting(caller: ApiCaller) -> Subquery:
    """Return the subquery of at most 10,000 waiting runs of the caller's organization that have a due time, without
    private ones.

    It reads them by the index of live runs.
    """
    return (
        select(
            *(col(Execution.id), col(Execution.workflow_id), col(Execution.due_at)),
            (col(Execution.started_at).is_(None) & (col(Execution.target) != DELAYED_TARGET)).label(
                "is_deferred"
            ),
        )
        .where(
            text(f"execution.{LIVE_CONDITION}"),
            col(Execution.organization_id) == caller.organization_id,
            col(Execution.status) == literal_column(f"'{ExecutionStatus.WAITING}'"),
            col(Execution.is_private) == literal_column("false"),
            col(Execution.due_at) < UNTIL_RESUMED,
        )
        .limit(MAX_WAITING)
        .subquery()
    )


async def _read_recent_due_runs(
    connection: AsyncConnection, request: GatewayRequest, shown: TimelineRange
) -> Mapping[str, Sequence[DueRuns]]:
    """Return the waiting runs as `read_due_runs` does, at most a second old: the organization shares the result of a
    query.

    It has workflows that the caller may not see, which lists must leave out.
    """
    key = (id(request.gateway), request.caller.organization_id, request.query[HOURS])
    found = _recent.get(key)
    if found is None:
        found = await read_due_runs(connection, request.caller, shown)
        _recent.put(key, found)
    return found


async def read_due_runs(
    connection: AsyncConnection, caller: ApiCaller, shown: TimelineRange
) -> Mapping[str, Sequence[DueRuns]]:
    """Return the waiting runs that become due from now to the end of the range, by workflow and in order of time.

    Those of one kind within the same hundredth of that time are counted together. A workflow with waiting runs that are
    all due at other times has an empty list.
    """
    found: dict[str, list[DueRuns]] = {}
    for row in await connection.execute(due_statement(caller, shown)):
        of_workflow = found.setdefault(row.workflow_id, [])
        if row.kind is not None:
            at = instant(from_microseconds(row.at))
            of_workflow.append(DueRuns(at=at, kind=DueKind(row.kind), count=row.number))
    return found


def due_statement(caller: ApiCaller, shown: TimelineRange) -> Select[*tuple[Any, ...]]:
    """Return the statement that counts waiting runs by workflow, kind, and part (a hundredth) of the future of a range,
    the earliest first.

    Its columns are `workflow_id`, `kind`, `at` (the earliest due time in microseconds since 1970) and `number`. Runs
    that become due at other times have no kind and no part.
    """
    waiting = _select_waiting(caller)
    retries = (
        select(col(BlockedInterval.execution_id))
        .where(
            col(BlockedInterval.execution_id) == waiting.c.id,
            col(BlockedInterval.code) == BlockerCode.RETRY_AT.value,
            col(BlockedInterval.ended_at).is_(None),
        )
        .correlate(waiting)
        .exists()
    )
    is_shown = and_(waiting.c.due_at > shown.now, waiting.c.due_at <= shown.until)
    kind = case(
        (not_(is_shown), None),
        (waiting.c.is_deferred, DueKind.DEFERRED.value),
        (retries, DueKind.RETRY.value),
        else_=DueKind.TIMER.value,
    )
    due_at = type_coerce(waiting.c.due_at, BigInteger)
    step: ColumnElement[int] = literal_column(
        str(max((shown.until - shown.now) // DUE_PARTS // _MICROSECOND, 1))
    )
    some = select(
        waiting.c.workflow_id,
        kind.label("kind"),
        due_at.label("at"),
        case((is_shown, due_at // step)).label("part"),
    ).subquery()
    earliest = func.min(some.c.at).label("at")
    return (
        select(some.c.workflow_id, some.c.kind, earliest, func.count().label("number"))
        .group_by(some.c.workflow_id, some.c.kind, some.c.part)
        .order_by(earliest)
    )


def _list_zones(row: _LaneRow) -> Iterable[str]:
    """Yield the names of the time zones of a workflow's schedule and windows."""
    with suppress(InvalidTimetable):
        if row.schedule is not None and row.trigger_config is not None:
            yield schedule_timetable.parse_timetable(row.trigger_config).timezone
    policy = lifecycle_policy.parse_policy(lifecycle_policy.effective_policy(row.workflow.lifecycle))
    if row.deployment_id is not None and isinstance(policy, ScheduledWindowPolicy):
        yield policy.schedule.timezone


def list_clock_changes(zones: Iterable[str], shown: TimelineRange) -> Sequence[TimelineClockChange]:
    """Return the changes of the clocks of some time zones within a range, the earliest first."""
    found = [
        (change, zone)
        for zone in sorted(zones)
        for change in weekly_windows.zone_clock_changes(zone, shown.since, shown.until)
    ]
    return [
        TimelineClockChange(
            at=instant(change.at),
            timezone=zone,
            local_time_before=change.at.astimezone(timezone(change.offset_before)).isoformat(),
            local_time_after=change.at.astimezone(timezone(change.offset_after)).isoformat(),
        )
        for change, zone in sorted(found, key=lambda one: (one[0].at, one[1]))
    ]


# ── lanes ───────────────────────────────────────────────────────────────────────────────────────────────────


def _build_lane(
    row: _LaneRow,
    decisions: Sequence[PodChange],
    due: Sequence[DueRuns],
    shown: TimelineRange,
) -> TimelineLane:
    """Return a workflow's lane of the timeline: times of its schedule, waiting runs, windows, and the times
    with pods.
    """
    ticks, are_cut = _list_ticks(row, shown)
    schedule = row.schedule
    return TimelineLane(
        workflow_id=row.workflow.id,
        workflow_name=row.workflow.name,
        is_deployed=row.deployment_id is not None,
        ticks=ticks,
        ticks_are_cut=are_cut,
        last_run_at=instant(schedule.last_run_at) if schedule and schedule.last_run_at else None,
        last_execution_id=schedule.last_execution_id if schedule else None,
        windows=_list_windows(row, shown),
        due=due,
        awake=[*lifecycle_calendar.list_awake_spans(decisions, shown.since, shown.now)],
    )


def _list_ticks(row: _LaneRow, shown: TimelineRange) -> tuple[Sequence[ScheduleTick], bool]:
    """Return up to 48 coming times of an active schedule within the range, and whether it has more of them there."""
    schedule = row.schedule
    if schedule is None or schedule.next_run_at is None or row.trigger_config is None:
        return [], False
    if row.workflow.status != WorkflowStatus.ACTIVE:
        return [], False
    try:
        timetable = schedule_timetable.parse_timetable(row.trigger_config)
    except InvalidTimetable:
        return [], False
    since = max(schedule.next_run_at, shown.now) - _MICROSECOND
    found = schedule_timetable.upcoming_instants(timetable, since, schedule.anchor_at, SHOWN_TICKS + 1)
    inside = [at for at in found if at <= shown.until]
    return [_show_tick(at, timetable) for at in inside[:SHOWN_TICKS]], len(inside) > SHOWN_TICKS


def _show_tick(at: datetime, timetable: ScheduleTimetable) -> ScheduleTick:
    """Return a coming time, with its local time and whether a change of the clocks lies within the hour before it."""
    before = (at - timedelta(hours=1)).astimezone(timetable.zone)
    local = at.astimezone(timetable.zone)
    return ScheduleTick(
        at=instant(at),
        local_time=local.isoformat(timespec="seconds"),
        is_by_clock_change=before.utcoffset() != local.utcoffset(),
    )


def _list_windows(row: _LaneRow, shown: TimelineRange) -> Sequence[TimeSpan]:
    """Return the windows of a deployed workflow within the range, cut to it; none under another policy than
    `scheduled-window`.
    """
    if row.deployment_id is None:
        return []
    policy = lifecycle_policy.parse_policy(lifecycle_policy.effective_policy(row.workflow.lifecycle))
    return [
        TimeSpan(start=instant(one.since), end=instant(one.until))
        for one in lifecycle_calendar.list_windows(policy, TimeRange(shown.since, shown.until))
    ]


def _show_decision(one: PodChange, name: str) -> TimelineDecision:
    return TimelineDecision(
        workflow_id=one.workflow_id,
        workflow_name=name,
        at=instant(one.at),
        action=LifecycleAction(one.action),
        reason=LifecycleReason(one.reason),
        replicas=one.replicas,
        user_id=one.user_id,
    )
