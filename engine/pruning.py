"""Pruning of a graph for a test run: only predecessors of its last node, and nothing before a pinned one.

A pinned node returns the output that was set for it and isn't run. Nodes that only lead to pinned nodes
aren't run either, unless an expression of a node that is run refers to them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from engine.expressions import ExpressionError, compile_expression, compile_template, list_paths
from engine.graph import GraphEdge, ParsedGraph, find_bodies
from engine.node_api import CONTINUE, UnknownNodeType
from engine.run_errors import InvalidDefinition

if TYPE_CHECKING:
    from engine.graph import GraphNode, LoopBodies
    from engine.node_lookup import NodeTypeLookup
    from engine.values import Json


def prune_graph(graph: ParsedGraph, catalog: NodeTypeLookup) -> ParsedGraph:
    """Return the part of a graph that is run: nodes needed for its `up_to`, without those hidden behind pinned nodes.

    Without `up_to` and pinned nodes it is the graph itself. Raises `InvalidDefinition` for an unknown node to pin or to
    end with.
    """
    if graph.up_to is None and not graph.pinned:
        return graph
    for node_id in (*graph.pinned, *([] if graph.up_to is None else [graph.up_to])):
        if node_id not in graph.by_id:
            raise InvalidDefinition(f"There is no node {node_id!r} to pin or to end with")
    bodies = find_bodies(graph, [node.id for node in graph.nodes if _is_loop(node, catalog)])
    needed = _NeededNodes(graph, bodies).collect()
    return ParsedGraph(
        nodes=[node for node in graph.nodes if node.id in needed],
        edges=[
            *(
                edge
                for edge in graph.edges
                if edge.source in needed and edge.target in needed and edge.target not in graph.pinned
            ),
            *_pin_loop_bodies(graph.pinned, bodies),
        ],
        settings=graph.settings,
        up_to=graph.up_to,
        pinned=graph.pinned,
    )


def _pin_loop_bodies(pinned: Collection[str], bodies: LoopBodies) -> Iterator[GraphEdge]:
    """Yield an edge from the loop to each pinned node in its body, so that the node stays there and returns
    at once.
    """
    for node_id in pinned:
        loop_id = bodies.holders.get(node_id)
        if loop_id is not None:
            yield GraphEdge(f"pinned {node_id}", loop_id, node_id, source_port=CONTINUE)


class _NeededNodes:
    """Backward search from the last nodes to all nodes that they need."""

    def __init__(self, graph: ParsedGraph, bodies: LoopBodies) -> None:
        self._graph = graph
        self._bodies = bodies
        self._loops = bodies.loops - graph.pinned.keys()
        self._last_of_bodies = self._last_nodes()
        self._found: set[str] = set()
        self._whole: set[str] = set()
        """Loops whose whole body is needed, and not only the path to a node in it."""
        self._left: list[str] = []

    def collect(self) -> set[str]:
        if self._graph.up_to is not None:
            self._add_needed(self._graph.up_to)
        else:
            for node_id in self._last_of_bodies[None]:
                self._add_needed(node_id)
        while self._left:
            self._add_requirements(self._graph.by_id[self._left.pop()])
        return self._found

    def _last_nodes(self) -> Mapping[str | None, list[str]]:
        """Return the ids of the last nodes by their innermost loop, None outside of loops.

        No edge leaves such a node, other than from a loop to its own body.
        """
        last: dict[str | None, list[str]] = {None: []}
        for node in self._graph.nodes:
            leading = [
                edge
                for edge in self._graph.outbound[node.id]
                if not self._enters_body(edge.source_port, node)
            ]
            if not leading:
                last.setdefault(self._bodies.holders.get(node.id), []).append(node.id)
        return last

    def _enters_body(self, port: str, node: GraphNode) -> bool:
        return port == CONTINUE and node.id in self._loops

    def _add_needed(self, node_id: str, *, whole: bool = True) -> None:
        """Add a node to those that are needed, once; for a loop that is needed `whole`, also the last nodes of its
        body.
        """
        if node_id not in self._found:
            self._found.add(node_id)
            self._left.append(node_id)
        if whole and node_id in self._loops and node_id not in self._whole:
            self._whole.add(node_id)
            for last in self._last_of_bodies.get(node_id, ()):
                self._add_needed(last)

    def _add_requirements(self, node: GraphNode) -> None:
        """Add the nodes that a needed node needs: enclosing loops, sources of its edges, and nodes that it
        refers to.
        """
        for loop_id in self._bodies.enclosing_loops(node.id):
            self._add_needed(loop_id, whole=False)
        if node.id in self._graph.pinned:
            return
        for edge in self._graph.inbound[node.id]:
            is_from_around = self._enters_body(edge.source_port, self._graph.by_id[edge.source])
            self._add_needed(edge.source, whole=not is_from_around)
        for named in _iterate_referenced_nodes(node):
            if named in self._graph.by_id:
                self._add_needed(named, whole=named not in self._bodies.enclosing_loops(node.id))


def _iterate_referenced_nodes(node: GraphNode) -> Iterator[str]:
    """Yield the ids of nodes that the expressions of a node refer to: `nodes.<id>`; invalid expressions are skipped."""
    texts = [*_collect_texts(dict(node.config)), *_collect_texts(dict(node.input_mappings))]
    for text in texts:
        if "nodes" not in text:
            continue
        try:
            paths = compile_template(text).paths if "{{" in text else list_paths(compile_expression(text))
        except ExpressionError:
            continue
        for path in paths:
            if path.root == "nodes" and path.steps and path.steps[0][0] is not None:
                yield path.steps[0][0]


def _collect_texts(value: Json) -> Iterator[str]:
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, dict):
            left.extend(inner.values())
        elif isinstance(inner, list):
            left.extend(inner)


def _is_loop(node: GraphNode, catalog: NodeTypeLookup) -> bool:
    try:
        return catalog.get(node.type, node.version).loops
    except UnknownNodeType:
        return False
