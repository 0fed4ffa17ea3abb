"""Tool servers in requests and answers, and the comparison of their tools with those that people have accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, TypeAlias

import msgspec
from msgspec import Meta

from engine.values import compare_values
from gateway.data_sources.data_source_shapes import CreateDataSource, Name, UpdateDataSource
from gateway.http import errors, limits
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import Instant, StrictWire, WireStruct, instant
from models.data_source_types import MAX_SECRET_LENGTH, DataSourceType
from models.tool_server import AcceptedTool, ListedTools, ToolEffect, read_tools

if TYPE_CHECKING:
    from gateway.data_sources.data_source_rows import StoredDataSource

FIELDS: Final[Mapping[str, str]] = {
    "secrets.key": "apiKey",
    "settings.url": "url",
    "settings.keyHeader": "keyHeader",
}
"""Fields of a tool server by those of its data source."""
COMPARED: Final = ("title", "description", "inputSchema", "hints", "problem")
"""Fields of a definition in which two are compared."""
SHOWN_CHANGES: Final = 20
ApiKey: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_SECRET_LENGTH)]
Url: TypeAlias = Annotated[str, Meta(max_length=300)]
KeyHeader: TypeAlias = Annotated[str, Meta(max_length=100)]
ToolHash: TypeAlias = Annotated[
    str, Meta(pattern="^[0-9a-f]{64}$", description="the hash that the list of tools shows")
]


class ToolStatus(StrEnum):
    """State of a tool: the last list of its server, compared with the accepted definitions."""

    NEW = "new"
    """Listed, and not accepted."""
    ACCEPTED = "accepted"
    """Listed as it was accepted: workflows may call it."""
    CHANGED = "changed"
    """Listed with another definition than the accepted one: calls are refused until somebody accepts that."""
    REMOVED = "removed"
    """Accepted, and not listed any more."""
    UNUSABLE = "unusable"
    """Listed with a name or schema that can't be used."""


class CreateToolServer(StrictWire):
    """Tool server to store."""

    read_only: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            (
                *("id", "hasKey", "keySetAt", "protocolVersion", "listedAt", "organizationId", "ownerId"),
                *("createdAt", "updatedAt"),
            ),
            "",
        ),
        "isPublic": "PUT /api/v1/datasources/:id/visibility",
        "tools": "POST /api/v1/ai/tool-servers/:id/accept",
    }

    name: Name
    """Unique among the caller's data sources."""
    url: Url
    """Address of the server, to which messages are posted."""
    api_key: ApiKey | None = None
    """Stored encrypted and never shown; null for servers without keys."""
    key_header: KeyHeader | None = None
    """Header of the key; null for `Authorization: Bearer`."""


class UpdateToolServer(StrictWire):
    """Changes of a tool server; absent fields do not change. Another address or header requires `apiKey`."""

    read_only: ClassVar[Mapping[str, str]] = CreateToolServer.read_only

    name: Name | msgspec.UnsetType = msgspec.UNSET
    url: Url | msgspec.UnsetType = msgspec.UNSET
    """Another address ends the acceptance of all tools."""
    api_key: ApiKey | msgspec.UnsetType = msgspec.UNSET
    """Replaces the key."""
    key_header: KeyHeader | msgspec.UnsetType | None = msgspec.UNSET


class ToolAcceptance(StrictWire):
    """Tool that workflows may call."""

    name: Annotated[str, Meta(max_length=200)]
    hash: ToolHash
    """Hash of the definition that you have read, as the tool server shows it."""
    effect: ToolEffect = ToolEffect.WRITE
    """`read` only if calls change nothing: they are made without approvals, and repeated after failures."""


class AcceptTools(StrictWire):
    """Tools that workflows may call from now on, and those that they may no longer call."""

    tools: Annotated[Sequence[ToolAcceptance], Meta(max_length=limits.ACCEPTED_TOOLS)] = ()
    withdrawn: Annotated[Sequence[str], Meta(max_length=limits.ACCEPTED_TOOLS)] = ()
    """Names of accepted tools; others are ignored."""


class ToolDefinitionShape(WireStruct):
    """Definition of a tool by its server."""

    hash: str
    """SHA-256 of name, description and schema as the server sent them; empty for a tool that can't be used."""
    title: str
    description: str
    """Without characters that people can't see, and cut to 2 kB."""
    input_schema: Mapping[str, Any]
    """JSON Schema of the arguments."""
    hints: Mapping[str, bool]
    """Claims of the server, such as `readOnlyHint`; nothing relies on them."""
    problem: str
    """Reason why the tool can't be used; empty if it can."""


class AcceptedToolShape(WireStruct):
    """Accepted tool."""

    definition: ToolDefinitionShape
    """Definition at that time."""
    effect: ToolEffect
    accepted_by: str
    """Id of the user."""
    accepted_at: Instant


class ToolShape(WireStruct):
    """Tool of a tool server."""

    name: str
    status: ToolStatus
    offered: ToolDefinitionShape | None
    """Definition at the last refresh; null if it was not listed any more."""
    accepted: AcceptedToolShape | None
    changed_paths: Sequence[str]
    """Places of a changed definition that differ from the accepted one, such as `inputSchema.properties.to`."""


class ToolServerSummary(WireStruct):
    """Tool server in a list, without its tools."""

    id: str
    name: str
    url: str
    key_header: str | None
    has_key: bool
    key_set_at: Instant
    protocol_version: str | None
    """Version of the protocol at the last refresh; null before the first one."""
    listed_at: Instant | None
    """Time of the refresh that has found the present list of tools."""
    tool_counts: Mapping[str, int]
    """Number of tools by status."""
    is_public: bool
    """Whether the whole organization may use it in workflows."""
    organization_id: str
    owner_id: str
    created_at: Instant
    updated_at: Instant


class ToolServerShape(WireStruct):
    """Tool server without its key."""

    id: str
    """Id of the data source, which tools of agents name as `toolServer`."""
    name: str
    url: str
    key_header: str | None
    has_key: bool
    key_set_at: Instant
    protocol_version: str | None
    """Version of the protocol at the last refresh; null before the first one."""
    listed_at: Instant | None
    """Time of the refresh that has found the present list of tools; null before the first one."""
    tools: Sequence[ToolShape]
    """Listed and accepted tools, by name."""
    is_public: bool
    """Whether the whole organization may use it in workflows."""
    organization_id: str
    owner_id: str
    created_at: Instant
    updated_at: Instant


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────


def build_data_source(body: CreateToolServer) -> CreateDataSource:
    """Return the data source of a new tool server."""
    settings = {"url": body.url, **({} if body.key_header is None else {"keyHeader": body.key_header})}
    secrets = {} if body.api_key is None else {"key": body.api_key}
    return CreateDataSource(
        name=body.name, type=DataSourceType.MCP_SERVER, settings=settings, secrets=secrets
    )


def build_changes(before: StoredDataSource, body: UpdateToolServer) -> UpdateDataSource:
    """Return the changes of the data source.

    Raises a 422 error if address or header change and the body doesn't repeat a stored key, which would be sent
    elsewhere.
    """
    given = {"url": body.url, "keyHeader": body.key_header}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not msgspec.UNSET}
    stored = before.source.settings
    moved = [name for name, value in settings.items() if value != stored.get(name)]
    if moved and before.source.secret_names and body.api_key is msgspec.UNSET:
        message = f"apiKey is required when {moved[0]} changes: it is part of its destination"
        raise errors.invalid([errors.problem("apiKey", "required", message)])
    return UpdateDataSource(
        name=None if body.name is msgspec.UNSET else body.name,
        settings=settings,
        secrets=None if body.api_key is msgspec.UNSET else {"key": body.api_key},
    )


def accept_tools(listed: ListedTools, body: AcceptTools, *, user_id: str, now: datetime) -> ListedTools:
    """Return the tools of a server after a person has accepted some, and withdrawn others; nothing is stored.

    An acceptance that doesn't change keeps its user and time. Raises a 422 error for a tool that is named twice or not
    listed, for a hash that is neither that of the last list nor the accepted one, and for too many tools.
    """
    problems = ProblemCollector()
    offered = {str(one["name"]): one for one in listed.offered if one["hash"]}
    accepted = {name: tool for name, tool in listed.accepted.items() if name not in body.withdrawn}
    seen: set[str] = set()
    for index, one in enumerate(body.tools):
        before = listed.accepted.get(one.name)
        definition = offered.get(one.name)
        path = f"tools.{index}"
        if one.name in seen:
            problems.add(f"{path}.name", "duplicate", f"{path}.name: {one.name!r} is named twice")
        elif before is not None and before.hash == one.hash:
            is_same = before.effect is one.effect
            changed = msgspec.structs.replace(before, effect=one.effect, accepted_by=user_id, accepted_at=now)
            accepted[one.name] = before if is_same else changed
        elif definition is None:
            message = f"{path}.name: the tool server lists no usable tool {one.name!r}; refresh it"
            problems.add(f"{path}.name", "tool-not-found", message)
        elif definition["hash"] != one.hash:
            message = f"{path}.hash: the tool server lists another definition of {one.name!r}: read that, and accept it"
            problems.add(f"{path}.hash", "tool-changed", message)
        else:
            accepted[one.name] = AcceptedTool(definition, one.effect, user_id, now)
        seen.add(one.name)
    if len(accepted) > limits.ACCEPTED_TOOLS:
        message = f"tools: a tool server may have at most {limits.ACCEPTED_TOOLS} accepted tools"
        problems.add("tools", "too-many-tools", message)
    problems.raise_any()
    return msgspec.structs.replace(listed, accepted=dict(sorted(accepted.items())))


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


def show_tool_server(stored: StoredDataSource) -> ToolServerShape:
    """Return a tool server with its tools, as the API shows it."""
    source, listed = stored.source, read_tools(stored.source.tools)
    return ToolServerShape(
        id=source.id,
        name=source.name,
        url=str(source.settings["url"]),
        key_header=source.settings.get("keyHeader"),
        has_key=bool(source.secret_names),
        key_set_at=instant(source.secrets_set_at),
        protocol_version=listed.protocol_version or None,
        listed_at=None if listed.listed_at is None else instant(listed.listed_at),
        tools=show_tools(listed),
        is_public=source.is_public,
        organization_id=source.organization_id,
        owner_id=source.owner_id,
        created_at=instant(source.created_at),
        updated_at=instant(source.updated_at),
    )


def summarize(stored: StoredDataSource) -> ToolServerSummary:
    """Return a tool server as lists show it, with the number of its tools by status."""
    shown = show_tool_server(stored)
    statuses = [tool.status for tool in shown.tools]
    return ToolServerSummary(
        tool_counts={status.value: statuses.count(status) for status in ToolStatus},
        **{
            name: getattr(shown, name)
            for name in ToolServerSummary.__struct_fields__
            if name != "tool_counts"
        },
    )


def show_tools(listed: ListedTools) -> Sequence[ToolShape]:
    """Return listed and accepted tools by name, with their states."""
    offered = {str(one["name"]): one for one in listed.offered}
    return [
        _show_tool(name, offered.get(name), listed.accepted.get(name))
        for name in sorted({*offered, *listed.accepted})
    ]


def _show_tool(name: str, offered: Mapping[str, Any] | None, accepted: AcceptedTool | None) -> ToolShape:
    return ToolShape(
        name=name,
        status=_find_status(offered, accepted),
        changed_paths=[]
        if offered is None or accepted is None
        else _list_changes(accepted.definition, offered),
        offered=None if offered is None else _show_definition(offered),
        accepted=None
        if accepted is None
        else AcceptedToolShape(
            definition=_show_definition(accepted.definition),
            effect=accepted.effect,
            accepted_by=accepted.accepted_by,
            accepted_at=instant(accepted.accepted_at),
        ),
    )


def _find_status(offered: Mapping[str, Any] | None, accepted: AcceptedTool | None) -> ToolStatus:
    if offered is None:
        return ToolStatus.REMOVED
    if accepted is not None:
        return ToolStatus.ACCEPTED if accepted.hash == offered["hash"] else ToolStatus.CHANGED
    return ToolStatus.UNUSABLE if offered["problem"] else ToolStatus.NEW


def _list_changes(accepted: Mapping[str, Any], offered: Mapping[str, Any]) -> Sequence[str]:
    """Return the paths at which a definition differs from the accepted one, up to 20, without the hash."""
    sides = [{name: definition[name] for name in COMPARED} for definition in (accepted, offered)]
    return [change.path for change in compare_values(*sides, at_most=SHOWN_CHANGES).changes]


def _show_definition(definition: Mapping[str, Any]) -> ToolDefinitionShape:
    return msgspec.convert(definition, ToolDefinitionShape)
