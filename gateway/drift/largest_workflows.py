"""Workflows with the most stored runs, by estimates that read no large table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from sqlalchemy import func, literal_column, select, text
from sqlmodel import col

from models.execution import Execution
from models.workflow import Workflow, is_readable_by

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import ApiCaller

SHOWN: Final = 10
SAMPLED_ROWS: Final = 500
_POSITIONS: Final = tuple(Random(0).random() for _ in range(SAMPLED_ROWS))  # noqa: S311 - spreads a sample
"""Positions of the sampled rows: always the same ones, so that numbers change with the rows alone."""
_POSTGRESQL_SHARES: Final = text(
    "SELECT most_common_vals::text::text[] AS ids, most_common_freqs AS shares,"
    " (SELECT reltuples FROM pg_class WHERE oid = 'execution'::regclass) AS rows FROM pg_stats"
    " WHERE schemaname = current_schema() AND tablename = 'execution' AND attname = 'workflow_id'"
)
_SQLITE_RANGE: Final = text(
    "SELECT (SELECT min(rowid) FROM execution) AS first, (SELECT max(rowid) FROM execution) AS last"
)


class WorkflowRunCount(Struct, frozen=True):
    """Workflow with many stored runs."""

    workflow_id: str
    organization_id: str | None
    """None for a workflow that was deleted."""
    name: str | None
    """None for workflows that the caller may not read."""
    runs: int


async def find_largest(connection: AsyncConnection, caller: ApiCaller) -> Sequence[WorkflowRunCount]:
    """Return up to ten workflows of all organizations with their estimated runs, the one with the most runs first.

    The name is None for a workflow that `caller` may not read; if the workflow no longer exists, its name and
    organization are both None. The estimates come from PostgreSQL's statistics (empty before its first analysis) or
    from a sample of SQLite's rows.
    """
    is_postgresql = connection.dialect.name == "postgresql"
    runs = await (_read_statistics(connection) if is_postgresql else _sample_rows(connection))
    largest = sorted(runs.items(), key=lambda one: (-one[1], one[0]))[:SHOWN]
    named = select(
        *(col(Workflow.id), col(Workflow.organization_id), col(Workflow.name)),
        is_readable_by(caller).label("is_readable"),
    ).where(col(Workflow.id).in_([workflow_id for workflow_id, _ in largest]))
    found = {row.id: row for row in await connection.execute(named)}
    return [
        WorkflowRunCount(
            workflow_id=workflow_id,
            organization_id=row.organization_id if (row := found.get(workflow_id)) else None,
            name=row.name if row and row.is_readable else None,
            runs=number,
        )
        for workflow_id, number in largest
    ]


async def _read_statistics(connection: AsyncConnection) -> Mapping[str, int]:
    """Return the estimated runs of the most frequent workflows by id, by PostgreSQL's statistics; {} before its first
    analysis.
    """
    row = (await connection.execute(_POSTGRESQL_SHARES)).first()
    if row is None or row.ids is None or row.rows < 0:
        return {}
    return {
        workflow_id: round(share * row.rows) for workflow_id, share in zip(row.ids, row.shares, strict=True)
    }


async def _sample_rows(connection: AsyncConnection) -> Mapping[str, int]:
    """Return the estimated runs by workflow id, from a sample of SQLite's rows; exact for up to 500 rows."""
    bounds = (await connection.execute(_SQLITE_RANGE)).one()
    if bounds.first is None:
        return {}
    size = bounds.last - bounds.first + 1
    sampled = (
        range(bounds.first, bounds.last + 1)
        if size <= SAMPLED_ROWS
        else sorted({bounds.first + int(position * size) for position in _POSITIONS})
    )
    statement = (
        select(col(Execution.workflow_id), func.count().label("number"))
        .where(literal_column("rowid").in_(sampled))
        .group_by(col(Execution.workflow_id))
    )
    scale = size / len(sampled)
    return {row.workflow_id: round(row.number * scale) for row in await connection.execute(statement)}
