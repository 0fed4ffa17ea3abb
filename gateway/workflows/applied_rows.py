"""Rows of applied workflows: their sets, and the workflows that a request names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import delete, insert, select
from sqlmodel import col

from gateway.workflows import workflow_rows
from models.access import Organization
from models.applied_workflow import AppliedWorkflow
from models.column_types import build_row, column_values
from models.data_source import DataSource, is_usable_by
from models.workflow import Workflow, is_readable_by

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.workflows.stored_workflow import StoredWorkflow
    from models.access import ApiCaller


async def lock_organization(connection: AsyncConnection, organization_id: str) -> None:
    """Lock the organization's row until the transaction ends, so that its `apply` requests plan one after the other.

    Names of workflows have no unique index that would prevent two of them from creating the same workflow.
    """
    statement = select(col(Organization.id)).where(col(Organization.id) == organization_id)
    await connection.execute(statement.with_for_update())


async def find_named(
    connection: AsyncConnection, caller: ApiCaller, names: Collection[str]
) -> Mapping[str, Sequence[StoredWorkflow]]:
    """Return the workflows with these names that the caller may read, keyed by name, locked until the transaction ends.

    Templates and deleted workflows are left out. A name may have several workflows; a name without any is omitted.
    """
    statement = (
        select(col(Workflow.id))
        .where(is_readable_by(caller), col(Workflow.is_template).is_(False), col(Workflow.name).in_(names))
        .order_by(col(Workflow.id))
    )
    found: dict[str, list[StoredWorkflow]] = {}
    for stored in await _read_all(connection, caller, (await connection.scalars(statement)).all()):
        found.setdefault(stored.workflow.name, []).append(stored)
    return found


async def find_members(
    connection: AsyncConnection, caller: ApiCaller, set_name: str
) -> Sequence[StoredWorkflow]:
    """Return the workflows of a set of `apply` that the caller may read, each locked until the transaction ends.

    A set is a named group of workflows that are applied together. Deleted workflows are left out.
    """
    statement = (
        select(col(AppliedWorkflow.workflow_id))
        .where(
            col(AppliedWorkflow.organization_id) == caller.organization_id,
            col(AppliedWorkflow.set_name) == set_name,
        )
        .order_by(col(AppliedWorkflow.workflow_id))
    )
    return await _read_all(connection, caller, (await connection.scalars(statement)).all())


async def _read_all(
    connection: AsyncConnection, caller: ApiCaller, ids: Iterable[str]
) -> Sequence[StoredWorkflow]:
    """Return the workflows with these ids that the caller may read, with graphs and shares, in the order of the ids;
    each is locked until the transaction ends.
    """
    found = []
    for workflow_id in ids:
        await workflow_rows.lock_workflow(connection, workflow_id, caller)
        stored = await workflow_rows.find_workflow(connection, workflow_id, caller)
        if stored is not None:
            found.append(stored)
    return found


async def find_apply_records(
    connection: AsyncConnection, workflow_ids: Collection[str]
) -> Mapping[str, AppliedWorkflow]:
    """Return the record of the last `apply` of each workflow (set, content hash, author) by workflow id.

    Workflows that were never applied are omitted.
    """
    statement = select(AppliedWorkflow).where(col(AppliedWorkflow.workflow_id).in_(workflow_ids))
    rows = (await connection.execute(statement)).mappings()
    return {row["workflow_id"]: build_row(AppliedWorkflow, row) for row in rows}


async def replace_apply_record(connection: AsyncConnection, applied: AppliedWorkflow) -> None:
    """Store the record of the last `apply` of a workflow in place of the earlier one, if any."""
    await delete_apply_record(connection, applied.workflow_id)
    await connection.execute(insert(AppliedWorkflow).values(column_values(applied)))


async def delete_apply_record(connection: AsyncConnection, workflow_id: str) -> None:
    """Delete the record of the last `apply` of a workflow, if any; it then counts as never applied."""
    await connection.execute(delete(AppliedWorkflow).where(col(AppliedWorkflow.workflow_id) == workflow_id))


async def data_source_ids(
    connection: AsyncConnection, caller: ApiCaller, names: Collection[str]
) -> Mapping[str, Sequence[str]]:
    """Return the ids of the data sources with these names that the caller may use, by name.

    A name may have several ids; a name without any is omitted.
    """
    statement = select(col(DataSource.name), col(DataSource.id)).where(
        col(DataSource.name).in_(names), is_usable_by(caller.organization_id, caller.user_id)
    )
    found: dict[str, list[str]] = {}
    for row in await connection.execute(statement):
        found.setdefault(row.name, []).append(row.id)
    return found


def build_apply_record(
    caller: ApiCaller, workflow_id: str, set_name: str, content_hash: str, status: str | None, now: datetime
) -> AppliedWorkflow:
    """Return the record of an `apply` of a workflow, not stored yet; `status` None means that the request has none."""
    return AppliedWorkflow(
        workflow_id=workflow_id,
        organization_id=caller.organization_id,
        set_name=set_name,
        content_hash=content_hash,
        status=status,
        applied_by=caller.user_id,
        applied_at=now,
    )
