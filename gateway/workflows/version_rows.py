"""Rows of versions: numbered consecutively and immutable.

Callers have checked that the workflow is readable, so its id is sufficient here.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import func, insert, select
from sqlmodel import col

from models.column_types import build_row, column_values
from models.execution import Execution
from models.workflow import WorkflowVersion

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.parameters import PageBounds

_HEAD = (
    col(WorkflowVersion.version),
    col(WorkflowVersion.version_tag),
    col(WorkflowVersion.description),
    col(WorkflowVersion.created_by),
    col(WorkflowVersion.created_at),
)


class VersionRow(Struct, frozen=True):
    """Version without its snapshot."""

    version: int
    version_tag: str
    description: str
    created_by: str
    created_at: datetime


async def list_versions(
    connection: AsyncConnection, workflow_id: str, part: PageBounds
) -> Sequence[VersionRow]:
    """Return the page `part` of a workflow's versions without their snapshots, the oldest first."""
    rows = await connection.execute(
        select(*_HEAD)
        .where(col(WorkflowVersion.workflow_id) == workflow_id)
        .order_by(col(WorkflowVersion.version))
        .limit(part.limit)
        .offset(part.offset)
    )
    return [VersionRow(**row) for row in rows.mappings()]


async def find_version(connection: AsyncConnection, workflow_id: str, version: int) -> WorkflowVersion | None:
    """Return a version of a workflow by its number, with its snapshot; None if it is missing."""
    statement = select(WorkflowVersion).where(
        col(WorkflowVersion.workflow_id) == workflow_id, col(WorkflowVersion.version) == version
    )
    row = (await connection.execute(statement)).mappings().first()
    return build_row(WorkflowVersion, row) if row else None


async def find_tagged(connection: AsyncConnection, workflow_id: str, version_tag: str) -> VersionRow | None:
    """Return the version of a workflow with a tag, without its snapshot; None if there is none."""
    statement = select(*_HEAD).where(
        col(WorkflowVersion.workflow_id) == workflow_id, col(WorkflowVersion.version_tag) == version_tag
    )
    row = (await connection.execute(statement)).mappings().first()
    return VersionRow(**row) if row else None


class VersionOfRun(Struct, frozen=True):
    """Version of its workflow that a run executes."""

    number: int | None = None
    """None if no version has its definition."""
    base: int | None = None
    """Newest version when it was accepted, if `number` is None."""


async def find_versions_of_runs(
    connection: AsyncConnection, shard: int, execution_ids: Sequence[str]
) -> dict[str, int]:
    """Return the numbers of the versions that runs of one shard execute, by the ids of the runs.

    Runs whose definition no version has are left out. Of versions with the same definition, it is the newest that
    was stored before the run, or else the first.
    """
    if not execution_ids:
        return {}
    rows = await connection.execute(select_versions_of_runs(shard, execution_ids))
    return {row.id: row.version for row in rows if row.version is not None}


async def find_version_of_run(connection: AsyncConnection, execution: Execution) -> VersionOfRun:
    """Return the version that a run executes.

    For a run without one, except for a test run, `base` is the newest version that was stored when it was accepted.
    """
    found = await find_versions_of_runs(connection, execution.shard, [execution.id])
    if execution.id in found or execution.is_private:
        return VersionOfRun(found.get(execution.id))
    base = await connection.scalar(select_newest_version(execution.workflow_id, execution.created_at))
    return VersionOfRun(None, base)


def select_versions_of_runs(shard: int, execution_ids: Sequence[str]) -> Select[*tuple[Any, ...]]:
    """Return the statement for the `id` and `version` of runs: the number as in `find_versions_of_runs`, null if no
    version has the definition of the run.

    Runs that don't exist in the shard have no row.
    """
    version = func.coalesce(_VERSION_BEFORE_RUN, _FIRST_VERSION_OF_RUN).label("version")
    columns: Sequence[Any] = (col(Execution.id), version)
    return select(*columns).where(col(Execution.id).in_(execution_ids), col(Execution.shard) == shard)


def select_newest_version(workflow_id: str, moment: datetime) -> Select[*tuple[Any, ...]]:
    """Return the statement for the number of the newest version of a workflow that was stored at or before `moment`."""
    return (
        select(col(WorkflowVersion.version))
        .where(col(WorkflowVersion.workflow_id) == workflow_id, col(WorkflowVersion.created_at) <= moment)
        .order_by(col(WorkflowVersion.created_at).desc(), col(WorkflowVersion.version).desc())
        .limit(1)
    )


def _select_version(
    order: Sequence[ColumnElement[Any]], *conditions: ColumnElement[bool]
) -> ColumnElement[Any]:
    """Return the subquery for the first version, by this order and with these conditions, with the definition of the
    outer query's execution.
    """
    return (
        select(col(WorkflowVersion.version))
        .where(
            col(WorkflowVersion.workflow_id) == col(Execution.workflow_id),
            col(WorkflowVersion.definition_hash) == col(Execution.definition_hash),
            *conditions,
        )
        .order_by(*order)
        .limit(1)
        .correlate(Execution)
        .scalar_subquery()
    )


_VERSION_BEFORE_RUN: Final = _select_version(
    (col(WorkflowVersion.created_at).desc(), col(WorkflowVersion.version).desc()),
    col(WorkflowVersion.created_at) <= col(Execution.created_at),
)
_FIRST_VERSION_OF_RUN: Final = _select_version(
    (col(WorkflowVersion.created_at).asc(), col(WorkflowVersion.version).asc())
)


async def add_version(connection: AsyncConnection, version: WorkflowVersion) -> None:
    """Insert a version of a workflow."""
    await connection.execute(insert(WorkflowVersion).values(column_values(version)))
