"""Call a tool of a tool server by the Model Context Protocol (MCP), if people have accepted its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.services import ToolCallRequest
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json:
    config = call.config
    server = await call.services.data_sources.tool_server(
        call.caller, config_fields.read_text(config, "toolServer")
    )
    request = ToolCallRequest(
        tool=config_fields.read_text(config, "tool"),
        arguments=config_fields.read_mapping(config, "arguments"),
        hash=str(config.get("hash", "")),
        is_read=config.get("effect") == "read",
        idempotency_key=call.idempotency_key,
    )
    return await server.call(request)
