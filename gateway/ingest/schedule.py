"""Schedule of a workflow: its next and last runs, and the reason if it is inactive."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct
from sqlalchemy import and_, func, select
from sqlmodel import col

from engine.triggers import SCHEDULE_KIND
from gateway.http import errors
from gateway.http.parameters import LIMIT, OFFSET
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, StrictWire, WireStruct, decode_body, instant
from gateway.workflows import editing
from journal import definition_snapshot, process_presence
from journal.definition_snapshot import TriggerNode
from models import schedule_timetable
from models.column_types import build_row
from models.execution import Execution
from models.execution_status import ExecutionStatus
from models.schedule import Schedule
from models.schedule_timetable import InvalidTimetable, MisfirePolicy, OverlapPolicy, SkipReason
from models.workflow import Workflow, WorkflowStatus, is_listed_for
from models.workflow_triggers import WorkflowTrigger

if TYPE_CHECKING:
    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.parameters import PageBounds
    from models.access import ApiCaller
    from models.database import Database
    from models.schedule_timetable import ScheduleTimetable

SHOWN_RUNS: Final = 5
OVERDUE: Final = timedelta(seconds=10)
"""Delay of a run from which on its schedule is overdue."""
_MICROSECOND: Final = timedelta(microseconds=1)


class InactiveReason(StrEnum):
    """Reason why a schedule starts no runs."""

    NO_SCHEDULE = "no-schedule"
    """The workflow has no schedule trigger."""
    DRAFT = "draft"
    PAUSED = "paused"
    ARCHIVED = "archived"
    TEMPLATE = "template"
    INVALID = "invalid-schedule"
    """`problem` describes the error."""


class OverdueReason(StrEnum):
    """Reason why a due run has not started."""

    NO_LEADER = "no-leader"
    """No scheduler leads."""
    BEHIND = "behind"
    """The scheduler that leads is behind."""


class SchedulePolicy(WireStruct):
    """Settings of the schedule trigger, with defaults."""

    cron: str | None
    interval_seconds: int | None
    timezone: str
    misfire: MisfirePolicy
    misfire_limit: int
    overlap: OverlapPolicy
    jitter_seconds: int


class UpcomingRun(WireStruct):
    """Planned instant of a schedule."""

    at: Instant
    local_time: str
    """The same instant in the schedule's time zone, with its offset."""
    starts_at: Instant
    """Start of the run: the instant plus the workflow's jitter."""


class LastRun(WireStruct):
    """Last run that a schedule has started."""

    scheduled_at: Instant
    execution_id: str
    status: ExecutionStatus | None
    """Null when the execution was deleted."""
    lag_seconds: float | None
    """Time from the planned start, jitter included, to the acceptance; null when the execution was deleted."""


class SkippedInstant(WireStruct):
    """Last instant without a run, with the reason."""

    at: Instant
    reason: SkipReason


class WorkflowSchedule(WireStruct):
    """Schedule of a workflow."""

    workflow_id: str
    is_active: bool
    inactive_reason: InactiveReason | None
    """Null while the schedule is active."""
    problem: str | None
    """Error that prevents runs, as text."""
    node_id: str | None
    policy: SchedulePolicy | None
    next_runs: Sequence[UpcomingRun]
    """Next five instants; for an inactive schedule, as if it were activated now."""
    last_run: LastRun | None
    last_passed_over: SkippedInstant | None
    overdue_since: Instant | None
    """Time at which its next run was due, if that is over ten seconds ago."""
    overdue_reason: OverdueReason | None
    """Null unless it is overdue."""


class ListedSchedule(WorkflowSchedule, kw_only=True):
    """Schedule of a workflow in a list."""

    workflow_name: str


class ScheduleList(WireStruct):
    """Page of the schedules, the next run first, then inactive ones; `count` is the number of all."""

    count: int
    limit: int
    offset: int
    schedules: Sequence[ListedSchedule]


class SchedulePreviewRequest(StrictWire):
    """Times to preview: the fields of the trigger `schedule-trigger` that decide when runs start."""

    cron: Annotated[str, Meta(max_length=schedule_timetable.CRON_CHARACTERS)] | None = None
    """Minute, hour, day, month and day of week; wins over an interval."""
    interval_seconds: Annotated[int, Meta(ge=1, le=31_536_000)] | None = None
    timezone: Annotated[str, Meta(max_length=100)] = "UTC"
    jitter_seconds: Annotated[int, Meta(ge=0, le=3_600)] = 0


class SchedulePreview(WireStruct):
    """Next instants of times that are not saved."""

    workflow_id: str
    next_runs: Sequence[UpcomingRun]


LISTED: Final = (LIMIT, OFFSET)


async def index(request: GatewayRequest) -> JsonResponse:
    """List the schedules, active now or before, of the workflows that the caller may read, the next run first."""
    part, now = request.query.page(), request.gateway.clock()
    async with request.gateway.database.read() as connection:
        count, found = await _list_rows(connection, request.caller, part)
    listed = [
        ListedSchedule(
            workflow_name=one.workflow.name,
            **msgspec.structs.asdict(_show_schedule(one.workflow, one.trigger, one.row, one.last, now)),
        )
        for one in found
    ]
    await _explain_overdue(request.gateway.database, listed)
    return JsonResponse(ScheduleList(count=count, limit=part.limit, offset=part.offset, schedules=listed))


async def show(request: GatewayRequest) -> JsonResponse:
    """Show the next and last runs of a workflow's schedule, and whether the schedule is active."""
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request.requested_object)
        row, last = await _read_row(connection, stored.workflow.id)
    trigger = definition_snapshot.find_trigger(stored.nodes, request.gateway.catalog)
    shown = _show_schedule(stored.workflow, trigger, row, last, request.gateway.clock())
    await _explain_overdue(request.gateway.database, [shown])
    return editing.answer(stored, shown)


async def preview(request: GatewayRequest) -> JsonResponse:
    """Show the next five instants of times for a workflow, as if they were saved now. Nothing is saved.

    Refused for times that no schedule can follow, such as a cron expression that matches no time.
    """
    body = await decode_body(request, SchedulePreviewRequest)
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
    config = {name: value for name, value in msgspec.to_builtins(body).items() if value is not None}
    try:
        timetable = schedule_timetable.parse_timetable(config)
    except InvalidTimetable as error:
        raise errors.invalid([errors.problem(error.field, "invalid-schedule", str(error))]) from error
    now = request.gateway.clock()
    upcoming = _list_upcoming(timetable, workflow.id, now, now.replace(microsecond=0))
    return JsonResponse(SchedulePreview(workflow_id=workflow.id, next_runs=upcoming))


async def _explain_overdue(database: Database, shown: Sequence[WorkflowSchedule]) -> None:
    """Set the reason of each overdue schedule in `shown`, by the presence of a leading scheduler; read
    nothing if none is overdue.
    """
    overdue = [one for one in shown if one.overdue_since is not None]
    if not overdue:
        return
    async with database.read() as connection:
        is_led = await process_presence.has_leader(connection)
    for one in overdue:
        one.overdue_reason = OverdueReason.BEHIND if is_led else OverdueReason.NO_LEADER


class _LastExecution(Struct, frozen=True):
    status: str
    created_at: datetime


class _ListedRow(Struct, frozen=True):
    workflow: Workflow
    trigger: TriggerNode
    row: Schedule
    last: _LastExecution | None


async def _list_rows(
    connection: AsyncConnection, caller: ApiCaller, part: PageBounds
) -> tuple[int, Sequence[_ListedRow]]:
    """Return the number of schedules that the caller may read, and the page `part` of them, the next to start
    first.

    Inactive ones come last. Each has its workflow, trigger and the status of its last run.
    """
    is_schedule = and_(
        col(WorkflowTrigger.workflow_id) == col(Schedule.workflow_id),
        col(WorkflowTrigger.kind) == SCHEDULE_KIND,
    )
    matching = (
        select(Schedule, Workflow, WorkflowTrigger, col(Execution.status), col(Execution.created_at))
        .join(Workflow, col(Workflow.id) == col(Schedule.workflow_id))
        .join(WorkflowTrigger, is_schedule)
        .outerjoin(Execution, col(Execution.id) == col(Schedule.last_execution_id))
        .where(col(Schedule.organization_id) == caller.organization_id, is_listed_for(caller))
    )
    ids = matching.with_only_columns(col(Schedule.workflow_id)).subquery()
    count = await connection.scalar(select(func.count()).select_from(ids))
    ordered = matching.order_by(
        col(Schedule.due_at).is_(None), col(Schedule.due_at), col(Schedule.workflow_id)
    )
    rows = await connection.execute(ordered.limit(part.limit).offset(part.offset))
    return count or 0, [_split_row(tuple(row)) for row in rows]


def _split_row(values: Sequence[Any]) -> _ListedRow:
    """Return schedule, workflow, trigger and last run of a result row: the columns of three tables, then
    status and acceptance of the run.
    """
    objects: list[Any] = []
    position = 0
    for table in (Schedule, Workflow, WorkflowTrigger):
        names = [column.name for column in table.__table__.columns]  # type: ignore[union-attr]  # SQLModel adds it
        objects.append(build_row(table, dict(zip(names, values[position:], strict=False))))
        position += len(names)
    row, workflow, trigger = objects
    node = TriggerNode(trigger.node_id, trigger.kind, trigger.config)
    return _ListedRow(workflow, node, row, _find_last(*values[position : position + 2]))


def _find_last(status: str | None, created_at: datetime | None) -> _LastExecution | None:
    """Return the last run of a schedule from the columns of an outer join; None if it was deleted, or never was."""
    return None if status is None or created_at is None else _LastExecution(status, created_at)


async def _read_row(
    connection: AsyncConnection, workflow_id: str
) -> tuple[Schedule | None, _LastExecution | None]:
    """Return the schedule of a workflow, and its last run; None for each that is missing. Access is not checked."""
    statement: Select[*tuple[Any, ...]] = (
        select(
            Schedule,
            col(Execution.status).label("last_status"),
            col(Execution.created_at).label("last_created_at"),
        )
        .outerjoin(Execution, col(Execution.id) == col(Schedule.last_execution_id))
        .where(col(Schedule.workflow_id) == workflow_id)
    )
    row = (await connection.execute(statement)).mappings().first()
    if row is None:
        return None, None
    columns = dict(row)
    last = _find_last(columns.pop("last_status"), columns.pop("last_created_at"))
    return build_row(Schedule, columns), last


def _show_schedule(
    workflow: Workflow,
    trigger: TriggerNode | None,
    row: Schedule | None,
    last: _LastExecution | None,
    now: datetime,
) -> WorkflowSchedule:
    """Return the schedule of a workflow as the API shows it, with its next five runs, but without the reason why it is
    overdue, which `_explain_overdue` sets.

    It is inactive without an active workflow and a valid schedule trigger, and says why. `row` None means that it was
    never active; `last` is its last run.
    """
    shape = WorkflowSchedule(
        workflow_id=workflow.id,
        is_active=False,
        inactive_reason=_inactive_reason(workflow),
        problem=row.problem if row else None,
        node_id=None,
        policy=None,
        next_runs=[],
        last_run=_show_last_run(row, last, timedelta()),
        last_passed_over=_show_last_skipped(row),
        overdue_since=None,
        overdue_reason=None,
    )
    if trigger is None or trigger.kind != SCHEDULE_KIND:
        shape.inactive_reason = InactiveReason.NO_SCHEDULE
        return shape
    shape.node_id = trigger.id
    try:
        wanted = schedule_timetable.parse_timetable(trigger.config)
    except InvalidTimetable as error:
        shape.inactive_reason = shape.inactive_reason or InactiveReason.INVALID
        shape.problem = str(error)
        return shape
    shape.policy = _show_policy(wanted)
    shape.last_run = _show_last_run(row, last, wanted.start_delay(workflow.id))
    if shape.inactive_reason is None and shape.problem:
        shape.inactive_reason = InactiveReason.INVALID
    shape.is_active = shape.inactive_reason is None
    if shape.inactive_reason is InactiveReason.PAUSED and row is not None and row.next_run_at is None:
        skipped_at = schedule_timetable.last_paused_instant(
            wanted, workflow.id, row.planned_at, row.anchor_at, now
        )
        if skipped_at is not None:
            shape.last_passed_over = SkippedInstant(at=instant(skipped_at), reason=SkipReason.PAUSED)
    if shape.is_active and row is not None and row.due_at is not None and row.due_at < now - OVERDUE:
        shape.overdue_since = instant(row.due_at)
    since, anchor = now, now.replace(microsecond=0)
    if row is not None and row.next_run_at is not None:
        since, anchor = row.next_run_at - _MICROSECOND, row.anchor_at
    shape.next_runs = _list_upcoming(wanted, workflow.id, since, anchor)
    return shape


def _list_upcoming(
    timetable: ScheduleTimetable, workflow_id: str, since: datetime, anchor: datetime
) -> Sequence[UpcomingRun]:
    """Return the next five instants of a timetable after `since`; intervals count from `anchor`."""
    delay = timetable.start_delay(workflow_id)
    return [
        UpcomingRun(
            at=instant(at),
            local_time=at.astimezone(timetable.zone).isoformat(timespec="seconds"),
            starts_at=instant(at + delay),
        )
        for at in schedule_timetable.upcoming_instants(timetable, since, anchor, SHOWN_RUNS)
    ]


def _inactive_reason(workflow: Workflow) -> InactiveReason | None:
    if workflow.is_template:
        return InactiveReason.TEMPLATE
    return None if workflow.status == WorkflowStatus.ACTIVE else InactiveReason(workflow.status)


def _show_policy(wanted: ScheduleTimetable) -> SchedulePolicy:
    return SchedulePolicy(
        cron=wanted.cron,
        interval_seconds=wanted.interval_seconds,
        timezone=wanted.timezone,
        misfire=wanted.misfire,
        misfire_limit=wanted.misfire_limit,
        overlap=wanted.overlap,
        jitter_seconds=wanted.jitter_seconds,
    )


def _show_last_run(row: Schedule | None, last: _LastExecution | None, delay: timedelta) -> LastRun | None:
    """Return the last run that a schedule has started; None if it has started none. `delay` is the planned
    jitter, which is no lag.
    """
    if row is None or row.last_run_at is None or row.last_execution_id is None:
        return None
    return LastRun(
        scheduled_at=instant(row.last_run_at),
        execution_id=row.last_execution_id,
        status=None if last is None else ExecutionStatus(last.status),
        lag_seconds=None
        if last is None
        else round(max((last.created_at - row.last_run_at - delay).total_seconds(), 0.0), 3),
    )


def _show_last_skipped(row: Schedule | None) -> SkippedInstant | None:
    if row is None or row.skipped_at is None or row.skipped_reason is None:
        return None
    return SkippedInstant(at=instant(row.skipped_at), reason=SkipReason(row.skipped_reason))
