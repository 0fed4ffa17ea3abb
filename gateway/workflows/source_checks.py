"""Checks of the data sources of a workflow before it becomes active.

Without them, senders would be refused because of the owner's mistake. No server is contacted: the test of a
data source does that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlmodel import col

from engine.graph import ParsedGraph
from engine.resource_scopes import list_references
from gateway.http import errors
from journal.definition_snapshot import build_definition
from models.data_source import DataSource, decrypt_secrets, is_usable_by
from models.encryption import VaultError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.node_lookup import NodeTypeLookup
    from engine.resource_scopes import ResourceReference
    from engine.values import Json
    from gateway.workflows.stored_workflow import StoredWorkflow
    from models.encryption import SecretVault


def named_sources(
    stored: StoredWorkflow, catalog: NodeTypeLookup, *, only: Collection[str]
) -> Sequence[ResourceReference]:
    """Return every field of these nodes that names a data source."""
    nodes = [node for node in stored.nodes if str(node["id"]) in only]
    graph = ParsedGraph.from_stored(build_definition(nodes, [], {}))
    return [one for one in list_references(graph, catalog) if one.kind == "datasources"]


async def require_usable(
    connection: AsyncConnection,
    stored: StoredWorkflow,
    named: Sequence[ResourceReference],
    vault: SecretVault,
) -> None:
    """Raise 422 unless each data source exists, is usable by the owner, decrypts, and has a suitable type."""
    if not named:
        return
    owner = stored.workflow
    statement = select(DataSource).where(
        col(DataSource.id).in_({one.id for one in named}), is_usable_by(owner.organization_id, owner.owner_id)
    )
    rows = (await connection.execute(statement)).mappings()
    found = {row["id"]: DataSource(**row) for row in rows}
    problems = [problem for one in named if (problem := _problem(one, found.get(one.id), vault)) is not None]
    if problems:
        raise errors.invalid(problems)


def _problem(
    reference: ResourceReference, source: DataSource | None, vault: SecretVault
) -> dict[str, Json] | None:
    path = f"nodes.{reference.node_id}.config.{reference.path}"
    wanted = " or ".join(reference.source_types)
    if source is None:
        message = (
            f"{path} names no data source that the workflow's owner may use: choose one of the type {wanted}"
        )
        return errors.problem(path, "data-source-not-found", message)
    if source.type not in reference.source_types:
        message = (
            f"{path} names a data source of the type {source.type}; the node needs one of the type {wanted}"
        )
        return errors.problem(path, "wrong-data-source", message)
    try:
        decrypt_secrets(vault, source)
    except VaultError:
        message = f"{path} names a data source with secrets that can't be decrypted: set them again"
        return errors.problem(path, "data-source-unreadable", message)
    return None
