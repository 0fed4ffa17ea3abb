"""Bulk inserts of runs, as rows that the database generates."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from models import ids
from models.database import Database

COLUMNS = (
    "id, shard, organization_id, workflow_id, user_id, status, target, trigger_type, definition_hash, rank, queue_turn,"
    " is_fresh, token, attempt, timeout_microseconds, completed_nodes, total_nodes, key_id, has_journal, channel,"
    " created_at, updated_at, started_at, depth, wait_answer_count"
)


@dataclass(frozen=True)
class BacklogRows:
    """Runs that are alike but for their ids and ranks."""

    organization_id: str
    workflow_id: str
    count: int
    status: str = "pending"
    target: str = "shared"
    is_fresh: bool = True
    started_at: int | None = None
    turn: int | None = None
    shard: int = 1
    user_id: str = "user_1"
    definition_hash: str = "hash"
    rank: str = "n"
    """An expression of the number `n` of a row, from 1 on."""
    prefix: str = field(default_factory=lambda: ids.new_id("exec"))


async def fill(database: Database, rows: BacklogRows) -> None:
    """Insert runs by the thousand."""
    if database.engine.dialect.name == "postgresql":
        numbers = f"generate_series(1, CAST({rows.count} AS bigint)) AS s (n)"
    else:
        counted = f"SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {rows.count}"
        numbers = f"(WITH RECURSIVE s (n) AS ({counted}) SELECT n FROM s)"
    values = (
        ":prefix || '_' || n, :shard, :organization_id, :workflow_id, :user_id, :status, :target, 'api',"
        " :definition_hash,"
        f" {rows.rank}, :queue_turn, :is_fresh, 0, 0, 3600000000, 0, 1, :prefix || '_' || n, false, '', n, n,"
        " CAST(:started_at AS bigint), 0, 0"
    )
    fields = {
        "prefix": rows.prefix,
        "shard": rows.shard,
        "organization_id": rows.organization_id,
        "workflow_id": rows.workflow_id,
        "user_id": rows.user_id,
        "status": rows.status,
        "target": rows.target,
        "definition_hash": rows.definition_hash,
        "queue_turn": ids.turn_of_workflow(rows.workflow_id) if rows.turn is None else rows.turn,
        "is_fresh": rows.is_fresh,
        "started_at": rows.started_at,
    }

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(
            text(f"INSERT INTO execution ({COLUMNS}) SELECT {values} FROM {numbers}"), fields
        )
        await connection.execute(
            text(
                "INSERT INTO execution_data"
                " (execution_id, shard, trigger, config, organization_id, workflow_id, created_at)"
                " SELECT :prefix || '_' || n, :shard, '{\"body\":{}}', '{}', :organization_id, :workflow_id, n"
                f" FROM {numbers}"
            ),
            {name: fields[name] for name in ("prefix", "shard", "organization_id", "workflow_id")},
        )

    await database.transaction(work)
