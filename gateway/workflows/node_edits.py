"""Edits of single nodes and connections: functions from a stored workflow to the changed one, or an error."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import replace

from engine import name_suggestions
from engine.canvas_layout import find_free_position
from engine.expressions import ExpressionError
from engine.node_api import ERROR, UnknownNodeType
from engine.program import compile_mapping
from engine.values import InvalidJson, encode_json
from gateway.http import errors, limits, text_rules
from gateway.http.errors import ApiError
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import GuardedWire
from gateway.workflows import graph_shapes
from gateway.workflows.graph_shapes import CanvasPosition, ConnectionInput, Label, NodeInput, RetryShape

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.workflows.stored_workflow import StoredConnection, StoredNode, StoredWorkflow
    from nodes.catalog import NodeCatalog

COMPARED_IDS = 1_000
"""Number of node ids that are compared with an unknown one, for a suggestion."""
SHOWN_OF_A_CYCLE = 6

_joined = itemgetter("source", "sourcePort", "target", "targetPort")


class NodeChanges(GuardedWire):
    """Changes of a node; absent fields stay. `config` is merged, and null removes a key of it."""

    read_only: ClassVar[Mapping[str, str]] = {
        **NodeInput.read_only,
        **dict.fromkeys(("id", "nodeId", "type", "nodeVersion"), ""),
        "inputMappings": "PUT /api/v1/workflows/:id/nodes/:sub/input-mappings",
        "passThroughValues": "PUT /api/v1/workflows/:id/nodes/:sub/passthrough-values",
    }

    config: dict[str, Any] | None = None
    label: Label | None = None
    position: CanvasPosition | None = None
    version: str | UnsetType | None = UNSET
    """Null removes the fixed version."""
    retry: RetryShape | UnsetType | None = UNSET
    """Null: one attempt."""
    timeout: Annotated[float, Meta(gt=0, le=limits.TIMEOUT_SECONDS)] | UnsetType | None = UNSET
    """Seconds; null: limited by the run alone."""
    at_most_once: bool | UnsetType | None = UNSET
    """For a writing node: an attempt with unknown outcome fails the node and is not repeated."""


NODE_FIELDS = frozenset(field.encode_name for field in msgspec.structs.fields(NodeInput)) | set(
    NodeChanges.read_only
)
"""Names of the fields of a node in any request or answer."""


# ── nodes ───────────────────────────────────────────────────────────────────────────────────────────────────


def node_of(stored: StoredWorkflow, node_id: str) -> StoredNode:
    """Return a node of a workflow by its id; raises a 404 error for an unknown one, and 409 if two nodes
    share the id.
    """
    return find_node(stored.nodes, node_id)


def find_node(nodes: Iterable[StoredNode], node_id: str) -> StoredNode:
    """Return the node with an id; raises a 404 error for an unknown one, and 409 if two nodes share the id."""
    found = [node for node in nodes if node["id"] == node_id]
    if not found:
        raise errors.not_found("node")
    if len(found) > 1:
        message = f"{len(found)} nodes have the id {node_id}: remove them, or give each an id of its own"
        raise errors.conflict("duplicate-node-id", message)
    return found[0]


def with_node(before: StoredWorkflow, node: NodeInput, catalog: NodeCatalog) -> StoredWorkflow:
    """Return a workflow with `node` added; nothing is stored. Callers set the node's id to find it in the result.

    Without a position it gets a free one beside the others. Raises a 409 error for an id in use, 422 for
    invalid fields, more than 10,000 nodes, and over 10 MB of them.
    """
    problems = ProblemCollector()
    place = node.position or _free_position(before.nodes)
    made = graph_shapes.stored_node(node, "", place, catalog, problems)
    _check_mappings(node.input_mappings or {}, "inputMappings", problems)
    problems.raise_any()
    if any(made["id"] == other["id"] for other in before.nodes):
        message = f"The workflow has a node with the id {made['id']} already"
        raise errors.conflict("duplicate-node-id", message)
    if len(before.nodes) >= limits.NODES:
        raise _build_refusal("nodes", "too-many", f"A workflow may have at most {limits.NODES:,} nodes")
    _require_size([*before.nodes, made], made)
    return replace(before, nodes=[*before.nodes, made])


def with_changes(
    before: StoredWorkflow, node_id: str, changes: NodeChanges, catalog: NodeCatalog
) -> StoredWorkflow:
    """Return a workflow with changed fields of one node; nothing is stored.

    Config is merged, and None in it removes a key; absent fields stay, None removes an optional one. The config is not
    checked by the schema. Raises a 404 error for an unknown node, 409 if two nodes share the id, and 422 for invalid
    fields and too large nodes.
    """
    node = node_of(before, node_id)
    problems = ProblemCollector()
    after = dict(node)
    if changes.config:
        after["config"] = _merge_config(cast("dict[str, Json]", node["config"]), changes.config)
    if changes.label is not None:
        after["label"] = text_rules.check_line(
            changes.label, "label", problems, max_length=limits.LABEL_LENGTH, may_be_empty=True
        )
    if changes.position is not None:
        after["position"] = {"x": changes.position.x, "y": changes.position.y}
    if changes.version is not UNSET:
        _set_or_remove(
            after, "version", _check_version(changes.version, str(node["type"]), catalog, problems)
        )
    if changes.retry is not UNSET:
        retry = None if changes.retry is None else graph_shapes.stored_retry(changes.retry)
        _set_or_remove(after, "retry", retry)
    if changes.timeout is not UNSET:
        _set_or_remove(after, "timeout", changes.timeout)
    if changes.at_most_once is not UNSET:
        _set_or_remove(after, "atMostOnce", changes.at_most_once or None)
    problems.raise_any()
    return _replace_node(before, node, after)


def require_config(node: StoredNode, given: Mapping[str, Json], catalog: NodeCatalog) -> None:
    """Raise a 422 error if every key of `given` is a field of nodes, and none a key of the config of this node's type.

    `given` is a body that the request would take for the node's config, though it was meant as changes of the node.
    """
    if not given.keys() <= NODE_FIELDS or not given.keys().isdisjoint(_list_config_keys(node, catalog)):
        return
    raise errors.invalid(
        errors.problem(name, "config-required", _describe_field(name)) for name in sorted(given)
    )


def _list_config_keys(node: StoredNode, catalog: NodeCatalog) -> Collection[str]:
    """Return the keys that the schema of a node's type names; none for a type that the catalog does not have."""
    try:
        node_type = catalog.get(str(node["type"]), cast("str | None", node.get("version")))
    except UnknownNodeType:
        return ()
    properties = node_type.config_schema.get("properties")
    return properties.keys() if isinstance(properties, dict) else ()


def _describe_field(name: str) -> str:
    """Return the message that refuses a node's field as a key of the config: the ways to change the field and such a
    key.
    """
    if route := NodeChanges.read_only.get(name):
        hint = f"which {route} changes"
    elif name in NodeChanges.read_only or name == "nodeType":
        hint = "which does not change, so leave it out"
    else:
        hint = f'which {{"config": {{}}, "{name}": …}} changes'
    return (
        f'{name} is a field of the node, {hint}. For a key of its config, send {{"config": {{"{name}": …}}}}'
    )


def with_mappings(before: StoredWorkflow, node_id: str, mappings: dict[str, Json]) -> StoredWorkflow:
    """Return a workflow with other input mappings of one node, not checked here; nothing is stored.

    Raises a 404 error for an unknown node, 409 if two nodes share the id, and 422 for too large nodes.
    """
    node = node_of(before, node_id)
    return _replace_node(before, node, {**node, "inputMappings": mappings})


def with_pass_through(before: StoredWorkflow, node_id: str, values: Mapping[str, str]) -> StoredWorkflow:
    """Return a workflow with other pass-through values of one node; nothing is stored.

    Such a value copies a key of the input to the output. Raises a 404 error for an unknown node, 409 if two nodes share
    the id, and 422 for too large nodes.
    """
    node = node_of(before, node_id)
    return _replace_node(before, node, {**node, "passThroughValues": dict(values)})


def without_node(before: StoredWorkflow, node_id: str) -> StoredWorkflow:
    """Return a workflow without the node with an id (all nodes, if several have it) and its connections.

    Raises a 404 error for an unknown id.
    """
    nodes = [node for node in before.nodes if node["id"] != node_id]
    if len(nodes) == len(before.nodes):
        raise errors.not_found("node")
    connections = [edge for edge in before.connections if node_id not in (edge["source"], edge["target"])]
    return replace(before, nodes=nodes, connections=connections)


def require_valid_mappings(mappings: Mapping[str, Json]) -> None:
    """Raise a 422 error with an entry for each mapping (field and expression) that is no valid expression."""
    problems = ProblemCollector()
    _check_mappings(mappings, "mappings", problems)
    problems.raise_any()


def _check_mappings(mappings: Mapping[str, Json], path: str, problems: ProblemCollector) -> None:
    """Add a problem for each mapping that is no valid expression, until `problems` is full."""
    for field, source in mappings.items():
        if problems.is_full:
            return
        try:
            compile_mapping(source)
        except ExpressionError as error:
            problems.add(f"{path}.{field}", "invalid-expression", str(error))


def _merge_config(before: Mapping[str, Json], given: Mapping[str, Json]) -> dict[str, Json]:
    merged = {**before, **given}
    return {key: value for key, value in merged.items() if value is not None or key not in given}


def _check_version(
    given: str | None, node_type: str, catalog: NodeCatalog, problems: ProblemCollector
) -> str | None:
    """Return `given`, a node's version, even if it is invalid; None for none.

    If the type doesn't have the version, a problem is added to `problems`.
    """
    if not given:
        return None
    try:
        catalog.get(node_type, given)
    except UnknownNodeType as error:
        problems.add("version", "unknown-node-type", error.message)
    return given


def _set_or_remove(node: StoredNode, key: str, value: Json) -> None:
    if value is None:
        node.pop(key, None)
    else:
        node[key] = value


def _replace_node(before: StoredWorkflow, node: StoredNode, after: StoredNode) -> StoredWorkflow:
    nodes = [after if other is node else other for other in before.nodes]
    _require_size(nodes, after)
    return replace(before, nodes=nodes)


def _require_size(nodes: Sequence[StoredNode], changed: StoredNode) -> None:
    """Raise a 422 error if a changed node is nested too deeply or too large for a body, or all nodes exceed
    10 MB as JSON.
    """
    try:
        encode_json({"nodes": [changed]})
    except InvalidJson as error:
        raise _build_refusal("nodes", error.code, f"{error.message}, as the graph would be sent") from error
    if len(msgspec.json.encode(nodes)) > limits.GRAPH_BYTES:
        message = f"The nodes of a workflow may take at most {limits.GRAPH_BYTES:,} bytes as JSON"
        raise _build_refusal("nodes", "too-large", message)


def _free_position(nodes: Iterable[StoredNode]) -> CanvasPosition:
    places = (cast("Mapping[str, float]", node["position"]) for node in nodes)
    x, y = find_free_position((place["x"], place["y"]) for place in places)
    return CanvasPosition(x=x, y=y)


# ── connections ─────────────────────────────────────────────────────────────────────────────────────────────


def with_connection(before: StoredWorkflow, edge: ConnectionInput, catalog: NodeCatalog) -> StoredWorkflow:
    """Return a workflow with one more connection as the last one, with a generated id if `edge` has none; nothing is
    stored.

    Raises a 409 error for a repeated id or connection, and 422 for unknown nodes or ports, a cycle, and more than
    20,000 connections.
    """
    problems = ProblemCollector()
    made = graph_shapes.stored_connection(edge, "", problems)
    problems.raise_any()
    nodes = {str(node["id"]): node for node in before.nodes}
    _require_ends(made, nodes)
    _require_ports(made, nodes, catalog)
    _require_new(made, before.connections)
    _require_no_cycle(made, before.connections)
    if len(before.connections) >= limits.CONNECTIONS:
        message = f"A workflow may have at most {limits.CONNECTIONS:,} connections"
        raise _build_refusal("connections", "too-many", message)
    return replace(before, connections=[*before.connections, made])


def without_connection(before: StoredWorkflow, connection_id: str) -> StoredWorkflow:
    """Return a workflow without the connection with an id (all, if several have it); raises a 404 error for an unknown
    id.
    """
    connections = [edge for edge in before.connections if edge["id"] != connection_id]
    if len(connections) == len(before.connections):
        raise errors.not_found("connection")
    return replace(before, connections=connections)


def _require_ends(edge: StoredConnection, nodes: Collection[str]) -> None:
    ends = (("sourceNodeId", str(edge["source"])), ("targetNodeId", str(edge["target"])))
    absent = [_describe_absent_node(path, node_id, nodes) for path, node_id in ends if node_id not in nodes]
    if absent:
        raise errors.invalid(absent)


def _describe_absent_node(path: str, node_id: str, nodes: Iterable[str]) -> dict[str, Json]:
    """Return the problem of a connection to an unknown node, with similar ids."""
    meant = name_suggestions.suggest_names(node_id, [*islice(nodes, COMPARED_IDS)])
    suggestion = (
        f"Did you mean {' or '.join(meant)}?"
        if meant
        else "GET the workflow's nodes for their ids, or add one."
    )
    return _build_flaw(
        path, "broken-connection", f"The workflow has no node with the id {node_id}", suggestion
    )


def _require_ports(edge: StoredConnection, nodes: Mapping[str, StoredNode], catalog: NodeCatalog) -> None:
    """Raise a 422 error if an end of a connection names a port that its node doesn't have; unknown types have any."""
    flaws = []
    outputs = _list_outputs(nodes[str(edge["source"])], catalog)
    target = catalog.node_types.get(str(nodes[str(edge["target"])]["type"]))
    if outputs and edge["sourcePort"] not in outputs:
        flaws.append(_no_port("sourcePort", str(edge["source"]), edge["sourcePort"], outputs))
    if target and edge["targetPort"] not in target.inputs:
        flaws.append(_no_port("targetPort", str(edge["target"]), edge["targetPort"], target.inputs))
    if flaws:
        raise errors.invalid(flaws)


def _list_outputs(node: StoredNode, catalog: NodeCatalog) -> Sequence[str]:
    """Return the output ports of a node, with the error port; empty for an unknown type."""
    node_type = catalog.node_types.get(str(node["type"]))
    if node_type is None:
        return ()
    return (*node_type.outputs_of(cast("Mapping[str, Json]", node["config"])), ERROR)


def _no_port(path: str, node_id: str, port: Json, known: Sequence[str]) -> dict[str, Json]:
    """Return the problem of a port that a node doesn't have, with those that it has."""
    kind = "output" if path == "sourcePort" else "input"
    has = f"it has {', '.join(known)}" if known else "it has no inputs"
    suggestion = f"Use one of: {', '.join(known)}." if known else "Connect to a node with an input."
    return _build_flaw(path, "invalid-port", f"Node {node_id} has no {kind} port {port}: {has}", suggestion)


def _require_new(edge: StoredConnection, others: Iterable[StoredConnection]) -> None:
    """Raise a 409 error if another connection has the id of a new one, or joins the same two ports."""
    joined = _joined(edge)
    for other in others:
        if other["id"] == edge["id"]:
            message = f"The workflow has a connection with the id {edge['id']} already"
            raise errors.conflict("duplicate-connection", message)
        if _joined(other) == joined:
            message = f"Connection {other['id']} joins these two ports already"
            raise errors.conflict("duplicate-connection", message)


def _require_no_cycle(edge: StoredConnection, others: Iterable[StoredConnection]) -> None:
    """Raise a 422 error if a connection would close a cycle, which the message shows, up to six nodes."""
    source, target = str(edge["source"]), str(edge["target"])
    if source == target:
        message = f"Node {source} can't be connected to itself"
        raise _build_refusal("targetNodeId", "cycle", message, "Connect it to another node.")
    way = _find_path(target, source, others)
    if way:
        around = [source, *way]
        if len(around) > SHOWN_OF_A_CYCLE + 1:
            around[SHOWN_OF_A_CYCLE:] = ["…"]
        message = f"The connection would close a cycle: {' → '.join(around)}"
        raise _build_refusal("targetNodeId", "cycle", message, "Remove a connection of the cycle first.")


def _find_path(start: str, end: str, edges: Iterable[StoredConnection]) -> list[str]:
    """Return the node ids on a shortest path along the edges, both ends included; empty if there is none."""
    children = defaultdict(list)
    for edge in edges:
        children[edge["source"]].append(str(edge["target"]))
    came_from = {start: ""}
    level = [start]
    while level and end not in came_from:
        below = [(child, node) for node in level for child in children[node] if child not in came_from]
        came_from |= below
        level = list(dict(below))
    way = []
    node = end if end in came_from else ""
    while node:
        way.append(node)
        node = came_from[node]
    return way[::-1]


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────


def _build_flaw(path: str, code: str, message: str, suggestion: str) -> dict[str, Json]:
    return {**errors.problem(path, code, message), "suggestion": suggestion}


def _build_refusal(path: str, code: str, message: str, suggestion: str = "") -> ApiError:
    flaw = _build_flaw(path, code, message, suggestion) if suggestion else errors.problem(path, code, message)
    return errors.invalid([flaw])
