"""Queries about the graph of a run: its definition, the states of its nodes without their data, and durations before.

Iterations of loops are counted by the database, so that a run with many thousands of them is read as fast as another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct, field
from sqlalchemy import and_, func, not_, select
from sqlmodel import col

from engine.agents.agent_steps import AGENT_TYPE
from engine.node_api import CONTINUE
from engine.run_records import CANDIDATE_STATUSES, SpanStatus
from gateway.executions import agent_step_rows, execution_rows
from gateway.workflows import version_rows
from journal.store import ExecutionKey
from models.access import User
from models.audit import AuditAction, AuditEntry
from models.execution import AttemptRow, Execution, ExecutionData, SpanRow
from models.execution_status import ExecutionStatus
from models.workflow import Definition, Workflow

if TYPE_CHECKING:
    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.agents.agent_steps import AgentStep
    from gateway.executions.agent_step_rows import ToolCallSums
    from gateway.executions.execution_rows import Recorded

SHOWN_ITERATIONS: Final = 200
"""Iterations of each node that are read one by one, from the first."""
SHOWN_ATTEMPTS: Final = 1_000
"""Failed attempts of all nodes that are read."""
SHOWN_STEPS: Final = 1_000
"""Steps of all unfinished agents that are read."""
UNFINISHED: Final = frozenset({SpanStatus.RUNNING, SpanStatus.WAITING, SpanStatus.RETRYING})
"""States of nodes that go on."""
EARLIER_RUNS: Final = 20
"""Runs of the workflow before this one among which a completed run is looked for."""
RUNS_BEFORE_FAILED: Final = 500
"""The same for a failed run, which may follow many others that have failed."""

DEFINING_ACTIONS: Final = (
    *(AuditAction.WORKFLOW_UPDATED, AuditAction.WORKFLOW_BUILT, AuditAction.WORKFLOW_IMPORTED),
    *(AuditAction.NODE_ADDED, AuditAction.NODE_CONFIGURED, AuditAction.NODE_REMOVED),
    *(AuditAction.CONNECTION_ADDED, AuditAction.CONNECTION_REMOVED, AuditAction.VERSION_RESTORED),
)
"""Acts that may change the definition of a workflow."""
DEFINING_FIELDS: Final = frozenset({"nodes", "connections", "settings", "config"})
"""Fields of a workflow, as the audit trail names them, that its definition has."""
EXAMINED_CHANGES: Final = 20
"""Changes of a workflow before a run among which one of the definition is looked for."""

IS_ITERATION_OF_LOOP: Final = and_(col(SpanRow.port) == CONTINUE, col(SpanRow.hashes).is_(None))
"""Condition of the records of a loop about its own iterations, which are no spans of nodes."""


class RunHead(Struct, frozen=True):
    """Facts about a run that its graph depends on."""

    organization_id: str
    workflow_id: str
    definition_hash: str
    created_at: datetime
    status: str


class DefinitionChange(Struct, frozen=True):
    """Change of the definition of a workflow, by a user."""

    at: datetime
    user_id: str
    user_name: str
    """Name or mail address; the id of a user that is no longer kept."""


class IterationCounts(Struct, frozen=True):
    """Iterations of a node in all loops around it: their number by status, first start and last end."""

    by_status: Mapping[str, int]
    started_at: datetime | None
    ended_at: datetime | None


class RunGraphRows(Struct, frozen=True):
    """Rows about the graph of a run."""

    head: RunHead
    definition: str | None
    """JSON text; None if it is not stored any more."""
    nodes: Sequence[Recorded]
    """Spans of nodes outside of loops, in the order of their last change."""
    iterations: Mapping[str, Sequence[Recorded]]
    """First iterations by node, in their order."""
    counts: Mapping[str, IterationCounts]
    attempts: Mapping[str, Sequence[Recorded]]
    """Failed attempts by node."""
    revision: int | None
    """Revision of the workflow; None if its row is gone."""
    previous_run: str | None
    """Newest completed run of the workflow before this one."""
    previous_version: int | None
    """Version of `previous_run`, if it has another definition than this run."""
    last_change: DefinitionChange | None
    """Last change of the definition between both; None if it is the same, or if the audit trail has none."""
    durations: Mapping[str, timedelta] = field(default_factory=dict)
    """Durations of nodes in `previous_run`, by node."""
    steps: Sequence[AgentStep] = ()
    """Steps of the agents outside of loops that have not ended, without contents."""
    questions: Mapping[str, str] = field(default_factory=dict)
    """Nodes of the open questions about these steps, by the iterations of the questions."""
    tool_calls: Sequence[ToolCallSums] = ()


async def read_rows(connection: AsyncConnection, key: ExecutionKey) -> RunGraphRows | None:
    """Return the rows about the graph of a run, with the durations of the last completed run before it; None if it is
    missing or being deleted.

    Up to 200 iterations of each node are read, and 1,000 failed attempts.
    """
    head = await read_head(connection, key)
    if head is None:
        return None
    definition = await connection.scalar(
        select(col(Definition.body)).where(
            col(Definition.organization_id) == head.organization_id,
            col(Definition.hash) == head.definition_hash,
        )
    )
    previous = await find_completed_before(connection, key, head)
    before = None
    if previous is not None:
        before = await _read_other_head(connection, ExecutionKey(previous, key.shard), head)
    nodes = await _read_nodes(connection, key)
    agents = [row.node_id for row in nodes if row.type == AGENT_TYPE and row.status in UNFINISHED]
    iterations = await _read_iterations(connection, key)
    has_agent = any(row.type == AGENT_TYPE for row in (*nodes, *(rows[0] for rows in iterations.values())))
    steps = await agent_step_rows.read_states(connection, key, agents, SHOWN_STEPS) if agents else ()
    return RunGraphRows(
        head,
        definition,
        nodes,
        iterations,
        await _count_iterations(connection, key),
        await _read_attempts(connection, key),
        await connection.scalar(
            select(col(Workflow.revision)).where(
                col(Workflow.id) == head.workflow_id, col(Workflow.organization_id) == head.organization_id
            )
        ),
        previous,
        None if before is None else await _find_version(connection, previous, key.shard),
        None if before is None else await _find_change(connection, before, head),
        {} if previous is None else await _read_durations(connection, previous, key.shard),
        steps,
        await agent_step_rows.read_questions(connection, key, steps),
        await agent_step_rows.sum_tool_calls(connection, key) if has_agent else (),
    )


async def read_head(connection: AsyncConnection, key: ExecutionKey) -> RunHead | None:
    """Return organization, workflow, definition hash, creation time and status of a run; None if it is missing or being
    deleted.
    """
    columns: Sequence[Any] = (
        *(col(Execution.organization_id), col(Execution.workflow_id), col(Execution.definition_hash)),
        *(col(ExecutionData.created_at), col(Execution.status)),
    )
    statement = (
        select(*columns)
        .join(ExecutionData, execution_rows.SAME_RUN)
        .where(col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard)
    )
    row = (await connection.execute(statement)).first()
    return None if row is None else RunHead(*row)


async def find_completed_before(connection: AsyncConnection, key: ExecutionKey, head: RunHead) -> str | None:
    """Return the id of the newest completed run of the workflow before a run; None without one.

    The 20 runs before it are examined, or 500 if it failed itself.
    """
    found: str | None = await connection.scalar(completed_before(key, head))
    return found


def completed_before(key: ExecutionKey, head: RunHead) -> Select[*tuple[Any, ...]]:
    """Return the statement of `find_completed_before`."""
    is_failed = head.status == ExecutionStatus.FAILED
    earlier = (
        select(col(ExecutionData.execution_id), col(ExecutionData.shard), col(ExecutionData.created_at))
        .where(
            col(ExecutionData.workflow_id) == head.workflow_id,
            col(ExecutionData.created_at) <= head.created_at,
            col(ExecutionData.execution_id) != key.execution_id,
        )
        .order_by(col(ExecutionData.created_at).desc(), col(ExecutionData.execution_id).desc())
        .limit(RUNS_BEFORE_FAILED if is_failed else EARLIER_RUNS)
        .subquery()
    )
    return (
        select(earlier.c.execution_id)
        .join(
            Execution,
            and_(col(Execution.id) == earlier.c.execution_id, col(Execution.shard) == earlier.c.shard),
        )
        .where(col(Execution.status) == ExecutionStatus.COMPLETED.value)
        .order_by(earlier.c.created_at.desc(), earlier.c.execution_id.desc())
        .limit(1)
    )


async def find_version_before(
    connection: AsyncConnection, key: ExecutionKey
) -> tuple[str, int | None] | None:
    """Return the definition hash of a run, and the version of the last completed run before it; None if the run is
    missing.

    The version is None without such a run, if it had the same definition, and if no version has its definition.
    """
    head = await read_head(connection, key)
    if head is None:
        return None
    previous = await find_completed_before(connection, key, head)
    if previous is None:
        return head.definition_hash, None
    before = await _read_other_head(connection, ExecutionKey(previous, key.shard), head)
    version = None if before is None else await _find_version(connection, previous, key.shard)
    return head.definition_hash, version


async def _read_other_head(connection: AsyncConnection, key: ExecutionKey, head: RunHead) -> RunHead | None:
    """Return the facts about a run; None if it has the same definition as `head`, or is being deleted."""
    other = await read_head(connection, key)
    return None if other is None or other.definition_hash == head.definition_hash else other


async def _find_version(connection: AsyncConnection, execution_id: str | None, shard: int) -> int | None:
    """Return the number of the version with the definition of a run; None for no run, and if no version has it."""
    if execution_id is None:
        return None
    return (await version_rows.find_versions_of_runs(connection, shard, [execution_id])).get(execution_id)


async def _find_change(
    connection: AsyncConnection, before: RunHead, head: RunHead
) -> DefinitionChange | None:
    """Return the last change of the workflow's definition between two runs, by the last 20 changes in the
    audit trail; None without one.
    """
    for row in await connection.execute(changes_statement(before, head)):
        paths = [change["path"].partition(".")[0] for change in row.changes or ()]
        if not paths or DEFINING_FIELDS & {*paths}:
            return DefinitionChange(row.created_at, row.user_id, row.name or row.email or row.user_id)
    return None


def changes_statement(before: RunHead, head: RunHead) -> Select[*tuple[Any, ...]]:
    """Return the statement of the last 20 changes of a workflow between two of its runs, with their authors."""
    columns: Sequence[Any] = (
        *(col(AuditEntry.created_at), col(AuditEntry.user_id), col(AuditEntry.changes)),
        *(col(User.name), col(User.email)),
    )
    return (
        select(*columns)
        .outerjoin(
            User,
            and_(
                col(User.id) == col(AuditEntry.user_id),
                col(User.organization_id) == col(AuditEntry.organization_id),
            ),
        )
        .where(
            col(AuditEntry.organization_id) == head.organization_id,
            col(AuditEntry.object_id) == head.workflow_id,
            col(AuditEntry.created_at) > before.created_at,
            col(AuditEntry.created_at) <= head.created_at,
            col(AuditEntry.action).in_(DEFINING_ACTIONS),
        )
        .order_by(col(AuditEntry.created_at).desc())
        .limit(EXAMINED_CHANGES)
    )


_COLUMNS: Final = (
    *(col(SpanRow.id), col(SpanRow.node_id), col(SpanRow.iteration), col(SpanRow.label), col(SpanRow.type)),
    *(col(SpanRow.status), col(SpanRow.port), col(SpanRow.attempt), col(SpanRow.sequence)),
    *(col(SpanRow.started_at), col(SpanRow.ended_at), col(SpanRow.wake_at)),
)


def _select_run(key: ExecutionKey) -> tuple[Any, ...]:
    return (
        col(SpanRow.execution_id) == key.execution_id,
        col(SpanRow.shard) == key.shard,
        col(SpanRow.status).not_in(CANDIDATE_STATUSES),
    )


async def _read_nodes(connection: AsyncConnection, key: ExecutionKey) -> Sequence[Recorded]:
    statement = (
        select(*_COLUMNS)
        .where(*_select_run(key), col(SpanRow.iteration) == "")
        .order_by(col(SpanRow.sequence))
    )
    return (await connection.execute(statement)).all()


def _in_iterations(key: ExecutionKey) -> tuple[Any, ...]:
    return (*_select_run(key), col(SpanRow.iteration) != "", not_(func.coalesce(IS_ITERATION_OF_LOOP, False)))


async def _read_iterations(
    connection: AsyncConnection, key: ExecutionKey
) -> Mapping[str, Sequence[Recorded]]:
    """Return the first 200 iterations of each node in loops, by node id."""
    number = func.row_number().over(
        partition_by=col(SpanRow.node_id), order_by=(func.length(SpanRow.iteration), col(SpanRow.iteration))
    )
    numbered = select(*_COLUMNS, number.label("number")).where(*_in_iterations(key)).subquery()
    statement = (
        select(numbered)
        .where(numbered.c.number <= SHOWN_ITERATIONS)
        .order_by(numbered.c.node_id, numbered.c.number)
    )
    return _by_node((await connection.execute(statement)).all())


async def _count_iterations(connection: AsyncConnection, key: ExecutionKey) -> Mapping[str, IterationCounts]:
    """Return the numbers by status, first start and last end of the iterations of each node in loops, by node id."""
    statement = (
        select(
            *(col(SpanRow.node_id), col(SpanRow.status), func.count().label("count")),
            func.min(SpanRow.started_at).label("started_at"),
            func.max(SpanRow.ended_at).label("ended_at"),
        )
        .where(*_in_iterations(key))
        .group_by(col(SpanRow.node_id), col(SpanRow.status))
    )
    rows = _by_node((await connection.execute(statement)).all())
    return {node_id: _sum_counts(of_node) for node_id, of_node in rows.items()}


def _sum_counts(rows: Sequence[Recorded]) -> IterationCounts:
    """Return the counts of one node from its rows by status; the last end is None while an iteration runs."""
    starts = [row.started_at for row in rows if row.started_at is not None]
    ends = [row.ended_at for row in rows]
    return IterationCounts(
        # `count` is a method of a row.
        {row.status: int(row[2]) for row in rows},
        min(starts, default=None),
        None if None in ends else max(ends, default=None),
    )


async def _read_attempts(connection: AsyncConnection, key: ExecutionKey) -> Mapping[str, Sequence[Recorded]]:
    """Return the failed attempts by node id, at most the first 1,000 of the run."""
    statement = (
        select(
            *(col(AttemptRow.node_id), col(AttemptRow.iteration), col(AttemptRow.attempt)),
            *(col(AttemptRow.started_at), col(AttemptRow.ended_at)),
        )
        .where(
            col(AttemptRow.execution_id) == key.execution_id,
            col(AttemptRow.shard) == key.shard,
            col(AttemptRow.status) == SpanStatus.FAILED.value,
        )
        .order_by(col(AttemptRow.sequence))
        .limit(SHOWN_ATTEMPTS)
    )
    return _by_node((await connection.execute(statement)).all())


async def _read_durations(
    connection: AsyncConnection, execution_id: str, shard: int
) -> Mapping[str, timedelta]:
    """Return the durations of the completed nodes outside of loops of a run, by node id."""
    statement = select(col(SpanRow.node_id), col(SpanRow.started_at), col(SpanRow.ended_at)).where(
        col(SpanRow.execution_id) == execution_id,
        col(SpanRow.shard) == shard,
        col(SpanRow.iteration) == "",
        col(SpanRow.status) == SpanStatus.COMPLETED.value,
    )
    return {
        row.node_id: row.ended_at - row.started_at
        for row in await connection.execute(statement)
        if row.started_at is not None and row.ended_at is not None
    }


def _by_node(rows: Sequence[Recorded]) -> dict[str, list[Recorded]]:
    """Return rows by node id, in their order."""
    found: dict[str, list[Recorded]] = {}
    for row in rows:
        found.setdefault(row.node_id, []).append(row)
    return found
