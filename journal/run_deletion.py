"""Deletion of executions with all their records, in small transactions.

The row of an execution is deleted first, so that nobody reads, resumes or awaits a partly deleted run. The
row of its data is deleted last, so that an interrupted deletion is found again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, delete, select, tuple_
from sqlalchemy.orm import aliased
from sqlmodel import SQLModel, col

from journal.blobs.blob_storage import BlobOwner
from models.agent_step import AgentStepRow
from models.approval import ApprovalLink, ApprovalRequest, ApprovalVote
from models.blocked_interval import BlockedInterval
from models.execution import AttemptRow, Execution, ExecutionData, LogRow, SpanRow, WaitAnswer
from models.execution_label import ExecutionLabel
from models.model_spending import ModelCharge
from models.published_value import PublishedValue
from models.signal import Signal, SignalWait
from models.task import Task

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from models.database import Database

BATCH_ROWS: Final = 2_000

_parent_alias = aliased(Execution)
_PARENT_IS_UNFINISHED: Final = (
    select(col(_parent_alias.id))
    .where(col(_parent_alias.id) == col(Execution.parent_id), col(_parent_alias.ended_at).is_(None))
    .correlate(Execution)
    .exists()
)
_IS_FINISHED: Final = and_(col(Execution.ended_at).is_not(None), col(Execution.completion_action).is_(None))
IS_DELETABLE: Final = and_(_IS_FINISHED, ~_PARENT_IS_UNFINISHED)
"""Condition: the run has ended, its completion actions are done, and no unfinished execution has started it.
"""
_RUN_TABLES: Final[Sequence[tuple[type[SQLModel], Sequence[SQLColumnExpression[Any]]]]] = (
    (SpanRow, (col(SpanRow.execution_id), col(SpanRow.node_id), col(SpanRow.iteration))),
    (
        AttemptRow,
        (
            *(col(AttemptRow.execution_id), col(AttemptRow.node_id)),
            *(col(AttemptRow.iteration), col(AttemptRow.attempt)),
        ),
    ),
    (
        AgentStepRow,
        (
            *(col(AgentStepRow.execution_id), col(AgentStepRow.node_id)),
            *(col(AgentStepRow.iteration), col(AgentStepRow.number)),
        ),
    ),
    (LogRow, (col(LogRow.execution_id), col(LogRow.sequence))),
    (Task, (col(Task.execution_id), col(Task.id))),
    (WaitAnswer, (col(WaitAnswer.execution_id), col(WaitAnswer.node_id), col(WaitAnswer.iteration))),
    (PublishedValue, (col(PublishedValue.execution_id), col(PublishedValue.key))),
    (Signal, (col(Signal.execution_id), col(Signal.number))),
    (SignalWait, (col(SignalWait.execution_id), col(SignalWait.node_id), col(SignalWait.iteration))),
    (
        ApprovalRequest,
        (
            *(col(ApprovalRequest.execution_id), col(ApprovalRequest.node_id)),
            col(ApprovalRequest.iteration),
        ),
    ),
    (ApprovalLink, (col(ApprovalLink.execution_id), col(ApprovalLink.hash))),
    (
        ApprovalVote,
        (
            *(col(ApprovalVote.execution_id), col(ApprovalVote.node_id)),
            *(col(ApprovalVote.iteration), col(ApprovalVote.voter)),
        ),
    ),
    (
        ExecutionLabel,
        (col(ExecutionLabel.execution_id), col(ExecutionLabel.key), col(ExecutionLabel.value)),
    ),
    (ModelCharge, (col(ModelCharge.execution_id), col(ModelCharge.key))),
    (BlockedInterval, (col(BlockedInterval.execution_id), col(BlockedInterval.started_at))),
)
"""Tables with records of an execution, and their keys."""


async def delete_runs(
    database: Database, execution_ids: Collection[str], left_over: Collection[str] = ()
) -> dict[str, BlobOwner]:
    """Delete ended executions with all their records, in several transactions; return the blob owner of each deleted
    run, by its id.

    Executions are skipped that are unfinished, have completion actions left, or are locked by another transaction.
    `left_over` are ids of runs without an execution, whose remaining records are deleted too; the result lacks them.
    Raises `DatabaseUnavailable`, and `LockWaitTimeout` for locked records: the rest is left over then. The caller
    deletes the blobs afterwards with `journal.blobs.orphan_blobs`.
    """

    async def delete_rows(connection: AsyncConnection) -> dict[str, BlobOwner]:
        unlocked = (
            select(col(Execution.id))
            .where(col(Execution.id).in_(sorted(execution_ids)), _IS_FINISHED)
            .with_for_update(skip_locked=True)
            .cte("unlocked")
        )
        statement = (
            delete(Execution)
            .where(col(Execution.id).in_(select(unlocked.c.id)))
            .returning(col(Execution.id), col(Execution.organization_id), col(Execution.key_id))
        )
        rows = await connection.execute(statement)
        return {row.id: BlobOwner(row.organization_id, row.key_id) for row in rows}

    deleted = await database.transaction(delete_rows) if execution_ids else {}
    run_ids = sorted({*left_over, *deleted})
    for table, identity in _RUN_TABLES:
        while await database.transaction(partial(_delete_records, table, identity, run_ids)) == BATCH_ROWS:
            pass

    async def delete_data(connection: AsyncConnection) -> None:
        await connection.execute(delete(ExecutionData).where(col(ExecutionData.execution_id).in_(run_ids)))

    await database.transaction(delete_data)
    return deleted


async def _delete_records(
    table: type[SQLModel],
    identity: Sequence[SQLColumnExpression[Any]],
    run_ids: Sequence[str],
    connection: AsyncConnection,
) -> int:
    """Delete up to `BATCH_ROWS` rows of these runs in one table; return their number.

    `identity` has the columns of the table's key, the run id first.
    """
    some = select(*identity).where(identity[0].in_(run_ids)).limit(BATCH_ROWS)
    result = await connection.execute(delete(table).where(tuple_(*identity).in_(some)))
    return result.rowcount
