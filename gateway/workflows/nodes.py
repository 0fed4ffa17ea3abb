"""Endpoints of single nodes, their config and mappings, and the connections between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from gateway.http import errors, read_only
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import GuardedWire, WireStruct, body_of, convert, decode_body, read_json
from gateway.workflows import editing, graph_shapes, node_edits
from gateway.workflows.editing import WorkflowEdit
from gateway.workflows.graph_shapes import CanvasPosition, ConnectionInput, NodeInput, RetryShape
from gateway.workflows.node_edits import NodeChanges
from models.audit import AuditAction

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.workflows.stored_workflow import StoredNode, StoredWorkflow
    from nodes.catalog import NodeCatalog

UNKNOWN_CATEGORY = "unknown"
_OF_THE_NODE: Final[Mapping[str, str]] = dict.fromkeys(("nodeId", "workflowId", "warnings"), "")

Values = TypeVar("Values", bound=Mapping[str, object])


class SetMappings(GuardedWire):
    """Input mappings of a node: for each field of its input, a path, a text with expressions, or a constant."""

    read_only: ClassVar[Mapping[str, str]] = _OF_THE_NODE

    mappings: dict[str, Any] | None = None
    input_mappings: dict[str, Any] | None = None
    """Alias of `mappings`, with the name that answers use; one of the two is required."""


class SetPassThrough(GuardedWire):
    """Pass-through values of a node: keys of its output, each with the key of its input."""

    read_only: ClassVar[Mapping[str, str]] = _OF_THE_NODE

    values: dict[str, str] | None = None
    pass_through_values: dict[str, str] | None = None
    """Alias of `values`, with the name that answers use; one of the two is required."""


class NodeSummary(WireStruct):
    """Node in a list, with the numbers of its connections."""

    id: str
    type: str
    label: str
    category: str
    position: CanvasPosition
    has_config: bool
    inbound_connections: int
    outbound_connections: int
    node_version: str | UnsetType = UNSET


class NodeList(WireStruct):
    """All nodes of a workflow."""

    workflow_id: str
    count: int
    nodes: list[NodeSummary]


class ResolvedNode(WireStruct):
    """Node with the catalog's fields of its type."""

    id: str
    type: str
    category: str
    label: str
    position: CanvasPosition
    config: dict[str, Any]
    input_mappings: dict[str, Any]
    pass_through_values: dict[str, str]
    s3_location: str
    resources: dict[str, Any]
    data: dict[str, Any]
    """Always empty: the configuration of a node is in its config."""
    node_version: str | UnsetType = UNSET
    retry: RetryShape | UnsetType = UNSET
    timeout: int | float | UnsetType = UNSET
    at_most_once: bool | UnsetType = UNSET


class NodeAnswer(WireStruct):
    """Added or configured node."""

    node_id: str
    workflow_id: str
    node: ResolvedNode


class NodeRemoval(WireStruct):
    """Removed node, and the number of its removed connections."""

    removed: bool
    node_id: str
    removed_connections: int
    workflow_id: str


class MappingsAnswer(WireStruct):
    """Input mappings of a node."""

    node_id: str
    workflow_id: str
    input_mappings: dict[str, Any]


class PassThroughAnswer(WireStruct):
    """Pass-through values of a node."""

    node_id: str
    workflow_id: str
    pass_through_values: dict[str, str]


class NodeConnection(WireStruct):
    """Connection from a port of one node to a port of another."""

    id: str
    source: str
    target: str
    source_port: str
    target_port: str


class ConnectionAnswer(WireStruct):
    """Added connection."""

    connection_id: str
    workflow_id: str
    connection: NodeConnection


class ConnectionRemoval(WireStruct):
    """Removed connection."""

    removed: bool
    connection_id: str
    workflow_id: str


# ── nodes ───────────────────────────────────────────────────────────────────────────────────────────────────


async def index(request: GatewayRequest) -> JsonResponse:
    """List the nodes of a workflow."""
    stored = await request.gateway.workflow_editor.read(request.requested_object)
    inbound = Counter(edge["target"] for edge in stored.connections)
    outbound = Counter(edge["source"] for edge in stored.connections)
    catalog = await request.catalog()
    nodes = [_show_summary(node, catalog, inbound[node["id"]], outbound[node["id"]]) for node in stored.nodes]
    listed = NodeList(workflow_id=stored.workflow.id, count=len(nodes), nodes=nodes)
    return editing.answer(stored, listed)


async def add(request: GatewayRequest) -> JsonResponse:
    """Add a node to a workflow; without a position it is placed beside the others."""
    body = await decode_body(request, NodeInput)
    node_id = body.id or graph_shapes.new_id("node")
    named = msgspec.structs.replace(body, id=node_id)
    catalog = await request.catalog()
    edited = await request.gateway.workflow_editor.edit(
        request.requested_object,
        AuditAction.NODE_ADDED,
        lambda before: node_edits.with_node(before, named, catalog),
    )
    return _node_answer(catalog, edited, node_id, status=201)


async def configure(request: GatewayRequest) -> JsonResponse:
    """Merge values into a node's config; null removes a key.

    A body with `config`, or with `label` alone, may change the label too. With `config` it may also change
    the position, version, retry, timeout and `atMostOnce`. A body in the form of a listed node
    changes its label and position. Any other body is the config itself, unless all its keys are fields of a node
    that the config of its type does not have: such a body is refused.
    """
    given = await read_json(request)
    body = _wrap_config(given)
    changes = body_of(request, body, NodeChanges)
    node_id = request.path_params["sub"]
    catalog = await request.catalog()

    def change(before: StoredWorkflow) -> StoredWorkflow:
        if body is not given and changes.config:
            node_edits.require_config(node_edits.node_of(before, node_id), changes.config, catalog)
        read_only.require_same(body, NodeChanges, lambda: _all_fields(before, node_id, catalog))
        return node_edits.with_changes(before, node_id, changes, catalog)

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object,
        AuditAction.NODE_CONFIGURED,
        change,
    )
    return _node_answer(catalog, edited, node_id)


async def remove(request: GatewayRequest) -> JsonResponse:
    """Remove a node and its connections.

    The answer has the number of removed connections.
    """
    node_id = request.path_params["sub"]
    edited = await request.gateway.workflow_editor.edit(
        request.requested_object,
        AuditAction.NODE_REMOVED,
        lambda before: node_edits.without_node(before, node_id),
    )
    removed = len(edited.before.connections) - len(edited.after.connections)
    return editing.answer(
        edited.after,
        NodeRemoval(
            removed=True, node_id=node_id, removed_connections=removed, workflow_id=edited.after.workflow.id
        ),
    )


async def set_mappings(request: GatewayRequest) -> JsonResponse:
    """Replace the input mappings of a node.

    An empty object removes them.
    """
    value = await read_json(request)
    body = body_of(request, value, SetMappings)
    mappings = _one_of("mappings", body.mappings, "inputMappings", body.input_mappings)
    node_edits.require_valid_mappings(mappings)
    node_id = request.path_params["sub"]

    def change(before: StoredWorkflow) -> StoredWorkflow:
        read_only.require_same(value, SetMappings, lambda: _ids_of_node(before, node_id))
        return node_edits.with_mappings(before, node_id, mappings)

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object, AuditAction.NODE_CONFIGURED, change
    )
    return editing.answer(
        edited.after,
        MappingsAnswer(node_id=node_id, workflow_id=edited.after.workflow.id, input_mappings=mappings),
    )


async def set_pass_through(request: GatewayRequest) -> JsonResponse:
    """Replace the pass-through values of a node."""
    value = await read_json(request)
    body = body_of(request, value, SetPassThrough)
    values = _one_of("values", body.values, "passThroughValues", body.pass_through_values)
    node_id = request.path_params["sub"]

    def change(before: StoredWorkflow) -> StoredWorkflow:
        read_only.require_same(value, SetPassThrough, lambda: _ids_of_node(before, node_id))
        return node_edits.with_pass_through(before, node_id, values)

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object, AuditAction.NODE_CONFIGURED, change
    )
    return editing.answer(
        edited.after,
        PassThroughAnswer(node_id=node_id, workflow_id=edited.after.workflow.id, pass_through_values=values),
    )


def _one_of(name: str, value: Values | None, other_name: str, other: Values | None) -> Values:
    """Return the given one of two fields with the same meaning; they may be equal.

    Raises a 422 error if both are None or if they differ.
    """
    if value is not None and other is not None and value != other:
        message = f"Send {name} or {other_name}, not both"
        raise errors.invalid([errors.problem(other_name, "ambiguous", message)])
    if value is not None:
        return value
    if other is not None:
        return other
    raise errors.invalid([errors.problem(name, "required", f"{name} is required")])


def _ids_of_node(stored: StoredWorkflow, node_id: str) -> dict[str, Json]:
    return {"nodeId": node_id, "workflowId": stored.workflow.id}


# ── connections ─────────────────────────────────────────────────────────────────────────────────────────────


async def connect(request: GatewayRequest) -> JsonResponse:
    """Connect a port of a node with a port of another.

    Refused for a missing node or port, an existing connection, and one that would close a cycle.
    """
    body = await decode_body(request, ConnectionInput)
    connection_id = body.id or graph_shapes.new_id("conn")
    named = msgspec.structs.replace(body, id=connection_id)
    catalog = await request.catalog()
    edited = await request.gateway.workflow_editor.edit(
        request.requested_object,
        AuditAction.CONNECTION_ADDED,
        lambda before: node_edits.with_connection(before, named, catalog),
    )
    made = convert(edited.after.connections[-1], NodeConnection)
    return editing.answer(
        edited.after,
        ConnectionAnswer(connection_id=connection_id, workflow_id=edited.after.workflow.id, connection=made),
        status=201,
    )


async def disconnect(request: GatewayRequest) -> JsonResponse:
    """Remove a connection."""
    connection_id = request.path_params["sub"]
    edited = await request.gateway.workflow_editor.edit(
        request.requested_object,
        AuditAction.CONNECTION_REMOVED,
        lambda before: node_edits.without_connection(before, connection_id),
    )
    return editing.answer(
        edited.after,
        ConnectionRemoval(removed=True, connection_id=connection_id, workflow_id=edited.after.workflow.id),
    )


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


def _node_answer(
    catalog: NodeCatalog, edited: WorkflowEdit, node_id: str, *, status: int = 200
) -> JsonResponse:
    node = _show_node(node_edits.node_of(edited.after, node_id), catalog)
    answer = NodeAnswer(node_id=node_id, workflow_id=edited.after.workflow.id, node=node)
    return editing.answer(edited.after, answer, status=status)


def _show_summary(node: StoredNode, catalog: NodeCatalog, inbound: int, outbound: int) -> NodeSummary:
    fields = _resolve_type(node, catalog) | {
        "hasConfig": bool(node["config"]),
        "inboundConnections": inbound,
        "outboundConnections": outbound,
    }
    return convert(fields, NodeSummary)


def _show_node(node: StoredNode, catalog: NodeCatalog) -> ResolvedNode:
    return convert(_resolve_type(node, catalog) | {"data": {}}, ResolvedNode)


def _resolve_type(node: StoredNode, catalog: NodeCatalog) -> dict[str, Json]:
    """Return a node with the catalog's fields of its type and version; for an unknown type, the category "unknown"."""
    node_type = catalog.node_types.get(str(node["type"]))
    if node_type is None:
        resolved: dict[str, Json] = {"category": UNKNOWN_CATEGORY, "s3Location": "", "resources": {}}
    else:
        node_type = node_type.earlier.get(str(node.get("version")), node_type)
        resolved = {
            "category": node_type.category,
            "nodeVersion": node_type.version,
            "s3Location": node_type.s3_location,
            "resources": dict(node_type.resources),
        }
    if "version" in node:
        resolved["nodeVersion"] = node["version"]
    return node | resolved


def _all_fields(stored: StoredWorkflow, node_id: str, catalog: NodeCatalog) -> dict[str, Json]:
    """Return every field of a node that any answer of the API shows, to compare read-only ones; raises a 404
    or 409 error.
    """
    node = node_edits.node_of(stored, node_id)
    inbound = sum(edge["target"] == node_id for edge in stored.connections)
    outbound = sum(edge["source"] == node_id for edge in stored.connections)
    summary: dict[str, Json] = msgspec.to_builtins(_show_summary(node, catalog, inbound, outbound))
    shown: dict[str, Json] = msgspec.to_builtins(_show_node(node, catalog))
    return graph_shapes.shown_node(node) | shown | summary


def _is_summary(body: Mapping[str, Json]) -> bool:
    """Return whether a body has all required fields of a node in the list of nodes, and so is not a config."""
    return all(field.encode_name in body for field in msgspec.structs.fields(NodeSummary) if field.required)


def _wrap_config(body: Json) -> Json:
    """Wrap the body of a request that changes a node as `{"config": body}`, if the body is the config itself.

    Returned unchanged are a body with `config`, one with only `label`, one with all required fields of a
    `NodeSummary`, and one that is no object.
    """
    if not isinstance(body, dict) or "config" in body or body.keys() == {"label"} or _is_summary(body):
        return body
    return {"config": body}
