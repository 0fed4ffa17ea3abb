"""Data source with its secrets, and the lookup that finds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.services import RunCaller
    from engine.values import Json


class ToolPin(msgspec.Struct, frozen=True):
    """Tool of a tool server that people have accepted."""

    hash: str
    """SHA-256 of the accepted definition, in hexadecimal."""
    effect: str
    """`read` or `write`, as they have decided."""


class ConnectionSource(msgspec.Struct, frozen=True, omit_defaults=True):
    """Data source with decrypted secrets."""

    id: str
    organization_id: str
    type: str
    revision: int
    """Increases with every change; connections of an earlier revision are not reused."""
    settings: dict[str, Json]
    secrets: dict[str, str]
    tools: Mapping[str, ToolPin] = {}
    """Accepted tools of a tool server, by name."""

    def __repr__(self) -> str:
        return f"Source({self.id!r}, type={self.type!r}, revision={self.revision})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("id", self.id), ("type", self.type), ("revision", self.revision)]


class ConnectionSources(Protocol):
    """Lookup of data sources that a caller may use."""

    async def find(self, caller: RunCaller, source_id: str) -> ConnectionSource:
        """Return a data source with its decrypted secrets.

        Raises `NodeError` `data-source-not-found` if it is missing or the caller may not use it.
        """
