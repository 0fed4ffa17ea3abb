"""Run against an in-memory journal that keeps the protocol: uncommitted records are lost with their worker."""

from __future__ import annotations

import asyncio
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from types import FrameType
from typing import Any, cast

import msgspec.structs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import span_recorder
from engine import workflow_runner as engine_run
from engine.node_api import (
    FieldCompilation,
    LoopRequest,
    NodeCall,
    NodeOutcome,
    NodeResult,
    RunNode,
    TimerWait,
)
from engine.node_key import NodeKey, decode_key
from engine.program import WorkflowProgram
from engine.run_errors import FailureCause, HttpRequestName, LeaseLost, NodeError
from engine.run_records import (
    SETTLED_STATUSES,
    NodeSpan,
    RunError,
    RunOutcome,
    RunStatus,
    SpanStatus,
    encode_error,
)
from engine.services import ControlRequest, RunControl
from engine.values import Json, decode_json
from journal import run_rows
from tests.unit.run_harness import (
    FAST_RETRY,
    PATIENCE_SECONDS,
    CrashPointJournal,
    InMemoryJournal,
    MadeUpNodeType,
    OutsideWorld,
    SimulatedWorker,
    SpanHistory,
    compile_drawing,
    echo_data,
    expire_waits,
    fail_node,
    pause_node,
    pure_node,
    read_world,
    require_error,
    run_to_completion,
    wait_forever,
    wait_of,
    wait_soon,
    write_world,
)

# ── the order of effects ──────────────────────────────────────────────────────────────────────────────────


async def test_a_write_starts_after_its_ancestors_its_input_and_its_attempt_are_committed() -> None:
    seen: dict[str, NodeSpan] = {}

    async def pay(call: NodeCall) -> Json:
        seen.update(worker.notebook.spans)
        return call.config["amount"]

    graph = compile_drawing(
        "start > look > pay",
        {"look": read_world(pause_node), "pay": write_world(pay)},
        {"pay": {"config": {"amount": "{{ data.amount }}"}, "inputMappings": {"to": "trigger.name"}}},
    )
    worker = SimulatedWorker(graph, {"amount": 3, "name": "Ada"})
    await run_to_completion(worker)
    assert [seen[node_id].status for node_id in ("start", "look")] == [SpanStatus.COMPLETED] * 2
    assert (seen["pay"].status, seen["pay"].attempt) == (SpanStatus.RUNNING, 1)
    assert decode_json(seen["pay"].input or b"") == {"amount": 3, "name": "Ada", "to": "Ada"}
    assert decode_json(seen["pay"].resolved_config or b"") == {"amount": 3}


@pytest.mark.parametrize("outcome", ["done", NodeResult("done", port="other"), NodeError("no")])
async def test_nothing_follows_a_write_before_its_result_is_committed(
    outcome: NodeOutcome | NodeError,
) -> None:
    async def pay(_call: NodeCall) -> NodeOutcome:
        await asyncio.sleep(0)
        if isinstance(outcome, NodeError):
            raise outcome
        return outcome

    def follow(_call: NodeCall) -> Json:
        return str(worker.notebook.status("pay"))

    graph = compile_drawing(
        "start > pay > follow; pay:other > follow; pay:error > follow",
        {"pay": write_world(pay), "follow": pure_node(follow)},
    )
    worker = SimulatedWorker(graph)
    notebook = await run_to_completion(worker)
    assert notebook.output("follow") == ("failed" if isinstance(outcome, NodeError) else "completed")


async def test_the_result_of_a_write_is_committed_though_another_branch_goes_on() -> None:
    graph = compile_drawing(
        "start > ever; start > pay", {"ever": read_world(wait_forever), "pay": write_world(pause_node)}
    )
    worker = SimulatedWorker(graph)
    work = worker.begin()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while worker.notebook.status("pay") is not SpanStatus.COMPLETED:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)
    worker.control.ask(ControlRequest.CANCEL)
    await work


async def test_a_chain_of_writes_takes_one_commit_each_and_one_for_the_end() -> None:
    notebook = await run_to_completion(
        SimulatedWorker(
            compile_drawing("start > write1 > write2 > write3", {"write": write_world(pause_node)})
        )
    )
    assert notebook.commits == 4


async def test_nodes_without_effects_wait_for_no_commit() -> None:
    notebook = await run_to_completion(
        SimulatedWorker(
            compile_drawing("start > echo1 > look > echo2", {"look": read_world(pause_node)}), recorded=()
        )
    )
    assert notebook.commits == 1
    assert set(notebook.statuses.values()) == {"completed"}


async def test_a_node_that_returns_at_once_is_called_in_place() -> None:
    tasks: set[asyncio.Task[Any] | None] = set()

    def where(_call: NodeCall) -> Json:
        tasks.add(asyncio.current_task())
        return None

    worker = SimulatedWorker(compile_drawing("start > where1 > where2", {"where": pure_node(where)}))
    work = worker.begin()
    await work
    assert tasks == {work}


async def test_branches_run_at_once() -> None:
    meeting = asyncio.Barrier(3)

    async def meet(call: NodeCall) -> Json:
        await asyncio.wait_for(meeting.wait(), PATIENCE_SECONDS)
        return call.data

    branches = "start > meet1; start > meet2; start > write3"
    await run_to_completion(
        SimulatedWorker(compile_drawing(branches, {"meet": read_world(meet), "write": write_world(meet)}))
    )


@pytest.mark.parametrize(
    ("settings", "most"), [({}, 16), ({"parallelism": 1}, 1), ({"parallelism": 40}, 40)], ids=str
)
@pytest.mark.parametrize("retry", [{}, FAST_RETRY], ids=["at first", "when they are tried again"])
async def test_no_more_nodes_run_at_once_than_the_settings_allow(
    retry: dict[str, Json], settings: dict[str, Json], most: int
) -> None:
    now_running = most_running = 0
    reached = asyncio.Event()

    async def count(call: NodeCall) -> Json:
        nonlocal now_running, most_running
        if retry and call.attempt == 1:
            raise NodeError("not yet", retryable=True)
        now_running += 1
        most_running = max(most_running, now_running)
        if most_running >= most:
            reached.set()
        await asyncio.wait_for(reached.wait(), PATIENCE_SECONDS)
        await asyncio.sleep(0.002)  # so that nodes above the limit would start meanwhile
        now_running -= 1
        return None

    ids = [f"count{number}" for number in range(50)]
    graph = compile_drawing(
        "; ".join(f"start > {node_id}" for node_id in ids),
        {"count": read_world(count)},
        dict.fromkeys(ids, retry),
        settings,
    )
    await run_to_completion(SimulatedWorker(graph))
    assert most_running == most


async def test_other_work_gets_a_turn_during_a_long_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_run, "SLICE_SECONDS", 0)
    turns = 0

    async def elsewhere() -> None:
        nonlocal turns
        while not work.done():
            turns += 1
            await asyncio.sleep(0)

    work = SimulatedWorker(compile_drawing(draw_chain(100))).begin()
    await elsewhere()
    assert turns >= 100


# ── the way through the graph ─────────────────────────────────────────────────────────────────────────────


async def test_branches_not_taken_are_skipped_and_a_merge_waits_for_the_others() -> None:
    graph = compile_drawing(
        "start > choose; choose:left > slow > merge; choose:right > echo1 > echo2 > merge; echo2 > echo3",
        {
            "choose": pure_node(lambda call: NodeResult(call.data, port="left")),
            "slow": read_world(pause_node),
            "merge": pure_node(echo_data),
        },
    )
    notebook = await run_to_completion(SimulatedWorker(graph, 7))
    assert notebook.output("merge") == 7
    assert {node_id for node_id, status in notebook.statuses.items() if status == "skipped"} == {
        "echo1",
        "echo2",
        "echo3",
    }


async def test_a_merge_gets_each_parent_under_its_id_and_all_of_them_merged() -> None:
    graph = compile_drawing(
        "start > one1 > merge; start > two2 > merge; start > text > merge",
        {
            "one": pure_node(lambda _: {"a": 1, "both": 1}),
            "two": pure_node(lambda _: {"b": 2, "both": 2}),
            "text": pure_node(lambda _: "no object"),
            "merge": pure_node(echo_data),
        },
    )
    notebook = await run_to_completion(SimulatedWorker(graph))
    assert notebook.output("merge") == {
        "a": 1,
        "b": 2,
        "both": 2,
        "one1": {"a": 1, "both": 1},
        "two2": {"b": 2, "both": 2},
        "text": "no object",
    }


async def test_a_parent_joined_by_two_edges_is_one_parent() -> None:
    both = {
        "choose": pure_node(lambda call: NodeResult(call.data, port="left")),
        "echo": pure_node(echo_data),
    }
    notebook = await run_to_completion(
        SimulatedWorker(compile_drawing("start > choose; choose:left > echo; choose:left > echo", both), 5)
    )
    assert notebook.output("echo") == 5


async def test_unreachable_nodes_are_skipped_and_reported_once() -> None:
    graph = compile_drawing("start > echo1; echo2 > echo3")
    notebook = await run_to_completion(SimulatedWorker(graph))
    again = await run_to_completion(SimulatedWorker(graph, recorded=list(notebook.spans.values())))
    assert again.commits == 0
    assert notebook.statuses == {
        "start": "completed",
        "echo1": "completed",
        "echo2": "skipped",
        "echo3": "skipped",
    }


async def test_a_node_sees_its_data_the_trigger_other_nodes_and_the_execution() -> None:
    wanted = {
        "data": "{{ data.n }}",
        "trigger": "{{ trigger.n }}",
        "node": "{{ nodes.echo1.n }}",
        "execution": "{{ execution.id }}",
    }
    graph = compile_drawing(
        "start > echo1 > show",
        {"show": pure_node(lambda call: dict(call.config))},
        {"show": {"config": cast("Json", wanted)}},
    )
    notebook = await run_to_completion(SimulatedWorker(graph, {"n": 1}))
    assert notebook.output("show") == {"data": 1, "trigger": 1, "node": 1, "execution": "exec_2"}


# ── failures ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_node_that_fails_for_good_fails_the_run() -> None:
    worker = SimulatedWorker(compile_drawing("start > fail > echo", {"fail": pure_node(fail_node)}))
    error = require_error(await worker.work())
    cause = FailureCause("node-error", "exec_1:fail:0 is broken", "fail")
    assert error == RunError("node-error", cause.message, "fail", 1, cause)
    assert worker.notebook.statuses == {"start": "completed", "fail": "failed"}


async def test_a_failure_leaves_by_the_error_port_where_something_is_connected_to_it() -> None:
    graph = compile_drawing("start > fail > echo1; fail:error > echo2", {"fail": pure_node(fail_node)})
    notebook = await run_to_completion(SimulatedWorker(graph, {"order": 7}))
    assert notebook.status("fail") is SpanStatus.FAILED
    assert notebook.status("echo1") is SpanStatus.SKIPPED
    message = "exec_1:fail:0 is broken"
    assert notebook.output("echo2") == {
        "error": {"code": "node-error", "message": message, "nodeId": "fail", "attempt": 1},
        "data": {"order": 7},
    }


async def test_metadata_that_are_refused_do_not_count_for_later_nodes() -> None:
    def flood(call: NodeCall) -> Json:
        call.set_metadata({f"key{number}": "x" for number in range(21)})
        return None

    def mark(call: NodeCall) -> Json:
        call.set_metadata({"order": "7"})
        return None

    kinds = {"flood": pure_node(flood), "mark": pure_node(mark)}
    notebook = await run_to_completion(
        SimulatedWorker(compile_drawing("start > flood; flood:error > mark", kinds))
    )
    assert (notebook.status("flood"), notebook.status("mark")) == (SpanStatus.FAILED, SpanStatus.COMPLETED)
    assert notebook.metadata == {"order": "7"}


async def test_the_output_of_a_failure_omits_data_that_does_not_fit() -> None:
    deep: Json = None
    for _ in range(64):
        deep = [deep]
    graph = compile_drawing("start > fail; fail:error > echo", {"fail": pure_node(fail_node)})
    notebook = await run_to_completion(SimulatedWorker(graph, deep))
    output = notebook.output("echo")
    assert isinstance(output, dict)
    assert output["data"] is None


async def test_a_failed_run_lets_writes_finish_breaks_off_the_rest_and_starts_nothing() -> None:
    is_waiting = asyncio.Event()

    async def pay(_call: NodeCall) -> Json:
        is_waiting.set()
        await asyncio.sleep(0.02)
        return "paid"

    async def fail_late(call: NodeCall) -> Json:
        await wait_soon(is_waiting)
        return fail_node(call)

    graph = compile_drawing(
        "start > pay > echo; start > ever; start > late",
        {"pay": write_world(pay), "ever": read_world(wait_forever), "late": read_world(fail_late)},
    )
    worker = SimulatedWorker(graph)
    assert require_error(await worker.work()).node_id == "late"
    assert worker.notebook.statuses == {
        "start": "completed",
        "pay": "completed",
        "ever": "cancelled",
        "late": "failed",
    }


async def test_a_failed_node_is_tried_again_with_the_same_key_and_input() -> None:
    calls: list[tuple[int, str, Json]] = []

    async def try_hard(call: NodeCall) -> Json:
        calls.append((call.attempt, call.idempotency_key, dict(call.config)))
        if call.attempt < 3:
            raise NodeError("not yet", retryable=True)
        return "done"

    config: dict[str, Json] = {"config": {"n": "{{ data }}"}, **FAST_RETRY}
    worker = SimulatedWorker(
        compile_drawing("start > write", {"write": write_world(try_hard)}, {"write": config}), 7
    )
    notebook = await run_to_completion(worker)
    assert calls == [(attempt, "exec_1:write:0", {"n": 7}) for attempt in (1, 2, 3)]
    assert (notebook.spans["write"].attempt, notebook.output("write")) == (3, "done")
    assert [line.message for line in notebook.lines] == [f"Attempt {n} failed: not yet" for n in (1, 2)]


def attempts_of(notebook: InMemoryJournal, node_id: str) -> list[tuple[int, str, str | None]]:
    """Return the number, status and error of each attempt that has a span of its own."""
    return [
        (number, one.status.value, None if one.error is None else one.error.code)
        for (node, _, number), one in sorted(notebook.attempts.items())
        if node == node_id
    ]


async def test_each_attempt_of_a_node_that_is_tried_again_is_a_span() -> None:
    async def try_hard(call: NodeCall) -> Json:
        if call.attempt < 3:
            raise NodeError("not yet", code="away", retryable=True)
        return "done"

    graph = compile_drawing("start > again > echo", {"again": read_world(try_hard)}, {"again": FAST_RETRY})
    notebook = await run_to_completion(SimulatedWorker(graph))
    assert attempts_of(notebook, "again") == [
        (1, "failed", "away"),
        (2, "failed", "away"),
        (3, "completed", None),
    ]
    assert {node_id for node_id, _, _ in notebook.attempts} == {"again"}, "others have one attempt alone"
    first, second, third = (notebook.attempts["again", "", number] for number in (1, 2, 3))
    node = notebook.spans["again"]
    moments = [
        *(node.started_at, first.started_at, first.ended_at, second.started_at, second.ended_at),
        *(third.started_at, third.ended_at, node.ended_at),
    ]
    in_order = [moment for moment in moments if moment is not None]
    assert len(in_order) == len(moments)
    assert in_order == sorted(in_order)
    assert None not in {first.next_attempt_at, second.next_attempt_at}
    assert third.next_attempt_at is None
    assert third.sequence < node.sequence


async def test_rounds_of_attempts_keep_the_number_that_each_had() -> None:
    def fail_for_good(call: NodeCall) -> Json:
        raise NodeError("no", code=f"at-{call.attempt}")

    settings: dict[str, Json] = {"retryOnFailure": True, "maxRetries": 1}
    first = SimulatedWorker(
        compile_drawing("start > step", {"step": pure_node(fail_for_good)}, {"step": FAST_RETRY}, settings)
    )
    assert (await first.work()).status in {RunStatus.WAITING, RunStatus.FAILED}
    kept = attempts_of(first.notebook, "step")
    assert kept[0] == (1, "failed", "at-1")
    assert all(code == f"at-{number}" for number, _, code in kept)


async def test_an_attempt_that_a_lost_worker_has_begun_is_told_by_the_next() -> None:
    async def pay(call: NodeCall) -> Json:
        return call.attempt

    graph = compile_drawing("start > pay", {"pay": write_world(pay)})
    first = SimulatedWorker(graph)
    begun = await run_to_completion(first)
    lost = msgspec.structs.replace(
        begun.spans["pay"], status=SpanStatus.RUNNING, output=None, ended_at=None, port=None
    )
    second = await run_to_completion(SimulatedWorker(graph, recorded=[begun.spans["start"], lost]))
    assert attempts_of(second, "pay") == [(1, "failed", "lost-attempt"), (2, "completed", None)]
    one, two = second.attempts["pay", "", 1], second.attempts["pay", "", 2]
    assert (one.started_at, one.ended_at) == (lost.started_at, None)
    assert one.sequence < two.sequence < second.spans["pay"].sequence
    third = msgspec.structs.replace(lost, attempt=2)
    again = await run_to_completion(SimulatedWorker(graph, recorded=[begun.spans["start"], third]))
    assert attempts_of(again, "pay") == [(2, "failed", "lost-attempt"), (3, "completed", None)]
    assert again.attempts["pay", "", 2].started_at is None, "its start is recorded already"


async def test_attempts_of_a_run_have_spans_up_to_a_limit_over_all_its_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(span_recorder, "MAX_ATTEMPT_SPANS", 5)

    async def try_twice(call: NodeCall) -> Json:
        if call.attempt == 1:
            raise NodeError("not yet", retryable=True)
        return call.data

    names = ["one", "two", "three", "four"]
    graph = compile_drawing(
        "start > one > two > three > four",
        {name: read_world(try_twice) for name in names},
        dict.fromkeys(names, FAST_RETRY),
    )
    notebook = await run_to_completion(SimulatedWorker(graph))
    assert len(notebook.attempts) == 5
    assert sum("further ones get no spans" in line.message for line in notebook.lines) == 1
    recorded = [notebook.spans[name] for name in ("start", "one", "two")]
    assert len((await run_to_completion(SimulatedWorker(graph, recorded=recorded))).attempts) == 5 - 4


async def test_a_node_is_tried_no_more_often_than_it_says() -> None:
    calls: Counter[str] = Counter()

    def count(call: NodeCall) -> Json:
        calls[call.idempotency_key] += 1
        raise NodeError("never", retryable="again" in call.idempotency_key)

    graph = compile_drawing(
        "start > again; start > once; once:error > echo",
        {"again": pure_node(count), "once": pure_node(count)},
        {"again": FAST_RETRY, "once": FAST_RETRY},
    )
    assert require_error(await SimulatedWorker(graph).work()).attempt == 3
    assert calls == {"exec_1:again:0": 3, "exec_1:once:0": 1}


async def test_a_node_that_takes_too_long_is_broken_off_and_tried_again() -> None:
    async def slow_at_first(call: NodeCall) -> Json:
        if call.attempt == 1:
            await wait_forever(call)
        return "in time"

    options: dict[str, Json] = {"timeout": 0.02, **FAST_RETRY}
    notebook = await run_to_completion(
        SimulatedWorker(
            compile_drawing("start > slow", {"slow": read_world(slow_at_first)}, {"slow": options})
        )
    )
    assert notebook.output("slow") == "in time"
    assert "timeout of 0.02 s" in notebook.lines[0].message


async def test_a_timeout_of_a_node_names_itself_as_the_reason() -> None:
    worker = SimulatedWorker(
        compile_drawing("start > ever", {"ever": read_world(wait_forever)}, {"ever": {"timeout": 0.01}})
    )
    assert require_error(await worker.work()).code == "timeout"


async def test_a_node_that_fails_because_of_its_timeout_has_timed_out() -> None:
    async def ask(call: NodeCall) -> Json:
        try:
            return await wait_forever(call)
        except asyncio.CancelledError:
            raise NodeError("interrupted") from None

    drawing = compile_drawing("start > ask", {"ask": read_world(ask)}, {"ask": {"timeout": 0.01}})
    assert require_error(await SimulatedWorker(drawing).work()).code == "timeout"


async def test_a_timeout_inside_a_node_is_not_taken_for_the_node_s_own() -> None:
    async def ask(_call: NodeCall) -> Json:
        raise TimeoutError("the other side said nothing")

    worker = SimulatedWorker(
        compile_drawing("start > ask", {"ask": read_world(ask)}, {"ask": {"timeout": 30}})
    )
    error = require_error(await worker.work())
    assert (error.code, error.message) == ("timeout", "the other side said nothing")


async def test_a_run_that_takes_too_long_fails_and_its_nodes_are_broken_off() -> None:
    graph = compile_drawing(
        "start > ever; start > pay",
        {"ever": read_world(wait_forever), "pay": write_world(wait_forever)},
        settings={"timeout": 9},
    )
    worker = SimulatedWorker(graph, seconds=0.05)
    assert require_error(await worker.work()) == RunError("timeout", "The run exceeded its timeout of 9 s")
    assert worker.notebook.statuses == {"start": "completed", "ever": "cancelled", "pay": "cancelled"}


async def test_a_run_that_is_late_before_it_begins_starts_nothing() -> None:
    worker = SimulatedWorker(compile_drawing("start > echo"), seconds=-1)
    assert require_error(await worker.work()).code == "timeout"
    assert worker.notebook.spans == {}


@pytest.mark.parametrize("kind", [pure_node, read_world, write_world])
async def test_any_exception_of_a_node_is_its_failure(kind: Callable[[RunNode], MadeUpNodeType]) -> None:
    def divide(_call: NodeCall) -> Json:
        return 1 // 0

    async def divide_later(call: NodeCall) -> Json:
        return divide(call)

    worker = SimulatedWorker(
        compile_drawing("start > divide", {"divide": kind(divide if kind is pure_node else divide_later)})
    )
    error = require_error(await worker.work())
    assert error.message == "ZeroDivisionError: integer division or modulo by zero"


async def test_a_node_that_cancels_itself_has_failed() -> None:
    async def give_up(_call: NodeCall) -> Json:
        raise asyncio.CancelledError

    error = require_error(
        await SimulatedWorker(compile_drawing("start > up > echo", {"up": read_world(give_up)})).work()
    )
    assert (error.node_id, error.code) == ("up", "node-error")


@pytest.mark.parametrize("connected", ["fail:error > echo", "fail > echo"])
async def test_a_message_that_could_not_be_stored_is_made_storable(connected: str) -> None:
    def fail_oddly(call: NodeCall) -> Json:
        call.log("info", "NUL \0, half a pair \ud800")
        text = "NUL \0, half a pair \udfff" + "x" * 100_000
        raise NodeError(text, cause=FailureCause("no", text, "inner", url=text, execution_id="exec_2"))

    worker = SimulatedWorker(compile_drawing(f"start > fail; {connected}", {"fail": pure_node(fail_oddly)}))
    await worker.work()
    error = worker.notebook.spans["fail"].error
    assert error is not None
    assert error.cause is not None
    assert error.cause.url == error.cause.message
    for text in (error.message, error.cause.message, worker.notebook.lines[0].message):
        assert text.startswith("NUL \ufffd, half a pair \ufffd")
        assert len(text) <= 8_192


# ── outputs of nodes ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("output", "code"),
    [
        (math.nan, "not-finite"),
        ({"list": [math.inf]}, "not-finite"),
        ("a\0b", "nul-character"),
        ("\ud800", "lone-surrogate"),
        ({1, 2}, "not-json"),
        ({1: "number"}, "not-json"),
        ("x" * 10_000_000, "output-too-large"),
        (["x" * 1_000_000] * 60, "output-too-large"),
    ],
    ids=["NaN", "infinity", "NUL", "surrogate", "a set", "a key that is no text", "10 MB", "60 MB"],
)
async def test_an_output_that_could_not_be_kept_fails_its_node(output: Any, code: str) -> None:  # noqa: ANN401 - any JSON value
    worker = SimulatedWorker(compile_drawing("start > odd > echo", {"odd": pure_node(lambda _call: output)}))
    error = require_error(await worker.work())
    assert (error.code, error.node_id) == ("node-error", "odd")
    span = worker.notebook.spans["odd"]
    assert span.error is not None
    assert span.error.code == code
    assert span.output is None


async def test_an_output_of_ten_megabytes_is_kept() -> None:
    kinds = {"big": pure_node(lambda _call: "x" * 9_999_998)}
    notebook = await run_to_completion(SimulatedWorker(compile_drawing("start > big", kinds)))
    assert len(notebook.spans["big"].output or b"") == 10_000_000


async def test_a_config_that_could_not_be_kept_once_it_is_rendered_fails_its_node() -> None:
    deep: Json = None
    for _ in range(63):
        deep = [deep]
    config: dict[str, Json] = {"config": {"body": {"inner": "{{ data }}"}}}
    worker = SimulatedWorker(
        compile_drawing("start > pay", {"pay": write_world(pause_node)}, {"pay": config}), deep
    )
    assert require_error(await worker.work()).node_id == "pay"
    assert worker.notebook.spans["pay"].error is not None
    assert worker.notebook.spans["pay"].error.code == "too-deep"


UNRESOLVED: dict[str, dict[str, Json]] = {
    "in a config": {"config": {"a": "{{ data.nothing }}"}},
    "in a mapping": {"inputMappings": {"a": "data.nothing"}},
    "in a mapped template": {"inputMappings": {"a": "= {{ data.nothing }}"}},
    "passed through": {"passThroughValues": {"a": "nothing"}},
    "found missing by the node itself": {"config": {"late": "{{ data.nothing }}"}},
}


def finish_late(call: NodeCall) -> Json:
    for template in call.values.values():
        template.render(dict(call.scope), call.unresolved)
    return {"kept": call.data}


@pytest.mark.parametrize("options", UNRESOLVED.values(), ids=UNRESOLVED)
async def test_a_path_that_finds_nothing_is_listed_or_fails_the_node_of_a_strict_graph(
    options: dict[str, Json],
) -> None:
    kinds = {"late": pure_node(finish_late, compiled={"late": FieldCompilation.VALUE})}
    notebook = await run_to_completion(
        SimulatedWorker(compile_drawing("start > late", kinds, {"late": options}), {"some": 1})
    )
    (path,) = notebook.spans["late"].unresolved
    assert path.removeprefix("data.") == "nothing"

    strict = compile_drawing("start > late", kinds, {"late": options}, settings={"strictMappings": True})
    worker = SimulatedWorker(strict, {"some": 1})
    assert require_error(await worker.work()).node_id == "late"
    error = worker.notebook.spans["late"].error
    assert error is not None
    assert error.code == "unresolved-mapping"
    assert "nothing" in error.message


MAY_BE_MISSING: dict[str, tuple[dict[str, Json], tuple[str, ...]]] = {
    "with a fallback in a config": ({"config": {"a": "{{ data.nothing ?? 1 }}"}}, ()),
    "with a fallback in a mapping": ({"inputMappings": {"a": "data.nothing ?? data.some"}}, ()),
    "into a node that was skipped": ({"config": {"a": "{{ nodes.away.x }} {{ nodes.away }}"}}, ()),
    "mapped from a node that was skipped": ({"inputMappings": {"a": "$.nodes.away.x[0]"}}, ()),
    "a field of an item": ({"config": {"late": "{{ item.nothing }}"}}, ("item.nothing",)),
    "in a condition": (
        {"config": {"asked": {"left": "{{ data.nothing }}", "operator": "equals", "right": 1}}},
        ("data.nothing",),
    ),
}


def ask_for_input(call: NodeCall) -> NodeOutcome:
    scope = call.scope_of({"a": 1}, 0)
    for template in call.values.values():
        template.render(scope, call.unresolved)
    for condition in call.conditions.values():
        condition.test(scope, call.unresolved)
    return NodeResult({"kept": call.data})


@pytest.mark.parametrize(("options", "listed"), MAY_BE_MISSING.values(), ids=MAY_BE_MISSING)
async def test_optional_values_are_null_in_a_strict_graph(
    options: dict[str, Json], listed: tuple[str, ...]
) -> None:
    kinds = {
        "asking": pure_node(
            ask_for_input, compiled={"late": FieldCompilation.VALUE, "asked": FieldCompilation.CONDITION}
        ),
        "choose": pure_node(lambda call: NodeResult(call.data, "left")),
        "away": pure_node(lambda call: call.data),
    }
    drawn = compile_drawing(
        "start > choose; choose:right > away; choose:left > asking",
        kinds,
        {"asking": options},
        settings={"strictMappings": True},
    )
    notebook = await run_to_completion(SimulatedWorker(drawn, {"some": 1}))
    assert notebook.spans["away"].status is SpanStatus.SKIPPED
    assert notebook.spans["asking"].unresolved == listed


async def test_values_passed_through_stand_in_the_output_under_their_new_keys() -> None:
    options: dict[str, Json] = {
        "inputMappings": {"id": "trigger.order"},
        "passThroughValues": {"orderId": "id"},
    }
    kinds = {"make": pure_node(lambda _call: {"made": True})}
    notebook = await run_to_completion(
        SimulatedWorker(compile_drawing("start > make", kinds, {"make": options}), {"order": 7})
    )
    assert notebook.output("make") == {"made": True, "orderId": 7}


async def test_a_log_has_a_bounded_number_of_lines_and_says_when_it_is_cut() -> None:
    def chatter(call: NodeCall) -> Json:
        for number in range(10_010):
            call.log("info", str(number))
        return None

    notebook = await run_to_completion(
        SimulatedWorker(compile_drawing("start > chatter", {"chatter": pure_node(chatter)}))
    )
    assert len(notebook.lines) == 10_001
    assert notebook.lines[-1].message.startswith("More than 10,000 log lines")
    sequences = [line.sequence for line in notebook.lines]
    assert sequences == sorted(set(sequences))


# ── waits ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_short_wait_keeps_the_worker() -> None:
    began = datetime.now(UTC)
    notebook = await run_to_completion(
        SimulatedWorker(compile_drawing("start > wait > echo", {"wait": pure_node(wait_of(0.05))}), 7)
    )
    assert datetime.now(UTC) - began >= timedelta(seconds=0.05)
    assert notebook.output("echo") == 7


async def test_a_long_wait_frees_the_worker_when_nothing_else_is_left_to_do() -> None:
    graph = compile_drawing(
        "start > wait1 > echo; start > wait2 > echo; start > look > echo1",
        {"wait": pure_node(wait_of(3600)), "look": read_world(pause_node)},
    )
    worker = SimulatedWorker(graph, 7)
    ended = await worker.work()
    assert ended.status is RunStatus.WAITING
    wakes = [worker.notebook.spans[node_id].wake_at for node_id in ("wait1", "wait2")]
    assert ended.due_at == min(wake for wake in wakes if wake)
    assert worker.notebook.status("echo1") is SpanStatus.COMPLETED
    assert worker.notebook.status("echo") is None


async def test_a_wait_goes_on_where_another_worker_left_it() -> None:
    calls = 0

    def wait(call: NodeCall) -> TimerWait:
        nonlocal calls
        calls += 1
        return TimerWait(call.now + timedelta(hours=1), output=call.data)

    graph = compile_drawing(
        "start > wait > echo", {"wait": pure_node(wait)}, {"wait": {"config": {"note": "{{ data.nothing }}"}}}
    )
    first = SimulatedWorker(graph, {"n": 7})
    due_at = (await first.work()).due_at
    spans = list(first.notebook.spans.values())
    assert await SimulatedWorker(graph, {"n": 7}, recorded=spans).work() == RunOutcome(
        RunStatus.WAITING, due_at=due_at
    )

    notebook = await run_to_completion(
        SimulatedWorker(graph, {"n": 7}, recorded=expire_waits(first.notebook))
    )
    assert calls == 1
    assert notebook.output("echo") == {"n": 7}
    waiting, done = first.notebook.spans["wait"], notebook.spans["wait"]
    assert (done.attempt, done.hashes, done.unresolved) == (1, waiting.hashes, ("data.nothing",))
    assert done.hashes is not None


async def test_a_pause_before_the_next_attempt_frees_the_worker_too() -> None:
    options: dict[str, Json] = {"retry": {"maxAttempts": 2, "backoff": 600, "jitter": 0}}
    graph = compile_drawing("start > fail", {"fail": pure_node(fail_node)}, {"fail": options})
    first = SimulatedWorker(graph)
    assert (await first.work()).status is RunStatus.WAITING
    assert first.notebook.status("fail") is SpanStatus.RETRYING
    assert (
        require_error(await SimulatedWorker(graph, recorded=expire_waits(first.notebook)).work()).attempt == 2
    )


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_after_death_at_any_moment_only_writes_in_flight_are_repeated_with_the_same_key_and_body() -> (
    None
):
    ledger = OutsideWorld()
    attempts: Counter[str] = Counter()

    async def flaky(call: NodeCall) -> Json:
        outcome = await ledger.write(call)
        attempts[call.idempotency_key] += 1
        if attempts[call.idempotency_key] == 1:
            raise NodeError("once more", retryable=True)
        return outcome

    def random(_call: NodeCall) -> Json:
        # A different value on every attempt: a repeated write must get the input of its first attempt.
        return {"value": len(ledger.moments)}

    graph = compile_drawing(
        "start > random > write1 > echo1 > write2; start > look > write3; write2 > flaky; write3 > flaky",
        {
            "random": pure_node(random),
            "look": read_world(pause_node),
            "write": write_world(ledger.write),
            "flaky": write_world(flaky),
        },
        {
            "write1": {"config": {"of": "{{ data.value }}"}},
            "write3": {"inputMappings": {"seen": "nodes.random.value", "n": "data.n"}},
            "flaky": FAST_RETRY,
        },
    )

    async def work(recorded: Sequence[NodeSpan]) -> InMemoryJournal:
        worker = SimulatedWorker(graph, {"n": 1}, recorded=recorded)
        worker.notebook = CrashPointJournal(ledger, recorded)
        return await run_to_completion(worker)

    whole = await work([])
    moments = ledger.moments
    assert len(moments) > 30
    for durable, before in moments:
        ledger.effects, ledger.moments = [], []
        attempts.clear()
        attempts.update(effect.key for effect in before)
        after = await work(durable)
        assert after.statuses == whole.statuses

        states = {f"exec_1:{span.node_id}:0": span.status for span in durable}
        repeated = {effect.key for effect in before} & {effect.key for effect in ledger.effects}
        assert repeated <= {key for key, status in states.items() if status not in SETTLED_STATUSES}
        assert not {effect.key for effect in ledger.effects} & {
            k for k, s in states.items() if s in SETTLED_STATUSES
        }
        assert {effect.key for effect in before + ledger.effects} == {
            f"exec_1:{node_id}:0" for node_id in ("write1", "write2", "write3", "flaky")
        }
        for key in repeated:
            bodies = [effect.body for effect in before + ledger.effects if effect.key == key]
            assert all(body == bodies[0] for body in bodies)


async def test_a_write_that_is_tried_again_elsewhere_gets_the_recorded_input_and_config() -> None:
    calls: list[tuple[int, Json, Json]] = []

    async def pay(call: NodeCall) -> Json:
        calls.append((call.attempt, call.data, dict(call.config)))
        return None

    async def look_up(_call: NodeCall) -> Json:
        await asyncio.sleep(0)
        return {"value": 2}

    options: dict[str, Json] = {
        "inputMappings": {"rate": "nodes.rate.value"},
        "config": {"note": "rate {{ nodes.rate.value }}"},
    }
    # No path leads from `rate` to `pay`, so their order of completion is random.
    graph = compile_drawing(
        "start > rate; start > pay", {"pay": write_world(pay), "rate": read_world(look_up)}, {"pay": options}
    )
    first = SimulatedWorker(graph, {"amount": 1})
    await first.work()
    span = msgspec.structs.replace(
        first.notebook.spans["pay"], status=SpanStatus.RUNNING, output=None, ended_at=None
    )
    rate = first.notebook.spans["rate"]
    later = SimulatedWorker(graph, {"amount": 1}, recorded=[first.notebook.spans["start"], span, rate])
    notebook = await run_to_completion(later)
    assert [attempt for attempt, _, _ in calls] == [1, 2]
    assert calls[0][1:] == calls[1][1:] == ({"amount": 1, "rate": None}, {"note": "rate "})
    assert notebook.spans["pay"].hashes == span.hashes
    assert notebook.spans["pay"].started_at == span.started_at


@pytest.mark.parametrize("note", ["to Ada", "to {{ trigger.name }}"])
async def test_a_config_that_an_older_release_recorded_gets_the_defaults_of_later_fields(note: str) -> None:
    calls: list[Json] = []

    async def pay(call: NodeCall) -> Json:
        calls.append(dict(call.config))
        return None

    graph = compile_drawing(
        "start > pay",
        {"pay": write_world(pay, defaults={"speed": 1, "isNew": False})},
        {"pay": {"config": {"note": note}}},
    )
    first = SimulatedWorker(graph, {"name": "Ada"})
    await first.work()
    recorded = b'{"note":"to Ada","speed":7}'
    span = msgspec.structs.replace(
        first.notebook.spans["pay"],
        status=SpanStatus.RUNNING,
        output=None,
        ended_at=None,
        resolved_config=recorded,
    )
    later = SimulatedWorker(graph, {"name": "Ada"}, recorded=[first.notebook.spans["start"], span])
    notebook = await run_to_completion(later)
    assert calls[1] == {"note": "to Ada", "speed": 7, "isNew": False}
    assert notebook.spans["pay"].resolved_config == recorded


@pytest.mark.parametrize(("raised", "code"), [(NodeError("no"), "node-error"), (TimeoutError(), "timeout")])
async def test_a_failure_that_was_recorded_before_the_worker_died_ends_the_run_in_the_same_way(
    raised: Exception, code: str
) -> None:
    async def fail_so(_call: NodeCall) -> Json:
        raise raised

    graph = compile_drawing("start > fail", {"fail": read_world(fail_so)})
    first = SimulatedWorker(graph)
    ended = await first.work()
    assert require_error(ended).code == code
    assert (require_error(ended).cause is None) == (code == "timeout")
    assert await SimulatedWorker(graph, recorded=list(first.notebook.spans.values())).work() == ended


async def test_a_failure_with_an_exact_reason_ends_the_run_in_the_same_way_after_a_crash() -> None:
    graph = compile_drawing("start > odd", {"odd": pure_node(lambda _call: math.nan)})
    first = SimulatedWorker(graph)
    ended = await first.work()
    cause = require_error(ended).cause
    assert cause is not None
    assert (cause.code, cause.node_id, cause.method) == ("not-finite", "odd", None)
    assert (
        await SimulatedWorker(graph, recorded=restore_errors(first.notebook.spans.values())).work() == ended
    )


async def test_a_failed_request_is_the_cause_of_a_failed_run_also_after_a_crash() -> None:
    async def refuse(_call: NodeCall) -> Json:
        raise NodeError("No", code="http-404", request=HttpRequestName("GET", "http://a.example/?q=…"))

    graph = compile_drawing("start > call", {"call": read_world(refuse)})
    first = SimulatedWorker(graph)
    ended = await first.work()
    cause = FailureCause("http-404", "No", "call", "GET", "http://a.example/?q=…")
    assert require_error(ended) == RunError("node-error", "No", "call", 1, cause)
    assert (
        await SimulatedWorker(graph, recorded=restore_errors(first.notebook.spans.values())).work() == ended
    )


def restore_errors(spans: Iterable[NodeSpan]) -> list[NodeSpan]:
    """Return spans with their errors as read back from rows."""
    return [
        msgspec.structs.replace(span, error=run_rows.decode_error(encode_error(span.error))) for span in spans
    ]


async def test_sequence_numbers_go_on_where_they_were() -> None:
    graph = compile_drawing("start > echo1 > wait > echo2", {"wait": pure_node(wait_of(3600))})
    first = SimulatedWorker(graph)
    await first.work()
    spans = expire_waits(first.notebook)
    notebook = await run_to_completion(SimulatedWorker(graph, recorded=spans))
    highest = max(span.sequence for span in spans)
    assert notebook.spans["wait"].sequence > highest
    assert notebook.spans["echo1"].sequence < highest


# ── merges ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("combine", "merged"),
    [
        ({}, {"one": {"a": 1, "both": 1}, "two": {"b": 2, "both": 2}}),
        ({"combine": "merged"}, {"a": 1, "b": 2, "both": 2}),
        ({"combine": "list"}, [{"a": 1, "both": 1}, {"b": 2, "both": 2}]),
    ],
    ids=["by node", "merged", "as a list"],
)
async def test_a_merge_combines_inputs_that_were_not_skipped(combine: dict[str, Json], merged: Json) -> None:
    graph = compile_drawing(
        "start > one > merge; start > slow > two > merge; start > choose; choose:left > echo > merge",
        {
            "one": pure_node(lambda _: {"a": 1, "both": 1}),
            "two": pure_node(lambda _: {"b": 2, "both": 2}),
            "slow": read_world(pause_node),
            "choose": pure_node(lambda call: NodeResult(call.data, port="right")),
            "merge": pure_node(echo_data, joins=True),
        },
        {"merge": {"config": combine}},
    )
    notebook = await run_to_completion(SimulatedWorker(graph))
    assert notebook.output("merge") == merged
    assert notebook.status("echo") is SpanStatus.SKIPPED


async def test_only_objects_can_be_merged() -> None:
    graph = compile_drawing(
        "start > list > merge",
        {"list": pure_node(lambda _: [1]), "merge": pure_node(echo_data, joins=True)},
        {"merge": {"config": {"combine": "merged"}}},
    )
    error = require_error(await SimulatedWorker(graph).work())
    assert (error.node_id, error.message) == (
        "merge",
        "Only objects can be merged, and node list gave list: combine by-node or list",
    )


async def test_a_merge_of_any_goes_on_with_the_first_and_the_others_run_on_and_change_nothing() -> None:
    may_end, follows = asyncio.Event(), Counter[str]()

    async def hold(call: NodeCall) -> Json:
        await wait_soon(may_end)
        return call.data

    def follow(call: NodeCall) -> Json:
        follows[str(call.data)] += 1
        may_end.set()
        return None

    graph = compile_drawing(
        "start > held > merge > follow; start > fast > merge; start > choose; choose:left > merge",
        {
            "held": read_world(hold),
            "fast": pure_node(lambda _: "fast"),
            "choose": pure_node(lambda call: NodeResult(call.data, port="right")),
            "merge": pure_node(echo_data, joins=True),
            "follow": pure_node(follow),
        },
        {"merge": {"config": {"mode": "any"}}},
    )
    notebook = await run_to_completion(SimulatedWorker(graph))
    assert follows == {"fast": 1}
    assert notebook.spans["merge"].input_node == "fast"
    assert set(notebook.statuses.values()) == {"completed"}


async def test_a_merge_of_any_is_skipped_when_no_branch_arrives() -> None:
    graph = compile_drawing(
        "start > choose; choose:left > merge; choose:other > merge > echo",
        {
            "choose": pure_node(lambda call: NodeResult(call.data, port="right")),
            "merge": pure_node(echo_data, joins=True),
        },
        {"merge": {"config": {"mode": "any"}}},
    )
    notebook = await run_to_completion(SimulatedWorker(graph))
    assert (notebook.statuses["merge"], notebook.statuses["echo"]) == ("skipped", "skipped")


async def test_a_merge_of_any_is_reached_by_the_branch_that_was_first_in_an_earlier_attempt_too() -> None:
    has_arrived = asyncio.Event()

    async def arrive(call: NodeCall) -> Json:
        if call.config:
            await wait_soon(has_arrived)
        has_arrived.set()
        return None

    options: dict[str, dict[str, Json]] = {
        "read1": {"config": {"is_late": True}},
        "merge": {"config": {"mode": "any"}},
    }
    kinds = {"read": read_world(arrive), "merge": pure_node(echo_data, joins=True)}
    graph = compile_drawing("start > read1 > merge; start > read2 > merge", kinds, options)
    whole = await run_to_completion(SimulatedWorker(graph))
    assert whole.spans["merge"].input_node == "read2"
    before = [span for span in whole.spans.values() if span.node_id != "merge"]
    again = await run_to_completion(SimulatedWorker(graph, recorded=before))
    assert again.spans["merge"].input_node == "read2"


@st.composite
def draw_race(draw: st.DrawFn) -> tuple[WorkflowProgram, Counter[str]]:
    """Draw a graph with branches of different lengths that meet in merges of both modes, and a counter of its
    calls.
    """
    calls: Counter[str] = Counter()

    async def step(call: NodeCall) -> NodeOutcome:
        node_id = call.idempotency_key.split(":")[1]
        calls[node_id] += 1
        for _ in range(cast("int", call.config["turns"])):
            await asyncio.sleep(0)
        return NodeResult(node_id, port=str(call.config["port"]))

    ids = ["start"]
    paths: list[str] = []
    options: dict[str, Mapping[str, Json]] = {}
    for number in range(draw(st.integers(4, 8))):
        is_branch = number < 3
        kind = draw(
            st.sampled_from(["read", "write"] if is_branch else ["any", "any", "all", "read", "write"])
        )
        fewest = 1 if is_branch or kind in {"read", "write"} else 2
        node_id = f"{kind}{9 - number}"
        sources = draw(
            st.lists(
                st.sampled_from(ids[:1] if is_branch else ids[1:]), min_size=fewest, max_size=3, unique=True
            )
        )
        ports = [draw(st.sampled_from(["output", "output", "other"])) for _ in sources]
        paths += [
            f"{source}:{port} > {node_id}"
            for source, port in zip(sources, ports, strict=True)
            if port == "output" or source[:4] in {"read", "writ"}
        ] or [f"start > {node_id}"]
        turns, port = draw(st.integers(0, 4)), draw(st.sampled_from(["output", "output", "other"]))
        mode = {"mode": "any"} if kind == "any" else {}
        options[node_id] = {"config": {"turns": turns, "port": port, **mode}}
        ids.append(node_id)
    kinds = {
        "read": read_world(step),
        "write": write_world(step),
        "any": pure_node(echo_data, joins=True),
        "all": pure_node(echo_data, joins=True),
    }
    return compile_drawing("; ".join(paths), kinds, options), calls


@given(draw_race())
def test_a_run_with_merges_has_the_same_result_from_any_recorded_state(
    race: tuple[WorkflowProgram, Counter[str]],
) -> None:
    graph, calls = race
    edges = graph.graph.inbound

    def work(recorded: Sequence[NodeSpan]) -> SpanHistory:
        worker = SimulatedWorker(graph, recorded=recorded)
        worker.notebook = stream = SpanHistory(recorded)
        assert asyncio.run(worker.work()) == RunOutcome(RunStatus.COMPLETED)
        return stream

    whole = work([])
    for length in range(len(whole.stream)):
        durable = {span.node_id: span for span in whole.stream[:length]}
        settled = {node_id: span.port for node_id, span in durable.items() if span.status in SETTLED_STATUSES}
        calls.clear()
        after = work(list(durable.values()))
        assert after.statuses == whole.statuses
        assert not calls.keys() & settled.keys()
        assert set(calls.values()) <= {1}
        # If no branch had arrived yet, another may be first the next time.
        open_races = {
            node_id
            for node_id in graph.root.eager
            if not any(settled.get(edge.source) == edge.source_port for edge in edges[node_id])
        }
        for node_id in graph.nodes:
            if not _is_behind(node_id, open_races, graph):
                assert after.spans[node_id].output == whole.spans[node_id].output


def _is_behind(node_id: str, others: set[str], graph: WorkflowProgram) -> bool:
    sources = {edge.source for edge in graph.graph.inbound[node_id]}
    return node_id in others or any(_is_behind(source, others, graph) for source in sources)


# ── requests to a run ───────────────────────────────────────────────────────────────────────────────────────


@dataclass
class HeldGraph:
    """Graph with one node in flight, an unstarted branch behind it, and a wait."""

    kind: Callable[[RunNode], MadeUpNodeType] = write_world
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: int = 0

    async def node(self, _call: NodeCall) -> Json:
        self.begun.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return "done"

    def worker(self) -> SimulatedWorker:
        return SimulatedWorker(compile_drawing("start > held > echo", {"held": self.kind(self.node)}))


@pytest.mark.parametrize(
    ("request_", "status", "held_span"),
    [
        (ControlRequest.HAND_OFF, RunStatus.RELEASED, "completed"),
        (ControlRequest.STOP, RunStatus.STOPPED, "completed"),
        (ControlRequest.HAND_OFF_NOW, RunStatus.RELEASED, "running"),
        (ControlRequest.CANCEL, RunStatus.CANCELLED, "cancelled"),
    ],
)
@pytest.mark.parametrize("kind", [read_world, write_world])
async def test_a_request_ends_a_run_as_it_says(
    request_: ControlRequest, status: RunStatus, held_span: str, kind: Callable[[RunNode], MadeUpNodeType]
) -> None:
    held = HeldGraph(kind)
    worker = held.worker()
    work = worker.begin()
    await wait_soon(held.begun)
    worker.control.ask(request_)
    if request_ in {ControlRequest.HAND_OFF, ControlRequest.STOP}:
        await asyncio.sleep(0)
        assert not work.done()
        held.go_on.set()
    assert await asyncio.wait_for(work, PATIENCE_SECONDS) == RunOutcome(status)
    assert worker.notebook.status("echo") is None
    expected = None if held_span == "running" and kind is read_world else held_span
    assert worker.notebook.statuses.get("held") == expected
    assert held.cancelled == (held_span in {"running", "cancelled"})


async def test_a_run_with_a_lost_lease_is_abandoned_and_writes_nothing() -> None:
    held = HeldGraph()
    worker = held.worker()
    work = worker.begin()
    await wait_soon(held.begun)
    before = dict(worker.notebook.statuses)
    worker.control.ask(ControlRequest.ABANDON)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(work, PATIENCE_SECONDS)
    assert held.cancelled == 1
    assert worker.notebook.statuses == before


async def test_a_run_looks_at_its_lease_by_the_clock_while_a_node_is_in_flight() -> None:
    held = HeldGraph()
    worker = held.worker()
    work = worker.begin()
    await wait_soon(held.begun)
    worker.notebook.is_held = False
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(work, PATIENCE_SECONDS)


async def test_a_stronger_request_replaces_a_weaker_one_and_never_the_other_way_round() -> None:
    control = RunControl()
    asked: list[ControlRequest | None] = []
    for request in (
        ControlRequest.STOP,
        ControlRequest.HAND_OFF,
        ControlRequest.CANCEL,
        ControlRequest.HAND_OFF_NOW,
        ControlRequest.ABANDON,
    ):
        control.ask(request)
        asked.append(control.request)
    assert asked == [
        ControlRequest.STOP,
        ControlRequest.STOP,
        ControlRequest.CANCEL,
        ControlRequest.CANCEL,
        ControlRequest.ABANDON,
    ]


@pytest.mark.parametrize("request_", [ControlRequest.STOP, ControlRequest.HAND_OFF])
async def test_a_wait_in_progress_does_not_hold_up_a_request(
    request_: ControlRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.workflow_runner.SHORT_WAIT_SECONDS", 3_600)
    worker = SimulatedWorker(compile_drawing("start > wait > echo", {"wait": pure_node(wait_of(3_000))}))
    work = worker.begin()
    await asyncio.sleep(0)
    worker.control.ask(request_)
    ended = await asyncio.wait_for(work, PATIENCE_SECONDS)
    assert ended.status is (RunStatus.STOPPED if request_ is ControlRequest.STOP else RunStatus.RELEASED)


@pytest.mark.parametrize(
    ("request_", "span"),
    [
        (ControlRequest.STOP, "cancelled"),
        (ControlRequest.CANCEL, "cancelled"),
        (ControlRequest.HAND_OFF, "running"),
        (ControlRequest.HAND_OFF_NOW, "running"),
    ],
)
async def test_a_write_is_not_begun_when_something_was_asked_during_the_commit_before_it(
    request_: ControlRequest, span: str
) -> None:
    held = HeldGraph()
    worker = held.worker()
    worker.notebook.may_commit.clear()
    work = worker.begin()
    await wait_soon(worker.notebook.is_committing)
    worker.control.ask(request_)
    worker.notebook.may_commit.set()
    await asyncio.wait_for(work, PATIENCE_SECONDS)
    assert not held.begun.is_set()
    assert worker.notebook.statuses["held"] == span


async def test_a_write_is_not_begun_when_the_lease_ran_out_during_the_commit_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_run, "SLICE_SECONDS", 0)
    held = HeldGraph()
    worker = held.worker()
    work = worker.begin()

    async def commit_at_the_last_moment() -> None:
        worker.notebook.is_held = False

    worker.notebook.commit = commit_at_the_last_moment  # type: ignore[method-assign]
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(work, PATIENCE_SECONDS)
    assert not held.begun.is_set()


async def test_a_write_is_not_begun_when_another_branch_failed_during_the_commit_before_it() -> None:
    is_paid = asyncio.Event()
    may_fail = asyncio.Event()

    async def fail_late(call: NodeCall) -> Json:
        await wait_soon(may_fail)
        return fail_node(call)

    async def pay(_call: NodeCall) -> Json:
        is_paid.set()
        return None

    graph = compile_drawing(
        "start > late; start > pay", {"late": read_world(fail_late), "pay": write_world(pay)}
    )
    worker = SimulatedWorker(graph)
    worker.notebook.may_commit.clear()
    work = worker.begin()
    await wait_soon(worker.notebook.is_committing)
    may_fail.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    worker.notebook.may_commit.set()
    assert require_error(await asyncio.wait_for(work, PATIENCE_SECONDS)).node_id == "late"
    assert not is_paid.is_set()
    assert worker.notebook.statuses["pay"] == "cancelled"


async def test_a_node_that_ends_well_while_it_is_broken_off_has_ended_well() -> None:
    begun = asyncio.Event()

    async def pay(_call: NodeCall) -> Json:
        begun.set()
        try:
            await wait_forever(_call)
        except asyncio.CancelledError:
            return "paid at the last moment"
        return None

    worker = SimulatedWorker(compile_drawing("start > pay > echo", {"pay": write_world(pay)}))
    work = worker.begin()
    await wait_soon(begun)
    worker.control.ask(ControlRequest.CANCEL)
    assert await asyncio.wait_for(work, PATIENCE_SECONDS) == RunOutcome(RunStatus.CANCELLED)
    assert worker.notebook.output("pay") == "paid at the last moment"
    assert worker.notebook.statuses == {"start": "completed", "pay": "completed"}


@pytest.mark.parametrize("drawing", ["start > stubborn", "start > loop; loop:continue > stubborn"])
async def test_a_node_that_ignores_its_cancellation_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, drawing: str
) -> None:
    monkeypatch.setattr(engine_run, "CANCEL_SECONDS", 0.05)
    begun, end = asyncio.Event(), asyncio.Event()
    ignored: list[asyncio.Task[Any] | None] = []

    async def ignore(_call: NodeCall) -> Json:
        begun.set()
        ignored.append(asyncio.current_task())
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                continue
        return None

    loop = pure_node(lambda _call: LoopRequest([1]), loops=True)
    worker = SimulatedWorker(compile_drawing(drawing, {"loop": loop, "stubborn": read_world(ignore)}))
    work = worker.begin()
    await wait_soon(begun)
    worker.control.ask(ControlRequest.CANCEL)
    assert await asyncio.wait_for(work, PATIENCE_SECONDS) == RunOutcome(RunStatus.CANCELLED)
    spans = [span for span in worker.notebook.rows.values() if span.node_id == "stubborn"]
    end.set()
    assert [span.status for span in spans] == [SpanStatus.CANCELLED]
    (task,) = ignored
    assert task is not None
    await task


# ── size ──────────────────────────────────────────────────────────────────────────────────────────────────


def draw_chain(length: int) -> str:
    return "start > " + " > ".join(f"echo{number}" for number in range(length))


def draw_diamonds(depth: int) -> str:
    """Two parallel nodes a level, both of which lead to both of the next level."""
    first = "start > const0; start > const1; "
    levels = (
        f"const{2 * level + left} > const{2 * level + 2 + right}"
        for level in range(depth - 1)
        for left in (0, 1)
        for right in (0, 1)
    )
    return first + "; ".join(levels)


CONST = {"const": pure_node(lambda _call: 1)}


@contextmanager
def count_calls() -> Iterator[Counter[str]]:
    """Count the calls of Python functions: work by the same measure on any machine."""
    calls: Counter[str] = Counter()

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        calls[event] += 1

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("drawn", [draw_chain, draw_diamonds])
async def test_work_grows_with_the_size_of_the_graph_and_no_faster(drawn: Callable[[int], str]) -> None:
    async def cost(size: int) -> int:
        graph = compile_drawing(drawn(size), CONST)
        with count_calls() as calls:
            await run_to_completion(SimulatedWorker(graph))
        return calls.total()

    assert await cost(800) < 2.2 * await cost(400)


async def test_ten_thousand_nodes_neither_recurse_nor_explode() -> None:
    drawing = draw_diamonds(5_000)
    notebook = await run_to_completion(SimulatedWorker(compile_drawing(drawing, CONST)))
    assert Counter(notebook.statuses.values()) == {"completed": 10_001}
    again = await run_to_completion(
        SimulatedWorker(compile_drawing(drawing, CONST), recorded=list(notebook.spans.values()))
    )
    assert again.commits == 0


async def test_ten_thousand_skipped_nodes_neither_recurse_nor_explode() -> None:
    notebook = await run_to_completion(
        SimulatedWorker(compile_drawing(f"start > echo; {draw_chain(10_000).removeprefix('start > ')}"))
    )
    assert Counter(notebook.statuses.values()) == {"completed": 2, "skipped": 10_000}


# ── hashes ────────────────────────────────────────────────────────────────────────────────────────────────


async def key_of(
    *,
    trigger: Json = 1,
    version: str = "1.0.0",
    code: bytes = b"code",
    config: Json = None,
    mappings: Json = None,
    edge: str = "start > node",
    kind: Callable[..., MadeUpNodeType] = pure_node,
) -> NodeKey:
    """Run a node, and return its key."""
    run = pause_node if kind is write_world else echo_data
    kinds = {"node": with_changes(kind(run), version=version, code=code)}
    options: dict[str, Json] = {"config": config or {"a": 1}, "inputMappings": mappings or {}}
    notebook = await run_to_completion(
        SimulatedWorker(compile_drawing(edge, kinds, {"node": options}), trigger)
    )
    key = decode_key(notebook.spans["node"].hashes)
    assert key is not None
    return key


@pytest.mark.parametrize("kind", [pure_node, write_world])
@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({}, set()),
        ({"version": "2.0.0"}, {"type"}),
        ({"config": {"a": 2}}, {"config"}),
        ({"mappings": {"m": "trigger"}}, {"mappings", "input"}),
        ({"trigger": 2}, {"input"}),
        ({"code": b"other"}, {"implementation"}),
        ({"edge": "start > node; start > node"}, {"ports"}),
    ],
    ids=["nothing", "version", "config", "mappings", "input", "implementation", "ports"],
)
async def test_a_change_shows_in_its_part_of_the_key(
    kind: Callable[..., MadeUpNodeType], change: dict[str, Any], changed: set[str]
) -> None:
    before, after = await key_of(kind=kind), await key_of(kind=kind, **change)
    # The input of a write includes its rendered config: the two can't change apart.
    expected = changed | ({"input"} if kind is write_world and "config" in changed else set())
    assert {part for part in NodeKey._fields if getattr(before, part) != getattr(after, part)} == expected


async def test_a_hash_does_not_depend_on_the_order_of_keys_or_on_where_it_is_taken() -> None:
    one = await key_of(config={"a": 1, "b": {"c": 2, "d": 3}})
    assert one == await key_of(config={"b": {"d": 3, "c": 2}, "a": 1})
    assert one.config == sha256(b'{"a":1,"b":{"c":2,"d":3}}').digest()
