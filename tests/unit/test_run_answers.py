"""Nodes that wait for an answer from outside."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import msgspec.structs
import pytest

from engine import run_progress
from engine.node_api import AnswerSource, AnswerWait, NodeCall, NodeResult
from engine.run_errors import NodeError
from engine.run_records import NodeSpan, RunOutcome, RunStatus, SpanStatus
from engine.services import ControlRequest
from engine.values import Json, encode_json
from tests.unit.run_harness import (
    FAST_RETRY,
    PATIENCE_SECONDS,
    InMemoryJournal,
    SimulatedWorker,
    compile_drawing,
    echo_data,
    pure_node,
    read_world,
    require_error,
    run_to_completion,
    wait_soon,
    write_world,
)

YES = encode_json({"output": {"said": "yes"}, "port": "output"})


class AskingNode:
    """Node that requests input, and counts its requests."""

    def __init__(self, *, seconds: float | None = None, expired: NodeResult | None = None) -> None:
        self.calls = 0
        self._seconds = seconds
        self._expired = expired

    def ask(self, call: NodeCall) -> AnswerWait:
        self.calls += 1
        expires_at = None if self._seconds is None else call.now + timedelta(seconds=self._seconds)
        return AnswerWait(AnswerSource.INPUT, {"title": "Really?"}, expires_at, self._expired)

    async def start(self, call: NodeCall) -> AnswerWait:
        return self.ask(call)


GRAPH = "start > ask > echo; ask:expired > late"


def answer_waits(notebook: InMemoryJournal, payload: bytes = YES) -> dict[tuple[str, str], bytes]:
    return {key: payload for key, span in notebook.rows.items() if span.awaits is not None}


def make_overdue(notebook: InMemoryJournal) -> list[NodeSpan]:
    past = datetime.now(UTC) - timedelta(seconds=1)
    return [msgspec.structs.replace(span, wake_at=span.wake_at and past) for span in notebook.rows.values()]


async def test_a_waiting_node_occupies_no_worker_until_its_answer() -> None:
    asking = AskingNode()
    graph = compile_drawing(GRAPH, {"ask": pure_node(asking.ask), "late": pure_node(echo_data)})
    first = SimulatedWorker(graph)
    assert await first.work() == RunOutcome(RunStatus.WAITING)
    span = first.notebook.spans["ask"]
    assert (span.status, span.wake_at) == (SpanStatus.WAITING, None)
    assert json.loads(span.awaits or b"") == {
        "kind": "input",
        "request": {"title": "Really?"},
        "expired": None,
    }
    rows = list(first.notebook.rows.values())
    assert await SimulatedWorker(graph, recorded=rows).work() == RunOutcome(RunStatus.WAITING)
    notebook = await run_to_completion(
        SimulatedWorker(graph, recorded=rows, wait_answers=answer_waits(first.notebook))
    )
    assert notebook.output("echo") == {"said": "yes"}
    assert (notebook.spans["ask"].hashes, asking.calls) == (span.hashes, 1)
    again = await run_to_completion(
        SimulatedWorker(
            graph, recorded=list(notebook.rows.values()), wait_answers=answer_waits(first.notebook)
        )
    )
    assert again.commits == 0


TASK_GRAPH = "start > work > echo"


def request_task(_call: NodeCall) -> AnswerWait:
    return AnswerWait(AnswerSource.TASK, {}, task=b"{}")


async def test_a_run_keeps_its_worker_for_the_answer_to_a_new_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_progress, "MAX_HOLD_SECONDS", PATIENCE_SECONDS)
    worker = SimulatedWorker(compile_drawing(TASK_GRAPH, {"work": pure_node(request_task)}))
    answers: dict[tuple[str, str], bytes] = {}

    async def read_answers() -> Mapping[tuple[str, str], bytes]:
        return answers

    worker.start = msgspec.structs.replace(
        worker.start, may_hold=lambda: True, read_wait_answers=read_answers
    )
    running = worker.begin()
    await wait_soon(worker.notebook.is_committing)
    answers["work", ""] = YES
    worker.control.announce_answer()
    assert await running == RunOutcome(RunStatus.COMPLETED)
    assert worker.notebook.output("echo") == {"said": "yes"}


async def test_a_run_leaves_its_worker_unless_its_task_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = compile_drawing(TASK_GRAPH, {"work": pure_node(request_task)})
    monkeypatch.setattr(run_progress, "MAX_HOLD_SECONDS", 3_600.0)
    assert await SimulatedWorker(graph).work() == RunOutcome(RunStatus.WAITING)
    busy = SimulatedWorker(graph)
    busy.start = msgspec.structs.replace(busy.start, may_hold=lambda: False)
    assert await busy.work() == RunOutcome(RunStatus.WAITING)
    monkeypatch.setattr(run_progress, "MAX_HOLD_SECONDS", 0.01)
    free = SimulatedWorker(graph)
    free.start = msgspec.structs.replace(free.start, may_hold=lambda: True)
    assert await free.work() == RunOutcome(RunStatus.WAITING)
    assert free.notebook.status("work") is SpanStatus.WAITING


async def test_a_question_after_a_task_is_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_progress, "MAX_HOLD_SECONDS", PATIENCE_SECONDS)
    nodes = {"work": pure_node(request_task), "ask": pure_node(AskingNode().ask)}
    worker = SimulatedWorker(compile_drawing("start > work > ask", nodes))
    answers: dict[tuple[str, str], bytes] = {}

    async def read_answers() -> Mapping[tuple[str, str], bytes]:
        return answers

    worker.start = msgspec.structs.replace(
        worker.start, may_hold=lambda: True, read_wait_answers=read_answers
    )
    running = worker.begin()
    await wait_soon(worker.notebook.is_committing)
    answers["work", ""] = YES
    worker.control.announce_answer()
    async with asyncio.timeout(PATIENCE_SECONDS / 2):
        assert await running == RunOutcome(RunStatus.WAITING)


async def test_a_question_beside_a_node_at_work_is_committed_at_once() -> None:
    async def work(_call: NodeCall) -> Json:
        await asyncio.Event().wait()
        return None

    nodes = {"ask": pure_node(AskingNode().ask), "work": read_world(work)}
    worker = SimulatedWorker(compile_drawing("start > work; start > ask", nodes))
    worker.notebook.may_commit.clear()
    running = worker.begin()
    await wait_soon(worker.notebook.is_committing)
    worker.notebook.may_commit.set()
    worker.control.ask(ControlRequest.CANCEL)
    await running
    assert worker.notebook.status("ask") is SpanStatus.WAITING


@pytest.mark.parametrize("settings", [{}, {"atMostOnce": True}], ids=["repeatable", "at most once"])
async def test_a_node_that_was_answered_before_its_wait_is_not_called_again(
    settings: Mapping[str, Json],
) -> None:
    asking = AskingNode()
    graph = compile_drawing("start > ask > echo", {"ask": write_world(asking.start)}, {"ask": settings})
    first = SimulatedWorker(graph)
    await first.work()
    told = answer_waits(first.notebook)
    cut_off = [
        msgspec.structs.replace(span, status=SpanStatus.RUNNING, awaits=None, wake_at=None)
        if span.node_id == "ask"
        else span
        for span in first.notebook.rows.values()
    ]
    notebook = await run_to_completion(SimulatedWorker(graph, recorded=cut_off, wait_answers=told))
    assert notebook.output("echo") == {"said": "yes"}
    span = notebook.spans["ask"]
    assert (asking.calls, span.attempt, span.status) == (1, 1, SpanStatus.COMPLETED)


async def test_an_answer_says_by_which_port_it_leaves() -> None:
    graph = compile_drawing("start > ask > echo1; ask:no > echo2", {"ask": pure_node(AskingNode().ask)})
    first = SimulatedWorker(graph)
    await first.work()
    no = answer_waits(first.notebook, encode_json({"output": 7, "port": "no"}))
    notebook = await run_to_completion(
        SimulatedWorker(graph, recorded=list(first.notebook.rows.values()), wait_answers=no)
    )
    assert notebook.status("echo1") is SpanStatus.SKIPPED
    assert notebook.output("echo2") == 7


@pytest.mark.parametrize(
    "settings", [{}, {"retryOnFailure": True}], ids=["", "though runs are taken up again"]
)
async def test_an_answer_may_be_a_failure_and_is_final(settings: Mapping[str, Json]) -> None:
    graph = compile_drawing(
        "start > ask", {"ask": write_world(AskingNode().start)}, {"ask": FAST_RETRY}, settings
    )
    first = SimulatedWorker(graph)
    await first.work()
    failed = encode_json({"error": {"code": "run-failed", "message": "It did not work"}})
    second = SimulatedWorker(
        graph,
        recorded=list(first.notebook.rows.values()),
        wait_answers=answer_waits(first.notebook, failed),
    )
    assert require_error(await second.work()).message == "It did not work"
    error = second.notebook.spans["ask"].error
    assert error is not None
    assert error.code == "run-failed"


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b'{"error":{"code":"run-failed","message":"a\\u0000b"}}', "nul-character"),
        (b'{"logs":[["info","a\\u0000b"]]}', "nul-character"),
        (b'{"logs":["x"]}', "malformed-json"),
        (b'{"port":1}', "malformed-json"),
    ],
)
async def test_an_answer_that_is_malformed_fails_its_node(payload: bytes, code: str) -> None:
    graph = compile_drawing("start > ask", {"ask": pure_node(AskingNode().ask)})
    first = SimulatedWorker(graph)
    await first.work()
    told = answer_waits(first.notebook, payload)
    second = SimulatedWorker(graph, recorded=list(first.notebook.rows.values()), wait_answers=told)
    cause = require_error(await second.work()).cause
    assert cause is not None
    assert (cause.code, cause.node_id) == (code, "ask")


async def test_an_answer_that_came_before_the_node_was_recorded_as_waiting_counts() -> None:
    asking = AskingNode()
    graph = compile_drawing("start > ask > echo", {"ask": write_world(asking.start)})
    notebook = await run_to_completion(SimulatedWorker(graph, wait_answers={("ask", ""): YES}))
    assert notebook.output("echo") == {"said": "yes"}


async def test_pass_through_values_appear_in_an_answer() -> None:
    options: dict[str, Json] = {"passThroughValues": {"order": "id"}}
    graph = compile_drawing("start > ask", {"ask": pure_node(AskingNode().ask)}, {"ask": options})
    notebook = await run_to_completion(SimulatedWorker(graph, {"id": 7}, wait_answers={("ask", ""): YES}))
    assert notebook.output("ask") == {"said": "yes", "order": 7}


@pytest.mark.parametrize("seconds", [3600, 0.02], ids=["later", "while the worker still waits"])
async def test_an_unanswered_node_outputs_its_default_or_fails(seconds: float) -> None:
    async def late(graph: str, expired: NodeResult | None) -> tuple[RunOutcome, InMemoryJournal]:
        asking = AskingNode(seconds=seconds, expired=expired)
        worker = SimulatedWorker(
            compile_drawing(graph, {"ask": pure_node(asking.ask), "late": pure_node(echo_data)})
        )
        ended = await worker.work()
        if seconds > 1:
            assert ended.status is RunStatus.WAITING
            assert ended.due_at == worker.notebook.spans["ask"].wake_at
            worker = SimulatedWorker(worker.program, recorded=make_overdue(worker.notebook))
            ended = await worker.work()
        assert asking.calls == 1
        return ended, worker.notebook

    ended, notebook = await late(GRAPH, NodeResult({"said": None}, port="expired"))
    assert ended.status is RunStatus.COMPLETED
    assert notebook.output("late") == {"said": None}
    assert notebook.status("echo") is SpanStatus.SKIPPED
    ended, notebook = await late(GRAPH, None)
    assert require_error(ended).message == "No answer arrived in time"
    error = notebook.spans["ask"].error
    assert error is not None
    assert error.code == "expired"
    ended, notebook = await late(f"{GRAPH}; ask:error > echo1", None)
    assert notebook.status("echo1") is SpanStatus.COMPLETED


async def test_an_answer_counts_though_its_time_is_over() -> None:
    graph = compile_drawing("start > ask > echo", {"ask": pure_node(AskingNode(seconds=3600).ask)})
    first = SimulatedWorker(graph)
    await first.work()
    notebook = await run_to_completion(
        SimulatedWorker(
            graph, recorded=make_overdue(first.notebook), wait_answers=answer_waits(first.notebook)
        )
    )
    assert notebook.output("echo") == {"said": "yes"}


async def test_the_request_of_a_write_is_committed_before_anything_follows() -> None:
    seen: list[SpanStatus | None] = []

    async def look(_call: NodeCall) -> Json:
        seen.append(worker.notebook.status("ask"))
        return None

    async def slowly(call: NodeCall) -> Json:
        for _ in range(10):
            await asyncio.sleep(0)
        return call.data

    graph = compile_drawing(
        "start > ask; start > slow > look",
        {"ask": write_world(AskingNode().start), "slow": read_world(slowly), "look": read_world(look)},
    )
    worker = SimulatedWorker(graph)
    await worker.work()
    assert seen == [SpanStatus.WAITING]


async def test_an_unanswered_question_does_not_hold_up_a_stop() -> None:
    begun, end = asyncio.Event(), asyncio.Event()

    async def hold(call: NodeCall) -> Json:
        begun.set()
        await wait_soon(end)
        return call.data

    worker = SimulatedWorker(
        compile_drawing(
            "start > ask; start > hold", {"ask": pure_node(AskingNode().ask), "hold": read_world(hold)}
        )
    )
    work = worker.begin()
    await wait_soon(begun)
    worker.control.ask(ControlRequest.STOP)
    end.set()
    assert await work == RunOutcome(RunStatus.STOPPED)


async def test_a_question_that_can_not_be_kept_fails_its_node() -> None:
    def ask(_call: NodeCall) -> AnswerWait:
        return AnswerWait(AnswerSource.INPUT, {"title": "\0"})

    worker = SimulatedWorker(compile_drawing("start > ask", {"ask": pure_node(ask)}))
    assert require_error(await worker.work()).node_id == "ask"


async def test_a_node_that_fails_before_it_asks_is_tried_again() -> None:
    asking = AskingNode()

    async def flaky(call: NodeCall) -> AnswerWait:
        if call.attempt == 1:
            raise NodeError("not yet", retryable=True)
        return asking.ask(call)

    graph = compile_drawing("start > ask > echo", {"ask": write_world(flaky)}, {"ask": FAST_RETRY})
    first = SimulatedWorker(graph)
    assert (await first.work()).status is RunStatus.WAITING
    assert first.notebook.spans["ask"].attempt == 2
    notebook = await run_to_completion(
        SimulatedWorker(
            graph, recorded=list(first.notebook.rows.values()), wait_answers=answer_waits(first.notebook)
        )
    )
    assert (notebook.spans["ask"].attempt, notebook.output("echo")) == (2, {"said": "yes"})
