"""Graphs in requests and answers: all accepted spellings become one stored form.

Answers have the form of the API.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, NamedTuple, TypeAlias, cast

from msgspec import Meta

from engine import canvas_layout
from engine.findings import FindingType
from engine.graph import ParsedGraph
from engine.node_api import INPUT, OUTPUT, UnknownNodeType
from gateway.http import limits, text_rules
from gateway.http.errors import ApiError
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import GuardedWire
from journal import definition_snapshot
from models import ids

if TYPE_CHECKING:
    from engine.canvas_layout import CardEdge, CardPosition
    from engine.findings import GraphFinding, ValidationResult
    from engine.values import Json
    from gateway.workflows.stored_workflow import StoredConnection, StoredNode, StoredWorkflow
    from nodes.catalog import NodeCatalog


class CanvasPosition(GuardedWire):
    """Position on the canvas."""

    x: int | float
    y: int | float


GRAPH_ID_PATTERN: Final = "^[A-Za-z0-9_-]{0,64}$"
GraphId: TypeAlias = Annotated[str, Meta(extra_json_schema={"pattern": GRAPH_ID_PATTERN})]
NodeTypeName: TypeAlias = Annotated[str, text_rules.describe_length(limits.NODE_TYPE_LENGTH)]
Label: TypeAlias = Annotated[str, text_rules.describe_length(limits.LABEL_LENGTH)]


class RetryShape(GuardedWire, omit_defaults=True):
    """Retries of a failed node: `min(backoff * 2 ** (attempt - 1), maxDelay)` seconds after the failed attempt."""

    max_attempts: Annotated[int, Meta(ge=1, le=limits.RETRIES)] | None = None
    """Attempts in all, the first included; 1, which is no retry, if absent."""
    backoff: Annotated[float, Meta(ge=0, le=limits.RETRY_DELAY_SECONDS)] | None = None
    """Seconds before the second attempt, 1 if absent; each further delay is twice as long."""
    max_delay: Annotated[float, Meta(ge=0, le=limits.RETRY_DELAY_SECONDS)] | None = None
    """Longest delay in seconds; 300 if absent."""
    jitter: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Largest share of the delay that is cut off at random; 0.1 if absent."""


OF_THE_TYPE: Final = (
    "category",
    "s3Location",
    "resources",
    "data",
    "hasConfig",
    "inboundConnections",
    "outboundConnections",
)
"""Fields of a node that follow from its type and its connections."""


class NodeInput(GuardedWire):
    """Node in a request; its type is `nodeId`, `type` or `nodeType`."""

    read_only: ClassVar[Mapping[str, str]] = dict.fromkeys(OF_THE_TYPE, "")

    id: GraphId | None = None
    """Id in connections; generated if absent."""
    node_id: NodeTypeName | None = None
    """Node type of the catalog; `queue`, `email`, `event` and `schedule` name their triggers."""
    type: NodeTypeName | None = None
    """Alias of `nodeId`."""
    node_type: NodeTypeName | None = None
    """Alias of `nodeId`."""
    version: NodeTypeName | None = None
    """Fixed version of the type."""
    node_version: NodeTypeName | None = None
    """Alias of `version`."""
    label: Label | None = None
    """By default the name of the type."""
    position: CanvasPosition | None = None
    """Computed if absent."""
    config: dict[str, Any] | None = None
    """Config by the schema of the type; texts may contain `{{ expressions }}`."""
    input_mappings: dict[str, Any] | None = None
    """Source of each field of the input: a path (`data.user.id`), a text with expressions, or a constant."""
    pass_through_values: dict[str, str] | None = None
    """Fields to copy from the input to the output: each key of the output, with the key of the input."""
    retry: RetryShape | None = None
    timeout: Annotated[float, Meta(gt=0, le=limits.TIMEOUT_SECONDS)] | None = None
    """Maximum duration of an attempt in seconds."""
    at_most_once: bool | None = None
    """For a writing node: an attempt with unknown outcome fails the node and is not repeated."""


class ConnectionInput(GuardedWire):
    """Connection in a request; its ends are `source` or `sourceNodeId`, and `target` or `targetNodeId`."""

    id: GraphId | None = None
    """Generated if absent."""
    source: GraphId | None = None
    """Alias of `sourceNodeId`."""
    source_node_id: GraphId | None = None
    """Node at the start of the connection."""
    source_port: Label | None = None
    """By default `output`."""
    target: GraphId | None = None
    """Alias of `targetNodeId`."""
    target_node_id: GraphId | None = None
    """Node at the end of the connection."""
    target_port: Label | None = None
    """By default `input`."""


Nodes: TypeAlias = Annotated[list[NodeInput], Meta(max_length=limits.NODES)]
Connections: TypeAlias = Annotated[list[ConnectionInput], Meta(max_length=limits.CONNECTIONS)]


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────


def stored_nodes(
    nodes: Sequence[NodeInput], catalog: NodeCatalog, problems: ProblemCollector
) -> list[StoredNode]:
    """Return the nodes of a body in their stored form; those without a position get none.

    Invalid fields are added to `problems`; once that is full, the rest is left out.
    """
    return [
        stored_node(node, f"nodes.{index}.", None, catalog, problems)
        for index, node in enumerate(nodes)
        if not problems.is_full
    ]


def stored_connections(
    connections: Sequence[ConnectionInput], problems: ProblemCollector
) -> list[StoredConnection]:
    """Return the connections of a body in their stored form.

    Invalid fields are added to `problems`; once that is full, the rest is left out.
    """
    return [
        stored_connection(edge, f"connections.{index}.", problems)
        for index, edge in enumerate(connections)
        if not problems.is_full
    ]


def stored_node(
    node: NodeInput, path: str, place: CanvasPosition | None, catalog: NodeCatalog, problems: ProblemCollector
) -> StoredNode:
    """Return a node of a body in its stored form, at `place` (None for none) unless it has a position.

    A missing id is generated, a missing label is the type's name, and a custom type without a version gets the newest.
    Problems are added to `problems` with the prefix `path`.
    """
    type_name = catalog.canonical_name(node.node_id or node.type or node.node_type or "")
    version = node.version or node.node_version
    default_label = ""
    if not type_name:
        problems.add(f"{path}nodeId", "required", f"{path}nodeId is required: the node's type")
    elif len(type_name) > limits.NODE_TYPE_LENGTH or len(version or "") > limits.NODE_TYPE_LENGTH:
        problems.add(f"{path}nodeId", "unknown-node-type", f"{path}nodeId names no node type")
    else:
        try:
            found = catalog.get(type_name, version)
            default_label = found.name
            if found.task is not None:
                # A new version of a custom type changes no workflow by itself.
                version = found.version
        except UnknownNodeType as error:
            problems.add(f"{path}nodeId", "unknown-node-type", error.message)
    stored: StoredNode = {
        "id": _check_id(node.id, "node", path, problems),
        "type": type_name,
        "label": _label(node.label or default_label, f"{path}label", problems),
        "config": node.config or {},
        "inputMappings": node.input_mappings or {},
        "passThroughValues": dict(node.pass_through_values or {}),
    }
    if place := node.position or place:
        stored["position"] = {"x": place.x, "y": place.y}
    if version is not None:
        stored["version"] = version
    if node.retry is not None:
        stored["retry"] = stored_retry(node.retry)
    if node.timeout is not None:
        stored["timeout"] = node.timeout
    if node.at_most_once:
        stored["atMostOnce"] = True
    return stored


def stored_connection(edge: ConnectionInput, path: str, problems: ProblemCollector) -> StoredConnection:
    """Return a connection of a body in its stored form; a missing id is generated, missing ports are the
    standard ones.

    Problems are added to `problems` with the prefix `path`.
    """
    return {
        "id": _check_id(edge.id, "conn", path, problems),
        "source": _end(edge.source_node_id or edge.source, f"{path}sourceNodeId", problems),
        "sourcePort": _check_port(edge.source_port, OUTPUT, f"{path}sourcePort", problems),
        "target": _end(edge.target_node_id or edge.target, f"{path}targetNodeId", problems),
        "targetPort": _check_port(edge.target_port, INPUT, f"{path}targetPort", problems),
    }


def _check_id(given: str | None, prefix: str, path: str, problems: ProblemCollector) -> str:
    if not given:
        return new_id(prefix)
    return text_rules.check_identifier(given, f"{path}id", problems)


def new_id(prefix: str) -> str:
    """Return a new id with twelve random characters: unlikely to collide within a graph, and short."""
    return f"{prefix}-{''.join(ids.ALPHABET[byte & 31] for byte in os.urandom(12))}"


def _end(given: str | None, path: str, problems: ProblemCollector) -> str:
    if not given:
        problems.add(path, "required", f"{path} is required")
        return ""
    return text_rules.check_identifier(given, path, problems)


def _label(given: str, path: str, problems: ProblemCollector) -> str:
    return text_rules.check_line(given, path, problems, max_length=limits.LABEL_LENGTH, may_be_empty=True)


def _check_port(given: str | None, default: str, path: str, problems: ProblemCollector) -> str:
    return text_rules.check_line(given or default, path, problems, max_length=limits.LABEL_LENGTH)


def stored_retry(retry: RetryShape) -> dict[str, Json]:
    """Return the retry policy of a node as stored: only the fields that the request has set."""
    shown: dict[str, Json] = {
        "maxAttempts": retry.max_attempts,
        "backoff": retry.backoff,
        "maxDelay": retry.max_delay,
        "jitter": retry.jitter,
    }
    return {key: value for key, value in shown.items() if value is not None}


# ── positions ───────────────────────────────────────────────────────────────────────────────────────────────


class LayoutInput(NamedTuple):
    """Input of a layout: the arguments of `layouts.arrange_cards`."""

    node_ids: list[str]
    edges: list[CardEdge]
    places: list[CardPosition | None]
    """Position of each node, or None."""


def build_layout_input(nodes: Sequence[StoredNode], connections: Sequence[StoredConnection]) -> LayoutInput:
    """Return the input of the layout engine for a graph: node ids, edges as pairs of ids, and present
    positions (or None).
    """
    edges = [(str(edge["source"]), str(edge["target"])) for edge in connections]
    return LayoutInput([str(node["id"]) for node in nodes], edges, [_place(node) for node in nodes])


def with_positions(nodes: Sequence[StoredNode], places: Sequence[CardPosition]) -> list[StoredNode]:
    """Return the nodes with new canvas positions: `places` has one for each node, in the same order."""
    return [
        {**node, "position": {"x": x, "y": y}} if _place(node) != (x, y) else node
        for node, (x, y) in zip(nodes, places, strict=True)
    ]


def with_all_positions(
    nodes: Sequence[StoredNode],
    connections: Sequence[StoredConnection],
    before: Sequence[StoredNode] = (),
) -> list[StoredNode]:
    """Return nodes with canvas positions.

    A node keeps its own, else gets that of the node with the same id in `before`, else a free one, found by
    the layout engine.
    """
    known = {str(node["id"]): node["position"] for node in before}
    kept: list[StoredNode] = []
    for node in nodes:
        position = node.get("position") or known.pop(str(node["id"]), None)
        kept.append(node if position is None else {**node, "position": position})
    return with_positions(kept, canvas_layout.complete_layout(*build_layout_input(kept, connections)))


def _place(node: StoredNode) -> CardPosition | None:
    position = node.get("position")
    if position is None:
        return None
    where = cast("Mapping[str, float]", position)
    return where["x"], where["y"]


# ── validation ──────────────────────────────────────────────────────────────────────────────────────────────


def graph_of(stored: StoredWorkflow) -> ParsedGraph:
    """Return the graph that a workflow's stored nodes and connections form, without its run settings."""
    return ParsedGraph.from_stored(definition_snapshot.build_definition(stored.nodes, stored.connections, {}))


def require_valid(validation: ValidationResult) -> None:
    """Raise a 422 error with up to 100 errors of a graph's validation, if there are any; warnings don't count.

    Its code is `unresolved-model-placeholder` if all errors are of this type, else `validation-failed`.
    """
    if not validation.errors:
        return
    shown = validation.errors[: limits.FINDINGS]
    count = len(validation.errors)
    message = shown[0].message if count == 1 else f"The workflow has {count} errors: see details"
    details = map(_show_finding, shown)
    if all(one.type is FindingType.UNRESOLVED_MODEL_PLACEHOLDER for one in validation.errors):
        raise ApiError(422, "unresolved-model-placeholder", message, details=details)
    raise ApiError(422, "validation-failed", message, details=details)


def _show_finding(finding: GraphFinding) -> dict[str, Json]:
    where = f"nodes.{finding.node_id}" if finding.node_id else f"connections.{finding.connection_id}"
    if finding.node_id is None and finding.connection_id is None:
        where = "nodes"
    return {"path": where, "code": finding.type, **finding.as_json()}


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


def shown_node(node: StoredNode) -> dict[str, Json]:
    """Return a stored node in API form: with its type as `nodeId` too."""
    return {"id": node["id"], "nodeId": node["type"], **node}


def shown_connection(connection: StoredConnection) -> dict[str, Json]:
    """Return a stored connection in API form, which has `sourceNodeId` and `targetNodeId` for `source` and `target`."""
    return {
        "id": connection["id"],
        "sourceNodeId": connection["source"],
        "sourcePort": connection["sourcePort"],
        "targetNodeId": connection["target"],
        "targetPort": connection["targetPort"],
    }
