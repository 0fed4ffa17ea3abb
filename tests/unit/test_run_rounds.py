"""Runs that are taken up again from a node that has failed, and nodes that write at most once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime

import msgspec.structs
import pytest

from engine.node_api import LoopRequest, NodeCall
from engine.run_errors import NodeError
from engine.run_records import NodeSpan, RunStatus, SpanStatus
from engine.services import ControlRequest
from engine.values import Json
from models.timestamps import DatabaseClock
from tests.unit.run_harness import (
    InMemoryJournal,
    SimulatedWorker,
    compile_drawing,
    echo_data,
    expire_waits,
    pure_node,
    require_error,
    run_to_completion,
    wait_forever,
    wait_soon,
    write_world,
)

AGAIN: dict[str, Json] = {"retryOnFailure": True, "maxRetries": 2}
ONCE: dict[str, Json] = {"atMostOnce": True}


class FailingNode:
    """A node that fails until it has been called often enough."""

    def __init__(self, *, times: int = 1_000, error: Exception | None = None) -> None:
        self.attempts: list[int] = []
        self._times = times
        self._error = error or NodeError("no")

    async def run(self, call: NodeCall) -> Json:
        self.attempts.append(call.attempt)
        if len(self.attempts) <= self._times:
            raise self._error
        return "done"


async def run_through_pauses(worker: SimulatedWorker) -> tuple[SimulatedWorker, list[float]]:
    """Let every pause expire at once, each in another worker; return the last worker and the pauses in
    seconds.
    """
    pauses: list[float] = []
    clock = StoppedClock()
    worker.start = msgspec.structs.replace(worker.start, clock=clock)
    while (await worker.work()).status is RunStatus.WAITING:
        asleep = [
            span.wake_at for span in worker.notebook.rows.values() if span.status is SpanStatus.RETRYING
        ]
        pauses += [(at - clock.now()).total_seconds() for at in asleep if at]
        worker = SimulatedWorker(worker.program, worker.start.trigger, recorded=expire_waits(worker.notebook))
        worker.start = msgspec.structs.replace(worker.start, clock=clock)
    return worker, pauses


class StoppedClock(DatabaseClock):
    """Clock that stands still, so that pauses have their exact length."""

    def __init__(self) -> None:
        super().__init__()
        self._stopped_at = super().now()

    def now(self) -> datetime:
        return self._stopped_at


@pytest.fixture(autouse=True)
def _every_pause_frees_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.workflow_runner.SHORT_WAIT_SECONDS", 0)


# ── rounds ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("retry", "error", "attempts", "pauses"),
    [
        ({}, NodeError("no"), [1, 2, 3], [1, 2]),
        (
            {"maxAttempts": 2, "backoff": 7, "jitter": 0},
            NodeError("no", retryable=True),
            [1, 2, 3, 4, 5, 6],
            [7, 1, 7, 2, 7],
        ),
        ({"maxAttempts": 2, "backoff": 7}, NodeError("no"), [1, 3, 5], [1, 2]),
    ],
    ids=["one attempt a round", "two attempts a round", "two that would not help"],
)
async def test_a_run_is_taken_up_again_from_the_node_that_failed(
    retry: dict[str, Json], error: NodeError, attempts: list[int], pauses: list[int]
) -> None:
    failing, before = FailingNode(error=error), FailingNode(times=0)
    graph = compile_drawing(
        "start > before > fails",
        {"before": write_world(before.run), "fails": write_world(failing.run)},
        {"fails": {"retry": retry}},
        AGAIN,
    )
    last, slept = await run_through_pauses(SimulatedWorker(graph))
    assert (failing.attempts, slept) == (attempts, pauses)
    assert before.attempts == [1]
    assert last.notebook.status("fails") is SpanStatus.FAILED


async def test_a_run_that_was_taken_up_again_may_end_well() -> None:
    failing = FailingNode(times=2)
    last, _ = await run_through_pauses(
        SimulatedWorker(
            compile_drawing("start > fails > echo", {"fails": write_world(failing.run)}, None, AGAIN)
        )
    )
    assert last.notebook.output("echo") == "done"


@pytest.mark.parametrize(
    ("drawing", "settings"),
    [
        ("start > fails", {}),
        ("start > fails; fails:error > echo", AGAIN),
        ("start > loop; loop:continue > fails", AGAIN),
        ("start > loop; loop:continue > fails; loop:error > echo", AGAIN),
    ],
    ids=[
        "not asked for",
        "its failure is taken up",
        "the loop goes on",
        "the failure of its loop is taken up",
    ],
)
async def test_a_failure_that_does_not_fail_the_run_is_not_repeated(
    drawing: str, settings: Mapping[str, Json]
) -> None:
    failing = FailingNode()
    goes_on = "error > echo" not in drawing
    kinds = {
        "fails": write_world(failing.run),
        "loop": pure_node(lambda _call: LoopRequest([1], continues_on_error=goes_on), loops=True),
    }
    await SimulatedWorker(compile_drawing(drawing, kinds, None, settings)).work()
    assert failing.attempts == [1]


async def test_a_failure_in_a_loop_that_would_fail_the_run_is_repeated() -> None:
    failing = FailingNode(times=1)
    kinds = {
        "fails": write_world(failing.run),
        "loop": pure_node(lambda _call: LoopRequest([1, 2]), loops=True),
    }
    last, _ = await run_through_pauses(
        SimulatedWorker(compile_drawing("start > loop; loop:continue > fails", kinds, None, AGAIN))
    )
    assert failing.attempts == [1, 2, 1]
    assert last.notebook.output("loop") == {"results": ["done", "done"], "count": 2, "errors": []}


@pytest.mark.parametrize("request_", [ControlRequest.STOP, ControlRequest.CANCEL])
async def test_stopped_and_timed_out_runs_are_not_resumed(request_: ControlRequest) -> None:
    begun = asyncio.Event()

    async def hang(call: NodeCall) -> Json:
        begun.set()
        await (asyncio.sleep(0.01) if request_ is ControlRequest.STOP else wait_forever(call))
        raise NodeError("no")

    worker = SimulatedWorker(compile_drawing("start > hang", {"hang": write_world(hang)}, None, AGAIN))
    work = worker.begin()
    await wait_soon(begun)
    worker.control.ask(request_)
    assert (await work).status in {RunStatus.STOPPED, RunStatus.CANCELLED}
    late = SimulatedWorker(
        compile_drawing("start > hang", {"hang": write_world(wait_forever)}, None, AGAIN), seconds=0.02
    )
    assert require_error(await late.work()).code == "timeout"


# ── at most once ──────────────────────────────────────────────────────────────────────────────────────────


def restart_spans(notebook: InMemoryJournal) -> list[NodeSpan]:
    """Return the recorded spans as they were during the write."""
    return [
        msgspec.structs.replace(span, status=SpanStatus.RUNNING, output=None, port=None, ended_at=None)
        if span.node_id == "pay"
        else span
        for span in notebook.rows.values()
        if span.node_id != "echo"
    ]


@pytest.mark.parametrize("settings", [{}, AGAIN])
async def test_an_attempt_that_was_lost_is_not_made_again(settings: Mapping[str, Json]) -> None:
    paying = FailingNode(times=0)
    for drawing in ("start > pay > echo", "start > pay; pay:error > echo"):
        paying.attempts.clear()
        graph = compile_drawing(drawing, {"pay": write_world(paying.run)}, {"pay": ONCE}, settings)
        first = await run_to_completion(SimulatedWorker(graph))
        second = SimulatedWorker(graph, recorded=restart_spans(first))
        ended = await second.work()
        assert paying.attempts == [1]
        error = second.notebook.spans["pay"].error
        assert error is not None
        assert (error.code, error.attempt) == ("lost-attempt", 1)
        assert ended.status is (RunStatus.COMPLETED if ":error" in drawing else RunStatus.FAILED)


async def test_a_read_node_may_run_again_with_any_config() -> None:
    graph = compile_drawing("start > pay > echo", {"pay": pure_node(echo_data)}, {"pay": ONCE})
    first = await run_to_completion(SimulatedWorker(graph))
    await run_to_completion(SimulatedWorker(graph, recorded=restart_spans(first)))


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (NodeError("refused", code="http-503", retryable=True), 3),
        (NodeError("no answer", code="timed-out", retryable=True), 1),
        (TimeoutError(), 1),
        (NodeError("wrong", code="http-400"), 1),
        (KeyError("a bug"), 1),
    ],
    ids=["known not to have happened", "unanswered", "too slow", "refused for good", "a surprise"],
)
async def test_only_operations_that_surely_did_not_happen_are_retried(
    error: Exception, attempts: int
) -> None:
    failing = FailingNode(error=error)
    options: dict[str, Json] = {**ONCE, "retry": {"maxAttempts": 3, "backoff": 2}}
    graph = compile_drawing("start > pay", {"pay": write_world(failing.run)}, {"pay": options})
    await run_through_pauses(SimulatedWorker(graph))
    assert len(failing.attempts) == attempts


@pytest.mark.parametrize("request_", [ControlRequest.HAND_OFF, ControlRequest.STOP])
async def test_a_write_announced_but_not_begun_is_not_lost(request_: ControlRequest) -> None:
    paying = FailingNode(times=0)
    graph = compile_drawing("start > pay > echo", {"pay": write_world(paying.run)}, {"pay": ONCE})
    worker = SimulatedWorker(graph)
    worker.notebook.may_commit.clear()
    work = worker.begin()
    await wait_soon(worker.notebook.is_committing)
    worker.control.ask(request_)
    worker.notebook.may_commit.set()
    ended = await work
    assert paying.attempts == []
    if request_ is ControlRequest.STOP:
        assert worker.notebook.status("pay") is SpanStatus.CANCELLED
        return
    assert ended.status is RunStatus.RELEASED
    notebook = await run_to_completion(SimulatedWorker(graph, recorded=expire_waits(worker.notebook)))
    assert paying.attempts == [1]
    assert notebook.output("echo") == "done"


async def test_the_pauses_between_rounds_grow_to_a_minute() -> None:
    failing = FailingNode()
    settings: dict[str, Json] = {"retryOnFailure": True, "maxRetries": 8}
    _, pauses = await run_through_pauses(
        SimulatedWorker(compile_drawing("start > fails", {"fails": write_world(failing.run)}, None, settings))
    )
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
