"""Rows of a run as the dashboard draws them: order, lanes, iterations, attempts and folded waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from gateway.dashboard.graph_lanes import HEIGHT
from gateway.dashboard.run_rows import MAX_CELLS, MAX_ROWS, build_cells, build_timeline

START = datetime(2026, 11, 28, 2, 30, tzinfo=UTC)


def at(seconds: float) -> str:
    return (START + timedelta(seconds=seconds)).isoformat()


def times(status: str, begin: float | None, end: float | None, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {
        "status": status,
        "startedAt": None if begin is None else at(begin),
        "endedAt": None if end is None else at(end),
        **fields,
    }


def state(node_id: str, status: str, begin: float | None, end: float | None, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return the state of a node, as the graph of a run has it."""
    return {
        **times(status, begin, end),
        "nodeId": node_id,
        "nodeLabel": node_id.capitalize(),
        "nodeType": "set",
        "attempt": 1,
        "port": None,
        "wakeAt": None,
        "durationMs": None if begin is None or end is None else int((end - begin) * 1_000),
        "previousDurationMs": None,
        "iterationCounts": {},
        "iterations": [],
        "failedAttempts": [],
        **fields,
    }


def iterations_of(*statuses: str) -> dict[str, Any]:
    """Return the fields of a node with one iteration of a second for each status."""
    iterations = [
        times(status, number, number + 1, iteration=str(number), attempt=1)
        for number, status in enumerate(statuses)
    ]
    return {"iterations": iterations, "iterationCounts": dict(Counter(statuses)), "durationMs": None}


def graph_of(*edges: str, states: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the graph of a run; `a>b` is an edge, and `a>>b` one into the body of a loop."""
    pairs = [edge.split(">") for edge in edges]
    nodes = dict.fromkeys(name for pair in pairs for name in pair if name)
    return {
        "nodes": [{"id": name, "label": name, "type": "set"} for name in nodes],
        "connections": [
            {
                "sourceNodeId": source,
                "targetNodeId": target[-1],
                "sourcePort": "continue" if len(target) > 1 else "output",
            }
            for source, *target in pairs
        ],
        "states": states,
    }


def run_until(seconds: float | None) -> dict[str, Any]:
    ended = None if seconds is None else at(seconds)
    return {"createdAt": at(0), "startedAt": at(0), "endedAt": ended}


def test_a_wait_inside_a_loop_is_no_work_of_the_loop_or_of_the_nodes_around_it() -> None:
    states = [
        state("each", "completed", 0, 100, nodeType="loop"),
        state("helper", "completed", 0, 100, nodeType="agent"),
        state("quick", "completed", 100, 100),
    ]
    history = [
        {"code": "timer", "from": at(1), "to": at(99)},
        {"code": "awaiting-task", "from": at(99), "to": at(100)},
    ]
    timeline = build_timeline(run_until(100), graph_of(states=states), START, why={"history": history})
    tones = {row.id: [bar.tone for bar in row.bars] for row in timeline.rows}
    assert tones == {"each": ["good", "warn", "good"], "helper": ["good", "warn", "good"], "quick": ["good"]}
    (fold,) = timeline.folds
    assert fold.milliseconds == 98_000


def test_nodes_follow_their_sources_and_are_dashed_where_the_run_did_not_go() -> None:
    states = [
        state("start", "completed", 0, 1),
        state("check", "completed", 1, 2),
        state("small", "skipped", None, None),
        state("write", "failed", 2, 3),
    ]
    graph = graph_of("start>check", "check>small", "check>write", "small>mail", "write>mail", states=states)
    timeline = build_timeline(run_until(3), graph, START)
    rows = {row.id: row for row in timeline.rows}
    assert [row.id for row in timeline.rows] == ["start", "check", "write", "small", "mail"]
    assert rows["mail"].state == "not-reached"
    assert timeline.counts == {"completed": 2, "failed": 1, "skipped": 1, "not-reached": 1}
    taken = {row.id: [line.is_taken for line in row.paths] for row in timeline.rows}
    assert taken["start"] == [True]
    assert sorted(taken["check"]) == [False, True, True]
    assert taken["mail"] == [False]
    assert rows["small"].lane_x != rows["write"].lane_x


def test_every_line_that_leaves_a_row_arrives_at_the_next() -> None:
    graph = graph_of("a>b", "a>c", "a>d", "a>e", "b>e", "c>e", "d>f", "e>f")
    timeline = build_timeline(run_until(1), graph, START)
    for row, following in zip(timeline.rows, timeline.rows[1:], strict=False):
        leaving = {path.path.split()[-1] for path in row.paths if path.path.endswith(f"{HEIGHT}")}
        assert bool(leaving) is any(path.path.split()[0][0] == "M" for path in following.paths)


def test_the_body_of_a_loop_has_a_lane_of_its_own() -> None:
    states = [
        state("each", "completed", 0, 3),
        state("reserve", "completed", 0, 3, **iterations_of("completed")),
    ]
    rows = build_timeline(run_until(3), graph_of("each>>reserve", "each>total", states=states), START).rows
    assert [(row.id, row.nesting) for row in rows] == [("each", 0), ("reserve", 1), ("total", 0)]
    assert rows[0].lane_x == rows[2].lane_x != rows[1].lane_x


def test_a_long_wait_is_folded_and_shows_its_length() -> None:
    states = [
        state("ask", "completed", 1, 363, nodeType="human-input"),
        state("write", "completed", 363, 364, previousDurationMs=500),
        state("read", "completed", 0, 1),
    ]
    timeline = build_timeline(run_until(364), graph_of("read>ask", "ask>write", states=states), START)
    (fold,) = timeline.folds
    assert fold.milliseconds == 362_000
    bars = {row.id: row.bars[0] for row in timeline.rows}
    assert bars["read"].width > 40
    assert bars["write"].width > 40
    assert bars["ask"].tone == "warn"
    assert all(bar.x >= 0 and bar.x + bar.width <= 100.01 for bar in bars.values())
    (ghost,) = [row.ghost_x for row in timeline.rows if row.ghost_x is not None]
    assert bars["write"].x < ghost < bars["write"].x + bars["write"].width


def test_iterations_of_a_loop_are_one_row_and_failed_attempts_have_bars() -> None:
    iterations = iterations_of("completed", "completed", "completed", "failed", "completed")
    tried = times("failed", 6, 7, iteration="", attempt=1)
    states = [
        state("each", "completed", 0, 5, nodeType="loop"),
        state("reserve", "failed", 0, 5, **iterations),
        state("write", "completed", 6, 9, attempt=2, failedAttempts=[tried]),
    ]
    timeline = build_timeline(run_until(9), graph_of("each>>reserve", "each>write", states=states), START)
    rows = {row.id: row for row in timeline.rows}
    assert [row.id for row in timeline.rows] == ["each", "reserve", "write"]
    assert [cell.tone for cell in rows["reserve"].cells] == ["good", "good", "good", "bad", "good"]
    assert (rows["reserve"].state, rows["reserve"].iteration_count) == ("failed", 5)
    assert [bar.tone for bar in rows["reserve"].bars] == ["good", "bad", "good"], (
        "equal neighbors are one bar"
    )
    assert rows["write"].attempts == 2
    assert [bar.tone for bar in rows["write"].bars] == ["good", "tried"]


def test_strips_of_many_iterations_show_each_failure_in_few_cells() -> None:
    few = build_cells(state("a", "failed", 0, 1, **iterations_of(*["completed"] * 99, "failed")))
    assert len(few) <= MAX_CELLS
    assert [cell.tone for cell in few if cell.tone == "bad"] == ["bad"]
    unlisted = iterations_of(*["completed"] * 10) | {"iterationCounts": {"completed": 9_999, "failed": 1}}
    many = build_cells(state("a", "failed", 0, 1, **unlisted))
    assert len(many) <= MAX_CELLS
    assert many[0].tone == "bad"


def test_the_time_before_the_start_has_a_row_with_its_wake() -> None:
    run = {"createdAt": at(0), "startedAt": at(4), "endedAt": at(8)}
    graph = graph_of("a>b", states=[state("a", "completed", 4, 8)])
    start = build_timeline(run, graph, START, waking_seconds=1).start
    assert start is not None
    assert (start.label, start.duration_ms) == ("Woke its pod", 4_000)
    assert [(bar.tone, bar.x) for bar in start.bars] == [("queued", 0), ("lit", 12.0)]
    wake = {"asleepSince": at(-60), "decidedAt": at(3.25), "podStartedAt": at(3.75)}
    recorded = build_timeline(run, graph, START, waking_seconds=1, why={"wake": wake}).start
    assert recorded is not None
    assert [bar.tone for bar in recorded.bars] == ["queued", "lit", "claim"]
    assert recorded.asleep_since == at(-60)
    assert build_timeline({**run, "startedAt": at(0.01)}, graph, START).start is None


def test_a_run_without_its_definition_and_a_cycle_are_drawn() -> None:
    running = state("here", "running", 0, None)
    timeline = build_timeline(run_until(None), graph_of(states=[running]), START + timedelta(seconds=2))
    assert timeline.rows[0].bars[0].width > 99
    assert len(build_timeline(run_until(1), graph_of("a>b", "b>a"), START).rows) == 2
    assert build_timeline(run_until(None), graph_of(), START).rows == []


def test_rows_without_news_are_folded_in_large_graphs_and_open_one_by_one() -> None:
    states = [state(f"n{number}", "completed", number, number + 1) for number in range(600)]
    states[400] |= {"status": "failed"}
    graph = graph_of(*(f"n{number}>n{number + 1}" for number in range(9_999)), states=states)
    timeline = build_timeline(run_until(600), graph, START, selected="n8000")
    assert sum(row.folded or 1 for row in timeline.rows) == 10_000
    assert len(timeline.rows) < MAX_ROWS
    ids = [row.id for row in timeline.rows if not row.folded]
    assert ids == [f"n{number}" for number in (*range(398, 403), *range(7_998, 8_003))]
    assert timeline.counts["not-reached"] == 9_400
    folded = next(row for row in timeline.rows if row.folded)
    opened = build_timeline(run_until(600), graph, START, opened=folded.id)
    assert [row.id for row in opened.rows[: folded.folded]] == [
        f"n{number}" for number in range(folded.folded)
    ]
    broken = [one | {"status": "failed"} for one in states]
    assert len(build_timeline(run_until(1), graph | {"states": broken}, START).rows) < MAX_ROWS
