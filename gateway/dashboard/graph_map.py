"""Map of a graph as shapes for an SVG: cards at their stored positions, and elbow edges between them.

Of a graph with more than 300 nodes, the map shows the neighborhood of one node, and an overview shows all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from engine.agents.agent_wiring import PROVIDER_PORTS
from engine.canvas_layout import complete_layout
from gateway.dashboard.formats import look_of

Node: TypeAlias = Mapping[str, Any]
Connection: TypeAlias = Mapping[str, Any]

CARD_WIDTH: Final = 188
CARD_HEIGHT: Final = 42
MARGIN: Final = 20
HORIZONTAL_SCALE: Final = 0.92
VERTICAL_SCALE: Final = 0.6
"""Stored positions are for cards of 80 pixels; those of the map are about half as high."""
RADIUS: Final = 7
MAX_CARDS: Final = 300
"""Maximum number of cards of a whole graph."""
WINDOW: Final = 120
"""Number of cards around the focus of a larger graph."""
OVERVIEW_WIDTH: Final = 1_000
OVERVIEW_HEIGHT: Final = 200
DOT: Final = 3
URGENT: Final = ("failed", "running", "retrying", "waiting")
"""States of the node that an unselected map shows first."""
TONES: Final = ("off", "", "good", "warn", "lit", "bad")
"""Tones of states, the least urgent first."""
NOT_TAKEN: Final = frozenset({"not-reached", "skipped", "removed"})


class MapCard(Struct, frozen=True):
    """Card of a node: its upper left corner, its texts, and its state as `formats.STATES` names it."""

    id: str
    label: str
    type: str
    x: int
    y: int
    state: str | None
    note: str = ""
    """Line below the card."""
    targets: Sequence[str] = ()
    """Ids of the nodes that follow."""


class MapEdge(Struct, frozen=True):
    """Edge as the path of an SVG."""

    path: str
    is_taken: bool
    """False for a branch that a run did not take."""
    serves: bool = False
    """Whether its source is a model or a tool of its target, and does not run before it."""


class GraphOverview(Struct, frozen=True):
    """All nodes of a large graph as dots: one path of an SVG for each tone, and one for the nodes of the map."""

    paths: Sequence[tuple[str, str]]
    """Tone and path."""
    shown: str


class GraphMap(Struct, frozen=True):
    """Map of a graph with its size in pixels."""

    cards: Sequence[MapCard]
    edges: Sequence[MapEdge]
    width: int
    height: int
    node_count: int
    focus: str = ""
    """Label of the node around which a large graph is shown."""
    focus_id: str = ""
    overview: GraphOverview | None = None
    """Null for a graph that is shown whole."""


def draw_graph(
    nodes: Sequence[Node],
    connections: Sequence[Connection],
    states: Mapping[str, str] | None = None,
    *,
    notes: Mapping[str, str] | None = None,
    focus: str = "",
    at: str = "",
) -> GraphMap | None:
    """Return the map of a workflow's nodes and connections, as the API shows them; None for a graph without nodes.

    `states` are the states of nodes in a run (None outside of a run), `notes` lines below the cards, both by
    node id. Of a graph with over 300 nodes, the map shows up to 120 around the node `focus`, or around the
    position `at` of the overview, as `500,100`; without both, around one that failed or runs, else the first.
    """
    if not nodes:
        return None
    overview, center = None, None
    shown = nodes
    if len(nodes) > MAX_CARDS:
        scale = _OverviewScale.of(nodes)
        center = _find_focus(nodes, states or {}, focus, scale.nearest(nodes, at))
        near = _find_neighborhood(center["id"], connections)
        shown = _arrange_nodes([node for node in nodes if node["id"] in near], connections)
        overview = _draw_overview(nodes, states or {}, near, scale)
    cards = _place_cards(shown, states, notes or {}, _find_targets(connections))
    edges = [
        replace(
            _draw_edge(cards[edge["sourceNodeId"]], cards[edge["targetNodeId"]]),
            serves=edge.get("targetPort") in PROVIDER_PORTS,
        )
        for edge in connections
        if edge["sourceNodeId"] in cards and edge["targetNodeId"] in cards
    ]
    return GraphMap(
        list(cards.values()),
        edges,
        max(card.x for card in cards.values()) + CARD_WIDTH + MARGIN,
        max(card.y for card in cards.values()) + CARD_HEIGHT + MARGIN,
        len(nodes),
        center["label"] if center else "",
        center["id"] if center else focus,
        overview,
    )


# ── cards ───────────────────────────────────────────────────────────────────────────────────────────────────


def _place_cards(
    nodes: Sequence[Node],
    states: Mapping[str, str] | None,
    notes: Mapping[str, str],
    targets: Mapping[str, Sequence[str]],
) -> dict[str, MapCard]:
    """Return the cards of the nodes by id, at their stored positions, scaled and moved so that the leftmost and the
    topmost begin at the margin.

    `states` is None outside of runs; `targets` are the ids of the nodes to which each node leads.
    """
    left = min(node["position"]["x"] for node in nodes)
    top = min(node["position"]["y"] for node in nodes)
    return {
        node["id"]: MapCard(
            node["id"],
            node["label"],
            node["type"],
            MARGIN + round((node["position"]["x"] - left) * HORIZONTAL_SCALE),
            MARGIN + round((node["position"]["y"] - top) * VERTICAL_SCALE),
            None if states is None else states.get(node["id"], "not-reached"),
            notes.get(node["id"], ""),
            targets.get(node["id"], ()),
        )
        for node in nodes
    }


def _find_targets(connections: Iterable[Connection]) -> Mapping[str, Sequence[str]]:
    """Return the ids of the nodes to which each node leads, by its id."""
    found: dict[str, dict[str, None]] = {}
    for edge in connections:
        found.setdefault(edge["sourceNodeId"], {})[edge["targetNodeId"]] = None
    return {source: [*targets] for source, targets in found.items()}


def _draw_edge(source: MapCard, target: MapCard) -> MapEdge:
    """Return the line from the right side of one card to the left side of another as an SVG path.

    A line back to the left passes below both cards. A line is taken unless one of its cards was skipped, removed or not
    reached.
    """
    x1, y1 = source.x + CARD_WIDTH, source.y + CARD_HEIGHT // 2
    x2, y2 = target.x, target.y + CARD_HEIGHT // 2
    is_taken = target.state not in NOT_TAKEN and source.state not in NOT_TAKEN
    if x2 <= x1:
        below = max(source.y, target.y) + CARD_HEIGHT + MARGIN // 2
        return MapEdge(f"M{x1} {y1}h{RADIUS}V{below}H{x2 - RADIUS}V{y2}H{x2}", is_taken)
    if y1 == y2:
        return MapEdge(f"M{x1} {y1}H{x2}", is_taken)
    middle, turn = (x1 + x2) // 2, RADIUS if y2 > y1 else -RADIUS
    return MapEdge(
        f"M{x1} {y1}H{middle - RADIUS}q{RADIUS} 0 {RADIUS} {turn}V{y2 - turn}q0 {turn} {RADIUS} {turn}H{x2}",
        is_taken,
    )


# ── large graphs ────────────────────────────────────────────────────────────────────────────────────────────


class _OverviewScale(Struct, frozen=True):
    """Map from stored positions to those of the overview."""

    left: float
    top: float
    horizontal: float
    vertical: float

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> _OverviewScale:
        """Return the scale with which all nodes fit the overview of 1,000 by 200 pixels."""
        columns = [node["position"]["x"] for node in nodes]
        rows = [node["position"]["y"] for node in nodes]
        width, height = max(columns) - min(columns), max(rows) - min(rows)
        return cls(
            min(columns),
            min(rows),
            (OVERVIEW_WIDTH - DOT) / width if width else 0,
            (OVERVIEW_HEIGHT - DOT) / height if height else 0,
        )

    def place(self, node: Node) -> tuple[int, int]:
        """Return the position of a node in the overview, in pixels."""
        position = node["position"]
        return (
            round((position["x"] - self.left) * self.horizontal),
            round((position["y"] - self.top) * self.vertical),
        )

    def nearest(self, nodes: Sequence[Node], at: str) -> Node | None:
        """Return the node nearest to a position of the overview, given as text such as `500,100`; None for
        other texts.
        """
        x, _, y = at.partition(",")
        if not (x.isdecimal() and y.isdecimal()) or len(at) > len("9999,9999"):
            return None
        wanted = (int(x), int(y))
        return min(nodes, key=lambda node: _compute_distance(self.place(node), wanted))


def _compute_distance(one: tuple[int, int], other: tuple[int, int]) -> int:
    """Return the squared distance of two positions."""
    return (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2


def _find_focus(nodes: Sequence[Node], states: Mapping[str, str], focus: str, nearest: Node | None) -> Node:
    """Return the node with the id `focus`, else `nearest`, else the first that failed, runs, retries or
    waits, else the first.
    """
    chosen = next((node for node in nodes if focus and node["id"] == focus), None) or nearest
    if chosen is not None:
        return chosen
    for state in URGENT:
        found = next((node for node in nodes if states.get(node["id"]) == state), None)
        if found is not None:
            return found
    return nodes[0]


def _find_neighborhood(center: str, connections: Iterable[Connection]) -> set[str]:
    """Return the ids of at most 120 nodes around a node, itself included, the nearest by connections first."""
    beside: dict[str, list[str]] = {}
    for edge in connections:
        beside.setdefault(edge["sourceNodeId"], []).append(edge["targetNodeId"])
        beside.setdefault(edge["targetNodeId"], []).append(edge["sourceNodeId"])
    near, waiting = {center}, deque([center])
    while waiting:
        for other in beside.get(waiting.popleft(), ()):
            if len(near) >= WINDOW:
                return near
            if other not in near:
                near.add(other)
                waiting.append(other)
    return near


def _arrange_nodes(nodes: Sequence[Node], connections: Iterable[Connection]) -> Sequence[Node]:
    """Return copies of the nodes with new positions close to each other: those in the whole graph may be far apart."""
    ids = [node["id"] for node in nodes]
    known = set(ids)
    edges = [
        (edge["sourceNodeId"], edge["targetNodeId"])
        for edge in connections
        if edge["sourceNodeId"] in known and edge["targetNodeId"] in known
    ]
    places = complete_layout(ids, edges, [None] * len(ids))
    return [{**node, "position": {"x": x, "y": y}} for node, (x, y) in zip(nodes, places, strict=True)]


def _draw_overview(
    nodes: Sequence[Node], states: Mapping[str, str], shown: set[str], scale: _OverviewScale
) -> GraphOverview:
    """Return all nodes as dots of an overview: one SVG path for each tone, failed ones drawn last, and one
    for those in `shown`.
    """
    dots: dict[str, dict[str, None]] = {}
    marked: dict[str, None] = {}
    for node in nodes:
        x, y = scale.place(node)
        tone = look_of(states[node["id"]]).tone if node["id"] in states else "off"
        # Nodes at one place are one dot.
        dots.setdefault(tone, {})[f"M{x} {y}h{DOT}v{DOT}h-{DOT}z"] = None
        if node["id"] in shown:
            marked[f"M{x - 1} {y - 1}h{DOT + 2}v{DOT + 2}h-{DOT + 2}z"] = None
    # Urgent tones are drawn last, above the others.
    order = sorted(dots, key=TONES.index)
    return GraphOverview([(tone, "".join(dots[tone])) for tone in order], "".join(marked))
