"""Rows of a run: its nodes in order, with lanes of the graph, bars of time and strips of iterations.

Everything is a pure function of the graph of the run, as the public route returns it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from heapq import heapify, heappop, heappush
from typing import Any, Final

from msgspec import Struct, field

from gateway.dashboard import run_bars
from gateway.dashboard.formats import look_of, parse_instant
from gateway.dashboard.graph_lanes import LANES, LaneEdge, LanePath, draw_lanes
from gateway.dashboard.run_bars import NodeState, StartRow, TimeBar
from gateway.dashboard.time_axis import AxisTick, FoldedWait, TimeAxis

MAX_CELLS: Final = 24
"""Cells of the strip that shows the iterations of a node; with more iterations, each stands for several."""
MAX_ROWS: Final = 300
"""Rows of a run; in a larger graph, rows without news are folded into one."""
FOLDED_ROWS: Final = 100
"""Rows that are folded into one at most, so that opening it shows few."""
NEIGHBORS: Final = 2
"""Rows that stay on both sides of a row with news."""
BODY: Final = "continue"
"""Port of a loop that leads to its body."""
NEWS: Final = frozenset({"failed", "running", "waiting", "retrying", "cancelled"})
"""States of the nodes that are never folded."""
WORST_FIRST: Final = ("failed", "running", "retrying", "waiting", "cancelled", "completed", "skipped")
NEVER: Final = "9999"
"""Text that sorts behind all times."""
NO_REASONS: Final[Mapping[str, Any]] = {}
NOT_TAKEN: Final = frozenset({"not-reached", "skipped"})


class IterationCell(Struct, frozen=True):
    """Cell of the strip of iterations, which stands for `count` iterations."""

    tone: str
    count: int


class RunRow(Struct):
    """Node of a run, or several that are folded: its state, lane, bars and, in a loop, the states of its iterations."""

    id: str
    label: str
    type: str
    state: str
    port: str = ""
    duration_ms: int | None = None
    attempts: int = 1
    calls: int = 0
    """Calls of a tool by agents."""
    iterations: Sequence[tuple[str, str]] = ()
    """Name and state of the first iterations."""
    iteration_count: int = 0
    cells: Sequence[IterationCell] = ()
    nesting: int = 0
    """Number of loops around it."""
    bars: Sequence[TimeBar] = ()
    ghost_x: float | None = None
    """Position at which it would have ended with its duration in the last good run."""
    lane_x: int = LANES[0]
    paths: Sequence[LanePath] = ()
    is_critical: bool = False
    folded: int = 0
    """Number of nodes that the row stands for; 0 for the row of one node."""


class RunTimeline(Struct, frozen=True):
    """Rows of a run with their time axis."""

    rows: Sequence[RunRow]
    start: StartRow | None
    folds: Sequence[FoldedWait]
    ticks: Sequence[AxisTick]
    counts: Mapping[str, int]
    """Number of nodes by state."""
    states: Mapping[str, str]
    """State of each node by its id."""


class _RowOrder(Struct):
    """Graph for a walk that brings its nodes into an order."""

    keys: Mapping[str, tuple[str, int]]
    sources: dict[str, set[str]] = field(default_factory=dict)
    followers: dict[str, list[str]] = field(default_factory=dict)


def build_timeline(
    run: Mapping[str, Any],
    graph: Mapping[str, Any],
    now: datetime,
    critical: Iterable[str] = (),
    *,
    waking_seconds: float = 0.0,
    why: Mapping[str, Any] = NO_REASONS,
    opened: str = "",
    selected: str = "",
) -> RunTimeline:
    """Return the rows of a run: its nodes in order with their bars, lanes and state, and the axis of time.

    `graph` and `why` are the API's answers about the run; `critical` holds ids of nodes that determine its duration;
    pods were woken for `waking_seconds` before its start. Of over 300 nodes, uneventful ones are folded into rows,
    except the row `opened` and the node `selected`.
    """
    states = {state["nodeId"]: state for state in graph["states"]}
    nodes = {node["id"]: node for node in graph["nodes"]}
    order = _order_nodes(states, nodes, graph["connections"])
    start = parse_instant(run["createdAt"]) or now
    waits = run_bars.list_waits(why.get("history", ()), now)
    busy = [*run_bars.list_work(graph["states"], now, waits), *run_bars.list_waking(run, waking_seconds)]
    axis = TimeAxis.build(start, parse_instant(run["endedAt"]) or now, busy)
    on_path = set(critical)
    rows = []
    for node_id in order:
        row = _describe(node_id, states.get(node_id), nodes.get(node_id))
        row.is_critical = node_id in on_path
        rows.append(row)
    shown = _fold_rows(rows, opened, selected)
    for row in shown:
        if (state := states.get(row.id)) is not None and not row.folded:
            row.bars = run_bars.build_bars(state, axis, now, waits)
            row.ghost_x = run_bars.find_ghost(state, axis)
    _set_lanes(shown, rows, graph["connections"])
    return RunTimeline(
        shown,
        run_bars.build_start_row(run, axis, now, waking_seconds, why.get("wake")),
        axis.list_folds(),
        axis.list_ticks(),
        Counter(row.state for row in rows),
        {row.id: row.state for row in rows},
    )


# ── order ───────────────────────────────────────────────────────────────────────────────────────────────────


def _order_nodes(
    states: Mapping[str, NodeState],
    nodes: Mapping[str, Mapping[str, Any]],
    connections: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Return the ids of all nodes by their first start, each after the sources of its connections.

    Nodes that never started come last. In a cycle, the one that started first leads.
    """
    known = [*nodes, *(one for one in states if one not in nodes)]
    graph = _RowOrder(
        {node_id: _start_key(states.get(node_id), number) for number, node_id in enumerate(known)}
    )
    graph.sources = {node_id: set() for node_id in graph.keys}
    graph.followers = {node_id: [] for node_id in graph.keys}
    for edge in connections:
        source, target = edge["sourceNodeId"], edge["targetNodeId"]
        if source in graph.keys and target in graph.keys and source != target:
            graph.sources[target].add(source)
            graph.followers[source].append(target)
    return _sort_by_sources(graph)


def _sort_by_sources(graph: _RowOrder) -> list[str]:
    """Return the ids of the nodes of a graph, each after its sources, otherwise in the order of their keys;
    it empties `graph.sources`.
    """
    ready = [(key, node_id) for node_id, key in graph.keys.items() if not graph.sources[node_id]]
    heapify(ready)
    left = sorted(graph.keys, key=lambda one: graph.keys[one], reverse=True)
    order: list[str] = []
    placed: set[str] = set()
    while len(order) < len(graph.keys):
        # A cycle has no first node: the one that started first leads.
        node_id = heappop(ready)[1] if ready else left.pop()
        if node_id in placed:
            continue
        order.append(node_id)
        placed.add(node_id)
        for follower in graph.followers[node_id]:
            graph.sources[follower].discard(node_id)
            if not graph.sources[follower] and follower not in placed:
                heappush(ready, (graph.keys[follower], follower))
    return order


def _start_key(state: NodeState | None, number: int) -> tuple[str, int]:
    """Return the key that sorts nodes by their first start, then by their place in the graph; nodes that
    never started are last.
    """
    return ((state or {}).get("startedAt") or NEVER, number)


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────


def _describe(node_id: str, state: NodeState | None, node: Mapping[str, Any] | None) -> RunRow:
    """Return the row of a node by its state in the run; one without a state was not reached."""
    if state is None:
        known = node or {}
        return RunRow(node_id, known.get("label") or node_id, known.get("type", ""), "not-reached")
    iterations = state["iterations"]
    return RunRow(
        node_id,
        state["nodeLabel"] or node_id,
        state["nodeType"],
        state["status"],
        port=state["port"] or "",
        duration_ms=state["durationMs"],
        attempts=state["attempt"],
        calls=state.get("calls", 0),
        iterations=[(one["iteration"], one["status"]) for one in iterations],
        iteration_count=sum(state["iterationCounts"].values()),
        cells=build_cells(state),
        nesting=iterations[0]["iteration"].count(".") + 1 if iterations else 0,
    )


def build_cells(state: NodeState) -> Sequence[IterationCell]:
    """Return the strip of cells for a node's iterations: one for each, or for several one with the worst of their
    states.

    There are about 24 cells. If not all iterations are listed, they show the share of each state, the worst first.
    """
    counts, iterations = state["iterationCounts"], [one["status"] for one in state["iterations"]]
    total = sum(counts.values())
    if total > len(iterations):
        iterations = [status for status in _worst_first(counts) for _ in range(_share(counts[status], total))]
    size = -(-len(iterations) // MAX_CELLS) or 1
    parts = [iterations[number : number + size] for number in range(0, len(iterations), size)]
    scale = total / len(iterations) if iterations else 1
    return [
        IterationCell(look_of(_worst_first(dict.fromkeys(part))[0]).tone, round(len(part) * scale))
        for part in parts
    ]


def _share(count: int, total: int) -> int:
    """Return the number of cells that stand for a share of about 24: at least one."""
    return max(round(MAX_CELLS * count / total), 1)


def _worst_first(states: Iterable[str]) -> list[str]:
    """Return states without repetition, the worst first: failed, then others by how much attention they need."""
    return sorted(states, key=lambda one: WORST_FIRST.index(one) if one in WORST_FIRST else len(WORST_FIRST))


def _fold_rows(rows: Sequence[RunRow], opened: str, selected: str) -> Sequence[RunRow]:
    """Return the rows to show: all of up to 300.

    Of more, they are those with news (failed, running, waiting) or selected, two neighbors on each side, and
    one folded row for up to 100 others in between; of too many with news, only the selected one stays.
    """
    if len(rows) <= MAX_ROWS:
        return rows
    kept = {
        near
        for number, row in enumerate(rows)
        if row.state in NEWS or row.id == selected
        for near in range(number - NEIGHBORS, number + NEIGHBORS + 1)
    }
    if len(kept) > MAX_ROWS:
        kept = {number for number, row in enumerate(rows) if row.id == selected}
    shown: list[RunRow] = []
    waiting: list[RunRow] = []
    for number, row in enumerate(rows):
        if number in kept:
            shown += _fold(waiting, opened)
            shown.append(row)
            waiting = []
        else:
            waiting.append(row)
            if len(waiting) == FOLDED_ROWS:
                shown += _fold(waiting, opened)
                waiting = []
    return [*shown, *_fold(waiting, opened)]


def _fold(rows: Sequence[RunRow], opened: str) -> Sequence[RunRow]:
    """Return rows as one folded row with the worst of their states, named by the first and last.

    A single row, and rows with the row `opened` among them, are returned as they are.
    """
    if len(rows) <= 1 or any(row.id == opened for row in rows):
        return rows
    counts = Counter(row.state for row in rows)
    worst = _worst_first(counts)[0]
    cells = [
        IterationCell(look_of(state).tone, counts[state])
        for state in _worst_first(counts)
        for _ in range(_share(counts[state], len(rows)))
    ]
    label = f"{rows[0].label} … {rows[-1].label}"
    return [RunRow(rows[0].id, label, "", worst, cells=cells, folded=len(rows))]


def _set_lanes(
    shown: Sequence[RunRow], rows: Sequence[RunRow], connections: Sequence[Mapping[str, Any]]
) -> None:
    """Set the lane of each shown row, and the lines of the graph that pass it.

    A folded row stands for all rows that it contains; `rows` are all rows.
    """
    place, number = {}, -1
    starts = {row.id for row in shown}
    for row in rows:
        number += row.id in starts
        place[row.id] = shown[number].id
    edges = [
        LaneEdge(place[edge["sourceNodeId"]], place[edge["targetNodeId"]], edge["sourcePort"] == BODY)
        for edge in connections
        if edge["sourceNodeId"] in place and edge["targetNodeId"] in place
    ]
    not_taken = {row.id for row in shown if row.state in NOT_TAKEN}
    for row, lanes in zip(shown, draw_lanes([row.id for row in shown], edges, not_taken), strict=True):
        row.lane_x, row.paths = lanes.x, lanes.paths
