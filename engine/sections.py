"""The parts of a graph that are run as one: what lies outside of every loop, and the body of each loop.

A loop's body is what is reached from its port `continue`. It is a part of its own: no edge leads into it from outside,
and none out of it; what comes of it leaves the loop by `done`.
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
"""Loops inside one another."""


@dataclass(frozen=True)
class GraphSection:
    """One part of a graph, ready to be walked through."""

    graph: ParsedGraph
    """Its nodes and edges; that of a body begins with the loop itself, and the edges from its port `continue`."""
    first: tuple[str, ...] = ()
    """Nodes that nothing leads to and that are ready all the same."""
    eager: frozenset[str] = frozenset()
    """Nodes that go on with the first branch that arrives."""
    bodies: Mapping[str, GraphSection] = field(default_factory=dict)
    """Of the loops in it that have one."""
    loop_id: str | None = None
    """The loop whose body it is."""

    @cached_property
    def last(self) -> tuple[str, ...]:
        """The nodes that lead nowhere: their outputs are what comes of the section."""
        outbound = self.graph.outbound
        return tuple(
            node.id for node in self.graph.nodes if not outbound[node.id] and node.id != self.loop_id
        )

    @cached_property
    def size(self) -> int:
        """How many nodes it has, with those of all the bodies in it."""
        return sum(1 for _ in self.inner_nodes())

    def inner_nodes(self) -> Iterator[GraphNode]:
        """Return the nodes of it and of all the bodies in it, without the loop whose body it is."""
        for node in self.graph.nodes:
            if node.id != self.loop_id:
                yield node
                if node.id in self.bodies:
                    yield from self.bodies[node.id].inner_nodes()


@dataclass(frozen=True, slots=True)
class LoopBodies:
    """Which loop's body each node is in."""

    loops: frozenset[str]
    holders: Mapping[str, str | None]
    """By node: the innermost loop around it; None: it is in no body."""
    depths: Mapping[str, int]
    """By node: how many loops are around it."""
    crossing: Sequence[GraphEdge]
    """Edges that lead into a body from outside of it."""

    def around(self, node_id: str) -> Iterator[str]:
        """Return the loops around a node, the innermost first."""
        holder = self.holders.get(node_id)
        while holder is not None:
            yield holder
            holder = self.holders.get(holder)


def find_bodies(graph: ParsedGraph, loops: Collection[str]) -> LoopBodies:
    """Look for the bodies of `loops`, in one pass; where bodies overlap, a node is in the deepest that reaches it."""
    if not loops:
        return LoopBodies(frozenset(), {}, {}, ())
    holders: dict[str, str | None] = {}
    depths: dict[str, int] = {}
    crossing: list[GraphEdge] = []
    for node_id in graph.order:
        arriving = [(edge, _holder_behind(edge, holders, loops)) for edge in graph.inbound[node_id]]
        # Loops come before what is in their bodies: the depth of each is known.
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
    """Return the outermost section, with all others in it; raises `InvalidDefinition` for what can't be divided."""
    if not loops:
        return GraphSection(graph, tuple(first), frozenset(eager))
    bodies = find_bodies(graph, loops)
    if bodies.crossing:
        raise InvalidDefinition(f"Connection {bodies.crossing[0].id!r} leads into the body of a loop")
    if max(bodies.depths.values(), default=0) > MAX_LOOP_DEPTH:
        raise InvalidDefinition(f"More than {MAX_LOOP_DEPTH} loops stand in one another")
    return _SectionDivider(graph, bodies, frozenset(first), frozenset(eager)).section(None)


class _SectionDivider:
    """Sorts nodes and edges by the section that they are in, once for all sections."""

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
