from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from engine.frames import ReadinessChange, ReadinessTracker
from engine.graph import GraphEdge, GraphNode, ParsedGraph

PORTS = ("output", "other")


@dataclass(frozen=True)
class GraphWalk:
    """A graph without cycles, and the port by which each node leaves once it is reached."""

    graph: ParsedGraph
    ports: Mapping[str, str]
    eager: frozenset[str]

    def reached(self) -> set[str]:
        """Say it the plain way: a node is reached when a reached parent left by the port of an edge to it."""
        reached: set[str] = set()
        for node in self.graph.nodes:
            if node.id == "n0" or any(
                edge.source in reached and self.ports[edge.source] == edge.source_port
                for edge in self.graph.inbound[node.id]
            ):
                reached.add(node.id)
        return reached


@st.composite
def draw_walk(draw: st.DrawFn) -> GraphWalk:
    ids = [f"n{number}" for number in range(draw(st.integers(1, 9)))]
    pairs = [(source, target) for place, target in enumerate(ids) for source in ids[:place]]
    drawn = draw(st.lists(st.tuples(st.sampled_from(pairs), st.sampled_from(PORTS)))) if pairs else []
    edges = [
        GraphEdge(f"e{number}", source, target, source_port=port)
        for number, ((source, target), port) in enumerate(drawn)
    ]
    ports = {node_id: draw(st.sampled_from(PORTS)) for node_id in ids}
    eager = draw(st.frozensets(st.sampled_from(ids)))
    return GraphWalk(ParsedGraph([GraphNode(node_id, "any") for node_id in ids], edges), ports, eager)


@given(draw_walk(), st.randoms(use_true_random=False))
def test_each_node_is_reached_or_skipped_once_in_any_order(walk: GraphWalk, random: st.DataObject) -> None:
    plan = ReadinessTracker(walk.graph, ["n0"], walk.eager)
    settled: dict[str, None] = {}
    told: Counter[str] = Counter()
    skipped: set[str] = set()

    def follow(change: ReadinessChange) -> None:
        told.update([*change.ready, *change.skipped])
        skipped.update(change.skipped)
        waiting.extend(change.ready)
        for node_id in change.ready:
            edges = walk.graph.inbound[node_id]
            taken = [edge for edge in edges if walk.ports[edge.source] == edge.source_port]
            arrived = [edge for edge in taken if edge.source in settled]
            if node_id in walk.eager and node_id != "n0":
                first_of[node_id] = list(plan.taken_edges(node_id))
                assert arrived[:1] == first_of[node_id]
            else:
                assert {edge.source for edge in edges} <= settled.keys() | skipped
                assert list(plan.taken_edges(node_id)) == arrived

    waiting: list[str] = []
    first_of: dict[str, list[GraphEdge]] = {}
    follow(plan.start())
    while waiting:
        node_id = waiting.pop(random.randrange(len(waiting)))  # type: ignore[attr-defined]
        settled[node_id] = None
        follow(plan.settle(node_id, walk.ports[node_id]))

    assert settled.keys() == walk.reached()
    assert all(list(plan.taken_edges(node_id)) == first for node_id, first in first_of.items())
    assert settled.keys() | skipped == {node.id for node in walk.graph.nodes}
    assert set(told.values()) == {1}


def test_an_eager_node_is_ready_by_the_first_branch_and_the_others_change_nothing() -> None:
    nodes = [GraphNode(node_id, "any") for node_id in ("a", "b", "c", "end")]
    edges = [
        GraphEdge("1", "a", "end"),
        GraphEdge("2", "b", "end"),
        GraphEdge("3", "c", "end", source_port="other"),
    ]
    plan = ReadinessTracker(ParsedGraph(nodes, edges), ["a", "b", "c"], {"end"})
    plan.start()
    assert [plan.settle(node_id, "output").ready for node_id in ("c", "b", "a")] == [[], ["end"], []]
    assert plan.taken_edges("end") == [edges[1]]


def test_parents_come_in_the_order_in_which_their_edges_were_drawn() -> None:
    nodes = [GraphNode(node_id, "any") for node_id in ("a", "b", "c", "end")]
    edges = [
        GraphEdge("1", "c", "end"),
        GraphEdge("2", "a", "end"),
        GraphEdge("3", "b", "end", source_port="other"),
    ]
    plan = ReadinessTracker(ParsedGraph(nodes, edges), ["a", "b", "c"])
    plan.start()
    for node_id in ("b", "a", "c"):
        change = plan.settle(node_id, "output")
    assert change.ready == ["end"]
    assert [edge.source for edge in plan.taken_edges("end")] == ["c", "a"]
