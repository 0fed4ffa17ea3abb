"""Runs that were accepted while their workflow was paused: they wait until it is resumed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from sqlalchemy import case, update
from sqlmodel import col

from journal import blocked_intervals
from journal.explanations.blockers import BlockerCode
from models.database_time import DatabaseTime
from models.execution import DELAYED_TARGET, Execution
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

UNTIL_RESUMED: Final = datetime(9999, 1, 1, tzinfo=UTC)
"""Due time of such a run while the workflow is paused."""


async def release_held_runs(connection: AsyncConnection, workflow_id: str) -> None:
    """Make the runs that a paused workflow has held due now, in the order of their acceptance; their blocked
    intervals end.

    Runs that a stopped deployment has deferred are released too. The sweep for due runs then makes them
    pending.
    """
    held = (
        col(Execution.workflow_id) == workflow_id,
        col(Execution.status) == ExecutionStatus.WAITING,
        col(Execution.due_at) == UNTIL_RESUMED,
    )
    # Deferred runs of a deployment that a user has stopped have the same due time.
    code = case(
        (col(Execution.target) == DELAYED_TARGET, BlockerCode.WORKFLOW_PAUSED.value),
        else_=BlockerCode.STOPPED_MANUALLY.value,
    )
    await blocked_intervals.add_ended_intervals(connection, code, *held, since=col(Execution.updated_at))
    await connection.execute(
        update(Execution)
        .where(*held)
        .values(due_at=DatabaseTime(), rank=col(Execution.created_at), updated_at=DatabaseTime())
    )
