"""Graph of a workflow in its stored form: nodes, edges, run settings, and the bodies of its loops.

The sections of a graph are the nodes outside of all loops, and the body of each loop: the nodes reachable from its port
`continue`. A body is closed: no edge leads into it from outside, and none out of it. Its results leave the loop by
`done`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Final, Self, TypeAlias, cast

from msgspec import Struct, field

from engine.node_api import CONTINUE, INPUT, OUTPUT
from engine.run_errors import InvalidDefinition

if TYPE_CHECKING:
    from engine.values import Json

Definition: TypeAlias = "Mapping[str, Json]"
"""`{"nodes": [...], "connections": [...], "settings": {...}}` in the stored form; see `GraphNode.from_stored`
and `GraphEdge.from_stored`.

The definition of a test run may contain `upTo`, the last node to run, and `pinned`. The latter holds outputs by
the ids of nodes that return them without being run.
"""

MAX_LOOP_DEPTH: Final = 4
"""Maximum nesting depth of loops."""


class RetryPolicy(Struct, frozen=True):
    """Attempts of a node and the delay between them: `backoff * 2 ** (attempt - 1)`, up to `max_delay`."""

    max_attempts: int = 1
    backoff_seconds: float = 1.0
    max_delay_seconds: float = 300.0
    jitter: float = 0.1
    """Share of the delay that is random, 0 to 1."""

    @classmethod
    def from_stored(cls, stored: Mapping[str, Json]) -> Self:
        return cls(
            max_attempts=int(_number_field(stored, "maxAttempts", 1)),
            backoff_seconds=_number_field(stored, "backoff", 1.0),
            max_delay_seconds=_number_field(stored, "maxDelay", 300.0),
            jitter=_number_field(stored, "jitter", 0.1),
        )

    def delay_seconds(self, attempt: int, chance: float) -> float:
        """Return the seconds to wait after the failed `attempt` (1, 2, …); `chance` is a random number from 0 to 1.

        The delay doubles with each attempt up to a maximum; jitter shortens it by up to its share.
        """
        delay = min(self.backoff_seconds * 2.0 ** min(attempt - 1, 30), self.max_delay_seconds)
        return delay * (1 - self.jitter * chance)


class GraphNode(Struct, frozen=True):
    """Node of a graph."""

    id: str
    type: str
    version: str | None = None
    label: str = ""
    config: Mapping[str, Json] = field(default_factory=dict)
    input_mappings: Mapping[str, Json] = field(default_factory=dict)
    pass_through_values: Mapping[str, Json] = field(default_factory=dict)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    timeout_seconds: float | None = None
    at_most_once: bool = False
    """Whether a write whose attempt has an unknown outcome fails the node instead of being repeated."""
    has_own_retry: bool = False
    """Whether the node itself has a retry policy, which precedes that of a custom type."""

    @classmethod
    def from_stored(cls, stored: Mapping[str, Json]) -> Self:
        """Return the node of its stored form; fields that are missing or of another type get their defaults, the label
        the id.

        Raises `KeyError` without `id` or `type`.
        """
        timeout = stored.get("timeout")
        version = stored.get("version")
        return cls(
            id=str(stored["id"]),
            type=str(stored["type"]),
            version=str(version) if version is not None else None,
            label=str(stored.get("label") or stored["id"]),
            config=_object_field(stored, "config"),
            input_mappings=_object_field(stored, "inputMappings"),
            pass_through_values=_object_field(stored, "passThroughValues"),
            retry=RetryPolicy.from_stored(_object_field(stored, "retry"))
            if "retry" in stored
            else RetryPolicy(),
            timeout_seconds=float(timeout) if isinstance(timeout, int | float) else None,
            at_most_once=stored.get("atMostOnce") is True,
            has_own_retry=isinstance(stored.get("retry"), dict),
        )


class GraphEdge(Struct, frozen=True):
    """Connection from a port of a node to a port of another."""

    id: str
    source: str
    target: str
    source_port: str = OUTPUT
    target_port: str = INPUT

    @classmethod
    def from_stored(cls, stored: Mapping[str, Json]) -> Self:
        return cls(
            id=str(stored["id"]),
            source=str(stored["source"]),
            target=str(stored["target"]),
            source_port=str(stored.get("sourcePort") or OUTPUT),
            target_port=str(stored.get("targetPort") or INPUT),
        )


class RunSettings(Struct, frozen=True):
    """Settings of a run."""

    timeout_seconds: float = 3600.0
    strict_mappings: bool = False
    parallelism: int = 16
    """Maximum number of nodes that wait for external work at the same time."""
    retry_on_failure: bool = False
    max_retries: int = 3
    """With `retry_on_failure`, the number of times that a permanently failed node, and the run with it, is
    resumed.
    """

    @classmethod
    def from_stored(cls, stored: Mapping[str, Json]) -> Self:
        return cls(
            timeout_seconds=_number_field(stored, "timeout", 3600.0),
            strict_mappings=stored.get("strictMappings") is True,
            parallelism=int(_number_field(stored, "parallelism", 16)),
            retry_on_failure=stored.get("retryOnFailure") is True,
            max_retries=int(_number_field(stored, "maxRetries", 3)),
        )


class ParsedGraph(Struct, frozen=True, dict=True):
    """Nodes and edges as stored, broken edges included; the indexes omit edges to unknown nodes."""

    nodes: Sequence[GraphNode]
    edges: Sequence[GraphEdge]
    settings: RunSettings = field(default_factory=RunSettings)
    up_to: str | None = None
    """Last node to run in a test run."""
    pinned: Mapping[str, Json] = field(default_factory=dict)
    """Outputs of nodes that aren't run, by their ids."""

    @classmethod
    def from_stored(cls, definition: Definition) -> Self:
        nodes = cast("list[Mapping[str, Json]]", definition.get("nodes") or [])
        edges = cast("list[Mapping[str, Json]]", definition.get("connections") or [])
        return cls(
            nodes=tuple(map(GraphNode.from_stored, nodes)),
            edges=tuple(map(GraphEdge.from_stored, edges)),
            settings=RunSettings.from_stored(_object_field(definition, "settings")),
            up_to=str(definition["upTo"]) if definition.get("upTo") is not None else None,
            pinned=_object_field(definition, "pinned"),
        )

    @cached_property
    def by_id(self) -> Mapping[str, GraphNode]:
        return {node.id: node for node in self.nodes}

    @cached_property
    def inbound(self) -> Mapping[str, Sequence[GraphEdge]]:
        edges: dict[str, list[GraphEdge]] = {node.id: [] for node in self.nodes}
        for edge in self._whole_edges:
            edges[edge.target].append(edge)
        return edges

    @cached_property
    def inbound_counts(self) -> Mapping[str, int]:
        return {node_id: len(edges) for node_id, edges in self.inbound.items()}

    @cached_property
    def outbound(self) -> Mapping[str, Sequence[GraphEdge]]:
        edges: dict[str, list[GraphEdge]] = {node.id: [] for node in self.nodes}
        for edge in self._whole_edges:
            edges[edge.source].append(edge)
        return edges

    @cached_property
    def order(self) -> Sequence[str]:
        """Node ids in topological order; nodes on a cycle, or behind one, are omitted."""
        waiting = dict(self.inbound_counts)
        ready = deque(node_id for node_id, count in waiting.items() if count == 0)
        order: list[str] = []
        while ready:
            node_id = ready.popleft()
            order.append(node_id)
            for edge in self.outbound[node_id]:
                waiting[edge.target] -= 1
                if waiting[edge.target] == 0:
                    ready.append(edge.target)
        return order

    @cached_property
    def _whole_edges(self) -> Sequence[GraphEdge]:
        return [edge for edge in self.edges if edge.source in self.by_id and edge.target in self.by_id]


def _object_field(stored: Mapping[str, Json], key: str) -> Mapping[str, Json]:
    value = stored.get(key)
    return value if isinstance(value, dict) else {}


def _number_field(stored: Mapping[str, Json], key: str, default: float) -> float:
    value = stored.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


class GraphSection(Struct, frozen=True, dict=True):
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
        """Nodes without outgoing edges, in graph order; their outputs are the result of the section."""
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


class LoopBodies(Struct, frozen=True):
    """Assignment of nodes to loop bodies."""

    loops: frozenset[str]
    holders: Mapping[str, str | None]
    """Innermost enclosing loop by node; None outside of all bodies."""
    depths: Mapping[str, int]
    """Number of enclosing loops by node."""
    crossing: Sequence[GraphEdge]
    """Edges that lead into a body from outside."""

    def enclosing_loops(self, node_id: str) -> Iterator[str]:
        """Yield the ids of the loops that enclose a node, the innermost first; none outside of loops."""
        holder = self.holders.get(node_id)
        while holder is not None:
            yield holder
            holder = self.holders.get(holder)


def find_bodies(graph: ParsedGraph, loops: Collection[str]) -> LoopBodies:
    """Return for each node the innermost loop whose body contains it, and the number of enclosing loops; nothing
    without loops.

    `loops` are ids of nodes. A body is all that is reached from a loop's port `continue`. A node in several bodies
    belongs to the deepest. Edges that lead into a body from outside are listed as `crossing`. Nodes on cycles, or
    behind one, are left out.
    """
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
    """Divide a graph into sections: the outermost one, with the bodies of loops in it; return that.

    `first` are the nodes that may start, `eager` those that start after their first branch. Raises
    `InvalidDefinition` for edges into a body from outside, and over four levels of loops.
    """
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
        """Return the section of a loop's body, or (None) the outermost one, with the sections in it."""
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
