from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.canvas_layout import (
    CARD_HEIGHT,
    CARD_WIDTH,
    COLUMN_WIDTH,
    ORIGIN,
    ROW_HEIGHT,
    CardEdge,
    CardPosition,
    arrange_cards,
    complete_layout,
    find_free_position,
)

Graph = tuple[list[str], list[CardEdge]]

MOMENT_SECONDS = 4.0
"""A quadratic algorithm would take minutes."""
IDS = [f"n{number}" for number in range(12)]
EDGES = st.lists(st.tuples(st.sampled_from([*IDS, "nobody"]), st.sampled_from(IDS)), max_size=25)
FORWARD = st.lists(st.sampled_from([*combinations(IDS, 2)]), max_size=25)
COORDINATES = st.one_of(
    st.integers(-5, 40).map(lambda number: number * 60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(10**308), 10**308),
)
PLACES = st.lists(st.tuples(COORDINATES, COORDINATES), min_size=12, max_size=12)


def parse_edges(text: str) -> list[CardEdge]:
    """Read `a>b b>c`."""
    return [(source, target) for source, _, target in (edge.partition(">") for edge in text.split())]


def parse_graph(text: str) -> Graph:
    edges = parse_edges(text)
    return list(dict.fromkeys(node for edge in edges for node in edge)), edges


def arrange_graph(graph: Graph, current: Sequence[CardPosition | None] = ()) -> dict[str, CardPosition]:
    """Arrange a graph."""
    node_ids, edges = graph
    places = arrange_cards(node_ids, edges, current or [None] * len(node_ids))
    return dict(zip(node_ids, places, strict=True))


def do_overlap(one: CardPosition, other: CardPosition) -> bool:
    return abs(one[0] - other[0]) < CARD_WIDTH and abs(one[1] - other[1]) < CARD_HEIGHT


def count_crossings(places: dict[str, CardPosition], edges: Sequence[CardEdge]) -> int:
    """Count the pairs of straight edges that cross."""

    def side(start: CardPosition, end: CardPosition, point: CardPosition) -> float:
        return (end[0] - start[0]) * (point[1] - start[1]) - (end[1] - start[1]) * (point[0] - start[0])

    lines = [(places[source], places[target]) for source, target in edges]
    return sum(
        side(*one, other[0]) * side(*one, other[1]) < 0 and side(*other, one[0]) * side(*other, one[1]) < 0
        for one, other in combinations(lines, 2)
    )


def random_flow(count: int, seed: int) -> Graph:
    """Return a workflow such as people draw: it branches now and then, and some branches meet again."""
    chance = random.Random(seed)
    node_ids = [f"n{number}" for number in range(count)]
    edges: list[CardEdge] = []
    ends = node_ids[:1]
    for node in node_ids[1:]:
        joined = chance.sample(ends, 2) if len(ends) > 1 and chance.random() < 0.15 else [chance.choice(ends)]
        edges += [(end, node) for end in joined]
        if len(joined) > 1 or chance.random() < 0.75:
            ends = [end for end in ends if end not in joined]
        ends.append(node)
    return node_ids, edges


def random_tangle(count: int, edges: int) -> Graph:
    """Return a graph without cycles, with edges between random nodes."""
    chance = random.Random(1)
    pairs = (sorted(chance.sample(range(count), 2)) for _ in range(edges))
    return [f"n{number}" for number in range(count)], [(f"n{low}", f"n{high}") for low, high in pairs]


# ── shape ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_chain_is_one_straight_row() -> None:
    places = arrange_graph(parse_graph("a>b b>c c>d"))
    assert list(places.values()) == [(ORIGIN[0] + COLUMN_WIDTH * column, ORIGIN[1]) for column in range(4)]


def test_the_first_branch_runs_straight_on_and_the_other_beneath_it() -> None:
    places = arrange_graph(parse_graph("start>if if>yes if>no yes>join no>join join>end"))
    heights = {node: y for node, (_, y) in places.items()}
    assert heights == dict.fromkeys(["start", "if", "yes", "join", "end"], ORIGIN[1]) | {
        "no": ORIGIN[1] + ROW_HEIGHT
    }
    assert places["yes"][0] == places["no"][0]


def test_a_node_stands_in_the_middle_of_its_children() -> None:
    places = arrange_graph(parse_graph("a>b b>c b>d b>e"))
    assert places["b"][1] == places["d"][1] == places["a"][1]
    assert [places["e"][1] - places["d"][1], places["d"][1] - places["c"][1]] == [ROW_HEIGHT, ROW_HEIGHT]


def test_nodes_that_only_lead_to_a_join_are_placed_just_before_it() -> None:
    places = arrange_graph(parse_graph("start>a a>b b>agent tool>agent agent>end"))
    assert places["tool"][0] == places["b"][0] == places["agent"][0] - COLUMN_WIDTH


def test_a_long_edge_passes_beside_the_nodes_between_its_ends() -> None:
    places = arrange_graph(parse_graph("a>b b>c c>d a>d"))
    assert places["b"][1] == places["c"][1]
    assert places["a"][1] == places["d"][1] != places["b"][1]
    chain = arrange_graph(parse_graph("a>b b>c c>d"))
    assert arrange_graph(parse_graph("a>b b>c c>d a>d"), [*chain.values()]) == places


def test_parts_stand_below_one_another_and_single_nodes_in_rows_below_them() -> None:
    node_ids = ["a", "b", "c", "d", *(f"single{number}" for number in range(5))]
    places = arrange_graph((node_ids, parse_edges("a>b c>d")))
    assert [places[node][1] for node in node_ids[:4]] == [200, 200, 320, 320]
    assert [places[node] for node in node_ids[4:]] == [
        (100, 440),
        (350, 440),
        (600, 440),
        (850, 440),
        (100, 560),
    ]


def test_nodes_of_one_id_have_places_of_their_own() -> None:
    places = arrange_cards(["a", "b", "b", "b"], parse_edges("a>b"), [None] * 4)
    assert not any(do_overlap(*pair) for pair in combinations(places, 2))


def test_there_may_be_no_nodes_at_all() -> None:
    assert arrange_cards([], [("a", "b")], []) == complete_layout([], [], []) == []


# ── rules ───────────────────────────────────────────────────────────────────────────────────────────────────


@given(EDGES, PLACES)
def test_cards_never_overlap_and_arranging_twice_is_arranging_once(
    edges: list[CardEdge], current: list[CardPosition]
) -> None:
    places = arrange_cards(IDS, edges, current)
    assert not any(do_overlap(*pair) for pair in combinations(places, 2))
    assert arrange_cards(IDS, edges, places) == places
    assert arrange_cards(IDS, edges, current) == places


@given(FORWARD)
def test_without_cycles_every_edge_leads_to_the_right(edges: list[CardEdge]) -> None:
    places = arrange_graph((IDS, edges))
    assert all(places[target][0] - places[source][0] >= COLUMN_WIDTH for source, target in edges)


@given(EDGES, PLACES, st.lists(st.booleans(), min_size=12, max_size=12))
def test_a_positioned_node_keeps_its_place_and_a_new_one_gets_a_free_one(
    edges: list[CardEdge], places: list[CardPosition], is_known: list[bool]
) -> None:
    known = [place if is_there else None for place, is_there in zip(places, is_known, strict=True)]
    whole = complete_layout(IDS, edges, known)
    assert [place for place, is_there in zip(whole, is_known, strict=True) if is_there] == [
        place for place in known if place is not None
    ]
    for (one, was), (other, _) in combinations(zip(whole, known, strict=True), 2):
        assert was is not None or not do_overlap(one, other)


@given(PLACES)
def test_one_more_node_is_put_where_no_other_is(places: list[CardPosition]) -> None:
    assert not any(do_overlap(find_free_position(places), place) for place in places)


@given(FORWARD, st.integers(-5_000, 5_000), st.integers(-5_000, 5_000))
def test_a_graph_that_is_arranged_may_be_moved_as_a_whole(
    edges: list[CardEdge], right: int, down: int
) -> None:
    elsewhere = [(x + right, y + down) for x, y in arrange_cards(IDS, edges, [None] * len(IDS))]
    assert arrange_cards(IDS, edges, elsewhere) == elsewhere


# ── crossings ───────────────────────────────────────────────────────────────────────────────────────────────

SHUFFLED_TREE = parse_graph("a>f a>c a>b a>e c>h f>i b>g e>d c>k f>j b>m e>l g>n d>o i>p h>q")
CROSSED_PAIRS = parse_graph("x>a x>b x>c x>d a>h b>g c>f d>e h>1 g>2 f>3 e>4 1>y 2>y 3>y 4>y")
TWISTED_LADDER = parse_graph("s>a s>b s>c a>f b>d c>e a>e b>f c>d d>t e>t f>t")


@pytest.mark.parametrize(("graph", "expected"), [(SHUFFLED_TREE, 0), (CROSSED_PAIRS, 0), (TWISTED_LADDER, 2)])
def test_edges_cross_as_seldom_as_they_can(graph: Graph, expected: int) -> None:
    tidy = arrange_graph(graph)
    columns: dict[float, int] = {}
    messy: list[CardPosition] = []
    for node in sorted(tidy):
        columns[tidy[node][0]] = columns.get(tidy[node][0], 0) + ROW_HEIGHT
        messy.append((tidy[node][0], columns[tidy[node][0]]))
    by_name = sorted(tidy)
    assert count_crossings(dict(zip(by_name, messy, strict=True)), graph[1]) > expected
    assert count_crossings(tidy, graph[1]) == expected
    assert count_crossings(arrange_graph((by_name, graph[1]), messy), graph[1]) == expected


@pytest.mark.parametrize("seed", range(5))
def test_no_arrangement_has_more_crossings_than_the_one_before_it(seed: int) -> None:
    graph = random_flow(40, seed)
    chance = random.Random(seed)
    tidy = arrange_graph(graph)
    shuffled = [(x, chance.random() * 1_000) for x, _ in tidy.values()]
    before = count_crossings(dict(zip(graph[0], shuffled, strict=True)), graph[1])
    assert count_crossings(arrange_graph(graph, shuffled), graph[1]) < before / 5


# ── little moved ────────────────────────────────────────────────────────────────────────────────────────────


def count_moved(graph: Graph, before: dict[str, CardPosition]) -> int:
    """Return the number of nodes that move when a graph that changed since `before` is arranged."""
    now = [before.get(node) or find_free_position(before.values()) for node in graph[0]]
    after = arrange_graph(graph, now)
    return sum(after[node] != place for node, place in before.items() if node in after)


def test_a_leaf_more_or_less_moves_few_others() -> None:
    with_less, with_more = [], []
    for seed in range(12):
        node_ids, edges = random_flow(60, seed)
        before = arrange_graph((node_ids, edges))
        leaf = next(node for node in reversed(node_ids) if all(node != source for source, _ in edges))
        rest = [edge for edge in edges if leaf not in edge]
        with_less.append(count_moved(([node for node in node_ids if node != leaf], rest), before))
        parent = node_ids[seed * 2]
        with_more.append(count_moved(([*node_ids, "new"], [*edges, (parent, "new")]), before))
    for counts in (with_less, with_more):
        assert sorted(counts)[len(counts) // 2] <= 2
        assert sum(counts) / len(counts) < 60 / 10


def test_a_node_that_was_dragged_away_comes_back_alone() -> None:
    graph = random_flow(30, 1)
    before = arrange_graph(graph)
    dragged = [place if node != "n7" else (place[0] + 313, place[1] - 77) for node, place in before.items()]
    assert list(arrange_graph(graph, dragged).values()) == list(before.values())


# ── size ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "graph", [random_flow(1_000, 1), random_tangle(1_000, 2_000)], ids=["a workflow", "a tangle"]
)
def test_a_thousand_nodes_take_a_moment(graph: Graph) -> None:
    started = time.thread_time()
    places = arrange_graph(graph)
    assert time.thread_time() - started < MOMENT_SECONDS
    assert len(set(places.values())) == 1_000


def test_thousands_of_nodes_in_a_ring_are_one_row() -> None:
    node_ids = [f"n{number}" for number in range(5_000)]
    places = arrange_cards(
        node_ids, [*pairwise(node_ids), (node_ids[-1], node_ids[0])], [None] * len(node_ids)
    )
    assert [x for x, _ in places] == [ORIGIN[0] + COLUMN_WIDTH * number for number in range(5_000)]
