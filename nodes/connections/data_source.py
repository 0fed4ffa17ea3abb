"""Data source with its secrets, and the lookup that finds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from engine.services import RunCaller
    from engine.values import Json


class ConnectionSource(msgspec.Struct, frozen=True):
    """Data source with decrypted secrets."""

    id: str
    organization_id: str
    type: str
    revision: int
    """Increases with every change; connections of an earlier revision are not reused."""
    settings: dict[str, Json]
    secrets: dict[str, str]

    def __repr__(self) -> str:
        return f"Source({self.id!r}, type={self.type!r}, revision={self.revision})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("id", self.id), ("type", self.type), ("revision", self.revision)]


class ConnectionSources(Protocol):
    """Lookup of data sources that a caller may use."""

    async def find(self, caller: RunCaller, source_id: str) -> ConnectionSource:
        """Return a data source; raises `NodeError` `data-source-not-found` if it is missing or not permitted."""
