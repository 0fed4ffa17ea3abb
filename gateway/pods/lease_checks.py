"""Statements that restrict a pod to the runs of its own workflow on which it holds a live lease.

Each statement checks the lease itself, so that nothing is read or changed after another process has taken the
run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct
from sqlalchemy import and_, bindparam, func, literal_column, select, update
from sqlmodel import col

from engine.services import RunCaller
from execution.pod_api import SPANS_PER_PAGE, STEPS_PER_PAGE, NodeAnswerRecord
from gateway.executions.agent_step_rows import select_steps
from gateway.http.errors import ApiError
from journal.run_rows import SPAN_COLUMNS, decode_span, decode_step
from journal.waits.node_answers import RESUMED_DEADLINE
from models.agent_step import AgentStepRow
from models.database_time import DatabaseTime
from models.deployment import Deployment
from models.execution import Execution, LogRow, SpanRow, WaitAnswer
from models.execution_status import ExecutionStatus
from models.pod_identity import PodProcess, lease_owner
from models.workflow import Definition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.agents.agent_steps import AgentStep
    from engine.run_records import NodeSpan
    from models.database import Database

_IS_RUNNING = col(Execution.status) == literal_column(f"'{ExecutionStatus.RUNNING}'")
"""Literal instead of bound: SQLite uses the partial index of running executions only for a literal condition."""
_TAKES_RUNS = select(col(Deployment.workflow_id)).where(
    col(Deployment.workflow_id) == bindparam("workflow_id"),
    col(Deployment.is_deployed),
    col(Deployment.replicas) > 0,
    col(Deployment.drain_until).is_(None),
)
"""Built once: each claim runs this statement, and building it takes longer than running it."""


class LeaseHolder(Struct, frozen=True):
    """Authenticated pod and its deployment."""

    workflow_id: str
    organization_id: str
    shard: int
    process: PodProcess

    @property
    def owner(self) -> str:
        """Name under which the process of the pod owns leases on runs: `pod:<workflow>:<pod>/<start>`."""
        return lease_owner(self.workflow_id, self.process)


def lease_lost() -> ApiError:
    """Return the 409 error `lease-lost`, the same for runs that are foreign, deleted or unknown.

    A lease is the limited right of one process to execute a run.
    """
    return ApiError(409, "lease-lost", "This pod holds no lease on such an execution")


def held_conditions(holder: LeaseHolder) -> Sequence[ColumnElement[bool]]:
    """Return the SQL conditions, all of which hold for the executions with a live lease of `holder`."""
    return (
        col(Execution.workflow_id) == holder.workflow_id,
        col(Execution.organization_id) == holder.organization_id,
        col(Execution.shard) == holder.shard,
        _IS_RUNNING,
        col(Execution.lease_owner) == holder.owner,
        col(Execution.lease_until) >= DatabaseTime(),
    )


async def read_caller(database: Database, holder: LeaseHolder, execution_id: str) -> RunCaller:
    """Return the organization, user, workflow and keys in whose name a run acts.

    Raises a 409 error `lease-lost` if the pod doesn't hold the run.
    """
    statement = select(col(Execution.user_id), col(Execution.key_id), col(Execution.write_key_id)).where(
        col(Execution.id) == execution_id, *held_conditions(holder)
    )
    async with database.read() as connection:
        row = (await connection.execute(statement)).first()
    if row is None:
        raise lease_lost()
    return RunCaller(
        *(holder.organization_id, row.user_id, holder.workflow_id, execution_id, row.key_id),
        write_key_id=row.write_key_id or "",
    )


async def take_write_key(
    database: Database, caller: RunCaller, node: tuple[str, str], write_key_id: str
) -> RunCaller:
    """Return the caller with the idempotency key of an earlier run, where a node repeats a request of that run.

    `node` is its id and iteration; its recorded span has the key. An empty or the run's own key leaves it
    unchanged. Raises 409 `lease-lost` for any other key.
    """
    if write_key_id in {"", caller.key_prefix}:
        return caller
    statement = select(col(SpanRow.key_id)).where(
        col(SpanRow.execution_id) == caller.execution_id,
        col(SpanRow.node_id) == node[0],
        col(SpanRow.iteration) == node[1],
    )
    async with database.read() as connection:
        if await connection.scalar(statement) != write_key_id:
            raise lease_lost()
    return msgspec.structs.replace(caller, write_key_id=write_key_id)


async def require_resume_chain(database: Database, holder: LeaseHolder, key_id: str) -> None:
    """Raise a 409 error `lease-lost` unless the pod holds a run of the chain of runs, which share their blobs.

    `key_id` is the id of the chain's first run.
    """
    statement = (
        select(col(Execution.id)).where(col(Execution.key_id) == key_id, *held_conditions(holder)).limit(1)
    )
    async with database.read() as connection:
        if await connection.scalar(statement) is None:
            raise lease_lost()


async def deployed_definition(database: Database, holder: LeaseHolder) -> tuple[str, str] | None:
    """Return hash and text of the definition that the workflow of a pod was last deployed with; None if it never was.

    Leases are not checked, and an undeployed workflow still has its last definition.
    """
    statement = (
        select(col(Definition.hash), col(Definition.body))
        .join(
            Deployment,
            (col(Deployment.organization_id) == col(Definition.organization_id))
            & (col(Deployment.definition_hash) == col(Definition.hash)),
        )
        .where(col(Deployment.workflow_id) == holder.workflow_id, col(Definition.shard) == holder.shard)
    )
    async with database.read() as connection:
        row = (await connection.execute(statement)).first()
    return None if row is None else (row.hash, row.body)


async def takes_runs(database: Database, holder: LeaseHolder) -> bool:
    """Return whether pods of the deployment may claim runs: not while it drains, is stopped or undeployed."""
    async with database.read() as connection:
        return await connection.scalar(_TAKES_RUNS, {"workflow_id": holder.workflow_id}) is not None


async def is_stopped(database: Database, holder: LeaseHolder) -> bool:
    """Return whether a deployment is stopped, so that its pods end once they have drained; False for an undeployed
    workflow.
    """
    statement = select(col(Deployment.workflow_id)).where(
        col(Deployment.workflow_id) == holder.workflow_id,
        col(Deployment.is_deployed),
        col(Deployment.replicas) == 0,
    )
    async with database.read() as connection:
        return await connection.scalar(statement) is not None


async def read_definitions(database: Database, holder: LeaseHolder, hashes: Sequence[str]) -> dict[str, str]:
    """Return the texts of definitions by hash, of runs that the pod holds; others are omitted.

    So a pod reads no definitions of other workflows.
    """
    pinned = (
        select(col(Execution.definition_hash))
        .where(col(Execution.definition_hash).in_(hashes), *held_conditions(holder))
        .distinct()
    )
    statement = select(col(Definition.hash), col(Definition.body)).where(
        col(Definition.organization_id) == holder.organization_id,
        col(Definition.shard) == holder.shard,
        col(Definition.hash).in_(pinned),
    )
    async with database.read() as connection:
        return {row.hash: row.body for row in await connection.execute(statement)}


async def read_spans(
    database: Database, holder: LeaseHolder, execution_id: str, after: int
) -> list[NodeSpan]:
    """Return a page of the recorded spans of a run with sequence numbers above `after`, in order.

    A page has `SPANS_PER_PAGE`. Empty if the pod doesn't hold the run.
    """
    # Raw columns as they are stored, since `decode_span` reads those.
    columns: list[ColumnElement[Any]] = [literal_column(f"span.{column}") for column in SPAN_COLUMNS]
    statement = (
        select(*columns)
        .select_from(SpanRow)
        .join(Execution, col(Execution.id) == col(SpanRow.execution_id))
        .where(
            col(SpanRow.execution_id) == execution_id,
            col(SpanRow.shard) == holder.shard,
            col(SpanRow.sequence) > after,
            *held_conditions(holder),
        )
        .order_by(col(SpanRow.sequence))
        .limit(SPANS_PER_PAGE)
    )
    async with database.read() as connection:
        return [decode_span(row) for row in await connection.execute(statement)]


async def read_steps(
    database: Database, holder: LeaseHolder, execution_id: str, after: int
) -> list[AgentStep]:
    """Return a page of the steps of a run's unfinished agents with sequence numbers above `after`, in order.

    A page has `STEPS_PER_PAGE`. Empty if the pod doesn't hold the run.
    """
    statement = (
        select_steps()
        .join(Execution, col(Execution.id) == col(AgentStepRow.execution_id))
        .outerjoin(
            SpanRow,
            and_(
                col(SpanRow.execution_id) == col(AgentStepRow.execution_id),
                col(SpanRow.node_id) == col(AgentStepRow.node_id),
                col(SpanRow.iteration) == col(AgentStepRow.iteration),
            ),
        )
        .where(
            col(AgentStepRow.execution_id) == execution_id,
            col(AgentStepRow.shard) == holder.shard,
            col(AgentStepRow.sequence) > after,
            col(SpanRow.ended_at).is_(None),
            *held_conditions(holder),
        )
        .order_by(col(AgentStepRow.sequence))
        .limit(STEPS_PER_PAGE)
    )
    async with database.read() as connection:
        return [decode_step(row) for row in await connection.execute(statement)]


async def read_log_ends(
    database: Database, holder: LeaseHolder, execution_ids: Sequence[str]
) -> dict[str, int]:
    """Return the highest sequence number of the log of each run that the pod holds; runs without a log are omitted."""
    statement = (
        select(col(LogRow.execution_id), func.max(col(LogRow.sequence)).label("last"))
        .join(Execution, col(Execution.id) == col(LogRow.execution_id))
        .where(
            col(LogRow.execution_id).in_(execution_ids),
            col(LogRow.shard) == holder.shard,
            *held_conditions(holder),
        )
        .group_by(col(LogRow.execution_id))
    )
    async with database.read() as connection:
        return {row.execution_id: row.last for row in await connection.execute(statement)}


async def read_answers(
    database: Database, holder: LeaseHolder, execution_ids: Sequence[str]
) -> list[NodeAnswerRecord]:
    """Return the wait answers that nodes of runs have received, for those of the given runs that the pod holds."""
    statement = (
        select(
            *(col(WaitAnswer.execution_id), col(WaitAnswer.node_id), col(WaitAnswer.iteration)),
            col(WaitAnswer.payload),
        )
        .join(Execution, col(Execution.id) == col(WaitAnswer.execution_id))
        .where(
            col(WaitAnswer.execution_id).in_(execution_ids),
            col(WaitAnswer.shard) == holder.shard,
            *held_conditions(holder),
        )
    )
    async with database.read() as connection:
        rows = (await connection.execute(statement)).all()
    return [
        NodeAnswerRecord(row.execution_id, row.node_id, row.iteration, row.payload.encode()) for row in rows
    ]


async def promote_due(database: Database, holder: LeaseHolder) -> int:
    """Put the runs of this deployment with a wait that is over by now back into the queue, and return their number.

    Rows that another transaction locks are skipped. The rest of a run's timeout, which stood still during the wait,
    counts from now on.
    """
    due = (
        select(col(Execution.id))
        .where(
            col(Execution.status) == literal_column(f"'{ExecutionStatus.WAITING}'"),
            col(Execution.due_at) <= DatabaseTime(),
            col(Execution.workflow_id) == holder.workflow_id,
            col(Execution.target) == holder.workflow_id,
            col(Execution.shard) == holder.shard,
        )
        .with_for_update(key_share=True, skip_locked=True)
        .cte("due")
    )
    statement = (
        update(Execution)
        .where(col(Execution.id).in_(select(due.c.id)))
        .values(
            status=ExecutionStatus.PENDING.value,
            due_at=None,
            updated_at=DatabaseTime(),
            deadline_at=RESUMED_DEADLINE,
        )
        .returning(col(Execution.id))
    )

    async def work(connection: AsyncConnection) -> int:
        return len((await connection.scalars(statement)).all())

    return await database.transaction(work)
