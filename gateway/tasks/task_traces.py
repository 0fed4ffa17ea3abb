"""Trace contexts of claimed tasks: the spans of their nodes, as parents of the spans of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import structlog
from sqlalchemy import and_, select
from sqlmodel import col

from models.errors import DatabaseUnavailable
from models.execution import Execution, SpanRow
from models.task import Task

if TYPE_CHECKING:
    from models.database import Database
    from telemetry.tracing import Tracer

log = structlog.get_logger()


async def find_traceparents(database: Database, tracer: Tracer, task_ids: Sequence[str]) -> Mapping[str, str]:
    """Return the `traceparent` of tasks by id, except for those without a span; empty while the database is away."""
    if not task_ids:
        return {}
    columns = (col(SpanRow.node_id), col(SpanRow.iteration), col(SpanRow.attempt))
    is_node = and_(
        col(SpanRow.execution_id) == col(Task.execution_id),
        col(SpanRow.node_id) == col(Task.node_id),
        col(SpanRow.iteration) == col(Task.iteration),
        col(SpanRow.shard) == col(Task.shard),
    )
    statement = (
        select(col(Task.id), col(Task.execution_id), col(Execution.trace_origin), *columns)
        .join(Execution, col(Execution.id) == col(Task.execution_id))
        .join(SpanRow, is_node)
        .where(col(Task.id).in_(task_ids))
    )
    try:
        async with database.read() as connection:
            rows = (await connection.execute(statement)).all()
    except DatabaseUnavailable as error:
        log.debug("tasks without traces", reason=str(error))
        return {}
    return {
        row.id: str(
            tracer.node_context(row.execution_id, row.trace_origin, row.node_id, row.iteration, row.attempt)
        )
        for row in rows
    }
