"""Loops: a turn for each item, however often the worker dies."""

from __future__ import annotations

import asyncio
import gc
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.frames import SectionFrame
from engine.node_api import (
    AnswerSource,
    AnswerWait,
    LoopRequest,
    NodeCall,
    NodeOutcome,
    NodeResult,
    TimerWait,
)
from engine.program import WorkflowProgram
from engine.run_errors import FailureCause, NodeError
from engine.run_limits import RunLimits
from engine.run_records import SETTLED_STATUSES, NodeSpan, RunError, RunOutcome, RunStatus, SpanStatus
from engine.services import ControlRequest
from engine.values import Json, encode_json
from tests.unit.run_harness import (
    FAST_RETRY,
    CrashPointJournal,
    InMemoryJournal,
    MadeUpNodeType,
    OutsideCall,
    OutsideWorld,
    SimulatedWorker,
    SpanHistory,
    echo_data,
    expire_waits,
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
from tests.unit.run_harness import compile_drawing as drawn


def loop_over_items(call: NodeCall) -> LoopRequest:
    items = cast("list[Json]", call.config.get("items", call.data))
    return LoopRequest(
        items,
        concurrency=cast("int", call.config.get("concurrency", 1)),
        continues_on_error=call.config.get("onItemError") == "continue",
    )


def fail_odd(call: NodeCall) -> Json:
    if cast("int", call.scope["item"]) % 2:
        raise NodeError(f"{call.scope['item']} is odd")
    return call.data


def double_data(call: NodeCall) -> Json:
    return 2 * cast("int", call.data)


def compile_loop(
    drawing: str,
    kinds: Mapping[str, MadeUpNodeType] | None = None,
    settings: Mapping[str, Json] | None = None,
    *,
    nodes: Mapping[str, Mapping[str, Json]] | None = None,
    **loop: Json,
) -> WorkflowProgram:
    """Compile a graph with a node `loop`, configured by `loop`."""
    known = {
        "loop": pure_node(loop_over_items, loops=True),
        "double": pure_node(double_data),
        "odd": pure_node(fail_odd),
        **(kinds or {}),
    }
    return drawn(drawing, known, {"loop": {"config": loop}, **(nodes or {})}, settings)


SIMPLE = "start > loop; loop:continue > double > pause; loop:done > end"
STEPS = {"pause": read_world(pause_node), "end": pure_node(echo_data)}


def loop_results(notebook: InMemoryJournal, node_id: str = "loop") -> Json:
    return cast("dict[str, Json]", notebook.output(node_id))["results"]


# ── turns and results ─────────────────────────────────────────────────────────────────────────────────────


async def test_each_item_has_a_turn_and_the_results_leave_together() -> None:
    notebook = await run_to_completion(SimulatedWorker(compile_loop(SIMPLE, STEPS), [3, 1, 2]))
    assert notebook.output("end") == {"results": [6, 2, 4], "count": 3, "errors": []}
    turns = [notebook.rows["loop", str(index)] for index in range(3)]
    assert [(turn.status, notebook.output("loop", turn.iteration)) for turn in turns] == [
        (SpanStatus.COMPLETED, 6),
        (SpanStatus.COMPLETED, 2),
        (SpanStatus.COMPLETED, 4),
    ]
    assert all(turn.is_iteration for turn in turns)
    assert not notebook.spans["loop"].is_iteration
    assert notebook.output("double", "1") == 2
    assert notebook.rows["double", "1"].input == b"1"
    assert notebook.rows["pause", "1"].input_node == "double"
    assert ("double", "") not in notebook.rows


async def test_turns_follow_one_another_unless_more_are_allowed_at_once() -> None:
    begun: list[Json] = []
    now = most = 0

    async def count(call: NodeCall) -> Json:
        nonlocal now, most
        begun.append(call.data)
        now += 1
        most = max(most, now)
        # Later items finish first.
        for _ in range(20 - 2 * cast("int", call.data)):
            await asyncio.sleep(0)
        now -= 1
        return call.data

    items = list(range(8))
    for concurrency in (1, 3, 100):
        begun.clear()
        now = most = 0
        graph = compile_loop(
            "start > loop; loop:continue > count", {"count": read_world(count)}, concurrency=concurrency
        )
        notebook = await run_to_completion(SimulatedWorker(graph, cast("Json", items)))
        assert loop_results(notebook) == begun == items
        assert most == min(concurrency, 8)


async def test_a_turn_sees_its_item_its_own_nodes_and_all_that_was_before_the_loop() -> None:
    wanted = {
        "item": "{{ item.n }}",
        "index": "{{ index }}",
        "data": "{{ data }}",
        "own": "{{ nodes.echo2 }}",
        "before": "{{ nodes.echo1.rows[1].n }}",
        "loop": "{{ nodes.loop.item.n }}",
        "trigger": "{{ trigger.rows[0].n }}",
        "execution": "{{ execution.id }}",
    }
    graph = compile_loop(
        "start > echo1 > loop; loop:continue > echo2 > show; loop:done > after",
        {
            "show": pure_node(lambda call: dict(call.config)),
            "after": pure_node(lambda call: dict(call.config)),
        },
        nodes={
            "show": {"config": cast("Json", wanted)},
            "after": {"config": {"item": "{{ item }}", "inside": "{{ nodes.echo2 }}"}},
        },
        items="{{ data.rows }}",
    )
    notebook = await run_to_completion(SimulatedWorker(graph, {"rows": [{"n": 1}, {"n": 2}]}))
    assert notebook.output("show", "1") == {
        "item": 2,
        "index": 1,
        "data": {"n": 2},
        "own": {"n": 2},
        "before": 2,
        "loop": 2,
        "trigger": 1,
        "execution": "exec_2",
    }
    assert notebook.output("after") == {"item": None, "inside": None}
    assert notebook.spans["after"].unresolved == ("item", "nodes.echo2")


async def test_of_several_last_nodes_those_that_were_reached_are_the_result() -> None:
    graph = compile_loop(
        "start > loop; loop:continue > route; route:both > echo1; route:both > echo2; route:one > echo1",
        {"route": pure_node(lambda call: NodeResult(call.data, port=str(call.data)))},
    )
    notebook = await run_to_completion(SimulatedWorker(graph, ["both", "one", "none"]))
    assert loop_results(notebook) == [{"echo1": "both", "echo2": "both"}, "one", None]
    assert notebook.status("echo2", "1") is SpanStatus.SKIPPED


async def test_branches_of_a_turn_meet_as_they_do_outside_of_loops() -> None:
    graph = compile_loop(
        "start > loop; loop:continue > merge; loop:continue > slow > merge; loop:continue > slow2 > any;"
        "loop:continue > double > any; any > merge",
        {
            "slow": read_world(pause_node),
            "merge": pure_node(echo_data, joins=True),
            "any": pure_node(echo_data, joins=True),
        },
        nodes={"any": {"config": {"mode": "any"}}},
        concurrency=2,
    )
    notebook = await run_to_completion(SimulatedWorker(graph, [1, 2]))
    assert loop_results(notebook) == [{"loop": n, "slow": n, "any": 2 * n} for n in (1, 2)]


@pytest.mark.parametrize("items", [[], [1, 2]])
async def test_a_loop_without_a_body_or_without_items_is_through_at_once(items: list[Json]) -> None:
    notebook = await run_to_completion(
        SimulatedWorker(compile_loop("start > loop; loop:done > end", STEPS), items)
    )
    assert notebook.output("end") == {"results": [None] * len(items), "count": len(items), "errors": []}
    assert set(notebook.rows) == {("start", ""), ("loop", ""), ("end", "")}


@pytest.mark.parametrize("is_empty", [True, False], ids=["empty", "skipped"])
async def test_the_body_of_a_loop_without_turns_is_skipped_once(is_empty: bool) -> None:  # noqa: FBT001 - a parameter
    graph = compile_loop(
        "start > route; route:loop > loop; loop:continue > echo1 > loop1; loop1:continue > echo2;"
        "loop1:done > echo3; loop:done > end",
        {
            **STEPS,
            "route": pure_node(lambda call: NodeResult(call.data, port="loop" if is_empty else "none")),
        },
    )
    notebook = await run_to_completion(SimulatedWorker(graph, []))
    skipped = {key for key, span in notebook.rows.items() if span.status is SpanStatus.SKIPPED}
    body = {("echo1", ""), ("loop1", ""), ("echo2", ""), ("echo3", "")}
    assert skipped == body | (set() if is_empty else {("loop", ""), ("end", "")})
    again = await run_to_completion(SimulatedWorker(graph, [], recorded=list(notebook.rows.values())))
    assert again.commits == 0


async def test_loops_stand_in_one_another() -> None:
    keys: list[str] = []

    async def pay(call: NodeCall) -> Json:
        await asyncio.sleep(0)
        keys.append(call.idempotency_key)
        return {"row": call.scope["index"], "of": cast("Mapping[str, Json]", call.scope["nodes"])["loop"]}

    graph = compile_loop(
        "start > loop; loop:continue > loop1; loop1:continue > pay; loop1:done > take; loop:done > end",
        {**STEPS, "pay": write_world(pay), "take": pure_node(lambda call: results_in(call.data))},
        concurrency=2,
    )
    notebook = await run_to_completion(SimulatedWorker(graph, [["a", "b"], [], ["c"]]))
    assert cast("Mapping[str, Json]", notebook.output("end"))["results"] == [
        [
            {"row": 0, "of": {"item": ["a", "b"], "index": 0}},
            {"row": 1, "of": {"item": ["a", "b"], "index": 0}},
        ],
        [],
        [{"row": 0, "of": {"item": ["c"], "index": 2}}],
    ]
    assert sorted(keys) == ["exec_1:pay:0.0", "exec_1:pay:0.1", "exec_1:pay:2.0"]
    assert notebook.status("loop1", "2.0") is SpanStatus.COMPLETED
    assert notebook.status("pay", "1") is SpanStatus.SKIPPED


def results_in(output: Json) -> Json:
    return cast("dict[str, Json]", output)["results"]


async def test_the_outcome_of_a_write_in_a_loop_is_committed_before_the_next_iteration() -> None:
    seen: list[int] = []

    async def pay(call: NodeCall) -> Json:
        await asyncio.sleep(0)
        paid = [span for (node_id, _), span in worker.notebook.rows.items() if node_id == "pay"]
        seen.append(sum(span.status is SpanStatus.COMPLETED for span in paid))
        return call.data

    worker = SimulatedWorker(
        compile_loop("start > loop; loop:continue > pay", {"pay": write_world(pay)}), [1, 2, 3]
    )
    await run_to_completion(worker)
    assert seen == [0, 1, 2]


# ── failures ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_turn_that_fails_may_be_listed_with_its_error() -> None:
    graph = compile_loop(
        "start > loop; loop:continue > odd > echo; loop:done > end", STEPS, onItemError="continue"
    )
    notebook = await run_to_completion(SimulatedWorker(graph, [2, 3, 4, 5]))
    reasons = [RunError("node-error", f"{n} is odd", "odd", 1) for n in (3, 5)]
    assert notebook.output("end") == {
        "results": [2, None, 4, None],
        "count": 4,
        "errors": [
            {"index": index, "error": reason.as_json()} for index, reason in zip((1, 3), reasons, strict=True)
        ],
    }
    turn = notebook.rows["loop", "3"]
    assert (turn.status, turn.error, turn.output) == (SpanStatus.FAILED, reasons[1], None)


async def test_a_turn_that_fails_fails_its_loop_and_the_run() -> None:
    graph = compile_loop("start > loop; loop:continue > odd > echo; loop:done > end", STEPS)
    worker = SimulatedWorker(graph, [2, 3, 4])
    ended = await worker.work()
    reason = RunError("node-error", "3 is odd", "odd", 1)
    cause = FailureCause("node-error", "3 is odd", "odd")
    assert ended == RunOutcome(RunStatus.FAILED, error=RunError("node-error", "3 is odd", "odd", 1, cause))
    assert worker.notebook.spans["loop"].error == reason
    assert ("odd", "2") not in worker.notebook.rows
    assert (
        await SimulatedWorker(graph, [2, 3, 4], recorded=list(worker.notebook.rows.values())).work() == ended
    )


async def test_the_failure_of_a_loop_leaves_by_its_error_port() -> None:
    graph = compile_loop("start > loop; loop:continue > odd; loop:done > end; loop:error > echo", STEPS)
    notebook = await run_to_completion(SimulatedWorker(graph, [1]))
    reason = RunError("node-error", "1 is odd", "odd", 1)
    assert notebook.output("echo") == {"error": reason.as_json(), "data": [1]}
    assert notebook.status("end") is SpanStatus.SKIPPED


@pytest.mark.parametrize("inner", [False, True], ids=["in the loop itself", "in a loop in it"])
async def test_when_a_loop_fails_its_writes_end_and_its_other_turns_are_broken_off(inner: bool) -> None:  # noqa: FBT001 - a parameter
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def fail_late(call: NodeCall) -> Json:
        if call.data != "fails":
            return call.data
        await wait_soon(begun)
        asyncio.get_running_loop().call_later(0.01, may_end.set)
        raise NodeError("no")

    async def pay(_call: NodeCall) -> Json:
        begun.set()
        await wait_soon(may_end)
        return "paid"

    route: dict[str, MadeUpNodeType] = {
        "route": pure_node(lambda call: NodeResult(call.data, port=str(call.data))),
        "late": read_world(fail_late),
        "pay": write_world(pay),
        "look": read_world(wait_forever),
        "wait": pure_node(wait_of(3600)),
    }
    body = "route; route:pays > pay > echo1; route:looks > look; route:waits > wait; route:fails > late"
    outer = "loop1; loop1:continue > " if inner else ""
    graph = compile_loop(
        f"start > loop; loop:continue > {outer}{body}; loop:error > echo2",
        route,
        nodes={"loop1": {"config": {"items": ["{{ data }}"]}}},
        concurrency=4,
    )
    worker = SimulatedWorker(graph, ["pays", "looks", "waits", "fails", "too late"])
    notebook = await run_to_completion(worker)
    assert notebook.status("echo2") is SpanStatus.COMPLETED
    suffix = ".0" if inner else ""
    assert [
        notebook.status(node_id, f"{turn}{suffix}")
        for turn, node_id in enumerate(("pay", "look", "wait", "late"))
    ] == [SpanStatus.COMPLETED, SpanStatus.CANCELLED, SpanStatus.CANCELLED, SpanStatus.FAILED]
    assert notebook.status("echo1", f"0{suffix}") is None
    assert [notebook.status("loop", str(turn)) for turn in range(5)] == [
        SpanStatus.CANCELLED,
        SpanStatus.CANCELLED,
        SpanStatus.CANCELLED,
        SpanStatus.FAILED,
        None,
    ]
    again = await run_to_completion(
        SimulatedWorker(graph, worker.start.trigger, recorded=list(notebook.rows.values()))
    )
    assert again.commits == 0


async def test_a_failure_in_a_turn_can_be_taken_up_inside_of_it() -> None:
    graph = compile_loop("start > loop; loop:continue > odd > echo1; odd:error > echo2", STEPS)
    found = cast("list[Json]", loop_results(await run_to_completion(SimulatedWorker(graph, [1, 2]))))
    assert found[1] == 2
    assert cast("Mapping[str, Json]", found[0])["data"] == 1


async def test_nodes_in_a_turn_are_tried_again() -> None:
    attempts: Counter[str] = Counter()

    async def flaky(call: NodeCall) -> Json:
        attempts[call.iteration] += 1
        if attempts[call.iteration] < 2:
            raise NodeError("not yet", retryable=True)
        return call.data

    graph = compile_loop(
        "start > loop; loop:continue > flaky",
        {"flaky": write_world(flaky)},
        nodes={"flaky": FAST_RETRY},
        concurrency=2,
    )
    assert loop_results(await run_to_completion(SimulatedWorker(graph, [1, 2, 3]))) == [1, 2, 3]
    assert attempts == {"0": 2, "1": 2, "2": 2}


@pytest.mark.parametrize(
    ("limits", "items", "code", "name"),
    [
        (RunLimits(max_loop_items=3), [1] * 4, "too-many-items", "PILOTFLAME_MAX_LOOP_ITEMS"),
        (RunLimits(max_iterations=3), [1] * 4, "too-many-iterations", "PILOTFLAME_MAX_ITERATIONS"),
        (RunLimits(max_output_bytes=99), ["x" * 40] * 4, "output-too-large", "PILOTFLAME_MAX_OUTPUT_BYTES"),
    ],
)
async def test_a_limit_that_is_reached_fails_the_loop_and_names_its_setting(
    limits: RunLimits, items: list[Json], code: str, name: str
) -> None:
    graph = compile_loop(
        "start > list > loop; loop:continue > echo", {"list": pure_node(lambda _call: None)}, items=items
    )
    worker = SimulatedWorker(graph, limits=limits)
    require_error(await worker.work())
    error = worker.notebook.spans["loop"].error
    assert error is not None
    assert error.code == code
    assert name in error.message


async def test_a_value_other_than_a_list_fails_the_loop() -> None:
    def choosy(call: NodeCall) -> LoopRequest:
        if not isinstance(call.data, list):
            raise NodeError("no list")
        return loop_over_items(call)

    graph = compile_loop("start > loop; loop:continue > echo", {"loop": pure_node(choosy, loops=True)})
    assert require_error(await SimulatedWorker(graph, 7).work()).message == "no list"


# ── external answers, and time ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("request_", "status", "loop_status"),
    [
        (ControlRequest.STOP, RunStatus.STOPPED, SpanStatus.CANCELLED),
        (ControlRequest.CANCEL, RunStatus.CANCELLED, SpanStatus.CANCELLED),
        (ControlRequest.HAND_OFF, RunStatus.RELEASED, SpanStatus.RUNNING),
        (ControlRequest.HAND_OFF_NOW, RunStatus.RELEASED, SpanStatus.RUNNING),
    ],
)
async def test_a_request_ends_a_run_in_the_middle_of_a_loop(
    request_: ControlRequest, status: RunStatus, loop_status: SpanStatus
) -> None:
    begun = asyncio.Event()

    async def pay(call: NodeCall) -> Json:
        begun.set()
        await asyncio.sleep(0.01)
        return call.data

    worker = SimulatedWorker(
        compile_loop("start > loop; loop:continue > pay", {"pay": write_world(pay)}), [1, 2]
    )
    work = worker.begin()
    await wait_soon(begun)
    worker.control.ask(request_)
    assert (await work).status is status
    assert worker.notebook.status("loop") is loop_status
    assert worker.notebook.status("loop", "1") is None


async def test_a_wait_in_each_turn_frees_the_worker_and_goes_on_elsewhere() -> None:
    graph = compile_loop(
        "start > loop; loop:continue > wait > echo", {"wait": pure_node(wait_of(3600))}, concurrency=3
    )
    worker = SimulatedWorker(graph, [1, 2, 3, 4])
    waits = 0
    while (ended := await worker.work()).status is RunStatus.WAITING:
        waits += 1
        worker = SimulatedWorker(graph, [1, 2, 3, 4], recorded=expire_waits(worker.notebook))
    assert ended == RunOutcome(RunStatus.COMPLETED)
    assert (loop_results(worker.notebook), waits) == ([1, 2, 3, 4], 2)


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────────────


def ask_for_item(call: NodeCall) -> AnswerWait:
    return AnswerWait(AnswerSource.INPUT, {"about": call.data})


class AnsweringOutsider:
    """Outside party that answers each wait once, and wakes sleeping nodes, until the run has ended."""

    def __init__(self, graph: WorkflowProgram, trigger: Json, ledger: OutsideWorld) -> None:
        self.graph = graph
        self.trigger = trigger
        self.ledger = ledger

    async def work(
        self, recorded: Sequence[NodeSpan], wait_answers: Mapping[tuple[str, str], bytes]
    ) -> tuple[RunOutcome, InMemoryJournal]:
        given = dict(wait_answers)
        rows = list(recorded)
        while True:
            worker = SimulatedWorker(self.graph, self.trigger, recorded=rows, wait_answers=given)
            worker.notebook = CrashPointJournal(self.ledger, rows)
            ended = await worker.work()
            if ended.status is not RunStatus.WAITING:
                return ended, worker.notebook
            for key, span in worker.notebook.rows.items():
                if span.awaits is not None and span.status is SpanStatus.WAITING:
                    assert key not in given
                    about = json.loads(span.awaits)["request"]["about"]
                    given[key] = encode_json({"output": {"answer": about}, "port": "output"})
            rows = expire_waits(worker.notebook)


HOSTILE = {
    "writes": "start > loop; loop:continue > pay > echo > pay2; loop:done > end",
    "branches": "start > loop; loop:continue > pay > merge; loop:continue > look > pay2 > merge; loop:done > end",
    "nested": "start > wrap > loop; loop:continue > loop1; loop1:continue > pay; loop1:done > pay2; loop:done > end",
    "waits": "start > loop; loop:continue > wait > pay; loop:done > end",
    "awaits": "start > loop; loop:continue > pay > ask > pay2; loop:done > end",
    "errors": "start > loop; loop:continue > pay > odd > pay2; loop:done > end; loop:error > end",
    "error ports": "start > loop; loop:continue > odd > pay; odd:error > pay2; loop:done > end",
    "retries": "start > loop; loop:continue > flaky > pay; loop:done > end",
}
CASES = [
    pytest.param(drawing, concurrency, on_error, id=f"{name}, {concurrency} at once, {on_error}")
    for name, drawing in HOSTILE.items()
    for concurrency in (1, 3)
    for on_error in (("fail", "continue") if name == "errors" else ("fail",))
]


@pytest.mark.parametrize(("drawing", "concurrency", "on_error"), CASES)
async def test_after_death_at_any_moment_a_loop_goes_on_where_it_was(
    drawing: str, concurrency: int, on_error: str
) -> None:
    ledger = OutsideWorld()
    attempts: Counter[str] = Counter()

    async def pay(call: NodeCall) -> Json:
        await ledger.write(call)
        return call.data

    async def flaky(call: NodeCall) -> Json:
        await ledger.write(call)
        attempts[call.idempotency_key] += 1
        if attempts[call.idempotency_key] == 1:
            raise NodeError("once more", retryable=True)
        return call.data

    graph = compile_loop(
        drawing,
        {
            "pay": write_world(pay),
            "flaky": write_world(flaky),
            "ask": pure_node(ask_for_item),
            "wait": pure_node(wait_of(1800)),
            "look": read_world(pause_node),
            "merge": pure_node(echo_data, joins=True),
            "wrap": pure_node(lambda call: [call.data, [], [7]]),
            "end": pure_node(echo_data),
        },
        nodes={
            "flaky": FAST_RETRY,
            "loop1": {"config": {"concurrency": concurrency}},
            "pay": {"config": {"of": "{{ item }}", "at": "{{ index }}"}},
        },
        concurrency=concurrency,
        onItemError=on_error,
    )
    outsider = AnsweringOutsider(graph, [2, 4, 3, 6, 8], ledger)
    whole_end, whole = await outsider.work([], {})
    reached = {effect.key for effect in ledger.effects}
    moments, wait_answers = ledger.moments, recorded_answers(whole)
    assert len(moments) > 20
    # Every state that a crash may leave behind, once.
    states = {frozenset((s.node_id, s.iteration, s.status, s.attempt) for s in d): (d, b) for d, b in moments}
    for durable, before in states.values():
        ledger.effects, ledger.moments = [], []
        attempts.clear()
        attempts.update(effect.key for effect in before)
        known = {(s.node_id, s.iteration): s for s in durable}
        ended, after = await outsider.work(durable, {k: v for k, v in wait_answers.items() if k in known})
        assert ended == whole_end
        assert after.rows.get(("end", "")) is None or after.output("end") == whole.output("end")
        _assert_nothing_was_done_twice(known, before, ledger.effects)
        if whole_end.status is RunStatus.COMPLETED and on_error != "fail":
            assert {effect.key for effect in before + ledger.effects} == reached


def recorded_answers(notebook: InMemoryJournal) -> dict[tuple[str, str], bytes]:
    return {
        key: encode_json({"output": notebook.output(*key)})
        for key, span in notebook.rows.items()
        if span.type == "ask"
    }


def _assert_nothing_was_done_twice(
    known: Mapping[tuple[str, str], NodeSpan], before: Sequence[OutsideCall], after: Sequence[OutsideCall]
) -> None:
    settled = {
        f"exec_1:{node_id}:{iteration or 0}"
        for (node_id, iteration), span in known.items()
        if span.status in SETTLED_STATUSES
    }
    begun = {f"exec_1:{node_id}:{iteration or 0}" for node_id, iteration in known}
    repeated = {effect.key for effect in before} & {effect.key for effect in after}
    assert not {effect.key for effect in after} & settled
    assert repeated <= begun
    for key in repeated:
        bodies = [effect.body for effect in (*before, *after) if effect.key == key]
        assert all(body == bodies[0] for body in bodies)


async def test_a_loop_that_is_taken_up_again_has_the_items_that_it_had() -> None:
    seen: list[Json] = []

    async def pay(call: NodeCall) -> Json:
        seen.append(call.data)
        await asyncio.sleep(0)
        return call.data

    made = 0

    def make(_call: NodeCall) -> Json:
        nonlocal made
        made += 1
        return [made, made + 1]

    graph = compile_loop(
        "start > make; start > loop; loop:continue > pay",
        {"make": pure_node(make), "pay": write_world(pay)},
        items="{{ nodes.make }}",
    )
    first = SimulatedWorker(graph)
    await run_to_completion(first)
    rows = first.notebook.rows
    # State committed at the first iteration; without the output of `make`, to which no path leads from the
    # loop.
    begun = [
        rows["start", ""],
        _restarted_span(rows["loop", ""], encode_json({"items": [1, 2]})),
        rows["pay", "0"],
        rows["loop", "0"],
    ]
    seen.clear()
    assert loop_results(await run_to_completion(SimulatedWorker(graph, recorded=begun))) == [1, 2]
    assert seen == [2]


def _restarted_span(span: NodeSpan, config: bytes) -> NodeSpan:
    import msgspec.structs  # noqa: PLC0415

    return msgspec.structs.replace(
        span, status=SpanStatus.RUNNING, output=None, port=None, ended_at=None, resolved_config=config
    )


# ── like map ──────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def draw_body(draw: st.DrawFn) -> str:
    """Draw a body without cycles: nodes that lead on from the loop or from one another."""
    ids = ["loop:continue"]
    paths = []
    for number in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["echo", "triple", "slow", "write", "route"]))
        sources = draw(st.lists(st.sampled_from(ids), min_size=1, max_size=2, unique=True))
        for source in sources:
            port = draw(st.sampled_from([":even", ":odd"])) if source.startswith("route") else ""
            paths.append(f"{source}{port} > {kind}{number}")
        ids.append(f"{kind}{number}")
    return "; ".join(paths)


ANY_BODY: dict[str, MadeUpNodeType] = {
    "triple": pure_node(lambda call: [call.data] * 3),
    "slow": read_world(pause_node),
    "write": write_world(pause_node),
    "route": pure_node(
        lambda call: NodeResult(call.data, "odd" if cast("int", call.scope["item"]) % 2 else "even")
    ),
}


@given(draw_body(), st.lists(st.integers(0, 3), max_size=4), st.integers(1, 3))
def test_a_loop_collects_the_result_of_each_item_from_any_recovered_state(
    body: str, items: list[Json], concurrency: int
) -> None:
    graph = compile_loop(f"start > loop; {body}", ANY_BODY, concurrency=concurrency)

    def looped(some: list[Json], recorded: Sequence[NodeSpan] = ()) -> SpanHistory:
        worker = SimulatedWorker(graph, some, recorded=recorded)
        worker.notebook = stream = SpanHistory(recorded)
        assert asyncio.run(worker.work()) == RunOutcome(RunStatus.COMPLETED)
        return stream

    whole = looped(items)
    assert loop_results(whole) == [cast("list[Json]", loop_results(looped([item])))[0] for item in items]
    for length in range(1, len(whole.stream), 3):
        durable = {(span.node_id, span.iteration): span for span in whole.stream[:length]}
        assert loop_results(looped(items, list(durable.values()))) == loop_results(whole)


# ── size ──────────────────────────────────────────────────────────────────────────────────────────────────


class CountingJournal(InMemoryJournal):
    """Journal that stores nothing, and counts records that wait for a commit."""

    pending = most_pending = most_frames = 0

    def record(self, span: NodeSpan) -> None:
        super().record(span)
        self.pending += 1
        self.most_pending = max(self.most_pending, self.pending)

    async def commit(self) -> None:
        await super().commit()
        self.pending = 0
        self.rows = {}


# ── progress ──────────────────────────────────────────────────────────────────────────────────────────────


def done(notebook: InMemoryJournal) -> list[float]:
    """Return the part of the run that was done after each step, which only grows and ends as a whole."""
    assert all(before <= after + 1e-9 for before, after in pairwise(notebook.done))
    assert notebook.done[-1] == pytest.approx(1)
    return notebook.done


async def test_each_turn_counts_for_its_part_of_the_loop_and_of_its_nodes() -> None:
    notebook = await run_to_completion(
        SimulatedWorker(compile_loop(SIMPLE, STEPS), cast("Json", list(range(10))))
    )
    # Five nodes: the start, then ten turns of a tenth of three nodes each, then the end.
    steps = done(notebook)
    assert steps[0] == pytest.approx(1 / 5)
    turns = [steps[3 * turn] for turn in range(1, 11)]
    assert turns == pytest.approx([1 / 5 + turn * 3 / 5 / 10 for turn in range(1, 11)])


@pytest.mark.parametrize(
    ("drawing", "items", "loop"),
    [
        pytest.param(SIMPLE, [], {}, id="no items"),
        pytest.param(
            "start > loop; loop:continue > odd > double", [1, 2, 3], {"onItemError": "continue"}, id="failed"
        ),
        pytest.param(
            "start > loop; loop:continue > odd > double; loop:error > end", [2, 4, 3, 6], {}, id="given up"
        ),
        pytest.param(
            "start > loop; loop:continue > loop2; loop2:continue > double; loop:done > end",
            [[1, 2], [], [3]],
            {"concurrency": 2},
            id="nested",
        ),
        pytest.param("start > no; no:yes > loop; loop:continue > double; no:no > end", [1], {}, id="skipped"),
    ],
)
async def test_all_parts_of_a_run_are_counted_however_its_loops_end(
    drawing: str, items: Json, loop: dict[str, Json]
) -> None:
    kinds = {
        **STEPS,
        "loop2": pure_node(loop_over_items, loops=True),
        "no": pure_node(lambda call: NodeResult(call.data, "no")),
    }
    graph = compile_loop(drawing, kinds, nodes={"loop": {"config": loop}})
    done(await run_to_completion(SimulatedWorker(graph, items)))


async def test_a_recovered_run_counts_the_nodes_in_its_journal() -> None:
    graph = compile_loop(
        "start > loop; loop:continue > double > wait; loop:done > end",
        {**STEPS, "wait": pure_node(wait_for_two_turns)},
    )
    first = SimulatedWorker(graph, [1, 2, 3, 4])
    assert (await first.work()).status is RunStatus.WAITING
    second = SimulatedWorker(graph, [1, 2, 3, 4], recorded=expire_waits(first.notebook))
    counted = done(await run_to_completion(second))
    # Before anything new has settled, no less is counted than the first had.
    assert first.notebook.done[-1] == pytest.approx(1 / 5 + 3 / 5 / 4 + 1 / 5 / 4)
    assert any(part == pytest.approx(first.notebook.done[-1]) for part in counted)


def wait_for_two_turns(call: NodeCall) -> NodeOutcome:
    if call.data != 4:
        return call.data
    return TimerWait(call.now + timedelta(hours=1), call.data)


async def test_a_loop_of_ten_thousand_items_keeps_little_in_memory() -> None:
    gc.freeze()  # hides the objects of other tests, which would take long to go through
    graph = compile_loop("start > loop; loop:continue > echo1 > echo2; loop:done > end", STEPS)
    worker = SimulatedWorker(graph, cast("Json", list(range(10_000))))
    worker.notebook = notebook = CountingJournal()
    assert await worker.work() == RunOutcome(RunStatus.COMPLETED)
    assert notebook.most_pending < 5_000
    gc.collect()
    assert sum(isinstance(one, SectionFrame) for one in gc.get_objects()) < 50


async def test_turns_that_have_ended_are_taken_from_the_journal_without_being_entered() -> None:
    calls = 0

    def count(call: NodeCall) -> NodeOutcome:
        nonlocal calls
        calls += 1
        return call.data

    graph = compile_loop(
        "start > loop; loop:continue > count > wait",
        {"count": pure_node(count), "wait": pure_node(wait_a_year)},
    )
    items = list(range(2_000))
    first = SimulatedWorker(graph, cast("Json", items))
    assert (await first.work()).status is RunStatus.WAITING
    assert calls == 2_000
    recorded = expire_waits(first.notebook)
    ended = {span.iteration for span in recorded if span.is_iteration and span.status in SETTLED_STATUSES}
    # The outputs of an ended iteration's nodes are no longer needed.
    needed = [span for span in recorded if span.node_id == "loop" or span.iteration not in ended]
    assert len(needed) < len(recorded) - 2_000
    notebook = await run_to_completion(SimulatedWorker(graph, cast("Json", items), recorded=needed))
    assert calls == 2_000
    assert loop_results(notebook) == items


def wait_a_year(call: NodeCall) -> NodeOutcome:
    return TimerWait(call.now.replace(year=call.now.year + 1), call.data) if call.data == 1_999 else call.data


async def test_a_node_that_is_broken_off_before_it_has_begun_leaves_its_turn() -> None:
    drawing = "start > loop; loop:continue > pause; loop:continue > odd; loop:done > end"
    notebook = await run_to_completion(
        SimulatedWorker(compile_loop(drawing, STEPS, onItemError="continue"), [1, 2])
    )
    statuses = [notebook.rows["pause", iteration].status for iteration in ("0", "1")]
    assert statuses == [SpanStatus.CANCELLED, SpanStatus.COMPLETED]
    errors = cast("list[dict[str, Json]]", cast("dict[str, Json]", notebook.output("loop"))["errors"])
    assert [error["index"] for error in errors] == [0]
