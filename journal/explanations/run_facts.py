"""Facts about one run that decide whether and when it moves, read from one snapshot of the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct, field
from msgspec.structs import replace
from sqlalchemy import Boolean, and_, case, func, literal_column, or_, select, text
from sqlmodel import col

from engine.agents.agent_steps import AGENT_TYPE, StepKind, StepReuse, StepStatus
from engine.node_api import AnswerSource
from engine.run_records import SpanStatus
from journal import concurrency_limits, run_rows
from journal.deployments import activity
from json_text import decoding
from models.agent_step import AgentStepRow
from models.blocked_interval import BlockedInterval
from models.column_types import build_row
from models.database_time import DatabaseTime
from models.deployment import LifecycleDecision
from models.execution import (
    ISOLATION_TARGETS,
    LIMITED_TARGET,
    Execution,
    ExecutionData,
    SpanRow,
    WaitAnswer,
)
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.execution_visibility import visibility_condition
from models.loss_limits import MAX_ISOLATION_LOSSES
from models.timestamps import from_microseconds
from models.worker_presence import WorkerPresence
from models.workflow import Workflow

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from journal.deployments.activity import DeploymentActivity
    from journal.explanations.task_facts import TaskFact
    from models.access import ApiCaller

MAX_COUNTED: Final = 10_000
"""Largest position that is counted."""
MAX_HOLDERS: Final = 20
MAX_NODES: Final = 50
RECENT_RUNS: Final = 40
MAX_INTERVALS: Final = 200
SPECIAL_TARGETS: Final = frozenset(
    {LIMITED_TARGET, "delayed", *ISOLATION_TARGETS, *ISOLATION_TARGETS.values()}
)
"""Targets that are no deployment."""


class OpenAgentStep(Struct, frozen=True):
    """Step of an agent that has begun and not ended."""

    number: int
    kind: StepKind
    name: str
    """Id of the model that is asked, or name of the tool."""
    since: datetime


class UnsettledNode(Struct, frozen=True):
    """Node of a run that is at work, waits or retries."""

    node_id: str
    iteration: str
    label: str
    status: SpanStatus
    attempt: int
    started_at: datetime | None
    wake_at: datetime | None
    awaits: Mapping[str, Json] | None
    """Kind and request of the answer for which it waits; None for another wait."""
    task: TaskFact | None = None
    """Open task for whose end it waits."""
    error_code: str | None = None
    """Code of the failure after which it retries."""
    open_steps: Sequence[OpenAgentStep] = ()
    """Steps of an agent that have begun and not ended, in their order."""


class SlotHolder(Struct, frozen=True):
    """Run that holds a concurrency slot."""

    execution_id: str
    since: datetime
    is_visible: bool


class SlotFacts(Struct, frozen=True):
    """Slots of a run's concurrency key."""

    held: int
    limit: int
    ahead: int
    """Runs that get a slot before this one."""
    holders: Sequence[SlotHolder]


class ChildRun(Struct, frozen=True):
    """Unfinished run that a node of this run has started."""

    execution_id: str
    node_id: str
    status: str
    since: datetime
    is_visible: bool


class LastDecision(Struct, frozen=True):
    """Last decision about a deployment."""

    action: str
    reason: str
    at: datetime
    user_id: str | None


class RecentDurations(Struct, frozen=True):
    """Durations of the last runs of a workflow, in seconds."""

    runs: Sequence[float] = ()
    nodes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By node id, only of nodes at work in this run."""


class RunFacts(Struct, frozen=True):
    """Facts about one run at one moment."""

    run: Execution
    now: datetime
    """Time of the database."""
    workflow_status: str | None
    """None if the workflow was deleted."""
    is_suspect: bool
    """Whether a claim for a trial takes it, and no other claim."""
    is_claimable: bool
    """Whether the condition of a claim, or of a trial, holds for the row at its target."""
    ahead: int = 0
    """Runs of the same workflow that claims take first; for a suspect, suspects before it."""
    workers: Sequence[WorkerPresence] = ()
    slot: SlotFacts | None = None
    deployment: DeploymentActivity | None = None
    last_decision: LastDecision | None = None
    nodes: Sequence[UnsettledNode] = ()
    children: Sequence[ChildRun] = ()
    recent: RecentDurations = field(default_factory=RecentDurations)
    intervals: Sequence[BlockedInterval] = ()
    is_broker_reachable: bool = True

    @property
    def deployment_id(self) -> str | None:
        """Workflow id of the deployment whose pods shall execute the run; None if any worker may, or the run is in a
        special queue.
        """
        return None if self.run.target in SPECIAL_TARGETS else self.run.target


async def read_run_facts(
    connection: AsyncConnection, execution_id: str, caller: ApiCaller, *, is_broker_reachable: bool = True
) -> RunFacts | None:
    """Return the facts from which the state of a run is explained; None for a run that the caller may not see.

    An ended run gets only its row and blocked intervals. `is_broker_reachable` is kept in the facts as it is. The
    connection must read one snapshot. Every statement is bounded, by an index and a limit.
    """
    claimable = f"({run_rows.pending_sql('target')} AND {_claimable_sql()})"
    statement = select(
        Execution,
        literal_column(claimable, Boolean).label("is_claimable"),
        literal_column(f"({run_rows.IS_SUSPECT_SQL})", Boolean).label("is_suspect"),
        select(col(Workflow.status))
        .where(col(Workflow.id) == col(Execution.workflow_id), col(Workflow.deleted_at).is_(None))
        .correlate(Execution)
        .scalar_subquery()
        .label("workflow_status"),
        DatabaseTime().label("now"),
    ).where(col(Execution.id) == execution_id, visibility_condition(caller))
    row = (await connection.execute(statement)).mappings().first()
    if row is None:
        return None
    run = build_row(Execution, {name: row[name] for name in Execution.model_fields})
    intervals = await read_intervals(connection, execution_id)
    facts = RunFacts(
        run=run,
        now=from_microseconds(row["now"]),
        workflow_status=row["workflow_status"],
        is_suspect=bool(row["is_suspect"]),
        is_claimable=bool(row["is_claimable"]),
        intervals=intervals,
        is_broker_reachable=is_broker_reachable,
    )
    if run.status in TERMINAL_STATUSES:
        return facts
    return await _complete(connection, facts, caller)


async def read_intervals(connection: AsyncConnection, execution_id: str) -> Sequence[BlockedInterval]:
    """Return the first `MAX_INTERVALS` blocked intervals of a run, the earliest first."""
    statement = (
        select(BlockedInterval)
        .where(col(BlockedInterval.execution_id) == execution_id)
        .order_by(col(BlockedInterval.started_at))
        .limit(MAX_INTERVALS)
    )
    return [build_row(BlockedInterval, row) for row in (await connection.execute(statement)).mappings()]


def _claimable_sql() -> str:
    """Return the SQL condition under which an executor may claim a pending row at its own target.

    Suspects (runs that lost several workers) are claimed only at the isolation target; limited, delayed and
    unparsed runs never.
    """
    isolated = ISOLATION_TARGETS["shared"]
    trial = run_rows.suspect_sql(str(MAX_ISOLATION_LOSSES))
    never = ", ".join(f"'{target}'" for target in sorted(SPECIAL_TARGETS - {"shared", isolated}))
    return (
        f"target NOT IN ({never}) AND CASE target"
        f" WHEN 'shared' THEN {run_rows.IS_NO_SUSPECT_SQL} WHEN '{isolated}' THEN {trial}"
        f" ELSE ({run_rows.IS_NO_SUSPECT_SQL} OR ({trial})) END"
    )


async def _complete(connection: AsyncConnection, facts: RunFacts, caller: ApiCaller) -> RunFacts:
    """Return the facts of an unfinished run with those added that explain its status.

    A pending run gets its slot or its place in the queue, a started one that is not pending its unsettled nodes and
    children, and all get recent durations. A deployment's run gets the deployment; a running one, and a pending one of
    the workers, get reports of workers.
    """
    run = facts.run
    added: dict[str, Any] = {}
    if run.status == ExecutionStatus.PENDING:
        if run.target == LIMITED_TARGET:
            added["slot"] = await _slot_facts(connection, run, caller)
        else:
            added["ahead"] = await _count_ahead(connection, run, is_suspect=facts.is_suspect)
    if facts.deployment_id is not None:
        added["deployment"] = await activity.read_activity(connection, facts.deployment_id)
        added["last_decision"] = await read_last_decision(connection, facts.deployment_id)
    if run.status == ExecutionStatus.PENDING and facts.deployment_id is None:
        added["workers"] = await _read_workers(connection, None)
    if run.status == ExecutionStatus.RUNNING:
        added["workers"] = await _read_workers(connection, run.lease_owner)
    if run.started_at is not None and run.status != ExecutionStatus.PENDING:
        added["nodes"] = await _read_unsettled_nodes(connection, run, facts.now)
        added["children"] = await _read_children(connection, run, caller)
    nodes = [one.node_id for one in added.get("nodes", ())]
    added["recent"] = await _recent_durations(connection, run, nodes)
    return replace(facts, **added)


async def _count_ahead(connection: AsyncConnection, run: Execution, *, is_suspect: bool) -> int:
    """Return how many pending runs the claims take before this one, at most 10,000.

    Counted are runs of the same target, kind, organization and queue turn; for a suspect, all suspects of its
    target.
    """
    order = run_rows.TRIAL_ORDER if is_suspect else run_rows.CLAIM_ORDER
    kind = run_rows.suspect_sql(str(MAX_ISOLATION_LOSSES)) if is_suspect else run_rows.IS_NO_SUSPECT_SQL
    of_turn = "" if is_suspect else " AND organization_id = :organization_id AND queue_turn = :queue_turn"
    columns, values = ", ".join(order), ", ".join(f":{name}" for name in order)
    # `text` instead of expressions: these conditions are those of the claims, word by word.
    statement = text(
        "SELECT count(*) FROM (SELECT 1 FROM execution"
        f" WHERE {run_rows.pending_sql(':target')}{of_turn} AND {kind} AND ({columns}) < ({values})"
        f" LIMIT {MAX_COUNTED}) AS ahead"
    )
    given = {name: getattr(run, name) for name in order} | {"target": run.target}
    if not is_suspect:
        given |= {"organization_id": run.organization_id, "queue_turn": run.queue_turn}
    return int(await connection.scalar(statement, given) or 0)


async def _slot_facts(connection: AsyncConnection, run: Execution, caller: ApiCaller) -> SlotFacts:
    """Return the oldest 20 holders of a run's concurrency key, the number of all, the limit, and how many waiting runs
    are before the run; numbers are counted up to 10,000.
    """
    key = run.concurrency_key or ""
    counted = concurrency_limits.holders_statement(key).limit(MAX_COUNTED).subquery()
    held = await connection.scalar(select(func.count()).select_from(counted))
    ahead = concurrency_limits.ahead_statement(key, run).limit(MAX_COUNTED).subquery()
    holders = (
        concurrency_limits.holders_statement(key)
        .add_columns(
            func.coalesce(col(Execution.started_at), col(Execution.created_at)).label("since"),
            case((visibility_condition(caller), True), else_=False).label("is_visible"),
        )
        .order_by(col(Execution.created_at))
        .limit(MAX_HOLDERS)
    )
    return SlotFacts(
        held=held or 0,
        limit=run.concurrency_limit or 0,
        ahead=await connection.scalar(select(func.count()).select_from(ahead)) or 0,
        holders=[
            SlotHolder(row.id, _to_datetime(row.since), bool(row.is_visible))
            for row in await connection.execute(holders)
        ],
    )


async def _read_workers(connection: AsyncConnection, owner: str | None) -> Sequence[WorkerPresence]:
    """Return up to 1,000 reports of workers, the newest first; only that of `owner` if it is given."""
    statement = select(WorkerPresence).order_by(col(WorkerPresence.seen_at).desc()).limit(1_000)
    if owner is not None:
        statement = statement.where(col(WorkerPresence.owner) == owner)
    return [build_row(WorkerPresence, row) for row in (await connection.execute(statement)).mappings()]


async def read_last_decision(connection: AsyncConnection, workflow_id: str) -> LastDecision | None:
    """Return the last decision about a deployment that is still stored; None without one."""
    statement = (
        select(
            *(col(LifecycleDecision.action), col(LifecycleDecision.reason)),
            *(col(LifecycleDecision.at), col(LifecycleDecision.user_id)),
        )
        .where(col(LifecycleDecision.workflow_id) == workflow_id)
        .order_by(col(LifecycleDecision.at).desc(), col(LifecycleDecision.id).desc())
        .limit(1)
    )
    row = (await connection.execute(statement)).first()
    return None if row is None else LastDecision(*row)


async def _read_unsettled_nodes(
    connection: AsyncConnection, run: Execution, now: datetime
) -> Sequence[UnsettledNode]:
    """Return up to 50 nodes of a run that are at work, retry, or wait and have no answer yet, in the order of
    their spans.

    Nodes that wait for a task have the facts of the task.
    """
    answered = select(col(WaitAnswer.node_id)).where(
        col(WaitAnswer.execution_id) == col(SpanRow.execution_id),
        col(WaitAnswer.node_id) == col(SpanRow.node_id),
        col(WaitAnswer.iteration) == col(SpanRow.iteration),
    )
    unsettled = [SpanStatus.RUNNING.value, SpanStatus.WAITING.value, SpanStatus.RETRYING.value]
    statement = (
        select(
            *(col(SpanRow.node_id), col(SpanRow.iteration), col(SpanRow.label), col(SpanRow.status)),
            *(col(SpanRow.attempt), col(SpanRow.started_at), col(SpanRow.wake_at), col(SpanRow.awaits)),
            *(col(SpanRow.error), col(SpanRow.type)),
        )
        .where(
            col(SpanRow.execution_id) == run.id,
            col(SpanRow.shard) == run.shard,
            col(SpanRow.status).in_(unsettled),
            or_(col(SpanRow.awaits).is_(None), ~answered.exists()),
        )
        .order_by(col(SpanRow.sequence))
        .limit(MAX_NODES)
    )
    rows = (await connection.execute(statement)).all()
    waits = {
        (row.node_id, row.iteration): decoding.decode(row.awaits) if row.awaits else None for row in rows
    }
    has_tasks = any(awaits is not None and awaits["kind"] == AnswerSource.TASK for awaits in waits.values())
    tasks: Mapping[tuple[str, str], TaskFact] = {}
    if has_tasks:
        from journal.explanations import task_facts  # noqa: PLC0415 - loaded where tasks are explained

        tasks = await task_facts.read_tasks(connection, run, now)
    has_agents = any(row.type == AGENT_TYPE and row.status == SpanStatus.RUNNING for row in rows)
    steps = await _read_open_steps(connection, run) if has_agents else {}
    return [
        UnsettledNode(
            *(row.node_id, row.iteration, row.label, SpanStatus(row.status)),
            *(row.attempt, row.started_at, row.wake_at),
            waits[row.node_id, row.iteration],
            tasks.get((row.node_id, row.iteration)),
            decoding.decode(row.error)["code"] if row.error else None,
            steps.get((row.node_id, row.iteration), ()),
        )
        for row in rows
    ]


async def _read_open_steps(
    connection: AsyncConnection, run: Execution
) -> Mapping[tuple[str, str], Sequence[OpenAgentStep]]:
    """Return the steps of a run's agents that have begun and not ended, at most 50, by node and iteration."""
    statement = (
        select(
            *(col(AgentStepRow.node_id), col(AgentStepRow.iteration), col(AgentStepRow.number)),
            *(col(AgentStepRow.kind), col(AgentStepRow.name), col(AgentStepRow.started_at)),
        )
        .where(
            col(AgentStepRow.execution_id) == run.id,
            col(AgentStepRow.shard) == run.shard,
            col(AgentStepRow.status) == StepStatus.STARTED.value,
            or_(col(AgentStepRow.reuse).is_(None), col(AgentStepRow.reuse) == StepReuse.REUSED.value),
            col(AgentStepRow.ended_at).is_(None),
        )
        .order_by(col(AgentStepRow.node_id), col(AgentStepRow.iteration), col(AgentStepRow.number))
        .limit(MAX_NODES)
    )
    found: dict[tuple[str, str], list[OpenAgentStep]] = {}
    for row in await connection.execute(statement):
        step = OpenAgentStep(row.number, StepKind(row.kind), row.name, row.started_at)
        found.setdefault((row.node_id, row.iteration), []).append(step)
    return found


async def _read_children(
    connection: AsyncConnection, run: Execution, caller: ApiCaller
) -> Sequence[ChildRun]:
    """Return the unfinished runs that nodes of a run have started, the oldest first, at most 20.

    Each says whether the caller may see it, and which node awaits it ("" if none does).
    """
    statement = (
        select(
            *(
                col(Execution.id),
                col(Execution.status),
                col(Execution.created_at),
                col(Execution.completion_action),
            ),
            case((visibility_condition(caller), True), else_=False).label("is_visible"),
        )
        .where(
            col(Execution.parent_id) == run.id,
            # In the words of the index: as a Boolean expression, SQLite would compare it with 1 and not use it.
            text("parent_id IS NOT NULL AND ended_at IS NULL"),
        )
        .order_by(col(Execution.created_at))
        .limit(MAX_HOLDERS)
    )
    return [
        ChildRun(
            row.id,
            str(((row.completion_action or {}).get("parent") or {}).get("nodeId", "")),
            row.status,
            row.created_at,
            bool(row.is_visible),
        )
        for row in await connection.execute(statement)
    ]


async def _recent_durations(
    connection: AsyncConnection, run: Execution, node_ids: Sequence[str]
) -> RecentDurations:
    """Return the durations in seconds of up to 40 completed runs among the last 80 of the workflow, none of them later
    than this run.

    With `node_ids`, also the durations of these nodes in those runs, outside of loops.
    """
    newest = (
        select(col(ExecutionData.execution_id))
        .where(
            col(ExecutionData.workflow_id) == run.workflow_id,
            col(ExecutionData.created_at) <= run.created_at,
        )
        .order_by(col(ExecutionData.created_at).desc())
        .limit(2 * RECENT_RUNS)
        .cte("newest")
    )
    completed = (
        select(col(Execution.id), col(Execution.started_at), col(Execution.ended_at))
        .join(newest, newest.c.execution_id == col(Execution.id))
        .where(col(Execution.status) == ExecutionStatus.COMPLETED, col(Execution.started_at).is_not(None))
        .limit(RECENT_RUNS)
    )
    rows = (await connection.execute(completed)).all()
    seconds = [(row.ended_at - row.started_at).total_seconds() for row in rows if row.ended_at]
    nodes: dict[str, list[float]] = {}
    if rows and node_ids:
        spans = select(col(SpanRow.node_id), col(SpanRow.started_at), col(SpanRow.ended_at)).where(
            col(SpanRow.execution_id).in_([row.id for row in rows]),
            and_(col(SpanRow.node_id).in_(node_ids), col(SpanRow.iteration) == ""),
            col(SpanRow.ended_at).is_not(None),
        )
        for row in await connection.execute(spans):
            if row.started_at is not None:
                nodes.setdefault(row.node_id, []).append((row.ended_at - row.started_at).total_seconds())
    return RecentDurations(seconds, nodes)


def _to_datetime(value: datetime | int) -> datetime:
    return value if isinstance(value, datetime) else from_microseconds(value)
