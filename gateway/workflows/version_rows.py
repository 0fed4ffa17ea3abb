"""Rows of versions: numbered consecutively and immutable.

Callers have checked that the workflow is readable, so its id is sufficient here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import insert, select
from sqlmodel import col

from models.column_types import column_values
from models.workflow import WorkflowVersion

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.parameters import PageBounds

_HEAD = (
    col(WorkflowVersion.version),
    col(WorkflowVersion.version_tag),
    col(WorkflowVersion.description),
    col(WorkflowVersion.created_by),
    col(WorkflowVersion.created_at),
)


@dataclass(frozen=True, slots=True)
class VersionRow:
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
    return WorkflowVersion(**row) if row else None


async def tagged(connection: AsyncConnection, workflow_id: str, version_tag: str) -> VersionRow | None:
    """Return the version of a workflow with a tag, without its snapshot; None if there is none."""
    statement = select(*_HEAD).where(
        col(WorkflowVersion.workflow_id) == workflow_id, col(WorkflowVersion.version_tag) == version_tag
    )
    row = (await connection.execute(statement)).mappings().first()
    return VersionRow(**row) if row else None


async def add_version(connection: AsyncConnection, version: WorkflowVersion) -> None:
    """Insert a version of a workflow."""
    await connection.execute(insert(WorkflowVersion).values(column_values(version)))
