"""Rows of a run as the dashboard draws them: order, lanes, turns, attempts and folded waits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from gateway.dashboard.run_rows import HEIGHT, build_timeline

START = datetime(2026, 11, 28, 2, 30, tzinfo=UTC)


def at(seconds: float) -> str:
    return (START + timedelta(seconds=seconds)).isoformat()


def span(node_id: str, status: str, begin: float | None, end: float | None, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {
        "id": f"span_{node_id}",
        "kind": "node",
        "nodeId": node_id,
        "nodeLabel": node_id.capitalize(),
        "nodeType": "set",
        "status": status,
        "sequence": 1,
        "iteration": "",
        "attempt": 1,
        "port": None,
        "startedAt": None if begin is None else at(begin),
        "endedAt": None if end is None else at(end),
        "durationMs": None if begin is None or end is None else int((end - begin) * 1_000),
        **fields,
    }


def graph_of(*edges: str) -> dict[str, Any]:
    pairs = [edge.split(">") for edge in edges]
    nodes = dict.fromkeys(name for pair in pairs for name in pair)
    return {
        "nodes": [{"id": name, "label": name, "type": "set"} for name in nodes],
        "connections": [{"sourceNodeId": source, "targetNodeId": target} for source, target in pairs],
    }


def run_until(seconds: float | None) -> dict[str, Any]:
    return {"createdAt": at(0), "endedAt": None if seconds is None else at(seconds)}


def test_nodes_follow_their_sources_and_are_dashed_where_the_run_did_not_go() -> None:
    graph = graph_of("start>check", "check>small", "check>write", "small>mail", "write>mail")
    spans = [
        span("start", "completed", 0, 1),
        span("check", "completed", 1, 2),
        span("small", "skipped", None, None),
        span("write", "failed", 2, 3),
    ]
    timeline = build_timeline(run_until(3), spans, graph, START)
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
    timeline = build_timeline(run_until(1), [], graph, START)
    for row, following in zip(timeline.rows, timeline.rows[1:], strict=False):
        leaving = {path.path.split()[-1] for path in row.paths if path.path.endswith(f"{HEIGHT}")}
        assert bool(leaving) is any(path.path.split()[0][0] == "M" for path in following.paths)


def test_a_long_wait_is_folded_and_shows_its_length() -> None:
    spans = [
        span("ask", "completed", 1, 363, nodeType="human-input"),
        span("write", "completed", 363, 364),
        span("read", "completed", 0, 1),
    ]
    timeline = build_timeline(run_until(364), spans, graph_of("read>ask", "ask>write"), START)
    (fold,) = timeline.folds
    assert fold.milliseconds == 362_000
    bars = {row.id: row.bars[0] for row in timeline.rows}
    assert bars["read"].width > 40
    assert bars["write"].width > 40
    assert bars["ask"].tone == "warn"
    assert all(bar.x >= 0 and bar.x + bar.width <= 100.01 for bar in bars.values())


def test_turns_of_a_loop_are_one_row_and_attempts_one_bar_each() -> None:
    turns = [
        span("reserve", "failed" if number == 3 else "completed", number, number + 1, iteration=str(number))
        for number in range(5)
    ]
    tries = [
        span("write", "failed", 6, 7, kind="attempt", attempt=1),
        span("write", "completed", 8, 9, attempt=2),
    ]
    spans = [span("each", "completed", 0, 5), *turns, *tries]
    timeline = build_timeline(run_until(9), spans, graph_of("each>reserve", "each>write"), START)
    rows = {row.id: row for row in timeline.rows}
    assert [row.id for row in timeline.rows] == ["each", "reserve", "write"]
    assert [tone for _, tone in rows["reserve"].turns] == ["good", "good", "good", "bad", "good"]
    assert (rows["reserve"].state, rows["reserve"].turn_count) == ("failed", 5)
    assert rows["write"].attempts == 2
    assert [bar.tone for bar in rows["write"].bars] == ["good", "tried"]


def test_a_run_without_its_workflow_and_a_cycle_are_drawn() -> None:
    running = span("here", "running", 0, None)
    timeline = build_timeline(run_until(None), [running], None, START + timedelta(seconds=2))
    assert timeline.rows[0].bars[0].width > 99
    assert len(build_timeline(run_until(1), [], graph_of("a>b", "b>a"), START).rows) == 2
    assert build_timeline(run_until(None), [], None, START).rows == []


def test_ten_thousand_nodes_are_ordered_in_time() -> None:
    graph = graph_of(*(f"n{number}>n{number + 1}" for number in range(9_999)))
    rows = build_timeline(run_until(1), [], graph, START).rows
    assert [row.id for row in rows[:3]] == ["n0", "n1", "n2"]
    assert len(rows) == 10_000
