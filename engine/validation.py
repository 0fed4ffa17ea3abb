"""What is wrong with a graph, before it runs. Linear in nodes and edges; nothing of the graph is evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from engine.expressions import ExpressionError
from engine.node import ERROR, NodeType
from engine.program import compile_node

if TYPE_CHECKING:
    from engine.graph import Graph, Node
    from engine.program import Catalog
    from engine.values import Json


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to mend."""

    type: str
    message: str
    suggestion: str
    node_id: str | None = None
    connection_id: str | None = None

    def as_json(self) -> dict[str, Json]:
        found: dict[str, Json] = {"type": self.type, "message": self.message, "suggestion": self.suggestion}
        if self.node_id is not None:
            found["nodeId"] = self.node_id
        if self.connection_id is not None:
            found["connectionId"] = self.connection_id
        return found


@dataclass(frozen=True, slots=True)
class Validation:
    """The findings: a graph with warnings alone is valid."""

    errors: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()

    @property
    def is_valid(self) -> bool:
        return not self.errors


def validate(graph: Graph, catalog: Catalog) -> Validation:
    """Check a graph against the catalogue; `not-runnable` is an error here and may be taken as a warning in drafts."""
    if not graph.nodes:
        return Validation(errors=(_finding_of_empty(),))
    known, type_errors = _look_up(graph, catalog)
    types = {node.id: node_type for node, node_type in known}
    errors = [*_duplicates(graph), *type_errors, *_triggers(graph, types), *_connections(graph, types)]
    if cycle := _cycle(graph):
        errors.append(cycle)
    warnings = [*_disconnected(graph, types)]
    for node, node_type in known:
        for finding in _config(node, node_type, catalog):
            (warnings if finding.type == "missing-config" else errors).append(finding)
    return Validation(errors=tuple(errors), warnings=tuple(warnings))


def _finding_of_empty() -> Finding:
    return Finding(
        "empty-workflow", "The workflow has no nodes", "Add a trigger node and a node that it leads to."
    )


def _look_up(graph: Graph, catalog: Catalog) -> tuple[list[tuple[Node, NodeType]], list[Finding]]:
    """Return the nodes whose types there are, each with its own: two of them may have one id."""
    known: list[tuple[Node, NodeType]] = []
    errors: list[Finding] = []
    for node in graph.nodes:
        try:
            known.append((node, catalog.get(node.type, node.version)))
        except LookupError as error:
            suggestion = "Choose a type and version from the catalogue."
            errors.append(Finding("unknown-node-type", str(error), suggestion, node.id))
    errors.extend(
        Finding(
            "not-runnable", f"Node {node.label!r} ({node.type}) can't run", "Remove or replace it.", node.id
        )
        for node, node_type in known
        if not node_type.runnable
    )
    return known, errors


def _duplicates(graph: Graph) -> Iterator[Finding]:
    for node_id, count in Counter(node.id for node in graph.nodes).items():
        if count > 1:
            message = f"{count} nodes have the id {node_id!r}"
            yield Finding("duplicate-node-id", message, "Give each node an id of its own.", node_id)
    for edge_id, count in Counter(edge.id for edge in graph.edges).items():
        if count > 1:
            message = f"{count} connections have the id {edge_id!r}"
            yield Finding("broken-connection", message, "Give each an id of its own.", connection_id=edge_id)


def _triggers(graph: Graph, types: dict[str, NodeType]) -> Iterator[Finding]:
    triggers = [node for node in graph.nodes if node.id in types and types[node.id].is_trigger]
    if not triggers and len(types) == len(graph.by_id):
        suggestion = "Add a trigger: manual, rest-api or webhook."
        yield Finding("missing-trigger", "The workflow has no trigger node", suggestion)
    for extra in triggers[1:]:
        message = f"Node {extra.label!r} ({extra.type}) is a second trigger beside {triggers[0].label!r}"
        yield Finding("multiple-triggers", message, "Keep one trigger.", extra.id)


def _connections(graph: Graph, types: dict[str, NodeType]) -> Iterator[Finding]:
    for edge in graph.edges:
        missing = [node_id for node_id in (edge.source, edge.target) if node_id not in graph.by_id]
        if missing:
            message = (
                f"Connection {edge.id!r} names {' and '.join(map(repr, missing))}, which the workflow lacks"
            )
            yield Finding("broken-connection", message, "Remove it or add the node.", connection_id=edge.id)
            continue
        source, target = types.get(edge.source), types.get(edge.target)
        if source and edge.source_port not in (*source.outputs, ERROR):
            yield _invalid_port(edge.id, edge.source, "output", edge.source_port, (*source.outputs, ERROR))
        if target and edge.target_port not in target.inputs:
            yield _invalid_port(edge.id, edge.target, "input", edge.target_port, target.inputs)


def _invalid_port(edge_id: str, node_id: str, kind: str, port: str, known: tuple[str, ...]) -> Finding:
    suggestion = (
        f"Use one of: {', '.join(known)}."
        if known
        else "Nothing can lead into this node: remove the connection."
    )
    return Finding(
        "invalid-port", f"Node {node_id!r} has no {kind} port {port!r}", suggestion, node_id, edge_id
    )


def _cycle(graph: Graph) -> Finding | None:
    parents = {node_id: [edge.source for edge in edges] for node_id, edges in graph.inbound.items()}
    try:
        TopologicalSorter(parents).prepare()
    except CycleError as error:
        around: list[str] = error.args[1]
        shown = " → ".join([*around[:6], "…"] if len(around) > 7 else around)  # noqa: PLR2004 - what a line holds
        return Finding("cycle", f"The connections form a cycle: {shown}", "Remove one of them.", around[0])
    return None


def _disconnected(graph: Graph, types: dict[str, NodeType]) -> Iterator[Finding]:
    for node in graph.nodes:
        is_trigger = node.id in types and types[node.id].is_trigger
        if is_trigger or graph.inbound[node.id]:
            continue
        message = f"Nothing leads to node {node.label!r}: it will be skipped"
        yield Finding("disconnected-node", message, "Connect it, or remove it.", node.id)


def _config(node: Node, node_type: NodeType, catalog: Catalog) -> Iterator[Finding]:
    for problem in catalog.config_problems(node_type, node.config):
        if problem.keyword == "required":
            message = f'Node "{node.label}" ({node.type}) needs configuration: {problem.message}'
            yield Finding("missing-config", message, f"Set {problem.path} in its config.", node.id)
        else:
            message = f'Node "{node.label}" ({node.type}): {problem.path}: {problem.message}'
            yield Finding("invalid-config", message, "See the schema of the node type.", node.id)
    try:
        compile_node(node, catalog)
    except ExpressionError as error:
        message = f'Node "{node.label}" ({node.type}): {error}'
        yield Finding("invalid-config", message, "Mend the expression.", node.id)
