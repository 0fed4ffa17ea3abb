"""Schedule row of a workflow, saved together with its graph and status; the scheduler reads only this row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from models import database_time, schedule_timetable
from models.column_types import build_row
from models.schedule import Schedule
from models.schedule_timetable import InvalidTimetable, SkipReason
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import RowMapping
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.schedule_timetable import ScheduleTimetable
    from models.workflow import Workflow
    from models.workflow_triggers import WorkflowTrigger

_KEPT = frozenset({"workflow_id", "organization_id", "shard"})
_HISTORY = {"last_run_at": None, "last_execution_id": None, "skipped_at": None, "skipped_reason": None}


async def save_schedule(
    connection: AsyncConnection, workflow: Workflow, trigger: WorkflowTrigger | None
) -> None:
    """Insert, update, suspend or delete the schedule of a workflow in the transaction that changes the workflow.

    It is suspended unless the workflow is active, no template, and has a schedule `trigger` (None for none), and
    deleted if the workflow is deleted. A schedule that continues with the same instants keeps its next one, even if
    other settings have changed.
    """
    is_of_workflow = col(Schedule.workflow_id) == workflow.id
    if workflow.deleted_at is not None:
        await connection.execute(delete(Schedule).where(is_of_workflow))
        return
    if trigger is None or workflow.status != WorkflowStatus.ACTIVE or workflow.is_template:
        rests = {"next_run_at": None, "due_at": None, "problem": None}
        await connection.execute(update(Schedule).where(is_of_workflow).values(rests))
        return
    # Locked before the time is read: a scheduler that starts runs has then committed, with the instants of
    # those runs.
    found = (
        (await connection.execute(select(Schedule).where(is_of_workflow).with_for_update()))
        .mappings()
        .first()
    )
    now = await database_time.read_database_time(connection)
    row = _new_schedule(workflow, trigger, now, _last_run_at(found, now))
    if found is not None and found["next_run_at"] is not None and _is_alike(row, build_row(Schedule, found)):
        return
    values = row.model_dump(exclude=set(_HISTORY))
    if found is None or found["node_id"] != trigger.node_id:
        values |= _HISTORY
    elif (skipped_at := _skipped_at(row, build_row(Schedule, found), trigger, now)) is not None:
        values |= {"skipped_at": skipped_at, "skipped_reason": SkipReason.PAUSED.value}
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(Schedule).values(values)
    changes = {name: statement.excluded[name] for name in values if name not in _KEPT}
    await connection.execute(
        statement.on_conflict_do_update(index_elements=[col(Schedule.workflow_id)], set_=changes)
    )


def _last_run_at(found: RowMapping | None, now: datetime) -> datetime:
    """Return the time up to which instants were run: `now`, or a later run that began after this transaction.

    `found` is the stored schedule, None without one; its last run is ignored if it is more than an hour ahead.
    """
    last_run_at = found["last_run_at"] if found is not None else None
    return (
        now
        if last_run_at is None or last_run_at > now + schedule_timetable.MAX_AHEAD
        else max(now, last_run_at)
    )


def _skipped_at(row: Schedule, before: Schedule, trigger: WorkflowTrigger, now: datetime) -> datetime | None:
    """Return the last instant that a schedule has skipped while it was suspended.

    None if it skipped none, was not suspended, has another trigger node or other times than before, or an invalid
    timetable.
    """
    if before.next_run_at is not None or row.problem is not None or not _is_alike(row, before):
        return None
    timetable = schedule_timetable.parse_timetable(trigger.config)
    return schedule_timetable.last_paused_instant(
        timetable, before.workflow_id, before.planned_at, before.anchor_at, now
    )


def _new_schedule(workflow: Workflow, trigger: WorkflowTrigger, now: datetime, since: datetime) -> Schedule:
    """Return the row, not stored, of a schedule that starts `now`; its next run is its first instant after `since`.

    An invalid timetable becomes the row's `problem`.
    """
    row = Schedule(
        workflow_id=workflow.id,
        organization_id=workflow.organization_id,
        shard=workflow.shard,
        node_id=trigger.node_id,
        timing_hash="",
        anchor_at=now.replace(microsecond=0),
        planned_at=now,
    )
    try:
        followed: ScheduleTimetable = schedule_timetable.parse_timetable(trigger.config)
    except InvalidTimetable as error:
        # The schedule was valid at activation, for example on a machine with other time zones.
        row.problem = str(error)
        return row
    row.timing_hash = followed.timing_hash
    row.next_run_at = followed.first_after(since, row.anchor_at)
    if row.next_run_at is not None:
        row.due_at = row.next_run_at + followed.start_delay(workflow.id)
    return row


def _is_alike(one: Schedule, other: Schedule) -> bool:
    return (one.node_id, one.timing_hash) == (other.node_id, other.timing_hash)
