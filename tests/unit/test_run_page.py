"""Page of a run: its answers belong together, also while the run moves."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.dashboard.page import PageFrame
from gateway.dashboard.page_request import PageRequest
from gateway.dashboard.pages import agent_turns, run_node
from gateway.dashboard.pages import run as run_page
from journal.explanations.blockers import BlockerCode
from nodes.catalog import load_catalog

NO_WAITS = frozenset(
    {BlockerCode.NONE, BlockerCode.PARENTS, BlockerCode.BRANCH_NOT_TAKEN, BlockerCode.PARALLELISM}
)
"""Codes of nodes alone, for which no run waits."""


class EndingRun:
    """API of a run whose only node, and the run with it, completes while the page asks for them."""

    def __init__(self) -> None:
        self._has_ended = False

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        """Answer any of the questions that the page asks; the run ends before its summary is answered."""
        path: str = scope["path"]
        if path.endswith("/graph"):
            body: dict[str, Any] = {"states": [self._state()], "previousExecutionId": None}
        elif "/spans/" in path:
            body = {"outputData": "done" if self._has_ended else None}
        elif path.endswith("/why"):
            body = {"blockers": []}
        else:
            await asyncio.sleep(0)  # questions that are asked together are answered before it ends
            self._has_ended = True
            body = {"status": "completed", "workflowId": "wf_1", "createdAt": "2026-11-28T02:30:00Z"}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": msgspec.json.encode(body)})

    def _state(self) -> dict[str, Any]:
        status = "completed" if self._has_ended else "running"
        return {"nodeId": "report", "nodeType": "set", "status": status, "iterations": []}


async def test_the_page_of_a_run_that_ends_meanwhile_shows_the_end_of_its_nodes_too() -> None:
    scope = {"type": "http", "path_params": {"id": "exec_1"}, "query_string": b"", "headers": []}
    shown = await run_page.load(PageRequest(scope, EndingRun(), datetime.now(UTC)))
    assert shown["run"]["status"] == "completed"
    assert [state["status"] for state in shown["graph"]["states"]] == ["completed"]
    assert shown["span"]["outputData"] == "done"


def test_a_run_says_what_it_does_after_seconds_without_progress() -> None:
    now = datetime(2026, 11, 28, 12, tzinfo=UTC)
    assert run_page.find_still_from("2026-11-28T11:59:58.500Z", now) == "2026-11-28T12:00:01.500Z"
    assert run_page.find_still_from("2026-11-28T11:59:57.000Z", now) == ""
    assert run_page.find_still_from(None, now) == ""


def test_the_parts_of_a_runs_time_have_words_and_no_codes() -> None:
    waiting = {code.value: 1.0 for code in BlockerCode if code not in NO_WAITS}
    timing = {"queued": 1.0, "waking": 0.0, "running": 2.0, "waitingFor": waiting}
    words = [part[0] for part in run_page.show_shares(timing)]
    assert words[0] == "work"
    assert "waiting for an answer of a person" in words
    assert all(word.startswith("waiting for ") for word in words if word not in {"work", "in the queue"})


def test_nodes_that_ask_models_have_a_place_for_their_texts() -> None:
    catalog = load_catalog()
    paid = {name for name in catalog.types() if catalog.get(name).is_paid}
    assert paid == run_node.MODEL_TYPES


def test_an_agent_shows_its_step_and_its_spending_of_its_budget() -> None:
    usage = {"calls": 2, "inputTokens": 900, "outputTokens": 100, "cost": "0.012"}
    model = {"number": 4, "kind": "model", "name": "model_1", "status": "started"}
    calls = [{**model, "kind": "tool", "name": name, "status": "started"} for name in ("find", "read")]
    waiting = [calls[0], {**calls[1], "number": 5, "status": "waiting"}]
    budgets = {"maxCost": "0.05", "maxTokens": 20_000}
    for steps, words, number in (
        ([model], "step 5: asks its model", 4),
        (calls, "step 5: calls find, read", 6),
        (waiting, "step 6: waits for approval of read", 6),
        ([], "step 6 done", 6),
    ):
        progress = {"steps": 6, "openSteps": steps, "usage": usage, **budgets}
        strip = agent_turns.describe_progress(progress)
        assert (strip.words, strip.number) == (words, number)
        assert strip.spent == "$0.012 of $0.05 · 1,000 of 20,000 tokens"


def test_an_iteration_that_has_ended_shows_its_output_while_others_write() -> None:
    iterations = [{"iteration": "0", "status": "completed"}, {"iteration": "1", "status": "running"}]
    counts = {"completed": 1, "running": 1}
    state = {"nodeId": "ask", "nodeType": "llm", "status": "running"}
    graph = {"states": [{**state, "iterations": iterations, "iterationCounts": counts}], "nodes": ()}
    for iteration in iterations:
        query = {"node": "ask", "iteration": iteration["iteration"]}
        frame = PageFrame("", "", datetime.now(UTC), query, {}, ())
        span = {**state, "status": iteration["status"], "config": {}, "outputData": {}}
        data = {"graph": graph, "span": span, "steps": None, "diff": None, "others": None}
        shown = run_node.view_node(data, frame, None, lambda **_: "")
        assert (shown["tab"], shown["writes_text"]) == ("output", iteration["status"] == "running")
