"""Memory of runs: their values are freed when they end, without a garbage collection."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

from engine.frames import NodeVisit, SectionFrame
from engine.node_api import LoopRequest, NodeCall, NodeOutcome, TimerWait
from engine.run_errors import NodeError
from engine.run_progress import RunProgress
from engine.run_records import RunStatus
from engine.services import ControlRequest
from engine.values import Json
from nodes.outbound_http import OutboundRefusalCode, OutboundRefused
from tests.unit.run_harness import SimulatedWorker, compile_drawing, echo_data, pure_node, wait_soon
from tests.unit.test_agent_runs import Outside, World

pytestmark = pytest.mark.anyio


def fail(call: NodeCall) -> Json:
    raise NodeError(f"{call.node_id} fails")


async def echo_later(call: NodeCall) -> Json:
    await asyncio.sleep(0)
    return call.data


async def fail_later(call: NodeCall) -> Json:
    await asyncio.sleep(0)
    raise NodeError(f"{call.node_id} fails")


async def crash_later(call: NodeCall) -> Json:
    await asyncio.sleep(0)
    raise ValueError(call.node_id)


KINDS = {
    "loop": pure_node(lambda _: LoopRequest([1, 2, 3], concurrency=2), loops=True),
    "echo": pure_node(echo_data),
    "fail": pure_node(fail),
    "later": pure_node(echo_later),
    "faillater": pure_node(fail_later),
    "crashlater": pure_node(crash_later),
    "wait": pure_node(lambda call: TimerWait(call.now + timedelta(hours=1), call.data)),
}


@contextmanager
def frees_runs() -> Iterator[None]:
    """Check that a block leaves no part of a run, while no garbage is collected."""
    gc.disable()
    gc.freeze()  # hides all earlier objects; to go through those of other tests would take half a second
    try:
        yield
        assert not [
            part for part in gc.get_objects() if isinstance(part, SectionFrame | NodeVisit | NodeCall)
        ]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("drawing", "status"),
    [
        ("start > echo > later", RunStatus.COMPLETED),
        ("start > loop; loop:continue > echo > later; loop:done > echo2", RunStatus.COMPLETED),
        ("start > fail", RunStatus.FAILED),
        ("start > faillater", RunStatus.FAILED),
        ("start > crashlater", RunStatus.FAILED),
        ("start > loop; loop:continue > faillater", RunStatus.FAILED),
        ("start > wait", RunStatus.WAITING),
        ("start > loop; loop:continue > loop2; loop2:continue > wait", RunStatus.WAITING),
    ],
)
async def test_a_run_that_leaves_its_worker_frees_its_values(drawing: str, status: RunStatus) -> None:
    program = compile_drawing(drawing, KINDS)
    with frees_runs():
        assert (await SimulatedWorker(program, {"large": "value"}).work()).status is status
        await asyncio.sleep(0)  # for the callbacks of its last task


@pytest.mark.parametrize("drawing", ["start > hang", "start > loop; loop:continue > hang"])
async def test_a_canceled_run_frees_its_values(drawing: str) -> None:
    has_begun = asyncio.Event()

    async def hang(_: NodeCall) -> Json:
        has_begun.set()
        async with asyncio.timeout(60):
            await asyncio.Event().wait()
        return None

    program = compile_drawing(drawing, {**KINDS, "hang": pure_node(hang)})
    with frees_runs():
        worker = SimulatedWorker(program, {"large": "value"})
        task = worker.begin()
        await wait_soon(has_begun)
        worker.control.ask(ControlRequest.CANCEL)
        assert (await task).status is RunStatus.CANCELLED
        await asyncio.sleep(0)  # for the callbacks of its last task


async def test_an_unexpected_error_of_the_engine_is_left_to_the_event_loop_to_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apply = RunProgress.apply_outcome

    def crash(progress: RunProgress, visit: NodeVisit, outcome: NodeOutcome) -> None:
        if visit.node_id == "later":
            raise ZeroDivisionError
        apply(progress, visit, outcome)

    monkeypatch.setattr(RunProgress, "apply_outcome", crash)
    loop, logged = asyncio.get_running_loop(), list[object]()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: logged.append(type(context.get("exception"))))
    try:
        await SimulatedWorker(compile_drawing("start > later", KINDS)).work()
        await asyncio.sleep(0)  # for the callbacks of its last task
        gc.collect()
    finally:
        loop.set_exception_handler(handler)
    assert logged == [ZeroDivisionError]


async def test_the_run_of_an_agent_with_failing_tools_frees_its_values() -> None:
    def refuse() -> None:
        raise OutboundRefused(OutboundRefusalCode.RESPONSE_TOO_LARGE, "more than 10 MB")

    worker = World(outside=Outside(on_request=refuse)).worker()
    with frees_runs():
        assert (await worker.work()).status is RunStatus.COMPLETED
        await asyncio.sleep(0)  # for the callbacks of its last task
