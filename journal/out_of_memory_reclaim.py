"""Reclaim of runs of a process that the kernel killed for lack of memory.

Each run gets a log line and becomes a suspect at once.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import structlog
from sqlalchemy import func, insert, literal_column, select
from sqlmodel import col

from engine.run_records import SpanStatus
from models import ids
from models.database_time import DatabaseTime
from models.execution import Execution, LogRow, SpanRow
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.store import JournalStore
    from models.database import Database

log = structlog.get_logger()

OUT_OF_MEMORY_MESSAGE = "The process ran out of memory while this execution was at work"
# Literals instead of bound parameters: the databases use a partial index only for a condition that they can
# read.
_IS_RUNNING = col(Execution.status) == literal_column(f"'{ExecutionStatus.RUNNING}'")


async def reclaim_out_of_memory(database: Database, store: JournalStore, owner: str) -> int:
    """Reclaim the runs of a process that the system killed for lack of memory, with a line in their logs;
    return their number.

    The line names the nodes with effect `write` that were running: other nodes record nothing before they
    end. `owner` may be the prefix of several owners. Raises `DatabaseUnavailable`.
    """
    nodes = await database.transaction(partial(_log_out_of_memory, owner=owner))
    log.warning(
        "memory ran out",
        owner=owner,
        count=len(nodes),
        executions=[" ".join([execution_id, *at_work]) for execution_id, at_work in nodes.items()],
    )
    return await store.reclaim(owner, out_of_memory=True)


async def _log_out_of_memory(connection: AsyncConnection, *, owner: str) -> dict[str, list[str]]:
    """Add a warning that the worker ran out of memory to the log of each running run of an owner, given by
    its prefix.

    Returns the running nodes by execution id.
    """
    # The leases are still valid: no other process writes these logs before the reclaim.
    is_held = func.substr(col(Execution.lease_owner), 1, len(owner)) == owner
    held = select(col(Execution.id), col(Execution.shard)).where(_IS_RUNNING, is_held)
    shards = {row.id: row.shard for row in await connection.execute(held)}
    nodes: dict[str, list[str]] = {execution_id: [] for execution_id in shards}
    at_work = select(col(SpanRow.execution_id), col(SpanRow.node_id)).where(
        col(SpanRow.execution_id).in_(shards), col(SpanRow.status) == SpanStatus.RUNNING.value
    )
    for execution_id, node_id in (await connection.execute(at_work)).all():
        nodes[execution_id].append(node_id)
    last = dict.fromkeys(shards, 0)
    for table in (SpanRow, LogRow):
        ends = (
            select(col(table.execution_id), func.max(col(table.sequence)).label("last"))
            .where(col(table.execution_id).in_(shards))
            .group_by(col(table.execution_id))
        )
        for execution_id, sequence in (await connection.execute(ends)).all():
            last[execution_id] = max(last[execution_id], sequence)
    lines = [
        {
            "execution_id": execution_id,
            "sequence": last[execution_id] + 1,
            "shard": shards[execution_id],
            "id": ids.new_id("log"),
            "level": "warning",
            "message": f"{OUT_OF_MEMORY_MESSAGE} on {', '.join(names)}" if names else OUT_OF_MEMORY_MESSAGE,
            "node_id": names[0] if len(names) == 1 else None,
        }
        for execution_id, names in nodes.items()
    ]
    if lines:
        await connection.execute(insert(LogRow).values(created_at=DatabaseTime()), lines)
    return nodes
