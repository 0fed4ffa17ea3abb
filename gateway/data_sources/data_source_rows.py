"""Queries of data sources, each restricted to the caller's organization; the revision guards changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self

from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import Text, and_, delete, func, insert, or_, select, type_coerce, update
from sqlalchemy.exc import IntegrityError
from sqlmodel import col

from models.ai_model import AiModel
from models.ai_model import is_readable_by as model_readable_by
from models.column_types import build_row
from models.data_source import DataSource, DataSourceShare, is_readable_by, is_writable_by
from models.deployment import Deployment
from models.workflow import Definition, Workflow, WorkflowGraph
from models.workflow import is_readable_by as workflow_readable_by

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from gateway.http.parameters import PageBounds
    from models.access import ApiCaller
    from models.data_source_types import DataSourceType

SORTABLE: Mapping[str, SQLColumnExpression[Any]] = {
    "createdAt": col(DataSource.created_at),
    "updatedAt": col(DataSource.updated_at),
    "name": col(DataSource.name),
    "type": col(DataSource.type),
}


class DataSourceNameTaken(ValueError):
    """Another data source of the owner has this name."""


class StoredDataSource(Struct, frozen=True):
    """Data source with its shares."""

    source: DataSource
    shared_with: Mapping[str, datetime]
    """Time of each share by user id, in the order of the shares."""

    def with_columns(self, **changes: Any) -> Self:  # noqa: ANN401 - columns of any type
        """Return a copy of the data source with changed columns of its own row; shares stay, and nothing is
        written.
        """
        return replace(self, source=DataSource(**{**self.source.model_dump(), **changes}))


async def lock(connection: AsyncConnection, source_id: str, caller: ApiCaller) -> None:
    """Lock a data source of the caller's organization against other changes until the transaction ends.

    Nothing is locked if it is missing.
    """
    row = select(col(DataSource.id)).where(
        col(DataSource.id) == source_id, col(DataSource.organization_id) == caller.organization_id
    )
    await connection.execute(row.with_for_update())


async def find(connection: AsyncConnection, source_id: str, caller: ApiCaller) -> StoredDataSource | None:
    """Return a data source with its shares; None if it is missing or the caller may not read it."""
    statement = select(DataSource).where(col(DataSource.id) == source_id, is_readable_by(caller))
    row = (await connection.execute(statement)).mappings().first()
    if row is None:
        return None
    shared_with = await _read_shares(connection, [source_id])
    return StoredDataSource(build_row(DataSource, row), shared_with.get(source_id, {}))


async def find_named(connection: AsyncConnection, source: DataSource) -> str | None:
    """Return the id of the data source with the owner, name and type of `source`; None without one."""
    statement = select(col(DataSource.id)).where(
        col(DataSource.owner_id) == source.owner_id,
        col(DataSource.name) == source.name,
        col(DataSource.type) == source.type,
    )
    return await connection.scalar(statement)


async def page(
    connection: AsyncConnection,
    caller: ApiCaller,
    kind: DataSourceType | None,
    part: PageBounds,
    order: ColumnElement[Any],
) -> tuple[int, list[StoredDataSource]]:
    """Return the number of data sources that the caller may read, and those of the page `part` in `order`.

    With `kind`, only those of this type; None means all types.
    """
    conditions = [is_readable_by(caller)]
    if kind is not None:
        conditions.append(col(DataSource.type) == kind)
    count = await connection.scalar(select(func.count()).select_from(DataSource).where(*conditions))
    rows = await connection.execute(
        select(DataSource)
        .where(*conditions)
        .order_by(order, col(DataSource.id).desc())
        .limit(part.limit)
        .offset(part.offset)
    )
    sources = [build_row(DataSource, row) for row in rows.mappings()]
    shared_with = await _read_shares(connection, [source.id for source in sources])
    return count or 0, [StoredDataSource(source, shared_with.get(source.id, {})) for source in sources]


async def _read_shares(
    connection: AsyncConnection, source_ids: Sequence[str]
) -> dict[str, dict[str, datetime]]:
    """Return the time of each share, by source id and user id, the first share first; unshared sources are
    absent.
    """
    found: dict[str, dict[str, datetime]] = {}
    for row in await connection.execute(
        select(
            col(DataSourceShare.data_source_id), col(DataSourceShare.user_id), col(DataSourceShare.shared_at)
        )
        .where(col(DataSourceShare.data_source_id).in_(source_ids))
        .order_by(col(DataSourceShare.shared_at), col(DataSourceShare.user_id))
    ):
        found.setdefault(row.data_source_id, {})[row.user_id] = row.shared_at
    return found


async def count(connection: AsyncConnection, organization_id: str) -> int:
    """Return the number of data sources of an organization."""
    statement = select(func.count()).where(col(DataSource.organization_id) == organization_id)
    return await connection.scalar(statement) or 0


async def exists(connection: AsyncConnection, source_id: str, *, revision: int | None = None) -> bool:
    """Return whether a data source exists, in this revision unless it is None; visibility is not checked."""
    statement = select(col(DataSource.id)).where(col(DataSource.id) == source_id)
    if revision is not None:
        statement = statement.where(col(DataSource.revision) == revision)
    return await connection.scalar(statement) is not None


async def add(connection: AsyncConnection, source: DataSource) -> None:
    """Insert the row of a data source; raises `DataSourceNameTaken` if its owner has another one of this name."""
    try:
        await connection.execute(insert(DataSource).values(source.model_dump()))
    except IntegrityError as error:
        raise DataSourceNameTaken(source.name) from error


async def save(
    connection: AsyncConnection, before: StoredDataSource, after: StoredDataSource, caller: ApiCaller
) -> bool:
    """Write the differences of two states unless the data source has changed since `before`; return whether
    they were written.

    Shares that were added or removed are written too. False also if the caller may not write it. Raises
    `DataSourceNameTaken`.
    """
    source = after.source
    written = (
        update(DataSource)
        .where(
            col(DataSource.id) == source.id,
            col(DataSource.revision) == before.source.revision,
            is_writable_by(caller),
        )
        .values(source.model_dump())
    )
    try:
        result = await connection.execute(written)
    except IntegrityError as error:
        raise DataSourceNameTaken(source.name) from error
    if result.rowcount != 1:
        return False
    if gone := before.shared_with.keys() - after.shared_with.keys():
        await connection.execute(
            delete(DataSourceShare).where(
                col(DataSourceShare.data_source_id) == source.id, col(DataSourceShare.user_id).in_(gone)
            )
        )
    if added := after.shared_with.keys() - before.shared_with.keys():
        shares = [
            {"data_source_id": source.id, "user_id": user_id, "shared_at": after.shared_with[user_id]}
            for user_id in added
        ]
        await connection.execute(insert(DataSourceShare), shares)
    return True


async def remove(connection: AsyncConnection, source: DataSource) -> None:
    """Delete a data source with its secrets and shares in the transaction; no copy of them remains."""
    await connection.execute(delete(DataSourceShare).where(col(DataSourceShare.data_source_id) == source.id))
    await connection.execute(delete(DataSource).where(col(DataSource.id) == source.id))


async def has_referring_workflows(connection: AsyncConnection, organization_id: str, object_id: str) -> bool:
    """Return whether a workflow of the organization that is not deleted has the id of a data source or model in its
    graph or deployed version.
    """
    statement = _select_referring_workflows(organization_id, object_id)
    return await connection.scalar(statement.limit(1)) is not None


async def list_referring_workflows(
    connection: AsyncConnection, object_id: str, caller: ApiCaller, limit: int
) -> list[tuple[str, str]]:
    """Return ids and names of at most `limit` workflows that the caller may read, with the id of a data source or model
    in their graph or deployed version.
    """
    statement = (
        _select_referring_workflows(caller.organization_id, object_id)
        .where(workflow_readable_by(caller))
        .order_by(col(Workflow.id))
        .limit(limit)
    )
    return [(row.id, row.name) for row in await connection.execute(statement)]


async def has_models(connection: AsyncConnection, source_id: str) -> bool:
    """Return whether a language model has its address and key from a data source."""
    statement = select(col(AiModel.id)).where(col(AiModel.data_source_id) == source_id)
    return await connection.scalar(statement.limit(1)) is not None


async def list_models(
    connection: AsyncConnection, source_id: str, caller: ApiCaller, limit: int
) -> list[tuple[str, str]]:
    """Return ids and names of at most `limit` language models of a data source that the caller may use."""
    statement = (
        select(col(AiModel.id), col(AiModel.name))
        .where(col(AiModel.data_source_id) == source_id, model_readable_by(caller))
        .order_by(col(AiModel.id))
        .limit(limit)
    )
    return [(row.id, row.name) for row in await connection.execute(statement)]


def _select_referring_workflows(organization_id: str, object_id: str) -> Any:  # noqa: ANN401 - a statement with these columns
    """Return the query of ids and names of the organization's workflows, without deleted ones, that have the id of a
    data source or model as a whole JSON string in their graph or deployed version.
    """
    nodes = type_coerce(col(WorkflowGraph.nodes), Text)
    deployed = select_referring_deployments(organization_id, object_id)
    return (
        select(col(Workflow.id), col(Workflow.name))
        .join(WorkflowGraph, col(WorkflowGraph.workflow_id) == col(Workflow.id))
        .where(
            col(Workflow.organization_id) == organization_id,
            col(Workflow.deleted_at).is_(None),
            or_(
                nodes.contains(f'"{object_id}"', autoescape=True),
                col(Workflow.id).in_(deployed.with_only_columns(col(Deployment.workflow_id))),
            ),
        )
    )


def select_referring_deployments(organization_id: str, object_id: str) -> Select[*tuple[Any, ...]]:
    """Return the query of an organization's deployments whose version contains the id of a data source or model."""
    is_definition = and_(
        col(Definition.organization_id) == col(Deployment.organization_id),
        col(Definition.hash) == col(Deployment.definition_hash),
    )
    return (
        select(col(Deployment.workflow_id), col(Deployment.version))
        .join(Definition, is_definition)
        .where(
            col(Deployment.organization_id) == organization_id,
            col(Deployment.is_deployed),
            col(Definition.body).contains(f'"{object_id}"', autoescape=True),
        )
    )
