"""Endpoints of tool servers: servers of the Model Context Protocol (MCP), whose tools agents may call.

They are the data sources of the type `mcp-server`, with fields of their own. A server is contacted by a test and by a
refresh alone. A tool can be called once a person has accepted its definition, by the hash of that; another definition
has to be accepted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.ai_models import own_fields, tool_server_shapes
from gateway.ai_models.own_fields import SORT, SourceResource
from gateway.ai_models.tool_server_shapes import (
    FIELDS,
    AcceptTools,
    CreateToolServer,
    ToolServerShape,
    ToolServerSummary,
    UpdateToolServer,
)
from gateway.data_sources import data_source_editing, data_source_rows
from gateway.data_sources.data_source_rows import StoredDataSource
from gateway.http import errors, read_only
from gateway.http.parameters import LIMIT, OFFSET, FlagParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.wire import WireStruct, body_of, decode_body, read_json
from models import tool_server
from models.audit import AuditAction
from models.data_source_types import DataSourceType

if TYPE_CHECKING:
    from datetime import datetime

    from gateway.data_sources.data_source_probes import ProbeResult

TOOL_SERVER: Final = SourceResource(
    DataSourceType.MCP_SERVER, "tool server", FIELDS, tool_server_shapes.show_tool_server
)
LISTED = (LIMIT, OFFSET, SORT)
FORCE = FlagParameter("force", "Delete it even if workflows name it; their calls then fail.")


class ToolServerList(WireStruct):
    """Page of a list of tool servers; `count` is the total."""

    count: int
    limit: int
    offset: int
    tool_servers: Sequence[ToolServerSummary]


class ToolServerTest(WireStruct):
    """Result of a test with the stored key."""

    ok: bool
    message: str
    duration_ms: int
    protocol_version: str | None
    """Newest version of the protocol that both sides know; null if the server did not answer."""
    tools: Sequence[str]
    """Names of the tools that the server lists."""


class ToolServerRefresh(WireStruct):
    """Result of a refresh."""

    ok: bool
    message: str
    duration_ms: int
    tool_server: ToolServerShape
    """Tool server with its tools; as it was before if the server did not answer."""


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────


async def index(request: GatewayRequest) -> JsonResponse:
    """List the tool servers that the caller may use."""
    part, order = request.query.page(), request.query[SORT]
    async with request.gateway.database.read() as connection:
        count, found = await data_source_rows.page(
            connection, request.caller, DataSourceType.MCP_SERVER, part, order
        )
    shown = [tool_server_shapes.summarize(stored) for stored in found]
    return JsonResponse(ToolServerList(count=count, limit=part.limit, offset=part.offset, tool_servers=shown))


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a tool server with its tools: as the server listed them last, and as they were accepted."""
    return _answer(await _read(request))


async def test(request: GatewayRequest) -> JsonResponse:
    """Test a tool server: list its tools, and store nothing.

    A failed connection is answered with 200 and `ok` false. At most 30 tests of the organization a minute.
    """
    found = await request.gateway.probes.probe((await _read(request)).source)
    return JsonResponse(
        ToolServerTest(
            ok=found.is_ok,
            message=found.message,
            duration_ms=found.duration_milliseconds,
            protocol_version=found.protocol_version or None,
            tools=sorted(tool.name for tool in found.tools),
        )
    )


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────


async def create(request: GatewayRequest) -> JsonResponse:
    """Store the address and the key of a tool server, encrypted, without contacting it.

    Tools of agents name the returned id as `toolServer`. A repetition with the same `Idempotency-Key` creates
    nothing.
    """
    value = await read_json(request)
    body = body_of(request, value, CreateToolServer)
    gateway, fields = request.gateway, tool_server_shapes.build_data_source(body)
    source = TOOL_SERVER.build(request.caller, fields, gateway.vault, gateway.clock())
    read_only.warn_of_new(
        request, value, CreateToolServer, lambda: TOOL_SERVER.as_json(StoredDataSource(source, {}))
    )
    request.warnings.extend(data_source_editing.warn_of_plain_http(source))
    compared = data_source_editing.without_secrets(value, gateway.settings.secret, "apiKey")
    key = request.idempotency_key(compared)
    return await gateway.data_source_editor.create(request.caller, source, key)


async def update(request: GatewayRequest) -> JsonResponse:
    """Change a tool server; absent fields do not change.

    The key is sent to no other address than the one that it was stored with, so a change of that requires it again,
    and ends the acceptance of all tools.
    """
    value = await read_json(request)
    body = body_of(request, value, UpdateToolServer)
    gateway = request.gateway
    vault, now = gateway.vault, gateway.clock()

    def change(before: StoredDataSource) -> StoredDataSource:
        TOOL_SERVER.require(before)
        read_only.require_same(value, UpdateToolServer, lambda: TOOL_SERVER.as_json(before))
        return TOOL_SERVER.apply(before, tool_server_shapes.build_changes(before, body), vault, now)

    after = await own_fields.edit(gateway.data_source_editor, request.requested_object, change)
    request.warnings.extend(data_source_editing.warn_of_plain_http(after.source))
    return _answer(after)


async def refresh(request: GatewayRequest) -> JsonResponse:
    """Refresh the tools of a tool server: ask it for their definitions, and store these.

    Nothing is accepted by it: a new tool can't be called, and neither can one whose definition has changed. A failed
    connection is answered with 200 and `ok` false. At most 30 tests and refreshes of the organization a minute.
    """
    stored = await _read(request)
    data_source_editing.require_writer(request.caller, stored.source)
    found = await request.gateway.probes.probe(stored.source)
    now = request.gateway.clock()

    def change(before: StoredDataSource) -> StoredDataSource:
        TOOL_SERVER.require(before)
        if before.source.settings != stored.source.settings:
            raise errors.conflict(
                "edit-conflict",
                "Another request changed the address of this tool server meanwhile: try again",
            )
        return _apply_listed_tools(before, found, now)

    if found.is_ok:
        stored = await request.gateway.data_source_editor.edit(
            request.requested_object, AuditAction.TOOLS_REFRESHED, change
        )
    answered = ToolServerRefresh(
        ok=found.is_ok,
        message=found.message,
        duration_ms=found.duration_milliseconds,
        tool_server=tool_server_shapes.show_tool_server(stored),
    )
    return data_source_editing.answer(stored, answered)


async def accept(request: GatewayRequest) -> JsonResponse:
    """Accept tools, which workflows may then call, each by the hash of the definition that you have read.

    Their effect is `write` unless you say that they only read. Refused for a hash that the server doesn't list, such
    as that of an earlier definition.
    """
    body = await decode_body(request, AcceptTools)
    user_id, now = request.caller.user_id, request.gateway.clock()

    def change(before: StoredDataSource) -> StoredDataSource:
        TOOL_SERVER.require(before)
        listed = tool_server.read_tools(before.source.tools)
        accepted = tool_server_shapes.accept_tools(listed, body, user_id=user_id, now=now)
        return before.with_columns(tools=tool_server.to_stored(accepted))

    after = await request.gateway.data_source_editor.edit(
        request.requested_object, AuditAction.TOOLS_ACCEPTED, change
    )
    return _answer(after)


async def delete(request: GatewayRequest) -> NoContent:
    """Delete a tool server; with `force`, even if workflows use it: their calls then fail."""
    await _read(request)
    await request.gateway.data_source_editor.delete(request.requested_object, is_forced=request.query[FORCE])
    return NoContent()


async def _read(request: GatewayRequest) -> StoredDataSource:
    return await own_fields.read(request.gateway.data_source_editor, request.requested_object, TOOL_SERVER)


def _apply_listed_tools(before: StoredDataSource, found: ProbeResult, now: datetime) -> StoredDataSource:
    """Return a tool server with the tools that a probe found, not stored; unchanged if these are the ones of before."""
    listed = tool_server.read_tools(before.source.tools)
    offered = [msgspec.to_builtins(tool) for tool in found.tools]
    if (listed.protocol_version, list(listed.offered)) == (found.protocol_version, offered):
        return before
    changed = msgspec.structs.replace(
        listed, protocol_version=found.protocol_version, listed_at=now, offered=offered
    )
    return before.with_columns(tools=tool_server.to_stored(changed))


def _answer(stored: StoredDataSource) -> JsonResponse:
    return data_source_editing.answer(stored, tool_server_shapes.show_tool_server(stored))
