"""A data source as whoever connects to it sees it, and who finds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from engine.services import RunCaller
    from engine.values import Json


class ConnectionSource(msgspec.Struct, frozen=True):
    """One data source, with what opens it."""

    id: str
    organization_id: str
    type: str
    revision: int
    """Goes up with every change: what was opened for an earlier one is not used again."""
    settings: dict[str, Json]
    secrets: dict[str, str]

    def __repr__(self) -> str:
        return f"Source({self.id!r}, type={self.type!r}, revision={self.revision})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("id", self.id), ("type", self.type), ("revision", self.revision)]


class ConnectionSources(Protocol):
    """Finds data sources, as far as a caller may use them."""

    async def find(self, caller: RunCaller, source_id: str) -> ConnectionSource:
        """Return a data source; `NodeError` `data-source-not-found` for one that the caller may not read."""
