"""Tools of a tool server as its data source stores them: those that it has listed, and those that were accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec

from json_text import decoding


class ToolEffect(StrEnum):
    """Effect of a tool, as a person has decided; claims of its server don't count."""

    READ = "read"
    WRITE = "write"


class AcceptedTool(msgspec.Struct, frozen=True, rename="camel"):
    """Tool that workflows may call."""

    definition: Mapping[str, Any]
    """Definition that the person has seen, with its `hash`."""
    effect: ToolEffect
    accepted_by: str
    """Id of the user."""
    accepted_at: datetime

    @property
    def hash(self) -> str:
        """SHA-256 of the definition, in hexadecimal, which is stored in it."""
        return str(self.definition["hash"])


class ListedTools(msgspec.Struct, frozen=True, rename="camel"):
    """Tools of one server."""

    protocol_version: str = ""
    listed_at: datetime | None = None
    """Time of the refresh that has found the current list; None before the first one."""
    offered: Sequence[Mapping[str, Any]] = ()
    """Definitions in the order of the server."""
    accepted: Mapping[str, AcceptedTool] = {}
    """Accepted tools by name."""


def read_tools(stored: Mapping[str, Any] | None) -> ListedTools:
    """Return the tools in the column `tools` of a data source; no tools for an empty column (None)."""
    return ListedTools() if stored is None else msgspec.convert(stored, ListedTools)


def to_stored(tools: ListedTools) -> dict[str, Any]:
    """Return tools as the column of a data source stores them."""
    # Through JSON, which has no tuples: hashes of the row don't know them.
    return decoding.decode(msgspec.json.encode(tools), dict[str, Any])
