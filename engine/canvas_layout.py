"""Automatic layout of nodes on a canvas: columns from left to right, few crossings, straight edges.

The steps are those of Sugiyama, Tagawa and Toda (1981): break the cycles, assign each node a column, order
the nodes in the columns, assign each node a height. The layout is stable: it keeps the current orders and
heights unless others are clearly better.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from math import inf, isqrt
from operator import itemgetter
from typing import Final, TypeAlias

from msgspec import Struct

CardPosition: TypeAlias = "tuple[float, float]"
"""Upper left corner of a node's card: `x` to the right, `y` down, in pixels."""
CardEdge: TypeAlias = "tuple[str, str]"
"""Ids of two nodes, the source and the target."""
NeighborLists: TypeAlias = "list[list[int]]"
"""For each node, its neighbors on one side."""
ColumnOrder: TypeAlias = "list[list[int]]"
"""For each column, its nodes from top to bottom."""

CARD_WIDTH: Final = 200
CARD_HEIGHT: Final = 80
COLUMN_WIDTH: Final = 250
"""Distance between two columns of cards."""
ROW_HEIGHT: Final = 120
"""Distance between two cards in a column."""
LANE_HEIGHT: Final = 40
"""Free height between cards for an edge that passes their column."""
ORIGIN: Final = (100, 200)
"""Position of the first card."""
CANVAS: Final = 10_000_000
"""Maximum distance from the origin for automatic positions. Users may place cards further out; no card is put
next to those.
"""
SINGLES_IN_A_ROW: Final = 4
"""Minimum number of nodes without edges in one row."""
BESIDE_NEIGHBOURS: Final = 50
"""Maximum number of new nodes that are placed beside their neighbors; more are placed below all others, as a
block.
"""
WORTH_REFINING: Final = 0.95
"""Maximum share of the crossings at which an order derived from the current one replaces it."""
WORTH_STARTING_ANEW: Final = 0.5
"""The same for an order unrelated to the current one, in a graph that was arranged before."""
WORTH_KEEPING: Final = 1.15
"""Maximum disorder of the current heights, relative to new ones, at which they are kept."""
HIDDEN_EDGE: Final = 4 * ROW_HEIGHT
"""Disorder of an edge that runs behind a card."""


class _LayoutEffort(Struct, frozen=True):
    """Search effort for graphs of at most `nodes` nodes."""

    nodes: float
    starts: int
    """Number of initial orders, besides the current one."""
    sweeps: int
    """Number of sweeps over all columns in each search for a better order."""
    longest_routed: int
    """Maximum number of columns of a routed edge; longer edges have no lane, and their crossings don't count.
    """


_EFFORTS: Final = (
    _LayoutEffort(50, starts=8, sweeps=16, longest_routed=20),
    _LayoutEffort(200, starts=3, sweeps=8, longest_routed=20),
    _LayoutEffort(1_000, starts=1, sweeps=4, longest_routed=10),
    _LayoutEffort(3_000, starts=1, sweeps=3, longest_routed=6),
    _LayoutEffort(inf, starts=1, sweeps=1, longest_routed=3),
)
_QUICK_EFFORTS: Final = (*_EFFORTS[:2], _LayoutEffort(inf, starts=0, sweeps=0, longest_routed=3))
"""Efforts for requests that wait for the layout: crossings of 10,000 nodes are not reduced."""


# ── positions for new nodes ─────────────────────────────────────────────────────────────────────────────────


def find_free_position(placed: Iterable[CardPosition]) -> CardPosition:
    """Return a free position for one more card: right of the rightmost card, in its row or below.

    Cards far outside the canvas are ignored; without others it is the origin.
    """
    cards = list(placed)
    near = [card for card in cards if _is_on_canvas(card)]
    if not near:
        return _find_free_from(ORIGIN, cards)
    x, y = max(near, key=lambda card: (card[0], -card[1]))
    return _find_free_from((x + COLUMN_WIDTH, y), cards)


def complete_layout(
    node_ids: Sequence[str], edges: Sequence[CardEdge], current: Sequence[CardPosition | None]
) -> list[CardPosition]:
    """Return a position for each node, in the order of `node_ids`; positions in `current` are unchanged, None
    is a missing one.

    A missing position is chosen beside the node's neighbors. Nodes without placed neighbors, and all if more
    than 50 are missing, are arranged by themselves, below all others.
    """
    missing = [number for number, place in enumerate(current) if place is None]
    if len(missing) == len(node_ids):
        return _arrange_parts(_build_layout_graph(node_ids, edges), current, _QUICK_EFFORTS)
    places = {number: place for number, place in enumerate(current) if place is not None}
    if not missing:
        return [*places.values()]
    if len(missing) <= BESIDE_NEIGHBOURS:
        _place_beside_neighbors(_build_layout_graph(node_ids, edges), missing, places)
    rest = [number for number in missing if number not in places]
    block = _arrange_parts(
        _build_layout_graph([node_ids[number] for number in rest], edges), [None] * len(rest), _QUICK_EFFORTS
    )
    places |= zip(rest, _stack_below(places.values(), block), strict=True)
    return [places[number] for number in range(len(node_ids))]


def _place_beside_neighbors(
    graph: _LayoutGraph, missing: Sequence[int], places: dict[int, CardPosition]
) -> None:
    """Add positions to `places`: right of parents or left of children, for nodes that paths connect to placed ones."""
    to_the_right = sorted(missing, key=graph.columns.__getitem__)
    sides = (
        (to_the_right, graph.parents, max, COLUMN_WIDTH),
        (to_the_right[::-1], graph.children, min, -COLUMN_WIDTH),
    )
    count = -1
    while count < len(places):
        count = len(places)
        for nodes, neighbours, outermost, step in sides:
            for node in nodes:
                found = [places[other] for other in neighbours[node] if other in places]
                near = sorted((card for card in found if _is_on_canvas(card)), key=itemgetter(1))
                if near and node not in places:
                    wanted = outermost(x for x, _ in near) + step, near[(len(near) - 1) // 2][1]
                    places[node] = _find_free_from(wanted, places.values())


def _stack_below(cards: Iterable[CardPosition], block: Sequence[CardPosition]) -> list[CardPosition]:
    """Return the positions of an arranged block, which begins at the origin, moved below the cards; unmoved
    without cards.
    """
    cards = list(cards)
    near = [card for card in cards if _is_on_canvas(card)]
    wanted = (min(x for x, _ in near), max(y for _, y in near) + ROW_HEIGHT) if near else ORIGIN
    right, bottom = (max((place[axis] - ORIGIN[axis] for place in block), default=0) for axis in (0, 1))
    x, y = _find_free_from(wanted, cards, width=right + CARD_WIDTH, height=bottom + CARD_HEIGHT)
    return [(x + place[0] - ORIGIN[0], y + place[1] - ORIGIN[1]) for place in block]


def _is_on_canvas(card: CardPosition) -> bool:
    return max(map(abs, card)) <= CANVAS


def _find_free_from(
    wanted: CardPosition,
    cards: Iterable[CardPosition],
    *,
    width: float = CARD_WIDTH,
    height: float = CARD_HEIGHT,
) -> CardPosition:
    """Return the first position at or straight below `wanted` at which an area of this size overlaps no card."""
    x, y = wanted
    for other in sorted(card[1] for card in cards if x - CARD_WIDTH < card[0] < x + width):
        if y - CARD_HEIGHT < other < y + height:
            y = other + ROW_HEIGHT
    return x, y


# ── whole layout ────────────────────────────────────────────────────────────────────────────────────────────


def arrange_cards(
    node_ids: Sequence[str], edges: Iterable[CardEdge], current: Sequence[CardPosition | None]
) -> list[CardPosition]:
    """Return a new position for each node, in the order of `node_ids`; `current` holds its position so far or None.

    The order from top to bottom is kept unless another has clearly fewer crossings. As many nodes as possible
    keep their exact position. Edges to unknown nodes and self-loops are ignored. Of several nodes with the
    same id, the first has its edges.
    """
    return _arrange_parts(_build_layout_graph(node_ids, edges), current, _EFFORTS)


def _arrange_parts(
    graph: _LayoutGraph, current: Sequence[CardPosition | None], efforts: Iterable[_LayoutEffort]
) -> list[CardPosition]:
    """Return a position for each node: connected parts below one another, then nodes without edges in rows.

    The first effort that permits this number of nodes bounds the work.
    """
    effort = next(effort for effort in efforts if len(current) <= effort.nodes)
    parts = sorted(_find_connected_parts(graph), key=lambda part: _part_corner(part, current))
    places: list[tuple[int, int]] = [(0, 0)] * len(current)
    top, columns = 0, SINGLES_IN_A_ROW
    for part in (part for part in parts if len(part) > 1):
        drawn = _ConnectedPart(graph, part, effort.longest_routed)
        heights = _assign_heights(drawn, [current[node] for node in part], effort)
        highest = min(heights)
        for node, height in zip(part, heights, strict=True):
            places[node] = (graph.columns[node] * COLUMN_WIDTH, top + height - highest)
        top += max(heights) - highest + ROW_HEIGHT
        columns = max(columns, 1 + max(graph.columns[node] for node in part))
    singles = [part[0] for part in parts if len(part) == 1]
    columns = max(columns, isqrt(len(singles)))
    for index, node in enumerate(singles):
        places[node] = (index % columns * COLUMN_WIDTH, top + index // columns * ROW_HEIGHT)
    return _anchor_layout(places, current)


def _part_corner(part: Sequence[int], current: Sequence[CardPosition | None]) -> tuple[float, float, int]:
    """Return the sort key of a connected part: its current top and left, or 0 without positions, and its first node."""
    placed = [place for node in part if (place := current[node])]
    return min((y for _, y in placed), default=0), min((x for x, _ in placed), default=0), min(part)


def _anchor_layout(
    places: Sequence[tuple[int, int]], current: Sequence[CardPosition | None]
) -> list[CardPosition]:
    """Return the positions, all shifted alike, so that most nodes keep their current place.

    If at most half would keep it, the layout begins at the origin.
    """
    shifts = Counter(
        (round(now[0] - x), round(now[1] - y))
        for (x, y), now in zip(places, current, strict=True)
        if now and _is_on_canvas(now)
    )
    ((shift, count),) = shifts.most_common(1) or [(ORIGIN, 0)]
    if 2 * count <= len(places):
        shift = ORIGIN
    return [(x + shift[0], y + shift[1]) for x, y in places]


# ── columns ─────────────────────────────────────────────────────────────────────────────────────────────────


class _LayoutGraph(Struct, frozen=True):
    """Graph with nodes as numbers, and edges that all lead to the right."""

    met: list[int]
    """Nodes in depth-first order."""
    parents: NeighborLists
    children: NeighborLists
    columns: list[int]


def _build_layout_graph(node_ids: Sequence[str], edges: Iterable[CardEdge]) -> _LayoutGraph:
    """Return the graph of nodes by their positions in `node_ids`, with edges that close a cycle turned around.

    Edges to unknown nodes, self-loops and repeated edges are left out.
    """
    numbers: dict[str, int] = {}
    for number, node_id in enumerate(node_ids):
        numbers.setdefault(node_id, number)
    known = {
        (numbers[source], numbers[target]): None
        for source, target in edges
        if source in numbers and target in numbers and source != target
    }
    met, left, back = _search_depth_first(*_build_neighbors(len(node_ids), known))
    turned = {
        (target, source) if (source, target) in back else (source, target): None for source, target in known
    }
    parents, children = _build_neighbors(len(node_ids), turned)
    return _LayoutGraph(met, parents, children, _assign_columns(left, parents, children))


def _build_neighbors(count: int, edges: Iterable[tuple[int, int]]) -> tuple[NeighborLists, NeighborLists]:
    """Return the parents and the children of each of `count` nodes, as two lists of lists by node number."""
    parents: NeighborLists = [[] for _ in range(count)]
    children: NeighborLists = [[] for _ in range(count)]
    for source, target in edges:
        parents[target].append(source)
        children[source].append(target)
    return parents, children


def _search_depth_first(
    parents: NeighborLists, children: NeighborLists
) -> tuple[list[int], list[int], set[tuple[int, int]]]:
    """Return the nodes in preorder, the nodes in postorder, and the edges that close a cycle."""
    met: list[int] = []
    left: list[int] = []
    back: set[tuple[int, int]] = set()
    is_met, is_open = [False] * len(children), [False] * len(children)
    for root in sorted(range(len(children)), key=lambda node: len(parents[node]) > 0):
        path = [] if is_met[root] else [(root, iter(children[root]))]
        while path:
            node, rest = path[-1]
            if not is_met[node]:
                met.append(node)
                is_met[node] = is_open[node] = True
            for child in rest:
                if not is_met[child]:
                    path.append((child, iter(children[child])))
                    break
                if is_open[child]:
                    back.add((node, child))
            else:
                path.pop()
                is_open[node] = False
                left.append(node)
    return met, left, back


def _assign_columns(left: Sequence[int], parents: NeighborLists, children: NeighborLists) -> list[int]:
    """Return the column of each node, right of all its parents.

    A chain of nodes whose only purpose is a join (a tributary) ends just before the join. `left` are the
    nodes in postorder.
    """
    columns = [0] * len(left)
    is_tributary = [True] * len(left)
    for node in reversed(left):
        for parent in parents[node]:
            columns[node] = max(columns[node], columns[parent] + 1)
            is_tributary[node] &= is_tributary[parent] and len(children[parent]) == 1
    for node in left:
        if is_tributary[node] and children[node]:
            columns[node] = min(columns[child] for child in children[node]) - 1
    return columns


def _find_connected_parts(graph: _LayoutGraph) -> list[list[int]]:
    """Return the connected parts, each with its nodes in depth-first order."""
    part_of = [-1] * len(graph.met)
    count = 0
    for root in graph.met:
        if part_of[root] >= 0:
            continue
        part_of[root] = count
        reached = [root]
        for node in reached:
            for other in (*graph.parents[node], *graph.children[node]):
                if part_of[other] < 0:
                    part_of[other] = count
                    reached.append(other)
        count += 1
    parts: list[list[int]] = [[] for _ in range(count)]
    for node in graph.met:
        parts[part_of[node]].append(node)
    return parts


# ── order ───────────────────────────────────────────────────────────────────────────────────────────────────


class _ConnectedPart:
    """Connected part: its nodes, numbered from 0, then the bends of edges in the columns that they pass."""

    def __init__(self, graph: _LayoutGraph, members: Sequence[int], longest_routed: int) -> None:
        number_of = {node: number for number, node in enumerate(members)}
        self.nodes = len(members)
        self.columns = [graph.columns[node] for node in members]
        self.parents = [[number_of[parent] for parent in graph.parents[node]] for node in members]
        self.children = [[number_of[child] for child in graph.children[node]] for node in members]
        self.before: NeighborLists = [[] for _ in members]
        """For each node and bend, its neighbors in the previous column."""
        self.after: NeighborLists = [[] for _ in members]
        self.bends: list[tuple[int, int, float]] = []
        """Source and target of the edge, and the share of its length before the bend."""
        for source, children in enumerate(self.children):
            for target in children:
                if self.columns[target] - self.columns[source] <= longest_routed:
                    self._route(source, target)

    def _route(self, source: int, target: int) -> None:
        """Add a bend in each column between source and target of an edge, and connect them."""
        first, last = self.columns[source], self.columns[target]
        stops = [source]
        for column in range(first + 1, last):
            stops.append(len(self.columns))
            self.columns.append(column)
            self.bends.append((source, target, (column - first) / (last - first)))
            self.before.append([])
            self.after.append([])
        for one, other in pairwise((*stops, target)):
            self.after[one].append(other)
            self.before[other].append(one)

    def sort_by_height(self, heights: Sequence[float]) -> ColumnOrder:
        """Return the numbers of nodes (and bends, if `heights` has them) by column, sorted by height."""
        order: ColumnOrder = [[] for _ in range(1 + max(self.columns))]
        for number in sorted(range(len(heights)), key=heights.__getitem__):
            order[self.columns[number]].append(number)
        return order

    def insert_bends(self, order: ColumnOrder) -> ColumnOrder:
        """Return an order of nodes by column, extended by the bends of long edges, at the heights of straight
        edges.

        Bends are exchanged with neighbors where that saves crossings.
        """
        nodes = [[number for number in column if number < self.nodes] for column in order]
        heights: list[float] = [*_straighten_edges(nodes, self.parents, self.children, self.nodes)]
        heights += [
            heights[source] + (heights[target] - heights[source]) * way for source, target, way in self.bends
        ]
        order = self.sort_by_height(heights)
        if self.bends:
            position = _index_positions(order, len(self.columns))
            for column in (*order, *reversed(order)):
                _exchange_neighbors(column, self, position, fixed=self.nodes)
        return order

    def measure_disorder(self, heights: Sequence[int]) -> int:
        """Return a penalty for heights: the extent of the part, the slopes of edges, and 480 for each bend
        behind a card.
        """
        rows: list[list[int]] = [[] for _ in range(1 + max(self.columns))]
        for number in sorted(range(self.nodes), key=heights.__getitem__):
            rows[self.columns[number]].append(heights[number])
        hidden = 0
        for bend, (source, target, way) in enumerate(self.bends, start=self.nodes):
            height = heights[source] + (heights[target] - heights[source]) * way
            row = rows[self.columns[bend]]
            below = bisect_right(row, height - CARD_HEIGHT / 2)
            hidden += below < len(row) and row[below] < height + CARD_HEIGHT / 2
        slopes = sum(
            abs(heights[source] - heights[target])
            for source, children in enumerate(self.children)
            for target in children
        )
        return max(heights) - min(heights) + slopes + hidden * HIDDEN_EDGE

    def count_crossings(self, order: ColumnOrder) -> int:
        """Return the number of edge crossings between neighboring columns in an order."""
        crossings = 0
        position = _index_positions(order, len(self.columns))
        for column in order:
            ends: list[int] = []
            for number in column:
                for end in sorted([position[other] for other in self.after[number]]):
                    at = bisect_right(ends, end)
                    crossings += len(ends) - at
                    ends.insert(at, end)
        return crossings


def _assign_heights(
    part: _ConnectedPart, current: Sequence[CardPosition | None], effort: _LayoutEffort
) -> list[int]:
    """Return the height in pixels of each node of a part, in their order.

    Current heights are kept, as far as the order allows, unless new ones are clearly better.
    """
    current_heights = _current_heights(part, current)
    order = part.insert_bends(part.sort_by_height([place[1] if place else 0 for place in current]))
    if effort.sweeps:
        order = _find_best_order(
            part, order, effort, WORTH_STARTING_ANEW if current_heights else WORTH_REFINING
        )
    heights = _straighten_edges(order, part.before, part.after, part.nodes)[: part.nodes]
    if not current_heights:
        return heights
    kept = _keep_heights(part, order, current_heights)
    return kept if part.measure_disorder(kept) <= part.measure_disorder(heights) * WORTH_KEEPING else heights


def _current_heights(part: _ConnectedPart, current: Sequence[CardPosition | None]) -> dict[int, int]:
    """Return the y coordinates, rounded down to lanes of 40 pixels, of the nodes in the column grid that most
    nodes share.

    The keys are node numbers. It is empty unless more than half of the part's nodes are in that grid.
    """
    grids: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for number, place in enumerate(current):
        if place and _is_on_canvas(place):
            x, y = round(place[0]), round(place[1])
            grids[x - part.columns[number] * COLUMN_WIDTH, y % LANE_HEIGHT][number] = (
                y // LANE_HEIGHT * LANE_HEIGHT
            )
    largest = max(grids.values(), key=len, default={})
    return largest if 2 * len(largest) > part.nodes else {}


def _keep_heights(part: _ConnectedPart, order: ColumnOrder, current_heights: Mapping[int, int]) -> list[int]:
    """Return heights that move the nodes in `current_heights` as little as the order allows, others near neighbors.

    `current_heights` is by node number.
    """
    heights = [current_heights.get(number, 0) for number in range(part.nodes)]
    for column in order:
        nodes = [number for number in column if number < part.nodes]
        wanted = [
            current_heights[number]
            if number in current_heights
            else _upper_median(heights, number, part.parents[number] or part.children[number])
            for number in nodes
        ]
        _fit_column(nodes, _column_offsets(nodes, part.nodes), wanted, heights)
    return heights


def _find_best_order(
    part: _ConnectedPart, order: ColumnOrder, effort: _LayoutEffort, worth_starting_anew: float
) -> ColumnOrder:
    """Return the order with the fewest crossings that several starts find, the given one first.

    Another order than the given one is taken if it has at most `worth_starting_anew` times its crossings.
    """
    order = _tidy_order(part, order, effort.sweeps)
    fewest = part.count_crossings(order)
    for start in range(effort.starts):
        if not fewest:
            break
        # The first is depth-first order, the others are scrambled: Knuth's multiplicative hashing.
        scrambled = [number * (1 + start * 2_654_435_761) % (1 << 32) for number in range(part.nodes)]
        found = _tidy_order(part, part.insert_bends(part.sort_by_height(scrambled)), effort.sweeps)
        crossings = part.count_crossings(found)
        if crossings <= fewest * worth_starting_anew:
            order, fewest = found, crossings
    return order


def _tidy_order(part: _ConnectedPart, order: ColumnOrder, sweeps: int) -> ColumnOrder:
    """Return an order improved by passes until one saves less than 5 % of the crossings."""
    fewest = part.count_crossings(order)
    while fewest:
        found = part.insert_bends(_reduce_crossings(part, order, sweeps))
        crossings = part.count_crossings(found)
        if crossings > fewest * WORTH_REFINING:
            break
        order, fewest = found, crossings
    return order


def _reduce_crossings(part: _ConnectedPart, order: ColumnOrder, sweeps: int) -> ColumnOrder:
    """Return the order with the fewest crossings during a number of sweeps over the columns, the given one
    included.
    """
    best, fewest = order, part.count_crossings(order)
    order = [[*column] for column in order]
    position = _index_positions(order, len(part.columns))
    for sweep in range(sweeps + 1):
        if not fewest:
            break
        columns, neighbours = (order, part.before) if sweep % 2 else (order[::-1], part.after)
        for column in columns:
            if sweep:
                _sort_column(column, neighbours, position, reverses_ties=sweep % 4 in {3, 0})
            _exchange_neighbors(column, part, position)
        crossings = part.count_crossings(order)
        if crossings < fewest:
            best, fewest = [[*column] for column in order], crossings
    return best


def _index_positions(order: ColumnOrder, count: int) -> list[int]:
    position = [0] * count
    for column in order:
        for index, number in enumerate(column):
            position[number] = index
    return position


def _sort_column(
    column: list[int], neighbours: NeighborLists, position: list[int], *, reverses_ties: bool
) -> None:
    """Sort a column in place by the mean position of the neighbors, and update `position`.

    Nodes without neighbors keep their place. `reverses_ties` reverses the order of nodes with the same mean.
    """
    mean = {
        number: sum([position[other] for other in neighbours[number]]) / len(neighbours[number])
        for number in column
        if neighbours[number]
    }
    moved = iter(sorted(reversed(mean) if reverses_ties else mean, key=mean.__getitem__))
    for index, number in enumerate(column):
        column[index] = next(moved) if number in mean else number
    for index, number in enumerate(column):
        position[number] = index


def _exchange_neighbors(
    column: list[int], part: _ConnectedPart, position: list[int], *, fixed: int = 0
) -> None:
    """Swap neighbors in a column in place if that saves crossings, and update `position`.

    Two numbers below `fixed` are never swapped with each other.
    """
    before = {number: sorted([position[other] for other in part.before[number]]) for number in column}
    after = {number: sorted([position[other] for other in part.after[number]]) for number in column}
    for index in range(len(column) - 1):
        upper, lower = column[index], column[index + 1]
        if upper < fixed and lower < fixed:
            continue
        if (
            _count_saved_crossings(before[upper], before[lower])
            + _count_saved_crossings(after[upper], after[lower])
            > 0
        ):
            column[index], column[index + 1] = lower, upper
    for index, number in enumerate(column):
        position[number] = index


def _count_saved_crossings(upper: Sequence[int], lower: Sequence[int]) -> int:
    """Return the number of crossings that a swap of two neighbors in a column saves; negative if it adds some.

    The arguments are the sorted positions of their neighbors in another column.
    """
    if not upper or not lower:
        return 0
    if upper[-1] < lower[0]:
        return -len(upper) * len(lower)
    if upper[0] > lower[-1]:
        return len(upper) * len(lower)
    if len(lower) > len(upper):
        return -_count_saved_crossings(lower, upper)
    return sum([len(upper) - bisect_left(upper, end) - bisect_right(upper, end) for end in lower])


# ── heights ─────────────────────────────────────────────────────────────────────────────────────────────────


def _straighten_edges(
    order: ColumnOrder, before: NeighborLists, after: NeighborLists, nodes: int
) -> list[int]:
    """Return heights that keep an order and its minimum distances, with edges as straight as possible.

    Numbers from `nodes` on are bends, which take less height. They count twice, so that a long edge is
    straight rather than hidden behind cards.
    """
    before, after = (
        [[*others, *(other for other in others if other >= nodes)] for others in neighbours]
        for neighbours in (before, after)
    )
    heights = [0] * len(before)
    columns = [(column, _column_offsets(column, nodes)) for column in order]
    for column, offsets in columns:
        for number, offset in zip(column, offsets, strict=True):
            heights[number] = offset
    for sweep, neighbours in ((columns, before), (columns[::-1], after)):
        for column, offsets in sweep:
            wanted = [_upper_median(heights, number, neighbours[number]) for number in column]
            _fit_column(column, offsets, wanted, heights)
    for sweep in (columns, columns[::-1]):
        for column, offsets in sweep:
            wanted = [_nearest_median(heights, number, before[number] + after[number]) for number in column]
            _fit_column(column, offsets, wanted, heights)
    return heights


def _column_offsets(column: Sequence[int], nodes: int) -> list[int]:
    """Return the minimum distance in pixels of each member of a column below the first; bends need less than nodes."""
    sizes = [ROW_HEIGHT if number < nodes else LANE_HEIGHT for number in column]
    return [0, *accumulate((one + other) // 2 for one, other in pairwise(sizes))]


def _upper_median(heights: Sequence[int], number: int, others: Sequence[int]) -> int:
    """Return the median height of a node's neighbors, the upper of two medians; its own height without neighbors."""
    if not others:
        return heights[number]
    return sorted([heights[other] for other in others])[(len(others) - 1) // 2]


def _nearest_median(heights: Sequence[int], number: int, others: Sequence[int]) -> int:
    """Return the height between the medians of a node's neighbors that is nearest to its own; its own without any."""
    if not others:
        return heights[number]
    ends = sorted([heights[other] for other in others])
    return min(max(heights[number], ends[(len(ends) - 1) // 2]), ends[len(ends) // 2])


def _fit_column(
    column: Sequence[int], offsets: Sequence[int], wanted: Sequence[int], heights: list[int]
) -> None:
    """Set the heights of a column as near to the wanted ones as its minimum distances allow.

    This is isotonic regression by medians; `heights` is changed.
    """
    blocks: list[list[int]] = []
    for height, offset in zip(wanted, offsets, strict=True):
        block = [height - offset]
        while blocks and blocks[-1][len(blocks[-1]) // 2] > block[len(block) // 2]:
            block = _merge_sorted(blocks.pop(), block)
        blocks.append(block)
    tops = [block[len(block) // 2] for block in blocks for _ in block]
    for number, offset, top in zip(column, offsets, tops, strict=True):
        heights[number] = top + offset


def _merge_sorted(one: list[int], other: list[int]) -> list[int]:
    """Return the merge of two sorted lists; the longer one is changed in place."""
    shorter, longer = sorted((one, other), key=len)
    for value in shorter:
        insort(longer, value)
    return longer
