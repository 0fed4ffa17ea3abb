"""Readiness of nodes in one run, without a clock or I/O; each step costs time linear in its edges."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.graph import GraphEdge, ParsedGraph


@dataclass(slots=True)
class ReadinessChange:
    """Result of one step: nodes that may start now, and nodes that never will."""

    ready: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


class ReadinessTracker:
    """Tracker of one run's readiness in its graph.

    A node is ready when every edge into it is decided and at least one was taken. If none was taken, the node
    is skipped, and so are its outgoing edges. The decision depends only on the settled nodes, not on their
    order. An eager node, however, is ready as soon as one edge into it was taken; later decisions change
    nothing for it.
    """

    def __init__(self, graph: ParsedGraph, triggers: Iterable[str], eager: Collection[str] = ()) -> None:
        self._inbound = graph.inbound
        self._outbound = graph.outbound
        self._undecided = dict(graph.inbound_counts)
        self._reached: set[str] = set()
        self._ports: dict[str, str] = {}
        self._triggers = frozenset(triggers)
        self._eager = eager
        self._first: dict[str, GraphEdge] = {}
        """Edge by which each eager node was reached."""

    def start(self) -> ReadinessChange:
        """Return the triggers as ready; other nodes without incoming edges are skipped."""
        step = ReadinessChange()
        roots = [node_id for node_id, count in self._undecided.items() if count == 0]
        step.ready = [node_id for node_id in roots if node_id in self._triggers]
        self._skip((node_id for node_id in roots if node_id not in self._triggers), step)
        return step

    def settle(self, node_id: str, port: str) -> ReadinessChange:
        """Record that a node has left by `port`: its edges at that port are taken, the others are not."""
        step = ReadinessChange()
        unreachable: list[str] = []
        self._ports[node_id] = port
        for edge in self._outbound[node_id]:
            if edge.source_port == port:
                self._mark_reached(edge, step)
            self._decide(edge.target, step, unreachable)
        self._skip(unreachable, step)
        return step

    def parents(self, node_id: str) -> Sequence[GraphEdge]:
        """Return the taken edges into a node, in graph order; only the first taken for an eager node."""
        if node_id in self._first:
            return [self._first[node_id]]
        return [edge for edge in self._inbound[node_id] if self._ports.get(edge.source) == edge.source_port]

    def _mark_reached(self, edge: GraphEdge, step: ReadinessChange) -> None:
        target = edge.target
        if target in self._eager and target not in self._reached:
            self._first[target] = edge
            step.ready.append(target)
        self._reached.add(target)

    def _decide(self, target: str, step: ReadinessChange, unreachable: list[str]) -> None:
        self._undecided[target] -= 1
        if self._undecided[target] > 0:
            return
        if target not in self._reached:
            unreachable.append(target)
        elif target not in self._eager:
            step.ready.append(target)

    def _skip(self, node_ids: Iterable[str], step: ReadinessChange) -> None:
        queue = deque(node_ids)
        while queue:
            node_id = queue.popleft()
            step.skipped.append(node_id)
            unreachable: list[str] = []
            for edge in self._outbound[node_id]:
                self._decide(edge.target, step, unreachable)
            queue.extend(unreachable)
