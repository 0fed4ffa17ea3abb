"""Nodes that wait for an answer from outside."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import msgspec.structs
import pytest

from engine.node_api import AnswerSource, AnswerWait, NodeCall, NodeResult
from engine.run_control import ControlRequest
from engine.run_errors import NodeError
from engine.run_records import NodeSpan, RunOutcome, RunStatus, SpanStatus
from engine.values import Json, encode_json
from tests.unit.running import (
    FAST_RETRY,
    Notebook,
    Worker,
    echo,
    error_of,
    finished,
    program,
    pure,
    read,
    soon,
    write,
)

YES = encode_json({"output": {"said": "yes"}, "port": "output"})


class Asking:
    """A node that asks, and counts how often it does."""

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


def answered(notebook: Notebook, payload: bytes = YES) -> dict[tuple[str, str], bytes]:
    return {key: payload for key, span in notebook.rows.items() if span.awaits is not None}


def overdue(notebook: Notebook) -> list[NodeSpan]:
    past = datetime.now(UTC) - timedelta(seconds=1)
    return [msgspec.structs.replace(span, wake_at=span.wake_at and past) for span in notebook.rows.values()]


async def test_a_node_that_asks_frees_the_worker_for_as_long_as_nobody_answers() -> None:
    asking = Asking()
    graph = program(GRAPH, {"ask": pure(asking.ask), "late": pure(echo)})
    first = Worker(graph)
    assert await first.work() == RunOutcome(RunStatus.WAITING)
    span = first.notebook.spans["ask"]
    assert (span.status, span.wake_at) == (SpanStatus.WAITING, None)
    assert json.loads(span.awaits or b"") == {
        "kind": "input",
        "request": {"title": "Really?"},
        "expired": None,
    }
    rows = list(first.notebook.rows.values())
    assert await Worker(graph, recorded=rows).work() == RunOutcome(RunStatus.WAITING)
    notebook = await finished(Worker(graph, recorded=rows, signals=answered(first.notebook)))
    assert notebook.output("echo") == {"said": "yes"}
    assert (notebook.spans["ask"].hashes, asking.calls) == (span.hashes, 1)
    again = await finished(
        Worker(graph, recorded=list(notebook.rows.values()), signals=answered(first.notebook))
    )
    assert again.commits == 0


async def test_an_answer_says_by_which_port_it_leaves() -> None:
    graph = program("start > ask > echo1; ask:no > echo2", {"ask": pure(Asking().ask)})
    first = Worker(graph)
    await first.work()
    no = answered(first.notebook, encode_json({"output": 7, "port": "no"}))
    notebook = await finished(Worker(graph, recorded=list(first.notebook.rows.values()), signals=no))
    assert notebook.status("echo1") is SpanStatus.SKIPPED
    assert notebook.output("echo2") == 7


@pytest.mark.parametrize(
    "settings", [{}, {"retryOnFailure": True}], ids=["", "though runs are taken up again"]
)
async def test_an_answer_may_be_a_failure_and_is_final(settings: Mapping[str, Json]) -> None:
    graph = program("start > ask", {"ask": write(Asking().start)}, {"ask": FAST_RETRY}, settings)
    first = Worker(graph)
    await first.work()
    failed = encode_json({"error": {"code": "run-failed", "message": "It did not work"}})
    second = Worker(
        graph,
        recorded=list(first.notebook.rows.values()),
        signals=answered(first.notebook, failed),
    )
    assert error_of(await second.work()).message == "It did not work"
    error = second.notebook.spans["ask"].error
    assert error is not None
    assert error.code == "run-failed"


async def test_an_answer_that_is_no_value_fails_its_node() -> None:
    graph = program("start > ask", {"ask": pure(Asking().ask)})
    first = Worker(graph)
    await first.work()
    told = answered(first.notebook, b'{"error":{"code":"run-failed","message":"a\\u0000b"}}')
    second = Worker(graph, recorded=list(first.notebook.rows.values()), signals=told)
    cause = error_of(await second.work()).cause
    assert cause is not None
    assert (cause.code, cause.node_id) == ("nul-character", "ask")


async def test_an_answer_that_came_before_the_node_was_recorded_as_waiting_counts() -> None:
    asking = Asking()
    graph = program("start > ask > echo", {"ask": write(asking.start)})
    notebook = await finished(Worker(graph, signals={("ask", ""): YES}))
    assert notebook.output("echo") == {"said": "yes"}


async def test_what_was_passed_through_stands_in_an_answer_too() -> None:
    options: dict[str, Json] = {"passThroughValues": {"order": "id"}}
    graph = program("start > ask", {"ask": pure(Asking().ask)}, {"ask": options})
    notebook = await finished(Worker(graph, {"id": 7}, signals={("ask", ""): YES}))
    assert notebook.output("ask") == {"said": "yes", "order": 7}


@pytest.mark.parametrize("seconds", [3600, 0.02], ids=["later", "while the worker still waits"])
async def test_when_nobody_answers_in_time_the_node_gives_what_was_agreed_on_or_fails(seconds: float) -> None:
    async def late(graph: str, expired: NodeResult | None) -> tuple[RunOutcome, Notebook]:
        asking = Asking(seconds=seconds, expired=expired)
        worker = Worker(program(graph, {"ask": pure(asking.ask), "late": pure(echo)}))
        ended = await worker.work()
        if seconds > 1:
            assert ended.status is RunStatus.WAITING
            assert ended.due_at == worker.notebook.spans["ask"].wake_at
            worker = Worker(worker.program, recorded=overdue(worker.notebook))
            ended = await worker.work()
        assert asking.calls == 1
        return ended, worker.notebook

    ended, notebook = await late(GRAPH, NodeResult({"said": None}, port="expired"))
    assert ended.status is RunStatus.COMPLETED
    assert notebook.output("late") == {"said": None}
    assert notebook.status("echo") is SpanStatus.SKIPPED
    ended, notebook = await late(GRAPH, None)
    assert error_of(ended).message == "Nobody has answered in time"
    error = notebook.spans["ask"].error
    assert error is not None
    assert error.code == "expired"
    ended, notebook = await late(f"{GRAPH}; ask:error > echo1", None)
    assert notebook.status("echo1") is SpanStatus.COMPLETED


async def test_an_answer_counts_though_its_time_is_over() -> None:
    graph = program("start > ask > echo", {"ask": pure(Asking(seconds=3600).ask)})
    first = Worker(graph)
    await first.work()
    notebook = await finished(
        Worker(graph, recorded=overdue(first.notebook), signals=answered(first.notebook))
    )
    assert notebook.output("echo") == {"said": "yes"}


async def test_what_a_write_asks_is_committed_before_anything_follows() -> None:
    seen: list[SpanStatus | None] = []

    async def look(_call: NodeCall) -> Json:
        seen.append(worker.notebook.status("ask"))
        return None

    async def slowly(call: NodeCall) -> Json:
        for _ in range(10):
            await asyncio.sleep(0)
        return call.data

    graph = program(
        "start > ask; start > slow > look",
        {"ask": write(Asking().start), "slow": read(slowly), "look": read(look)},
    )
    worker = Worker(graph)
    await worker.work()
    assert seen == [SpanStatus.WAITING]


async def test_an_unanswered_question_does_not_hold_up_a_stop() -> None:
    begun, end = asyncio.Event(), asyncio.Event()

    async def hold(call: NodeCall) -> Json:
        begun.set()
        await soon(end)
        return call.data

    worker = Worker(program("start > ask; start > hold", {"ask": pure(Asking().ask), "hold": read(hold)}))
    work = worker.begin()
    await soon(begun)
    worker.control.ask(ControlRequest.STOP)
    end.set()
    assert await work == RunOutcome(RunStatus.STOPPED)


async def test_a_question_that_can_not_be_kept_fails_its_node() -> None:
    def ask(_call: NodeCall) -> AnswerWait:
        return AnswerWait(AnswerSource.INPUT, {"title": "\0"})

    worker = Worker(program("start > ask", {"ask": pure(ask)}))
    assert error_of(await worker.work()).node_id == "ask"


async def test_a_node_that_fails_before_it_asks_is_tried_again() -> None:
    asking = Asking()

    async def flaky(call: NodeCall) -> AnswerWait:
        if call.attempt == 1:
            raise NodeError("not yet", retryable=True)
        return asking.ask(call)

    graph = program("start > ask > echo", {"ask": write(flaky)}, {"ask": FAST_RETRY})
    first = Worker(graph)
    assert (await first.work()).status is RunStatus.WAITING
    assert first.notebook.spans["ask"].attempt == 2
    notebook = await finished(
        Worker(graph, recorded=list(first.notebook.rows.values()), signals=answered(first.notebook))
    )
    assert (notebook.spans["ask"].attempt, notebook.output("echo")) == (2, {"said": "yes"})
