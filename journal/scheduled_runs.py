"""Runs of schedules, accepted in the transaction that advances their schedules.

Each instant has one run for that reason. The transaction locks the rows of the schedules and skips those that
another has locked. So several processes may do this at once, and a process that dies in between changes
nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct, field
from sqlalchemy import BigInteger, and_, bindparam, insert, select, type_coerce, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from engine.graph import RunSettings
from engine.triggers import SCHEDULE_KIND, trigger_output
from engine.values import encode_json
from journal import backlog, concurrency_limits, run_labels
from journal.concurrency_limits import ConcurrencyLimit, LimitAction
from journal.run_rows import TOUCH_INTERVAL_MICROSECONDS
from journal.waits import completion
from json_text import decoding
from models import ids, schedule_timetable, timestamps
from models.deployment import Deployment
from models.execution import LIMITED_TARGET, SHARED_TARGET, Execution, ExecutionData
from models.execution_label import ExecutionLabel
from models.schedule import Schedule
from models.schedule_timetable import MAX_WAITING, InvalidTimetable, OverlapPolicy, ScheduleState, SkipReason
from models.timestamps import from_microseconds
from models.workflow import Definition, Workflow, WorkflowStatus
from models.workflow_triggers import WorkflowTrigger

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, RowMapping, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from models.schedule_timetable import ScheduleTimetable

BATCH_SCHEDULES: Final = 200
POSTPONE_TIME: Final = timedelta(minutes=1)
"""Delay before the next look at a schedule that can't run because of a problem."""
TRIMMED_TIME: Final = timedelta(seconds=1)
"""Tolerated difference between clocks, and between begins of transactions."""
_MICROSECOND: Final = timedelta(microseconds=1)
_encode: Final = msgspec.json.Encoder().encode

_IS_ACTIVE: Final = (
    col(Workflow.status) == WorkflowStatus.ACTIVE,
    col(Workflow.deleted_at).is_(None),
    col(Workflow.is_template).is_(False),
)
_DEPLOYED_HASH: Final[ColumnElement[str]] = col(Deployment.definition_hash).label("deployed_hash")
_IS_DEPLOYED: Final = and_(
    col(Deployment.workflow_id) == col(Schedule.workflow_id), col(Deployment.is_deployed)
)
_EXECUTION_DEFAULTS: Final[dict[str, Any]] = {
    name: column.get_default() for name, column in Execution.model_fields.items() if not column.is_required()
}
"""Column values of a new execution, except for those that each execution sets itself."""
_MOVED_COLUMNS: Final = (
    *("planned_at", "next_run_at", "due_at", "problem"),
    *("last_run_at", "last_execution_id", "skipped_at", "skipped_reason"),
)
_MOVE_SCHEDULE: Final = (
    update(Schedule)
    .where(col(Schedule.workflow_id) == bindparam("moved_id"))
    .values({name: bindparam(name) for name in _MOVED_COLUMNS})
)


class DueSchedule(Struct, frozen=True):
    """Due schedule, and the definition that its workflow runs."""

    workflow_id: str
    organization_id: str
    shard: int
    revision: int
    """Revision of the workflow."""
    deployed_hash: str | None
    """Hash of the deployed definition. None: any worker runs the workflow's own definition."""


class ScheduleDefinition(Struct, frozen=True):
    """Definition that a schedule runs."""

    due: DueSchedule
    text: str
    hash: str
    settings: Mapping[str, Json]
    """Effective settings, with defaults."""
    trigger_kind: str
    total_nodes: int
    names_default_model: bool = False
    """Whether it changes with the default language model of the organization, at the same revision."""


class ScheduleRunResult(Struct):
    """Result for a batch of due schedules."""

    runs: list[tuple[str, str, datetime]] = field(default_factory=list)
    """Workflow, execution and instant of each accepted run."""
    passed: list[tuple[str, SkipReason, datetime]] = field(default_factory=list)
    """Workflow, reason and last instant of each series of skipped instants."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Workflows with schedules that are postponed from now on, and the problem of each."""
    concurrency_keys: set[str] = field(default_factory=set)
    """Keys of runs that wait for a concurrency slot."""
    assigned_deployment_ids: set[str | None] = field(default_factory=set)
    """Deployments with new runs to claim; None: workers have new runs."""
    decided: int = 0
    """Number of schedules that are no longer due."""

    def add(self, other: ScheduleRunResult) -> None:
        """Add the counts and keys of another batch of schedules to this result."""
        self.runs += other.runs
        self.passed += other.passed
        self.problems += other.problems
        self.concurrency_keys |= other.concurrency_keys
        self.assigned_deployment_ids |= other.assigned_deployment_ids
        self.decided += other.decided


def due_statement(now: ColumnElement[int]) -> Select[*tuple[Any, ...]]:
    """Return the statement that lists up to 200 due schedules with workflow, revision and deployed definition, longest
    due first.

    `now` is an SQL expression in microseconds since 1970. It uses one range of an index.
    """
    # Selected before any join, so that the planner can't start from another table.
    chosen = (
        select(*(col(Schedule.workflow_id), col(Schedule.due_at)))
        .where(col(Schedule.due_at) <= now)
        .order_by(col(Schedule.due_at))
        .limit(BATCH_SCHEDULES)
        .subquery("chosen")
    )
    is_deployed = and_(col(Deployment.workflow_id) == chosen.c.workflow_id, col(Deployment.is_deployed))
    return (
        select(
            *(col(Workflow.id), col(Workflow.organization_id), col(Workflow.shard)),
            *(col(Workflow.revision), _DEPLOYED_HASH),
        )
        .select_from(chosen)
        .join(Workflow, col(Workflow.id) == chosen.c.workflow_id)
        .outerjoin(Deployment, is_deployed)
        .order_by(chosen.c.due_at)
    )


async def start_due_runs(
    connection: AsyncConnection, runnables: Mapping[str, ScheduleDefinition], now: ColumnElement[int]
) -> ScheduleRunResult:
    """Decide about the due schedules of the workflows in `runnables` (by workflow id), accept their runs, and set their
    next times; return the result.

    Schedules are left alone that another transaction has locked, or whose workflow or deployed definition has changed.
    A schedule without its trigger, or of a workflow that is not active, gets no next time.
    """
    locked = [*await connection.scalars(_lock_statement(runnables, now))]
    # A statement of its own: rows that PostgreSQL reads together with a lock may be older than the lock.
    found = (await connection.execute(_found_statement(locked, now))).mappings().all()
    # Separate as well: with outdated statistics, a join would scan all executions for each schedule.
    unended = [*await connection.scalars(_select_unended([row["last_execution_id"] for row in found]))]
    writer = _ScheduleWriter(connection, frozenset(unended))
    for row in found:
        runnable = runnables[row["workflow_id"]]
        if (row["revision"], row["deployed_hash"]) == (runnable.due.revision, runnable.due.deployed_hash):
            await writer.decide(row, runnable)
    await writer.write()
    resting = sorted({*locked} - {row["workflow_id"] for row in found})
    if resting:
        # Schedules of workflows that aren't active, or have no such trigger: there should be none.
        await connection.execute(
            update(Schedule)
            .where(col(Schedule.workflow_id).in_(resting))
            .values(next_run_at=None, due_at=None)
        )
    writer.started.decided += len(resting)
    return writer.started


async def postpone_schedules(
    connection: AsyncConnection, problems: Mapping[str, str], now: ColumnElement[int]
) -> None:
    """Store a problem for each due schedule, by workflow id, and make the schedule due again in a minute.

    Their next instants stay as they are. Schedules that are not due are left alone.
    """
    for workflow_id, problem in sorted(problems.items()):
        await connection.execute(
            update(Schedule)
            .where(col(Schedule.workflow_id) == workflow_id, col(Schedule.due_at) <= now)
            .values(due_at=now + POSTPONE_TIME // _MICROSECOND, problem=problem)
        )


async def reset_schedules_ahead(connection: AsyncConnection, now: ColumnElement[int]) -> int:
    """Recompute the next instants of up to 200 schedules that were planned by a clock over a second ahead of `now`.

    `now` is in microseconds since 1970. Return their number; with 200, more may follow. Locked schedules are
    passed over; an invalid timetable is stored as the schedule's problem.
    """
    ahead = (
        select(Schedule, col(WorkflowTrigger.config), now.label("now"))
        .join(WorkflowTrigger, _is_trigger_of_schedule())
        .where(
            col(Schedule.planned_at) > now + TRIMMED_TIME // _MICROSECOND,
            col(Schedule.next_run_at).is_not(None),
        )
        .order_by(col(Schedule.workflow_id))
        .limit(BATCH_SCHEDULES)
        .with_for_update(of=Schedule, skip_locked=True)
    )
    rows = (await connection.execute(ahead)).mappings().all()
    for row in rows:
        moment = from_microseconds(row["now"])
        anchor_at = min(row["anchor_at"], moment)
        changes: dict[str, Any] = {"planned_at": moment, "anchor_at": anchor_at}
        try:
            wanted = schedule_timetable.parse_timetable(row["config"])
        except InvalidTimetable as error:
            changes["problem"] = str(error)
        else:
            next_run_at = schedule_timetable.recompute_next_instant(
                wanted, row["workflow_id"], anchor_at, row["last_run_at"], moment
            )
            changes |= _plan_columns(wanted, row["workflow_id"], next_run_at, moment)
        await connection.execute(
            update(Schedule).where(col(Schedule.workflow_id) == row["workflow_id"]).values(changes)
        )
    return len(rows)


def _lock_statement(workflow_ids: Collection[str], now: ColumnElement[int]) -> Select[*tuple[Any, ...]]:
    return (
        select(col(Schedule.workflow_id))
        .where(col(Schedule.workflow_id).in_(sorted(workflow_ids)), col(Schedule.due_at) <= now)
        .order_by(col(Schedule.workflow_id))
        .with_for_update(skip_locked=True)
    )


def _found_statement(workflow_ids: Collection[str], now: ColumnElement[int]) -> Select[*tuple[Any, ...]]:
    return (
        select(
            Schedule,
            *(col(WorkflowTrigger.config), col(Workflow.owner_id), col(Workflow.revision)),
            *(_DEPLOYED_HASH, now.label("now")),
        )
        .join(Workflow, col(Workflow.id) == col(Schedule.workflow_id))
        .join(WorkflowTrigger, _is_trigger_of_schedule())
        .outerjoin(Deployment, _IS_DEPLOYED)
        .where(col(Schedule.workflow_id).in_(workflow_ids), *_IS_ACTIVE)
        .order_by(col(Schedule.workflow_id))
    )


def _select_unended(execution_ids: Sequence[str | None]) -> Select[str]:
    wanted = sorted(one for one in execution_ids if one is not None)
    return select(col(Execution.id)).where(col(Execution.id).in_(wanted), col(Execution.ended_at).is_(None))


def _is_trigger_of_schedule() -> ColumnElement[bool]:
    """Return the condition that joins a schedule with its trigger, the node of its workflow that it names."""
    return and_(
        col(WorkflowTrigger.workflow_id) == col(Schedule.workflow_id),
        col(WorkflowTrigger.node_id) == col(Schedule.node_id),
    )


def _plan_columns(
    wanted: ScheduleTimetable, workflow_id: str, next_run_at: datetime | None, now: datetime
) -> dict[str, Any]:
    """Return the columns of a schedule whose next instant was computed now; it has no more instants if `next_run_at` is
    None.
    """
    return {
        "planned_at": now,
        "next_run_at": next_run_at,
        "due_at": None if next_run_at is None else next_run_at + wanted.start_delay(workflow_id),
        "problem": None,
    }


class _ScheduleWriter:
    """Collector of rows for locked schedules, written in a few statements."""

    def __init__(self, connection: AsyncConnection, unended: Collection[str]) -> None:
        """Create a collector. `unended` are those last runs of schedules that have not ended."""
        self.started = ScheduleRunResult()
        self._unended = unended
        self._connection = connection
        self._executions: list[dict[str, Any]] = []
        self._data: list[dict[str, Any]] = []
        self._labels: list[dict[str, Any]] = []
        self._definitions: dict[tuple[str, str], dict[str, Any]] = {}
        self._moves: list[dict[str, Any]] = []

    async def decide(self, row: RowMapping, runnable: ScheduleDefinition) -> None:
        """Decide whether a due schedule starts runs now, and collect the rows of these runs and of its next
        instant.

        Instants are skipped with a reason by the policies for misfires and overlap, and over a rejecting
        concurrency limit. An invalid timetable is stored as the schedule's problem.
        """
        workflow_id, now = row["workflow_id"], from_microseconds(row["now"])
        self.started.decided += 1
        try:
            wanted = schedule_timetable.parse_timetable(row["config"])
        except InvalidTimetable as error:
            if row["problem"] != str(error):
                self.started.problems.append((workflow_id, str(error)))
            self._collect_update(row, due_at=now + POSTPONE_TIME, problem=str(error))
            return
        decided = schedule_timetable.decide_instants(wanted, await self._read_state(row), now)
        changes = _plan_columns(wanted, workflow_id, decided.next_run_at, now)
        if decided.passed is not None:
            changes |= self._skip(workflow_id, decided.passed, decided.skipped_at or now)
        for instant in decided.run:
            trigger = _build_trigger(runnable, wanted, instant)
            limit = _schedule_limit(runnable, wanted, trigger)
            if (
                limit is not None
                and limit.on_limit is LimitAction.REJECT
                and not await self._has_capacity(limit)
            ):
                changes |= self._skip(workflow_id, SkipReason.CONCURRENCY_LIMIT, instant)
                continue
            execution_id = self._accept(row, runnable, trigger, limit, now)
            self.started.runs.append((workflow_id, execution_id, instant))
            changes |= {"last_run_at": instant, "last_execution_id": execution_id}
        self._collect_update(row, **changes)

    async def write(self) -> None:
        """Write the collected rows of all decided schedules: definitions, runs, labels and next instants."""
        if self._executions:
            await self._write_definitions()
            await self._connection.execute(insert(Execution), self._executions)
            await self._connection.execute(insert(ExecutionData), self._data)
        if self._labels:
            await self._connection.execute(insert(ExecutionLabel), self._labels)
        if self._moves:
            await self._connection.execute(_MOVE_SCHEDULE, self._moves)

    async def _read_state(self, row: RowMapping) -> ScheduleState:
        """Return the state of a schedule, with its waiting runs, counted up to 1,000 and only if its last run
        has not ended.
        """
        waiting_runs = 0
        is_busy = row["last_execution_id"] in self._unended
        if is_busy:
            waiting_runs = await backlog.count_workflow_backlog(
                self._connection, row["organization_id"], row["workflow_id"], at_most=MAX_WAITING
            )
        return ScheduleState(
            workflow_id=row["workflow_id"],
            anchor_at=row["anchor_at"],
            next_run_at=row["next_run_at"],
            is_busy=is_busy,
            waiting_runs=waiting_runs,
        )

    def _skip(self, workflow_id: str, reason: SkipReason, instant: datetime) -> dict[str, Any]:
        """Note a skipped instant for the result; return the columns that store it."""
        self.started.passed.append((workflow_id, reason, instant))
        return {"skipped_at": instant, "skipped_reason": reason.value}

    def _collect_update(self, row: RowMapping, **changes: Any) -> None:  # noqa: ANN401 - columns of any type
        """Collect an update of a schedule's row; columns that are not named keep their values."""
        kept = {name: row[name] for name in _MOVED_COLUMNS}
        self._moves.append({"moved_id": row["workflow_id"], **kept, **changes})

    async def _has_capacity(self, limit: ConcurrencyLimit) -> bool:
        """Return whether the limit has a free slot, with the runs that are collected."""
        collected = [one for one in self._executions if one["concurrency_key"] == limit.key]
        return (
            await concurrency_limits.count_unended(self._connection, limit.key) + len(collected) < limit.runs
        )

    def _accept(
        self,
        row: RowMapping,
        runnable: ScheduleDefinition,
        trigger: Json,
        limit: ConcurrencyLimit | None,
        now: datetime,
    ) -> str:
        """Collect the rows of a new run: execution, data, labels and its definition; return its id.

        Deployed workflows use the definition that is deployed. `trigger` is the output of its trigger node.
        """
        due = runnable.due
        assigned_deployment_id = due.workflow_id if due.deployed_hash else None
        completion_action = completion.requested_actions(runnable.settings)
        execution_id = ids.new_id("exec")
        common = {
            "shard": due.shard,
            "organization_id": due.organization_id,
            "workflow_id": due.workflow_id,
            "created_at": now,
        }
        execution = {
            **_EXECUTION_DEFAULTS,
            **common,
            "id": execution_id,
            "user_id": row["owner_id"],
            "target": LIMITED_TARGET if limit else assigned_deployment_id or SHARED_TARGET,
            "assigned_deployment_id": assigned_deployment_id,
            "trigger_type": SCHEDULE_KIND,
            "definition_hash": runnable.hash,
            "rank": row["now"],
            "queue_turn": ids.turn_of_workflow(due.workflow_id),
            "timeout_microseconds": int(
                RunSettings.from_stored(runnable.settings).timeout_seconds * 1_000_000
            ),
            "total_nodes": runnable.total_nodes,
            "key_id": execution_id,
            "channel": "",
            "concurrency_key": limit.key if limit else None,
            "concurrency_limit": limit.runs if limit else None,
            "completion_action": decoding.decode(completion_action) if completion_action else None,
            "updated_at": now,
        }
        config = encode_json(runnable.settings).decode()
        data = {
            **common,
            "execution_id": execution_id,
            "trigger": _encode(trigger).decode(),
            "config": config,
        }
        self._executions.append(execution)
        self._data.append(data)
        labels = run_labels.read_settings_metadata(runnable.settings, trigger)
        shared = {name: value for name, value in common.items() if name != "workflow_id"}
        self._labels += [
            {**shared, "execution_id": execution_id, "key": key, "value": value} for key, value in labels
        ]
        if due.deployed_hash is None:
            self._definitions[due.organization_id, runnable.hash] = {
                "organization_id": due.organization_id,
                "hash": runnable.hash,
                "shard": due.shard,
                "body": runnable.text,
                "created_at": now,
            }
        if limit is None:
            self.started.assigned_deployment_ids.add(assigned_deployment_id)
        else:
            self.started.concurrency_keys.add(limit.key)
        return execution_id

    async def _write_definitions(self) -> None:
        """Store the collected definitions; the age of one that exists begins anew, so that retention keeps it."""
        dialect: Any = postgresql if self._connection.dialect.name == "postgresql" else sqlite
        statement = dialect.insert(Definition)
        created_at = type_coerce(statement.excluded.created_at, BigInteger)
        statement = statement.on_conflict_do_update(
            index_elements=[col(Definition.organization_id), col(Definition.hash)],
            set_={"created_at": created_at},
            where=type_coerce(col(Definition.created_at), BigInteger)
            < created_at - TOUCH_INTERVAL_MICROSECONDS,
        )
        rows = [self._definitions[key] for key in sorted(self._definitions)]
        if rows:
            await self._connection.execute(statement, rows)


def _build_trigger(runnable: ScheduleDefinition, wanted: ScheduleTimetable, instant: datetime) -> Json:
    """Return the output of the trigger node, with the instant for which the run is scheduled, even if it
    starts late.
    """
    given: dict[str, Json] = {
        "scheduledAt": timestamps.format_timestamp(instant),
        "timezone": wanted.timezone,
    }
    return trigger_output(runnable.trigger_kind, given, instant)


def _schedule_limit(
    runnable: ScheduleDefinition, wanted: ScheduleTimetable, trigger: Json
) -> ConcurrencyLimit | None:
    """Return the concurrency limit of a scheduled run: that of the settings, or one run at a time for overlap
    `queue`; or None.
    """
    workflow_id = runnable.due.workflow_id
    limit = concurrency_limits.concurrency_limit(runnable.settings, workflow_id, trigger)
    if wanted.overlap is not OverlapPolicy.QUEUE:
        return limit
    return ConcurrencyLimit(limit.key if limit else f"{workflow_id}:{SCHEDULE_KIND}", 1, LimitAction.QUEUE)
