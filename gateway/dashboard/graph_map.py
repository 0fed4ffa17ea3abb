"""Map of a graph as shapes for an SVG: cards at their stored positions, and elbow edges between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

CARD_WIDTH: Final = 188
CARD_HEIGHT: Final = 42
MARGIN: Final = 20
HORIZONTAL_SCALE: Final = 0.92
VERTICAL_SCALE: Final = 0.6
"""Stored positions are for cards of 80 pixels; those of the map are about half as high."""
RADIUS: Final = 7
MAX_CARDS: Final = 300
"""Maximum number of cards; larger graphs are shown as a table."""


@dataclass(frozen=True, slots=True)
class MapCard:
    """Card of a node: its upper left corner, its texts, and its state as `formats.STATES` names it."""

    id: str
    label: str
    type: str
    x: int
    y: int
    state: str | None


@dataclass(frozen=True, slots=True)
class MapEdge:
    """Edge as the path of an SVG; `is_taken` is false for a branch that a run did not take."""

    path: str
    is_taken: bool


@dataclass(frozen=True, slots=True)
class GraphMap:
    """Map of a graph with its size in pixels."""

    cards: Sequence[MapCard]
    edges: Sequence[MapEdge]
    width: int
    height: int


def draw_graph(
    nodes: Sequence[Mapping[str, Any]],
    connections: Sequence[Mapping[str, Any]],
    states: Mapping[str, str] | None = None,
) -> GraphMap | None:
    """Return the map of a workflow's nodes and connections, as the API shows them; None for an unfit graph.

    A graph is unfit if it has no nodes, or more than `MAX_CARDS`. `states` are the states of nodes in a run.
    """
    if not 0 < len(nodes) <= MAX_CARDS:
        return None
    left = min(node["position"]["x"] for node in nodes)
    top = min(node["position"]["y"] for node in nodes)
    cards = {
        node["id"]: MapCard(
            node["id"],
            node["label"],
            node["type"],
            MARGIN + round((node["position"]["x"] - left) * HORIZONTAL_SCALE),
            MARGIN + round((node["position"]["y"] - top) * VERTICAL_SCALE),
            None if states is None else states.get(node["id"], "not-reached"),
        )
        for node in nodes
    }
    edges = [
        _draw_edge(cards[edge["sourceNodeId"]], cards[edge["targetNodeId"]])
        for edge in connections
        if edge["sourceNodeId"] in cards and edge["targetNodeId"] in cards
    ]
    return GraphMap(
        list(cards.values()),
        edges,
        max(card.x for card in cards.values()) + CARD_WIDTH + MARGIN,
        max(card.y for card in cards.values()) + CARD_HEIGHT + MARGIN,
    )


def _draw_edge(source: MapCard, target: MapCard) -> MapEdge:
    """Return an elbow from the right of one card to the left of another; back edges pass below both."""
    x1, y1 = source.x + CARD_WIDTH, source.y + CARD_HEIGHT // 2
    x2, y2 = target.x, target.y + CARD_HEIGHT // 2
    is_taken = target.state != "not-reached" and source.state != "not-reached"
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
