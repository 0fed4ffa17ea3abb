"""Runs that were accepted while their workflow was paused: they wait until it is resumed."""

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
"""Due time of such a run while the workflow is paused."""


async def release_held_runs(connection: AsyncConnection, workflow_id: str) -> None:
    """Make the held runs of a workflow due, in the order of their acceptance.

    The sweep for due runs finds them.
    """
    await connection.execute(
        update(Execution)
        .where(
            col(Execution.workflow_id) == workflow_id,
            col(Execution.status) == ExecutionStatus.WAITING,
            col(Execution.due_at) == UNTIL_RESUMED,
        )
        .values(due_at=DatabaseTime(), rank=col(Execution.created_at), updated_at=DatabaseTime())
    )
