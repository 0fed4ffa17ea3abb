from typing import Any

from gateway.dashboard.graph_map import CARD_HEIGHT, CARD_WIDTH, MARGIN, WINDOW, draw_graph


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


def test_an_edge_from_a_tool_is_drawn_as_one_that_serves() -> None:
    served = {**edge("a", "b"), "targetPort": "tools"}
    graph = draw_graph(
        [node("a", 0, 0), node("b", 250, 0)], [served, {**edge("b", "a"), "targetPort": "input"}]
    )
    assert graph is not None
    assert [each.serves for each in graph.edges] == [True, False]


def test_a_graph_without_nodes_has_no_map() -> None:
    assert draw_graph([], []) is None


def test_a_large_graph_is_shown_around_one_node_with_an_overview_of_all() -> None:
    nodes = [node(f"n{number}", number * 250, number % 7 * 120) for number in range(2_000)]
    edges = [edge(f"n{number}", f"n{number + 1}") for number in range(1_999)]
    states = {"n0": "completed", "n900": "failed"}
    graph = draw_graph(nodes, edges, states)
    assert graph is not None
    assert graph.overview is not None
    assert (graph.node_count, len(graph.cards), graph.focus_id) == (2_000, WINDOW, "n900")
    assert graph.width < WINDOW * 300
    assert {tone for tone, _ in graph.overview.paths} == {"off", "good", "bad"}
    chosen = draw_graph(nodes, edges, states, focus="n5")
    assert chosen is not None
    assert chosen.focus_id == "n5"
    at = draw_graph(nodes, edges, states, at="500,100")
    assert at is not None
    assert 950 < int(at.focus_id[1:]) < 1_050
    for text in ("5", "x,1", "-1,2", "1,2,3", "99999,99999"):
        unread = draw_graph(nodes, edges, states, at=text)
        assert unread is not None
        assert unread.focus_id == "n900"


def test_ten_thousand_nodes_are_drawn_in_time() -> None:
    nodes = [node(f"n{number}", 0, number) for number in range(10_000)]
    graph = draw_graph(nodes, [edge("n0", f"n{number}") for number in range(1, 10_000)])
    assert graph is not None
    assert len(graph.cards) == WINDOW
    assert graph.overview is not None
    assert len(graph.overview.paths[0][1]) < 10_000
