"""Data sources for runs: looked up with the permissions of the user that a workflow runs for."""

from __future__ import annotations

from collections import OrderedDict
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog
from sqlalchemy import select
from sqlmodel import col

from concurrency.single_flight import SingleFlight
from engine.run_errors import NodeError
from models.column_types import build_row
from models.data_source import DataSource, decrypt_secrets, is_usable_by
from models.encryption import VaultError
from models.errors import DatabaseUnavailable
from models.tool_server import read_tools
from nodes.connections.data_source import ConnectionSource, ToolPin

if TYPE_CHECKING:
    from engine.services import RunCaller
    from models.database import Database
    from models.encryption import SecretVault

log = structlog.get_logger()

CACHE_SECONDS: Final = 2.0
"""Maximum delay until starting nodes see a change of a data source or of its shares."""
MAX_CACHED: Final = 1_000

_SourceKey: TypeAlias = tuple[str, str, str]
"""Organization, user and data source."""


class StoredDataSources:
    """Data sources in the database, cached briefly: a loop asks for the same data source every time."""

    def __init__(self, database: Database, vault: SecretVault) -> None:
        self._database = database
        self._vault = vault
        self._cached: OrderedDict[_SourceKey, tuple[float, ConnectionSource]] = OrderedDict()
        self._lookups: SingleFlight[_SourceKey, ConnectionSource] = SingleFlight(self._find)

    async def find(self, caller: RunCaller, source_id: str) -> ConnectionSource:
        """Return a data source with its decrypted secrets, cached for two seconds for each user.

        Raises `NodeError` if it is missing, the caller may not use it, its secrets can't be decrypted, or the
        database is unavailable; only the last may be retried.
        """
        key = (caller.organization_id, caller.user_id, source_id)
        cached = self._cached.get(key)
        if cached is not None and cached[0] > monotonic():
            return cached[1]
        return await self._lookups.get(key)

    def clear(self) -> None:
        """Drop all cached data sources, so that the next use reads them again."""
        self._cached.clear()
        self._lookups = SingleFlight(self._find)

    async def _find(self, key: _SourceKey) -> ConnectionSource:
        until = monotonic() + CACHE_SECONDS
        source = self._decrypt(await self._look_up(key))
        self._cached[key] = (until, source)
        self._cached.move_to_end(key)
        while len(self._cached) > MAX_CACHED:
            self._cached.popitem(last=False)
        return source

    async def _look_up(self, key: _SourceKey) -> DataSource:
        """Return the row of a data source that a user may use; raises `NodeError` as `find` does."""
        organization_id, user_id, source_id = key
        is_usable = is_usable_by(organization_id, user_id)
        statement = select(DataSource).where(col(DataSource.id) == source_id, is_usable)
        try:
            async with self._database.read() as connection:
                row = (await connection.execute(statement)).mappings().first()
        except DatabaseUnavailable as error:
            message = "The data source could not be looked up just now"
            raise NodeError(message, code="data-source-unavailable", retryable=True) from error
        if row is None:
            # The same text for absent and for forbidden data sources: guessing an id reveals nothing.
            message = f"There is no data source {source_id!r} that this run may use"
            raise NodeError(message, code="data-source-not-found")
        return build_row(DataSource, row)

    def _decrypt(self, row: DataSource) -> ConnectionSource:
        """Return a data source with decrypted secrets and its accepted tools; raises `NodeError` if the secrets can't
        be decrypted.
        """
        try:
            secrets = decrypt_secrets(self._vault, row)
        except VaultError as error:
            log.error("data source can't be opened", data_source_id=row.id, reason=str(error))  # noqa: TRY400 - a trace adds nothing
            message = f"The secrets of the data source {row.id!r} can't be decrypted: enter them again"
            raise NodeError(message, code="data-source-unreadable") from error
        return ConnectionSource(
            id=row.id,
            organization_id=row.organization_id,
            type=row.type,
            revision=row.revision,
            settings=row.settings,
            secrets=secrets,
            tools={
                name: ToolPin(tool.hash, tool.effect.value)
                for name, tool in read_tools(row.tools).accepted.items()
            },
        )
