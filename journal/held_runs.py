"""What has arrived for a workflow while it was paused: runs that wait until it is paused no longer."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from sqlalchemy import update
from sqlmodel import col

from models.database_time import DatabaseTime
from models.execution import Execution
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

UNTIL_RESUMED: Final = datetime(9999, 1, 1, tzinfo=UTC)
"""When such a run is due, as long as nobody knows."""


async def release_held_runs(connection: AsyncConnection, workflow_id: str) -> None:
    """Let them run, in the order in which they came; they are found as all are that have become due."""
    await connection.execute(
        update(Execution)
        .where(
            col(Execution.workflow_id) == workflow_id,
            col(Execution.status) == ExecutionStatus.WAITING,
            col(Execution.due_at) == UNTIL_RESUMED,
        )
        .values(due_at=DatabaseTime(), rank=col(Execution.created_at), updated_at=DatabaseTime())
    )
