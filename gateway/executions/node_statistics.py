"""Endpoint that sums up how long the nodes of a workflow take, and how often they fail."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import and_, func, not_, select
from sqlmodel import col

from engine.run_records import SpanStatus
from gateway.executions.run_graph_rows import IS_ITERATION_OF_LOOP
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from gateway.workflows import editing
from models.execution import ExecutionData, SpanRow

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.executions.execution_rows import Recorded

TIME: Final = timedelta(days=7)
RUNS: Final = 100
"""Newest runs that are read."""
SPANS: Final = 5_000
"""Spans that are read of them; a run with long loops has many."""
_MILLISECOND: Final = timedelta(milliseconds=1)


class NodeStatistics(WireStruct):
    """Durations and failures of a node; each iteration of a loop counts as one."""

    node_id: str
    ended: int
    """Number of times that the node completed or failed."""
    failed: int
    p50_ms: int | None
    """Median of the durations; null if it has never ended."""
    p95_ms: int | None


class WorkflowStatistics(WireStruct):
    """Statistics of the nodes of a workflow over its newest runs of seven days."""

    workflow_id: str
    since: Instant
    runs: int
    """Number of runs that were read, 100 at most; fewer if they have more than 5,000 spans."""
    nodes: Sequence[NodeStatistics]


async def show(request: GatewayRequest) -> JsonResponse:
    """Return the median and the 95th percentile of each node's duration, in milliseconds, and its failures.

    Iterations of loops count one by one. The newest runs of seven days count: 100 at most, and fewer if they
    have more than 5,000 spans.
    """
    since = request.gateway.clock() - TIME
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        rows = await _read_spans(connection, workflow.id, workflow.shard, since)
    # In a thread, so that thousands of rows do not block other requests.
    return JsonResponse(await asyncio.to_thread(_sum_up, workflow.id, since, rows))


async def _read_spans(
    connection: AsyncConnection, workflow_id: str, shard: int, since: datetime
) -> Sequence[Recorded]:
    """Return the completed and failed spans of the 100 newest runs of a workflow since a time; of over 5,000, only
    those of the newest of these runs.

    Reused results and iterations as a whole are left out; nodes in iterations are included.
    """
    runs = (
        select(col(ExecutionData.execution_id), col(ExecutionData.created_at))
        .where(col(ExecutionData.workflow_id) == workflow_id, col(ExecutionData.created_at) >= since)
        .order_by(col(ExecutionData.created_at).desc(), col(ExecutionData.execution_id).desc())
        .limit(RUNS)
        .subquery()
    )
    of_run = and_(col(SpanRow.execution_id) == runs.c.execution_id, col(SpanRow.shard) == shard)
    statement = (
        select(
            *(col(SpanRow.execution_id), col(SpanRow.node_id), col(SpanRow.status)),
            *(col(SpanRow.started_at), col(SpanRow.ended_at)),
        )
        .select_from(runs)
        .join(SpanRow, of_run)
        .where(
            col(SpanRow.status).in_((SpanStatus.COMPLETED.value, SpanStatus.FAILED.value)),
            col(SpanRow.reused_from).is_(None),
            not_(func.coalesce(IS_ITERATION_OF_LOOP, False)),
        )
        .limit(SPANS)
    )
    if connection.dialect.name == "postgresql":
        # SQLite reads the spans run by run anyway, and would sort those of all runs.
        statement = statement.order_by(runs.c.created_at.desc(), runs.c.execution_id.desc())
    return (await connection.execute(statement)).all()


def _sum_up(workflow_id: str, since: datetime, rows: Sequence[Recorded]) -> WorkflowStatistics:
    """Return the statistics of the nodes from their ended spans, by node id."""
    durations: dict[str, list[int]] = {}
    failed: dict[str, int] = {}
    for row in rows:
        of_node = durations.setdefault(row.node_id, [])
        if row.started_at is not None and row.ended_at is not None:
            of_node.append(max((row.ended_at - row.started_at) // _MILLISECOND, 0))
        failed[row.node_id] = failed.get(row.node_id, 0) + (row.status == SpanStatus.FAILED.value)
    return WorkflowStatistics(
        workflow_id=workflow_id,
        since=instant(since),
        runs=len({row.execution_id for row in rows}),
        nodes=[
            NodeStatistics(
                node_id=node_id,
                ended=len(of_node),
                failed=failed[node_id],
                p50_ms=quantile(sorted(of_node), 50),
                p95_ms=quantile(sorted(of_node), 95),
            )
            # The database returns the spans in no certain order.
            for node_id, of_node in sorted(durations.items())
        ],
    )


def quantile(ordered: Sequence[int], percent: int) -> int | None:
    """Return the smallest value of a sorted list that at least this percentage of all values does not exceed;
    None for none.
    """
    return ordered[-(-len(ordered) * percent // 100) - 1] if ordered else None
