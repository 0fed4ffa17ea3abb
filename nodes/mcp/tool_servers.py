"""Calls of accepted tools: each is checked against the definition that people have accepted, and then made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from engine.run_errors import NodeError
from engine.services import ToolCallRequest
from nodes import redaction
from nodes.mcp import mcp_errors, mcp_session, tool_results

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.connections.data_source import ConnectionSource, ToolPin
    from nodes.mcp.mcp_session import McpSession
    from nodes.mcp.tool_definitions import ToolDefinition
    from nodes.outbound_http import IpNetwork

LISTED_SECONDS: Final = 60.0
"""Time for which a list of tools counts: a definition that changes is noticed after it at the latest."""
MAX_REMEMBERED: Final = 200


class ListedServer(Struct, frozen=True):
    """Version and tools of a server, as it has listed them shortly before."""

    revision: int
    """Revision of the data source."""
    version: str
    tools: Mapping[str, ToolDefinition]
    until: float
    """Time, of the monotonic clock, until which the list counts."""


class ToolServers:
    """Calls of tools over one HTTP client, with the lists of servers remembered for a minute."""

    def __init__(self, networks: Sequence[IpNetwork], hosts: Collection[str]) -> None:
        """`networks` and `hosts` are private ones that the operator allows."""
        self._outbound = mcp_session.open_outbound(networks, hosts)
        self._listed: OrderedDict[tuple[str, str], ListedServer] = OrderedDict()

    async def call(self, source: ConnectionSource, request: ToolCallRequest) -> Json:
        """Call a tool once, and return its result with the key of the server redacted.

        The accepted definition is compared with a list of the server's tools that is at most a minute old. Raises
        `NodeError`: `tool-not-accepted` and `tool-changed` before the tool is called, and the errors of the server.
        """
        pin = _require_accepted(source, request)
        key = (source.organization_id, source.id)
        address = mcp_session.build_address(source.settings, source.secrets)
        listed = self._find_listed(source)
        try:
            async with mcp_session.open_session(
                self._outbound, address, version=None if listed is None else listed.version
            ) as session:
                listed = listed or await self._list_tools(source, session)
                tool = _require_unchanged(listed.tools.get(request.tool), request.tool, pin)
                result = await session.call_tool(
                    tool, request.arguments, idempotency_key=request.idempotency_key
                )
        except NodeError:
            # Its version or its tools may be other ones now.
            self._listed.pop(key, None)
            raise
        secrets = source.secrets.values()
        with redaction.redact_errors(secrets):
            shown = tool_results.read_result(result)
        return {name: redaction.redact_value(value, secrets) for name, value in shown.items()}

    async def close(self) -> None:
        """Close all connections."""
        await self._outbound.close()

    def _find_listed(self, source: ConnectionSource) -> ListedServer | None:
        listed = self._listed.get((source.organization_id, source.id))
        is_valid = listed is not None and listed.revision == source.revision and listed.until > monotonic()
        return listed if is_valid else None

    async def _list_tools(self, source: ConnectionSource, session: McpSession) -> ListedServer:
        """Ask a server for its tools and return them; keep the list for the calls of the next minute.

        Raises `NodeError`.
        """
        until = monotonic() + LISTED_SECONDS
        tools = {tool.name: tool for tool in await session.list_tools()}
        listed = ListedServer(source.revision, session.version or "", tools, until)
        key = (source.organization_id, source.id)
        self._listed[key] = listed
        self._listed.move_to_end(key)
        while len(self._listed) > MAX_REMEMBERED:
            self._listed.popitem(last=False)
        return listed


class ToolServerConnection:
    """Implements `engine.services.ToolServerService` for one data source."""

    def __init__(self, servers: ToolServers, source: ConnectionSource) -> None:
        self._servers = servers
        self._source = source

    async def call(self, request: ToolCallRequest) -> Json:
        """Call a tool once, as `ToolServers` does; raises `NodeError`."""
        return await self._servers.call(self._source, request)


def _require_accepted(source: ConnectionSource, request: ToolCallRequest) -> ToolPin:
    """Return the accepted definition of a tool; raises `NodeError` if there is none, if the workflow names another
    definition, or takes a tool that writes as one that reads.
    """
    pin = source.tools.get(request.tool)
    if pin is None:
        message = f"The tool {request.tool!r} is not accepted: accept its definition at its tool server"
        raise NodeError(message, code=mcp_errors.TOOL_NOT_ACCEPTED)
    if request.hash and request.hash != pin.hash:
        message = f"The tool {request.tool!r} was accepted with another definition than the workflow names by `hash`"
        raise NodeError(message, code=mcp_errors.TOOL_CHANGED)
    if request.is_read and pin.effect != "read":
        message = f"The tool {request.tool!r} was accepted as one that writes: set `effect` to `write`"
        raise NodeError(message, code=mcp_errors.TOOL_NOT_ACCEPTED)
    return pin


def _require_unchanged(found: ToolDefinition | None, name: str, pin: ToolPin) -> ToolDefinition:
    """Return the listed definition `found` of a tool; raises `NodeError` if it is missing, or differs from the accepted
    definition.
    """
    if found is None:
        message = f"The tool server doesn't list the tool {name!r} any more"
        raise NodeError(message, code=mcp_errors.TOOL_CHANGED)
    if found.hash != pin.hash:
        message = (
            f"The definition of the tool {name!r} has changed: refresh its tool server, read and accept it"
        )
        raise NodeError(message, code=mcp_errors.TOOL_CHANGED)
    return found
