"""Catalogs of organizations: the library with the custom node types of each, read again when they change."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from sqlalchemy import bindparam, select, tuple_
from sqlmodel import col

from models.access import Organization
from models.custom_node_type import CustomNodeType
from nodes import custom_types

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.node_api import NodeType
    from models.database import Database
    from nodes.catalog import NodeCatalog

MAX_ORGANIZATIONS: Final = 500
READ_TOGETHER: Final = 200


class VersionState(Struct, frozen=True):
    """State of one version of a custom type: its content, and whether it is deprecated."""

    hash: str
    is_deprecated: bool


class CachedCatalog(Struct):
    """Catalog, with the versions that it was built from."""

    versions: Mapping[tuple[str, str], VersionState]
    node_types: Mapping[tuple[str, str], NodeType]
    documents: Mapping[tuple[str, str], str]
    default_model_id: str | None
    catalog: NodeCatalog


@cache
def _select_versions() -> Select[*tuple[Any, ...]]:
    """Return the statement that reads the versions of custom types of the organization `organization_id`, and its
    default language model.

    It is one for both, built once: it is executed before each run whose workflow isn't cached.
    """
    from models.ai_model import AiSettings  # noqa: PLC0415 - loaded with the first workflow

    return (
        select(
            col(CustomNodeType.type),
            col(CustomNodeType.version),
            col(CustomNodeType.hash),
            col(CustomNodeType.is_deprecated),
            col(AiSettings.default_model_id),
        )
        .select_from(Organization)
        .outerjoin(CustomNodeType, col(CustomNodeType.organization_id) == col(Organization.id))
        .outerjoin(AiSettings, col(AiSettings.organization_id) == col(Organization.id))
        .where(col(Organization.id) == bindparam("organization_id"))
    )


class OrganizationCatalogs:
    """Catalogs of the organizations that this process serves. Each use asks the database for changes."""

    def __init__(self, database: Database, base: NodeCatalog) -> None:
        self._database = database
        self.base = base
        """Node types of the library, which every organization has."""
        self._cached: OrderedDict[str, CachedCatalog] = OrderedDict()

    async def of(self, organization_id: str) -> NodeCatalog:
        """Return the catalog of an organization with its custom node types; the same object as before if
        nothing has changed.

        It asks the database each time. Raises `DatabaseUnavailable`.
        """
        async with self._database.read() as connection:
            return await self.read(connection, organization_id)

    async def read(self, connection: AsyncConnection, organization_id: str) -> NodeCatalog:
        """Return the catalog of an organization as a transaction sees its custom node types.

        Without custom types and a default language model it is the catalog of the library.
        """
        rows = await connection.execute(_select_versions(), {"organization_id": organization_id})
        versions: dict[tuple[str, str], VersionState] = {}
        default_model_id: str | None = None
        for row in rows:
            default_model_id = row.default_model_id
            if row.type is not None:
                versions[row.type, row.version] = VersionState(row.hash, row.is_deprecated)
        if not versions and default_model_id is None:
            self._cached.pop(organization_id, None)
            return self.base
        cached = self._cached.get(organization_id)
        if cached is None or cached.versions != versions or cached.default_model_id != default_model_id:
            cached = await self._build(connection, organization_id, versions, default_model_id, cached)
            self._cached[organization_id] = cached
        self._cached.move_to_end(organization_id)
        while len(self._cached) > MAX_ORGANIZATIONS:
            self._cached.popitem(last=False)
        return cached.catalog

    async def _build(
        self,
        connection: AsyncConnection,
        organization_id: str,
        versions: Mapping[tuple[str, str], VersionState],
        default_model_id: str | None,
        earlier: CachedCatalog | None,
    ) -> CachedCatalog:
        """Return the catalog of an organization with its default language model, and with these versions of its
        custom node types, by type and version.

        Documents that an earlier catalog has with the same hash aren't read again. Versions deleted meanwhile
        are left out.
        """
        known = {} if earlier is None else earlier.versions
        documents = {
            key: earlier.documents[key]
            for key, state in versions.items()
            if earlier is not None and key in known and known[key].hash == state.hash
        }
        missing = [key for key in versions if key not in documents]
        key_columns = tuple_(col(CustomNodeType.type), col(CustomNodeType.version))
        for start in range(0, len(missing), READ_TOGETHER):
            statement = select(
                col(CustomNodeType.type), col(CustomNodeType.version), col(CustomNodeType.document)
            ).where(
                col(CustomNodeType.organization_id) == organization_id,
                key_columns.in_(missing[start : start + READ_TOGETHER]),
            )
            documents |= {
                (row.type, row.version): row.document for row in await connection.execute(statement)
            }
        node_types: dict[tuple[str, str], NodeType] = {}
        for key, document in documents.items():
            state = versions[key]
            if earlier is not None and known.get(key) == state:
                node_types[key] = earlier.node_types[key]
            else:
                node_types[key] = custom_types.decode_node_type(
                    document, state.hash, is_deprecated=state.is_deprecated
                )
        catalog = custom_types.build_catalog(
            self.base, documents, list(node_types.values()), default_model_id
        )
        # A version deleted between the two queries is missing in the documents: the next use reads again.
        found = {key: state for key, state in versions.items() if key in documents}
        return CachedCatalog(found, node_types, documents, default_model_id, catalog)
