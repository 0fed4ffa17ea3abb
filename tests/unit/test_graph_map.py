from typing import Any

from gateway.dashboard.graph_map import CARD_HEIGHT, CARD_WIDTH, MARGIN, MAX_CARDS, draw_graph


def node(name: str, x: float, y: float) -> dict[str, Any]:
    return {"id": name, "label": name, "type": "set", "position": {"x": x, "y": y}}


def edge(source: str, target: str) -> dict[str, Any]:
    return {"sourceNodeId": source, "targetNodeId": target}


def test_the_map_begins_at_its_margin_and_contains_every_card() -> None:
    graph = draw_graph([node("a", 500, -300), node("b", 750, -180)], [edge("a", "b")])
    assert graph is not None
    assert (graph.cards[0].x, graph.cards[0].y) == (MARGIN, MARGIN)
    assert graph.width == graph.cards[1].x + CARD_WIDTH + MARGIN
    assert graph.height == graph.cards[1].y + CARD_HEIGHT + MARGIN


def test_edges_end_at_their_cards_forward_straight_and_back() -> None:
    nodes = [node("a", 0, 0), node("b", 250, 120), node("c", 250, 0)]
    graph = draw_graph(nodes, [edge("a", "b"), edge("a", "c"), edge("b", "a"), edge("a", "gone")])
    assert graph is not None
    a, b, c = graph.cards
    assert len(graph.edges) == 3
    assert [each.path.rsplit("H", 1)[1] for each in graph.edges] == [str(b.x), str(c.x), str(a.x)]
    assert "q" not in graph.edges[1].path


def test_edges_to_nodes_that_a_run_did_not_reach_are_not_taken() -> None:
    nodes = [node("a", 0, 0), node("b", 250, 0), node("c", 500, 0)]
    graph = draw_graph(nodes, [edge("a", "b"), edge("b", "c")], {"a": "completed", "b": "failed"})
    assert graph is not None
    assert [card.state for card in graph.cards] == ["completed", "failed", "not-reached"]
    assert [each.is_taken for each in graph.edges] == [True, False]


def test_a_graph_without_nodes_or_with_too_many_has_no_map() -> None:
    assert draw_graph([], []) is None
    assert draw_graph([node(str(number), 0, 0) for number in range(MAX_CARDS + 1)], []) is None
