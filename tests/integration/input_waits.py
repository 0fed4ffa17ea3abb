"""Executions that wait for a person, made without a worker."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from engine.run_records import SpanStatus
from models import ids
from models.database import Database
from models.database_time import DatabaseTime
from models.execution import Execution, SpanRow
from models.execution_status import ExecutionStatus

REQUEST: Final[dict[str, Any]] = {
    "title": "Write 120 rows?",
    "description": "They replace those of yesterday.",
    "schema": {"type": "object", "properties": {"comment": {"type": "string", "maxLength": 20}}},
    "choices": [{"port": "approve", "label": "Yes, write"}, {"port": "reject", "label": "No"}],
}
TOOL_CALL: Final[dict[str, Any]] = {
    "agentId": "agent",
    "tool": "send",
    "arguments": {"to": "a@b.example"},
    "hash": "0" * 64,
    "parameters": {
        "type": "object",
        "properties": {"to": {"type": "string"}},
        "required": ["to"],
        "additionalProperties": False,
    },
}
CALL_PLACE: Final = ("send", "3-0000000000000000")
"""Node and iteration of a question about a tool call."""
HOUR: Final = timedelta(hours=1)


async def wait_for_input(
    database: Database,
    execution_id: str,
    node_id: str = "approval",
    iteration: str = "",
    *,
    request: dict[str, Any] = REQUEST,
    kind: str = "input",
    expires_in: timedelta | None = HOUR,
    status: ExecutionStatus = ExecutionStatus.WAITING,
) -> None:
    """Record that a node of an execution waits for an answer, as a worker would, and set the status of the execution.

    `request` and `kind` are of the question; `expires_in` None lets it wait without end.
    """
    now = datetime.now(UTC)
    awaits = msgspec.json.encode({"kind": kind, "request": request, "expired": None}).decode()

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(
            update(Execution)
            .where(col(Execution.id) == execution_id, col(Execution.status) != status)
            .values(
                status=status,
                has_journal=True,
                due_at=now + HOUR,
                deadline_at=DatabaseTime() - DatabaseTime(),
            )
        )
        shard = await connection.scalar(select(col(Execution.shard)).where(col(Execution.id) == execution_id))
        span = SpanRow(
            execution_id=execution_id,
            node_id=node_id,
            iteration=iteration,
            shard=shard or 0,
            id=ids.new_id("span"),
            sequence=3,
            label="Approval",
            type="human-input",
            status=SpanStatus.WAITING,
            started_at=now,
            wake_at=None if expires_in is None else now + expires_in,
            awaits=awaits,
        )
        await connection.execute(insert(SpanRow).values(span.model_dump()))

    await database.transaction(work)
