"""Rows of a run: its nodes in order, with lanes of the graph and bars of time, as shapes for an SVG.

Everything is a pure function of the spans and the graph that public routes return.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any, Final, TypeAlias

from gateway.dashboard.formats import look_of, parse_instant

Span: TypeAlias = Mapping[str, Any]
"""Span, as the API shows it."""

LANES: Final = (14, 30, 46)
"""Horizontal positions of lanes; further lanes share the last one."""
MIDDLE: Final = 18
HEIGHT: Final = 36
FOLDED_SHARE: Final = 0.12
"""Share of the time axis that a folded wait takes."""
MIN_FOLDED_SECONDS: Final = 2.0
FOLDED_FACTOR: Final = 0.5
"""A gap is folded if it lasts longer than this part of all work."""
MIN_WIDTH: Final = 0.6
"""Percentage of the axis that the shortest bar takes."""
MAX_TURNS: Final = 200
"""Turns of a loop that a strip shows one by one."""
WAITING_TYPES: Final = frozenset({"human-input", "wait", "wait-for-event", "sub-workflow"})
NEVER: Final = "9999"
"""Text that sorts behind all times."""
NOT_TAKEN: Final = frozenset({"not-reached", "skipped"})
WHOLE: Final = 100.0


@dataclass(frozen=True, slots=True)
class TimeBar:
    """Bar on the time axis, in percent of its width."""

    x: float
    width: float
    tone: str


@dataclass(frozen=True, slots=True)
class LanePath:
    """Line of the graph beside a row; `is_taken` is false for a branch that the run did not take."""

    path: str
    is_taken: bool


@dataclass(slots=True)
class RunRow:
    """Node of a run: its state, its lane, its bars and, in a loop, the states of its turns."""

    id: str
    label: str
    type: str
    state: str
    span_id: str = ""
    port: str = ""
    duration_ms: int | None = None
    attempts: int = 1
    turns: Sequence[tuple[str, str]] = ()
    """Name and tone of each turn."""
    turn_count: int = 0
    bars: Sequence[TimeBar] = ()
    lane_x: int = LANES[0]
    paths: Sequence[LanePath] = ()
    is_critical: bool = False


@dataclass(frozen=True, slots=True)
class FoldedWait:
    """Part of the time axis in which nothing ran, drawn shorter than it was."""

    x: float
    width: float
    milliseconds: int


@dataclass(frozen=True, slots=True)
class RunTimeline:
    """Rows of a run with their time axis."""

    rows: Sequence[RunRow]
    folds: Sequence[FoldedWait]
    ticks: Sequence[tuple[float, int]]
    """Positions in percent, with the milliseconds since the start of the run."""
    counts: Mapping[str, int]
    """Number of nodes by state."""


@dataclass(slots=True)
class _NodeSpans:
    """Spans of one node."""

    whole: Span | None = None
    turns: list[Span] = field(default_factory=list)
    """Spans of the node in iterations of a loop."""
    attempts: list[Span] = field(default_factory=list)


def build_timeline(
    run: Mapping[str, Any],
    spans: Sequence[Span],
    graph: Mapping[str, Any] | None,
    now: datetime,
    critical: Iterable[str] = (),
) -> RunTimeline:
    """Return the rows of a run; `graph` has `nodes` and `connections`, and `critical` names nodes."""
    found = _group(spans)
    nodes = {node["id"]: node for node in (graph or {}).get("nodes", ())}
    edges = [(edge["sourceNodeId"], edge["targetNodeId"]) for edge in (graph or {}).get("connections", ())]
    order = _order(found, nodes, edges)
    axis = _TimeAxis.build(run, spans, now)
    on_path = set(critical)
    rows = []
    for node_id in order:
        row = _describe(node_id, found.get(node_id, _NodeSpans()), nodes.get(node_id))
        row.is_critical = node_id in on_path
        row.bars = _bars(found.get(node_id, _NodeSpans()), axis, now)
        rows.append(row)
    _draw_lanes(rows, edges)
    return RunTimeline(rows, axis.folds(), axis.ticks(), Counter(row.state for row in rows))


def _group(spans: Sequence[Span]) -> dict[str, _NodeSpans]:
    found: dict[str, _NodeSpans] = {}
    for span in spans:
        node = found.setdefault(span["nodeId"], _NodeSpans())
        if span["kind"] == "attempt":
            node.attempts.append(span)
        elif span["kind"] == "turn":
            continue  # the nodes of the turn have spans of their own
        elif span["iteration"]:
            node.turns.append(span)
        else:
            node.whole = span
    return found


def _order(
    found: Mapping[str, _NodeSpans],
    nodes: Mapping[str, Mapping[str, Any]],
    edges: Sequence[tuple[str, str]],
) -> list[str]:
    """Return the ids of nodes by their first start, each behind its sources; those that never started come last."""
    keys = {
        node_id: _first_start(found.get(node_id), number)
        for number, node_id in enumerate([*nodes, *(one for one in found if one not in nodes)])
    }
    sources: dict[str, set[str]] = {node_id: set() for node_id in keys}
    followers: dict[str, list[str]] = {node_id: [] for node_id in keys}
    for source, target in edges:
        if source in keys and target in keys and source != target:
            sources[target].add(source)
            followers[source].append(target)
    ready = [(keys[node_id], node_id) for node_id in keys if not sources[node_id]]
    heapify(ready)
    order: list[str] = []
    placed: set[str] = set()
    while len(order) < len(keys):
        # A cycle has no first node: the one that started first leads.
        node_id = heappop(ready)[1] if ready else min(keys.keys() - placed, key=lambda one: keys[one])
        if node_id in placed:
            continue
        order.append(node_id)
        placed.add(node_id)
        for follower in followers[node_id]:
            sources[follower].discard(node_id)
            if not sources[follower] and follower not in placed:
                heappush(ready, (keys[follower], follower))
    return order


def _first_start(node: _NodeSpans | None, number: int) -> tuple[str, int]:
    """Return the first start of a node and its place in the graph; a node that never started sorts last."""
    spans = () if node is None else (*filter(None, [node.whole]), *node.turns)
    starts = [span["startedAt"] for span in spans if span["startedAt"]]
    return (min(starts, default=NEVER), number)


def _describe(node_id: str, found: _NodeSpans, node: Mapping[str, Any] | None) -> RunRow:
    shown = found.whole or (found.turns[-1] if found.turns else None)
    if shown is None:
        known = node or {}
        return RunRow(node_id, known.get("label", node_id), known.get("type", ""), "not-reached")
    row = RunRow(
        node_id,
        shown["nodeLabel"] or node_id,
        shown["nodeType"],
        _worst_state(found.turns) if found.whole is None else shown["status"],
        span_id=shown["id"],
        port=shown["port"] or "",
        duration_ms=shown["durationMs"] if found.whole is not None else None,
        attempts=max([shown["attempt"], *(one["attempt"] for one in found.attempts)]),
        turn_count=len(found.turns),
    )
    row.turns = [(turn["iteration"], look_of(turn["status"]).tone) for turn in found.turns[:MAX_TURNS]]
    return row


def _worst_state(turns: Sequence[Span]) -> str:
    states = {turn["status"] for turn in turns}
    for state in ("failed", "running", "retrying", "waiting"):
        if state in states:
            return state
    return "completed" if "completed" in states else next(iter(states))


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _TimeAxis:
    """Map from times to percent, in which long waits are folded."""

    pieces: Sequence[tuple[float, float, float, float, bool]]
    """Start and end in seconds since the start of the run, start and end in percent, whether it is folded."""
    start: datetime

    @classmethod
    def build(cls, run: Mapping[str, Any], spans: Sequence[Span], now: datetime) -> _TimeAxis:
        start = parse_instant(run["createdAt"]) or now
        end = parse_instant(run["endedAt"]) or now
        length = max((end - start).total_seconds(), 0.001)
        busy = [
            (max((first - start).total_seconds(), 0.0), min((last - start).total_seconds(), length))
            for first, last in _work(spans, now)
        ]
        edges = sorted({0.0, length, *(edge for pair in busy for edge in pair if 0 <= edge <= length)})
        segments = [
            (first, last, any(begin <= first and last <= stop for begin, stop in busy))
            for first, last in pairwise(edges)
        ]
        work = sum(last - first for first, last, is_busy in segments if is_busy)
        longest = max(MIN_FOLDED_SECONDS, work * FOLDED_FACTOR)
        folded = [not is_busy and last - first > longest for first, last, is_busy in segments]
        share = FOLDED_SHARE * WHOLE * min(1.0, 4 / max(sum(folded), 1))
        plain = sum(
            last - first
            for (first, last, _), is_folded in zip(segments, folded, strict=True)
            if not is_folded
        )
        left = WHOLE - share * sum(folded)
        pieces, position = [], 0.0
        for (first, last, _), is_folded in zip(segments, folded, strict=True):
            width = share if is_folded else left * (last - first) / plain if plain else 0.0
            pieces.append((first, last, position, position + width, is_folded))
            position += width
        return cls(pieces, start)

    def percent(self, moment: datetime) -> float:
        seconds = (moment - self.start).total_seconds()
        for first, last, begin, stop, _ in self.pieces:
            if seconds <= last:
                part = (seconds - first) / (last - first) if last > first else 0.0
                return begin + (stop - begin) * min(max(part, 0.0), 1.0)
        return WHOLE

    def folds(self) -> list[FoldedWait]:
        return [
            FoldedWait(round(begin, 2), round(stop - begin, 2), int((last - first) * 1_000))
            for first, last, begin, stop, is_folded in self.pieces
            if is_folded
        ]

    def ticks(self) -> list[tuple[float, int]]:
        """Return the start, the end, and the points between plain pieces that are far enough apart."""
        ticks = [(0.0, 0)]
        for _, last, _, stop, _ in self.pieces:
            if stop - ticks[-1][0] >= WHOLE / 4:
                ticks.append((round(stop, 2), int(last * 1_000)))
        return ticks


def _work(spans: Sequence[Span], now: datetime) -> Iterable[tuple[datetime, datetime]]:
    """Yield the times in which nodes ran; of a node that waited, its start alone."""
    for span in spans:
        start = parse_instant(span["startedAt"])
        if start is None or span["kind"] == "turn":
            continue
        end = parse_instant(span["endedAt"]) or (start if span["status"] == "waiting" else now)
        yield (start, start) if span["nodeType"] in WAITING_TYPES else (start, end)
        if span["nodeType"] in WAITING_TYPES:
            yield end, end


def _bars(node: _NodeSpans, axis: _TimeAxis, now: datetime) -> list[TimeBar]:
    bars = []
    shown = [*filter(None, [node.whole]), *node.turns[:MAX_TURNS]]
    tried = [one for one in node.attempts if one["status"] == "failed"]
    for span in (*shown, *tried):
        start = parse_instant(span["startedAt"])
        if start is None:
            continue
        end = parse_instant(span["endedAt"]) or now
        first = axis.percent(start)
        width = max(axis.percent(end) - first, MIN_WIDTH)
        tone = "warn" if span["nodeType"] in WAITING_TYPES else look_of(span["status"]).tone
        is_attempt = span["kind"] == "attempt"
        bars.append(
            TimeBar(round(min(first, WHOLE - width), 2), round(width, 2), "tried" if is_attempt else tone)
        )
    return bars


# ── lanes ───────────────────────────────────────────────────────────────────────────────────────────────────


def _draw_lanes(rows: Sequence[RunRow], edges: Sequence[tuple[str, str]]) -> None:
    """Give each row its lane, and the lines of the graph that pass it."""
    place = {row.id: number for number, row in enumerate(rows)}
    targets: dict[int, list[int]] = {}
    for source, target in edges:
        if source in place and target in place and place[source] < place[target]:
            targets.setdefault(place[source], []).append(place[target])
    lanes: list[tuple[int, bool] | None] = []
    """For each lane, the row that its line leads to, and whether the run took it."""
    for number, row in enumerate(rows):
        arriving = [lane for lane, line in enumerate(lanes) if line is not None and line[0] == number]
        own = arriving[0] if arriving else _free_lane(lanes)
        row.lane_x = _lane_x(own)
        paths = [
            LanePath(f"M{_lane_x(lane)} 0V{HEIGHT}", line[1])
            for lane, line in enumerate(lanes)
            if line is not None and line[0] != number
        ]
        for lane in arriving:
            line = lanes[lane]
            paths.append(LanePath(_curve(_lane_x(lane), 0, row.lane_x, MIDDLE), line is not None and line[1]))
            lanes[lane] = None
        for later in sorted(set(targets.get(number, ()))):
            is_taken = not {row.state, rows[later].state} & NOT_TAKEN
            known = next(
                (lane for lane, line in enumerate(lanes) if line is not None and line[0] == later), None
            )
            if known is None:
                known = own if _is_free(lanes, own) else _free_lane(lanes)
            lanes += [None] * (known + 1 - len(lanes))
            lanes[known] = (later, is_taken)
            paths.append(LanePath(_curve(row.lane_x, MIDDLE, _lane_x(known), HEIGHT), is_taken))
        row.paths = paths


def _free_lane(lanes: Sequence[object]) -> int:
    return next((lane for lane, line in enumerate(lanes) if line is None), len(lanes))


def _is_free(lanes: Sequence[object], lane: int) -> bool:
    return lane >= len(lanes) or lanes[lane] is None


def _lane_x(lane: int) -> int:
    return LANES[min(lane, len(LANES) - 1)]


def _curve(x1: int, y1: int, x2: int, y2: int) -> str:
    if x1 == x2:
        return f"M{x1} {y1}V{y2}"
    middle = (y1 + y2) // 2
    return f"M{x1} {y1}C{x1} {middle} {x2} {middle} {x2} {y2}"
