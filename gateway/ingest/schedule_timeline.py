"""Timeline of an organization: times of schedules, windows, and the time for which pods were awake and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, func, or_, select
from sqlmodel import col

from engine.triggers import SCHEDULE_KIND
from gateway.http import limits
from gateway.http.parameters import OFFSET, IntegerParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from models import lifecycle_policy, schedule_timetable, weekly_windows
from models.deployment import Deployment, LifecycleDecision
from models.lifecycle_policy import LifecycleAction, LifecycleReason, ScheduledWindowPolicy
from models.schedule import Schedule
from models.schedule_timetable import InvalidTimetable
from models.workflow import Workflow, WorkflowStatus, is_listed_for
from models.workflow_triggers import WorkflowTrigger

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import ApiCaller
    from models.schedule_timetable import ScheduleTimetable
    from models.weekly_windows import WindowSchedule

PAST_SHARE: Final = 4
"""The past that is shown is this fraction of the future."""
SHOWN_TICKS: Final = 48
"""Times of one schedule: more are dense, and are shown as one band."""
SHOWN_DECISIONS: Final = 1_000
LIMIT: Final = IntegerParameter(
    "limit", "Maximum number of workflows.", 20, minimum=1, maximum=limits.TIMELINE_LANES
)
HOURS: Final = IntegerParameter("hours", "Hours of the future that are shown.", 24, minimum=1, maximum=336)
LISTED: Final = (HOURS, LIMIT, OFFSET)
_MICROSECOND: Final = timedelta(microseconds=1)


class ScheduleTick(WireStruct):
    """Coming instant of a schedule."""

    at: Instant
    local_time: str
    """The same instant in the schedule's time zone, with its offset."""
    is_by_clock_change: bool
    """Whether the clocks of the zone change within the hour before."""


class TimeSpan(WireStruct):
    """Time from one instant to another."""

    start: Instant
    end: Instant


class AwakeSpan(TimeSpan):
    """Time for which a workflow had pods."""

    reason: LifecycleReason | None
    """Reason of the start; null if it began before the timeline."""
    is_by_hand: bool
    is_open: bool
    """Whether it has pods now."""


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


@dataclass(frozen=True, slots=True)
class _LaneRow:
    workflow: Workflow
    schedule: Schedule | None
    trigger_config: Mapping[str, Any] | None
    deployment_id: str | None


@dataclass(frozen=True, slots=True)
class TimelineRange:
    """Range of a timeline: its begin, the present, and its end."""

    since: datetime
    now: datetime
    until: datetime


async def timeline(request: GatewayRequest) -> JsonResponse:
    """Show when schedules start runs, when windows are open, and when and why pods were awake.

    The past that is shown is a quarter of the future.
    """
    query, now = request.query, request.gateway.clock()
    shown = TimelineRange(
        now - timedelta(hours=query[HOURS]) / PAST_SHARE, now, now + timedelta(hours=query[HOURS])
    )
    async with request.gateway.database.read() as connection:
        count, rows = await _list_rows(connection, request.caller, query[LIMIT], query[OFFSET])
        decisions = await _read_decisions(connection, [row.workflow.id for row in rows], shown.since)
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
            workflows=[_build_lane(row, by_workflow.get(row.workflow.id, ()), shown) for row in rows],
            decisions=ledger[:SHOWN_DECISIONS],
            clock_changes=list_clock_changes({zone for row in rows for zone in _zones(row)}, shown),
        )
    )


async def _list_rows(
    connection: AsyncConnection, caller: ApiCaller, limit: int, offset: int
) -> tuple[int, Sequence[_LaneRow]]:
    """Return the number of workflows with an active schedule or a deployment that the caller may read, and a
    page of them.
    """
    is_schedule = and_(
        col(WorkflowTrigger.workflow_id) == col(Workflow.id), col(WorkflowTrigger.kind) == SCHEDULE_KIND
    )
    is_deployed = and_(col(Deployment.workflow_id) == col(Workflow.id), col(Deployment.is_deployed))
    matching = (
        select(Workflow, col(WorkflowTrigger.config).label("trigger_config"))
        .add_columns(col(Deployment.workflow_id).label("deployment_id"))
        .outerjoin(Schedule, col(Schedule.workflow_id) == col(Workflow.id))
        .outerjoin(WorkflowTrigger, is_schedule)
        .outerjoin(Deployment, is_deployed)
        .where(
            is_listed_for(caller),
            or_(col(Schedule.next_run_at).is_not(None), col(Deployment.workflow_id).is_not(None)),
        )
    )
    ids = matching.with_only_columns(col(Workflow.id)).subquery()
    count = await connection.scalar(select(func.count()).select_from(ids))
    ordered = matching.order_by(col(Schedule.due_at).is_(None), col(Schedule.due_at), col(Workflow.id))
    found = [dict(row) for row in (await connection.execute(ordered.limit(limit).offset(offset))).mappings()]
    schedules = await _read_schedules(connection, [row["id"] for row in found])
    rows = []
    for row in found:
        config, deployment_id = row.pop("trigger_config"), row.pop("deployment_id")
        rows.append(_LaneRow(Workflow(**row), schedules.get(row["id"]), config, deployment_id))
    return count or 0, rows


async def _read_schedules(connection: AsyncConnection, workflow_ids: Sequence[str]) -> dict[str, Schedule]:
    if not workflow_ids:
        return {}
    rows = await connection.execute(select(Schedule).where(col(Schedule.workflow_id).in_(workflow_ids)))
    return {row["workflow_id"]: Schedule(**row) for row in rows.mappings()}


async def _read_decisions(
    connection: AsyncConnection, workflow_ids: Sequence[str], since: datetime
) -> Sequence[LifecycleDecision]:
    """Return decisions since a time (the newest 1,000), and the last one of each workflow before it, by
    workflow and time.

    The earlier one tells whether its pods ran at that time.
    """
    if not workflow_ids:
        return []
    of_workflows = col(LifecycleDecision.workflow_id).in_(workflow_ids)
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
    before = await connection.execute(select(LifecycleDecision).join(earlier, is_earlier))
    after = await connection.execute(
        select(LifecycleDecision)
        .where(of_workflows, col(LifecycleDecision.at) >= since)
        .order_by(col(LifecycleDecision.at).desc())
        .limit(SHOWN_DECISIONS)
    )
    found = [LifecycleDecision(**row) for rows in (before, after) for row in rows.mappings()]
    return sorted(found, key=lambda one: (one.workflow_id, one.at, one.id))


def _zones(row: _LaneRow) -> Iterable[str]:
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


def _build_lane(row: _LaneRow, decisions: Sequence[LifecycleDecision], shown: TimelineRange) -> TimelineLane:
    """Return the lane of a workflow on the timeline: coming runs, windows, and the times with pods."""
    ticks, are_cut = _ticks(row, shown)
    schedule = row.schedule
    return TimelineLane(
        workflow_id=row.workflow.id,
        workflow_name=row.workflow.name,
        is_deployed=row.deployment_id is not None,
        ticks=ticks,
        ticks_are_cut=are_cut,
        last_run_at=instant(schedule.last_run_at) if schedule and schedule.last_run_at else None,
        last_execution_id=schedule.last_execution_id if schedule else None,
        windows=[*_windows(row, shown)],
        awake=[*_awake_spans(decisions, shown)],
    )


def _ticks(row: _LaneRow, shown: TimelineRange) -> tuple[Sequence[ScheduleTick], bool]:
    """Return up to 48 coming times of an active schedule within the range, and whether there are more of them."""
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


def _windows(row: _LaneRow, shown: TimelineRange) -> Iterable[TimeSpan]:
    """Yield the windows of a deployed workflow within the range, cut to it; none under another policy than
    `scheduled-window`.
    """
    policy = lifecycle_policy.parse_policy(lifecycle_policy.effective_policy(row.workflow.lifecycle))
    if row.deployment_id is None or not isinstance(policy, ScheduledWindowPolicy):
        return
    opened_at = shown.since if weekly_windows.is_open(policy.schedule, shown.since) else None
    for change in _changes(policy.schedule, shown):
        if change.is_open:
            opened_at = change.at
        elif opened_at is not None:
            yield TimeSpan(start=instant(opened_at), end=instant(change.at))
            opened_at = None
    if opened_at is not None:
        yield TimeSpan(start=instant(opened_at), end=instant(shown.until))


def _changes(schedule: WindowSchedule, shown: TimelineRange) -> Iterable[weekly_windows.WindowChange]:
    """Return the openings and closings of a schedule within the range, in order."""
    return weekly_windows.window_changes(schedule, shown.since, shown.until)


def _awake_spans(decisions: Sequence[LifecycleDecision], shown: TimelineRange) -> Iterable[AwakeSpan]:
    """Yield the times with pods within the range, from the decisions about a deployment, ordered by time."""
    begun: LifecycleDecision | None = None
    for one in decisions:
        if one.replicas > 0 and begun is None:
            begun = one
        elif one.replicas == 0 and begun is not None:
            if one.at > shown.since:
                yield _show_span(begun, one.at, shown, is_open=False)
            begun = None
    if begun is not None:
        yield _show_span(begun, shown.now, shown, is_open=True)


def _show_span(begun: LifecycleDecision, end: datetime, shown: TimelineRange, *, is_open: bool) -> AwakeSpan:
    """Return a time with pods, cut to the range; its reason is None if it began before."""
    is_inside = begun.at >= shown.since
    return AwakeSpan(
        start=instant(max(begun.at, shown.since)),
        end=instant(end),
        reason=LifecycleReason(begun.reason) if is_inside else None,
        is_by_hand=begun.user_id is not None,
        is_open=is_open,
    )


def _show_decision(one: LifecycleDecision, name: str) -> TimelineDecision:
    return TimelineDecision(
        workflow_id=one.workflow_id,
        workflow_name=name,
        at=instant(one.at),
        action=LifecycleAction(one.action),
        reason=LifecycleReason(one.reason),
        replicas=one.replicas,
        user_id=one.user_id,
    )
