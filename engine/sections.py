"""Sections of a graph: the nodes outside of all loops, and the body of each loop.

The body of a loop consists of the nodes reachable from its port `continue`. It is closed: no edge leads into
it from outside, and none out of it. Its results leave the loop by `done`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

from engine.graph import ParsedGraph
from engine.node_api import CONTINUE
from engine.run_errors import InvalidDefinition

if TYPE_CHECKING:
    from engine.graph import GraphEdge, GraphNode

MAX_LOOP_DEPTH: Final = 4
"""Maximum nesting depth of loops."""


@dataclass(frozen=True)
class GraphSection:
    """Executable section of a graph."""

    graph: ParsedGraph
    """Nodes and edges; the graph of a body begins with the loop itself, and the edges from its port
    `continue`.
    """
    first: tuple[str, ...] = ()
    """Nodes without incoming edges that are ready at the start."""
    eager: frozenset[str] = frozenset()
    """Nodes that continue with the first branch that arrives."""
    bodies: Mapping[str, GraphSection] = field(default_factory=dict)
    """Bodies of the loops in this section."""
    loop_id: str | None = None
    """Loop that this section is the body of."""

    @cached_property
    def last(self) -> tuple[str, ...]:
        """Nodes without outgoing edges; their outputs are the result of the section."""
        outbound = self.graph.outbound
        return tuple(
            node.id for node in self.graph.nodes if not outbound[node.id] and node.id != self.loop_id
        )

    @cached_property
    def size(self) -> int:
        """Number of nodes, including those of all nested bodies."""
        return sum(1 for _ in self.inner_nodes())

    def inner_nodes(self) -> Iterator[GraphNode]:
        """Yield the nodes of the section and of all nested bodies, without the section's own loop."""
        for node in self.graph.nodes:
            if node.id != self.loop_id:
                yield node
                if node.id in self.bodies:
                    yield from self.bodies[node.id].inner_nodes()


@dataclass(frozen=True, slots=True)
class LoopBodies:
    """Assignment of nodes to loop bodies."""

    loops: frozenset[str]
    holders: Mapping[str, str | None]
    """Innermost enclosing loop by node; None outside of all bodies."""
    depths: Mapping[str, int]
    """Number of enclosing loops by node."""
    crossing: Sequence[GraphEdge]
    """Edges that lead into a body from outside."""

    def around(self, node_id: str) -> Iterator[str]:
        """Yield the enclosing loops of a node, the innermost first."""
        holder = self.holders.get(node_id)
        while holder is not None:
            yield holder
            holder = self.holders.get(holder)


def find_bodies(graph: ParsedGraph, loops: Collection[str]) -> LoopBodies:
    """Find the bodies of `loops` in one pass; a node in several bodies belongs to the deepest."""
    if not loops:
        return LoopBodies(frozenset(), {}, {}, ())
    holders: dict[str, str | None] = {}
    depths: dict[str, int] = {}
    crossing: list[GraphEdge] = []
    for node_id in graph.order:
        arriving = [(edge, _holder_behind(edge, holders, loops)) for edge in graph.inbound[node_id]]
        # Loops precede the nodes in their bodies, so the depth of each is known.
        holder = max(
            (found for _, found in arriving), key=lambda found: _holder_depth(found, depths), default=None
        )
        holders[node_id], depths[node_id] = holder, _holder_depth(holder, depths)
        crossing += [edge for edge, found in arriving if found != holder]
    return LoopBodies(frozenset(loops), holders, depths, crossing)


def _holder_behind(edge: GraphEdge, holders: Mapping[str, str | None], loops: Collection[str]) -> str | None:
    is_entry = edge.source_port == CONTINUE and edge.source in loops
    return edge.source if is_entry else holders[edge.source]


def _holder_depth(holder: str | None, depths: Mapping[str, int]) -> int:
    return 0 if holder is None else depths[holder] + 1


def divide_graph(
    graph: ParsedGraph, loops: Collection[str], first: Collection[str], eager: Collection[str]
) -> GraphSection:
    """Return the outermost section with all others in it; raises `InvalidDefinition` for invalid loop bodies."""
    if not loops:
        return GraphSection(graph, tuple(first), frozenset(eager))
    bodies = find_bodies(graph, loops)
    if bodies.crossing:
        raise InvalidDefinition(f"Connection {bodies.crossing[0].id!r} leads into the body of a loop")
    if max(bodies.depths.values(), default=0) > MAX_LOOP_DEPTH:
        raise InvalidDefinition(f"Loops nest more than {MAX_LOOP_DEPTH} deep")
    return _SectionDivider(graph, bodies, frozenset(first), frozenset(eager)).section(None)


class _SectionDivider:
    """Grouping of nodes and edges by section, once for all sections."""

    def __init__(
        self, graph: ParsedGraph, bodies: LoopBodies, first: frozenset[str], eager: frozenset[str]
    ) -> None:
        self._graph = graph
        self._first = first
        self._eager = eager
        self._nodes: dict[str | None, list[GraphNode]] = {}
        self._edges: dict[str | None, list[GraphEdge]] = {}
        for node in graph.nodes:
            self._nodes.setdefault(bodies.holders.get(node.id), []).append(node)
        for node_id, edges in graph.inbound.items():
            self._edges.setdefault(bodies.holders.get(node_id), []).extend(edges)

    def section(self, loop_id: str | None) -> GraphSection:
        nodes = self._nodes.get(loop_id, [])
        head = [] if loop_id is None else [self._graph.by_id[loop_id]]
        ids = {node.id for node in nodes}
        return GraphSection(
            graph=ParsedGraph([*head, *nodes], self._edges.get(loop_id, []), self._graph.settings),
            first=tuple(node.id for node in nodes if node.id in self._first),
            eager=self._eager & ids,
            bodies={node.id: self.section(node.id) for node in nodes if node.id in self._nodes},
            loop_id=loop_id,
        )
