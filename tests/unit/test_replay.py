"""Replays: exactly the nodes run again whose key has changed, and no write is repeated by guess."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.node_api import CONTINUE, LoopRequest, NodeCall, NodeResult
from engine.node_key import decode_key
from engine.program import WorkflowProgram
from engine.replay_changes import changed_body_nodes, diff_paths
from engine.replay_plan import NodeReplay, ReplayDecision, ReplayFacts, ReplayOptions, ReplayPlan, ResultUse
from engine.replay_planner import plan_replay
from engine.run_errors import NodeError
from engine.run_records import NodeSpan, RunOutcome, RunStatus, SpanStatus
from engine.services import RunCaller
from engine.unfinished_writes import may_have_happened
from engine.values import Json
from models.timestamps import DatabaseClock
from tests.unit.run_harness import (
    InMemoryJournal,
    MadeUpNodeType,
    SimulatedWorker,
    compile_drawing,
    pure_node,
    read_world,
    write_world,
)

EARLIER, LATER = "exec_1", "exec_2"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class NodeRecorder:
    """Node types that note their calls."""

    calls: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Idempotency keys of the writes."""
    broken: set[str] = field(default_factory=set)
    error: str = "broken"

    @property
    def kinds(self) -> Mapping[str, MadeUpNodeType]:
        return {
            "start": pure_node(self.start),
            "add": pure_node(self.add),
            "parity": pure_node(self.parity),
            "branch": pure_node(self.branch),
            "read": read_world(self.add),
            "pay": write_world(self.pay),
            "loop": pure_node(self.loop, loops=True),
        }

    def start(self, call: NodeCall) -> Json:
        return call.data

    def add(self, call: NodeCall) -> Json:
        self._note(call)
        return total_of(call.data) + total_of(call.config.get("by", 0))

    def parity(self, call: NodeCall) -> Json:
        self._note(call)
        return total_of(call.data) % 2

    def branch(self, call: NodeCall) -> NodeResult:
        self._note(call)
        return NodeResult(call.data, "output" if total_of(call.data) % 2 else "other")

    def loop(self, call: NodeCall) -> LoopRequest:
        self._note(call)
        return LoopRequest(cast("Sequence[Json]", call.config.get("items", [1, 2, 3])))

    async def pay(self, call: NodeCall) -> Json:
        await asyncio.sleep(0)
        self.keys.append(call.idempotency_key)
        self._note(call)
        return {"paid": call.data}

    def _note(self, call: NodeCall) -> None:
        name = f"{call.node_id}.{call.iteration}" if call.iteration else call.node_id
        self.calls.append(name)
        if name in self.broken:
            raise NodeError("broken", code=self.error)


def total_of(value: Json) -> int:
    """Return the sum of all numbers in a value."""
    if isinstance(value, dict):
        return sum(map(total_of, value.values()))
    if isinstance(value, list):
        return sum(map(total_of, value))
    return int(value) if isinstance(value, int | float) else 0


@dataclass(frozen=True)
class RecordedRun:
    """An ended run."""

    program: WorkflowProgram
    trigger: Json
    spans: Sequence[NodeSpan]


async def run_first(program: WorkflowProgram, trigger: Json = 1) -> RecordedRun:
    worker = SimulatedWorker(program, trigger)
    await worker.work()
    return RecordedRun(program, trigger, list(worker.notebook.rows.values()))


def plan_of(
    past: RecordedRun,
    program: WorkflowProgram | None = None,
    trigger: Json = None,
    **options: Any,  # noqa: ANN401 - fields of `ReplayOptions`
) -> ReplayPlan:
    program = program or past.program
    inner = {
        span.node_id
        for span in past.spans
        if span.iteration and span.status is SpanStatus.COMPLETED and span.port != CONTINUE
    }
    facts = ReplayFacts(
        caller=RunCaller("org_1", "user_1", "wf_1", EARLIER, EARLIER),
        started_at=NOW,
        clock=DatabaseClock(),
        original=past.program.graph,
        program=program,
        trigger=past.trigger if trigger is None else trigger,
        has_new_input=trigger is not None,
        spans=[span for span in past.spans if not span.iteration],
        has_outputs=True,
        written_in_loops=frozenset(inner),
        written_in_failed_iterations=frozenset(
            span.node_id
            for span in past.spans
            if span.node_id in inner and span.iteration not in good_turns(past)
        ),
        revisions={name: 1 for span in past.spans for name, _ in sources_of(span)},
    )
    return plan_replay(facts, ReplayOptions(**options))


def good_turns(past: RecordedRun) -> set[str]:
    return {
        span.iteration for span in past.spans if span.port == CONTINUE and span.status is SpanStatus.COMPLETED
    }


def sources_of(span: NodeSpan) -> Collection[tuple[str, int]]:
    key = decode_key(span.hashes)
    return key.sources if key else ()


def use_spans(past: RecordedRun, plan: ReplayPlan, program: WorkflowProgram) -> list[NodeSpan]:
    """Return the spans with which a replay begins."""
    by_id = {node.node_id: node for node in plan.nodes}
    found: list[NodeSpan] = []
    for span in past.spans:
        node = by_id.get(span.node_id)
        if not span.iteration and node is not None:
            found += [used] if (used := use_span(span, node)) else []
        elif span.iteration:
            found += [used] if (used := use_inner(span, plan, past, program)) else []
    left_out = [node.node_id for node in plan.nodes if node.use is ResultUse.LEFT_OUT]
    graph = program.graph.by_id
    return found + [
        NodeSpan(one, graph[one].label, graph[one].type, SpanStatus.SKIPPED, 0, None) for one in left_out
    ]


def use_span(span: NodeSpan, node: NodeReplay) -> NodeSpan | None:
    match node.use:
        case ResultUse.SETTLED:
            return replace(span, reused_from=EARLIER)
        case ResultUse.IN_FLIGHT:
            return replace(span, status=SpanStatus.RUNNING, error=None, attempt=0, key_id=EARLIER)
        case ResultUse.CANDIDATE | ResultUse.UNCONFIRMED:
            is_free = node.use is ResultUse.CANDIDATE
            status = SpanStatus.CANDIDATE if is_free else SpanStatus.UNCONFIRMED
            return replace(span, status=status, reused_from=EARLIER, key_id=EARLIER)
        case _:
            return None


def use_inner(
    span: NodeSpan, plan: ReplayPlan, past: RecordedRun, program: WorkflowProgram
) -> NodeSpan | None:
    for loop in plan.nodes:
        body = program.nodes[loop.node_id].body
        if loop.use is ResultUse.ITERATIONS and (span.node_id in body or span.node_id == loop.node_id):
            is_kept = span.status is SpanStatus.COMPLETED
            changed = changed_body_nodes(program.nodes[loop.node_id], past.program.graph, program.graph)
            return span if is_kept and span.node_id not in changed else None
    return None


async def run_again(
    past: RecordedRun, plan: ReplayPlan, program: WorkflowProgram | None = None, trigger: Json = None
) -> tuple[RunOutcome, InMemoryJournal]:
    program = program or past.program
    recorded = use_spans(past, plan, program)
    worker = SimulatedWorker(program, past.trigger if trigger is None else trigger, recorded=recorded)
    worker.start = replace(worker.start, caller=RunCaller("org_1", "user_1", "wf_1", LATER, EARLIER, LATER))
    ended = await worker.work()
    return ended, worker.notebook


def decisions(plan: ReplayPlan) -> dict[str, str]:
    return {node.node_id: node.decision.value for node in plan.nodes}


def reasons(plan: ReplayPlan, node_id: str) -> list[str]:
    return [reason.code.value for node in plan.nodes if node.node_id == node_id for reason in node.reasons]


# ── any graph and any edit ──────────────────────────────────────────────────────────────────────────────────

KINDS = ("add", "parity", "branch", "pay")


@st.composite
def graphs(draw: st.DrawFn) -> tuple[str, dict[str, dict[str, Json]]]:
    """Return a drawing of a graph, and the options of its nodes."""
    count = draw(st.integers(2, 7))
    names = [f"{draw(st.sampled_from(KINDS))}{number}" for number in range(1, count + 1)]
    drawing: list[str] = []
    options: dict[str, dict[str, Json]] = {}
    ancestors: dict[str, set[str]] = {"start": set()}
    for place, name in enumerate(names):
        before = ["start", *names[:place]]
        sources = draw(st.lists(st.sampled_from(before), min_size=1, max_size=2, unique=True))
        ancestors[name] = {*sources, *(each for source in sources for each in ancestors[source])}
        for source in sources:
            port = draw(st.sampled_from(["", ":other"])) if source.startswith("branch") else ""
            drawing.append(f"{source}{port} > {name}")
        by: Json = draw(st.integers(0, 2))
        if draw(st.booleans()):
            # Of branches that run at the same time, none can rely on the other.
            by = f"{{{{ nodes.{draw(st.sampled_from(sorted(ancestors[name])))} ?? 0 }}}}"
        options[name] = {"config": {"by": by}}
    return "; ".join(drawing), options


@settings(max_examples=50, deadline=None)
@given(graph=graphs(), trigger=st.integers(0, 3))
def test_a_replay_of_an_unchanged_definition_and_input_runs_nothing_again(
    graph: tuple[str, dict[str, dict[str, Json]]], trigger: int
) -> None:
    async def check() -> None:
        drawing, options = graph
        recorder = NodeRecorder()
        past = await run_first(compile_drawing(drawing, recorder.kinds, options), trigger)
        recorder.calls.clear()
        plan = plan_of(past)
        assert set(decisions(plan).values()) == {"reuse"}
        ended, notebook = await run_again(past, plan)
        assert (ended, recorder.calls) == (RunOutcome(RunStatus.COMPLETED), [])
        statuses = {span.node_id: span.status for span in past.spans}
        assert {node_id: span.status for node_id, span in notebook.spans.items()} == statuses

    asyncio.run(check())


@settings(max_examples=100, deadline=None)
@given(
    graph=graphs(),
    trigger=st.integers(0, 3),
    data=st.data(),
)
def test_an_edit_reruns_exactly_the_nodes_with_changed_keys(
    graph: tuple[str, dict[str, dict[str, Json]]], trigger: int, data: st.DataObject
) -> None:
    drawing, options = graph
    edited = data.draw(st.sampled_from([*options, "start"]))
    after = dict(options)
    new_trigger: Json = None
    if edited == "start":
        new_trigger = data.draw(st.integers(0, 3))
    elif data.draw(st.booleans()):
        after[edited] = {"config": {"by": data.draw(st.integers(3, 5))}}
    else:
        after[edited] = {**options[edited], "inputMappings": {"more": "trigger"}}

    async def check() -> None:
        recorder = NodeRecorder()
        past = await run_first(compile_drawing(drawing, recorder.kinds, options), trigger)
        program = compile_drawing(drawing, recorder.kinds, after)
        wanted = await run_first(program, trigger if new_trigger is None else new_trigger)
        before = {span.node_id: decode_key(span.hashes) for span in past.spans}
        changed = {
            span.node_id
            for span in wanted.spans
            if span.status is SpanStatus.COMPLETED and decode_key(span.hashes) != before.get(span.node_id)
        } - {"start"}
        recorder.calls.clear()
        recorder.keys.clear()
        writes = frozenset(name for name in options if name.startswith("pay"))
        plan = plan_of(past, program, new_trigger, confirmed=writes)
        ended, notebook = await run_again(past, plan, program, new_trigger)
        assert ended == RunOutcome(RunStatus.COMPLETED)
        assert sorted(recorder.calls) == sorted(changed)
        assert {span.node_id: span.output for span in wanted.spans} == {
            node_id: span.output for node_id, span in notebook.spans.items()
        }
        # A write that is repeated has a new key, and one that isn't has none.
        assert all(key.startswith(LATER) for key in recorder.keys)
        # What isn't confirmed is asked for or refused, and never runs.
        recorder.calls.clear()
        careful = plan_of(past, program, new_trigger)
        if not careful.unconfirmed:
            await run_again(past, careful, program, new_trigger)
        done = {span.node_id for span in past.spans if span.port is not None}
        assert not {name for name in recorder.calls if name.startswith("pay")} & done

    asyncio.run(check())


@settings(max_examples=60, deadline=None)
@given(graph=graphs(), trigger=st.integers(0, 3), data=st.data())
def test_a_write_that_is_left_out_never_runs_and_the_plan_predicts_the_rest(
    graph: tuple[str, dict[str, dict[str, Json]]], trigger: int, data: st.DataObject
) -> None:
    drawing, options = graph
    names = sorted(options)
    writes = frozenset(name for name in names if name.startswith("pay"))
    left_out = frozenset(data.draw(st.sets(st.sampled_from(sorted(writes))) if writes else st.just(set())))
    broken = data.draw(st.sampled_from(["", *names]))
    edited = data.draw(st.sampled_from(names))

    async def check() -> None:
        recorder = NodeRecorder(broken={broken}, error="http-409")
        past = await run_first(compile_drawing(drawing, recorder.kinds, options), trigger)
        recorder.broken.clear()
        recorder.calls.clear()
        program = compile_drawing(drawing, recorder.kinds, {**options, edited: {"config": {"by": 7}}})
        plan = plan_of(past, program, left_out=left_out, confirmed=writes - left_out)
        ended, notebook = await run_again(past, plan, program)
        assert ended == RunOutcome(RunStatus.COMPLETED)
        assert not left_out & {*recorder.calls}
        outputs = {span.node_id: span.output for span in past.spans if span.port is not None}
        for node in plan.nodes:
            span = notebook.spans[node.node_id]
            if node.decision is ReplayDecision.SKIP:
                assert span.status is SpanStatus.SKIPPED, (node, drawing)
            if node.node_id in left_out:
                assert (node.decision is ReplayDecision.REUSE) == (node.node_id in outputs)
                if span.status is SpanStatus.COMPLETED:
                    assert span.output == outputs[node.node_id]

    asyncio.run(check())


async def test_a_write_that_is_left_out_gives_its_recorded_output_or_none_to_the_nodes_behind_it() -> None:
    recorder = NodeRecorder()
    drawing = "start > add > pay > add2; start > pay2 > parity; pay2 > add3; start > add3"
    past = await run_first(compile_drawing(drawing, recorder.kinds))
    recorder.calls.clear()
    changed = compile_drawing(drawing, recorder.kinds, {"add": {"config": {"by": 1}}})
    plan = plan_of(past, changed, left_out=frozenset({"pay"}))
    assert decisions(plan)["pay"] == "reuse"
    assert (reasons(plan, "pay"), plan.unconfirmed) == (["left-out"], ())
    ended, notebook = await run_again(past, plan, changed)
    assert (ended, recorder.calls) == (RunOutcome(RunStatus.COMPLETED), ["add"])
    assert notebook.spans["pay"].reused_from == notebook.spans["add2"].reused_from == EARLIER

    behind = {"pay2", "parity", "add3"}
    unfinished = RecordedRun(
        past.program, past.trigger, [one for one in past.spans if one.node_id not in behind]
    )
    recorder.calls.clear()
    plan = plan_of(unfinished, left_out=frozenset({"pay2"}))
    assert {node.node_id for node in plan.nodes if node.decision is ReplayDecision.SKIP} == {"pay2", "parity"}
    assert reasons(plan, "parity") == ["upstream-left-out"]
    ended, notebook = await run_again(unfinished, plan)
    assert (ended, recorder.calls) == (RunOutcome(RunStatus.COMPLETED), ["add3"])
    assert (notebook.status("pay2"), notebook.status("parity")) == ("skipped", "skipped")
    hashes = {plan_of(unfinished, left_out=frozenset(one)).digest() for one in ((), ("pay2",), ("pay",))}
    assert len(hashes) == 3


async def test_a_write_that_may_have_happened_before_it_was_left_out_is_asked_for_later() -> None:
    recorder = NodeRecorder(broken={"pay"}, error="timed-out")
    program = compile_drawing("start > add > pay", recorder.kinds)
    past = await run_first(program)
    left = [
        replace(span, status=SpanStatus.SKIPPED, error=None) if span.node_id == "pay" else span
        for span in past.spans
    ]
    changed = compile_drawing("start > add > pay", recorder.kinds, {"pay": {"config": {"by": 1}}})
    assert plan_of(RecordedRun(program, past.trigger, left), changed).unconfirmed == ("pay",)


async def test_a_write_that_a_replay_did_not_reach_is_asked_for_later() -> None:
    recorder = NodeRecorder()
    drawing = "start > add > branch > pay"
    program = compile_drawing(drawing, recorder.kinds)
    past = await run_first(program)
    assert recorder.calls == ["add", "branch", "pay"]
    other = compile_drawing(drawing, recorder.kinds, {"add": {"config": {"by": 1}}})
    plan = plan_of(past, other)
    assert (decisions(plan)["pay"], plan.unconfirmed) == ("maybe", ())
    ended, notebook = await run_again(past, plan, other)
    assert (ended, notebook.status("pay")) == (RunOutcome(RunStatus.COMPLETED), "skipped")
    later = RecordedRun(other, past.trigger, list(notebook.spans.values()))
    assert plan_of(later, program).unconfirmed == ("pay",)


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "decision", "key"),
    [
        ("http-409", "rerun", LATER),
        ("not-connected", "rerun", LATER),
        ("sql-error", "rerun", LATER),
        ("http-502", "rerun", EARLIER),
        ("timed-out", "rerun", EARLIER),
        ("anything-else", "rerun", EARLIER),
    ],
)
async def test_a_failed_write_runs_again_under_its_old_key_unless_nothing_can_have_happened(
    error: str, decision: str, key: str
) -> None:
    recorder = NodeRecorder(broken={"pay"}, error=error)
    past = await run_first(compile_drawing("start > pay > add", recorder.kinds))
    recorder.broken.clear()
    recorder.keys.clear()
    plan = plan_of(past)
    assert decisions(plan) == {"start": "reuse", "pay": decision, "add": "rerun"}
    ended, _ = await run_again(past, plan)
    assert (ended, recorder.keys) == (RunOutcome(RunStatus.COMPLETED), [f"{key}:pay:0"])


async def test_a_failed_write_with_an_unknown_end_and_another_request_needs_a_confirmation() -> None:
    recorder = NodeRecorder(broken={"pay"}, error="timed-out")
    past = await run_first(compile_drawing("start > pay", recorder.kinds, {"pay": {"config": {"by": 1}}}))
    changed = compile_drawing("start > pay", recorder.kinds, {"pay": {"config": {"by": 2}}})
    plan = plan_of(past, changed)
    assert plan.unconfirmed == ("pay",)
    assert reasons(plan, "pay") == ["failed", "config-changed", "write-needs-confirm"]
    allowed = plan_of(past, changed, confirmed=frozenset({"pay"}))
    assert allowed.digest() == plan.digest()
    recorder.broken.clear()
    recorder.keys.clear()
    await run_again(past, allowed, changed)
    assert recorder.keys == [f"{LATER}:pay:0"]


async def test_a_mended_graph_goes_on_behind_the_last_good_node() -> None:
    recorder = NodeRecorder(broken={"add2"})
    drawing = "start > pay > add1 > add2 > pay2"
    past = await run_first(compile_drawing(drawing, recorder.kinds))
    recorder.broken.clear()
    recorder.calls.clear()
    mended = compile_drawing(drawing, recorder.kinds, {"add2": {"config": {"by": 7}}})
    plan = plan_of(past, mended)
    assert decisions(plan) == {
        "start": "reuse", "pay": "reuse", "add1": "reuse", "add2": "rerun", "pay2": "rerun",
    }  # fmt: skip
    ended, notebook = await run_again(past, plan, mended)
    assert (ended, recorder.calls) == (RunOutcome(RunStatus.COMPLETED), ["add2", "pay2"])
    reused = {node_id: span.reused_from for node_id, span in notebook.spans.items()}
    assert reused == {"start": EARLIER, "pay": EARLIER, "add1": EARLIER, "add2": None, "pay2": None}


async def test_a_write_behind_a_maybe_is_reused_or_refused_at_run_time() -> None:
    recorder = NodeRecorder()
    drawing = "start > add > parity > pay"
    past = await run_first(compile_drawing(drawing, recorder.kinds))
    for by, ended_as in ((2, RunStatus.COMPLETED), (1, RunStatus.FAILED)):
        recorder.keys.clear()
        changed = compile_drawing(drawing, recorder.kinds, {"add": {"config": {"by": by}}})
        plan = plan_of(past, changed)
        assert decisions(plan) == {"start": "reuse", "add": "rerun", "parity": "maybe", "pay": "maybe"}
        ended, notebook = await run_again(past, plan, changed)
        assert (ended.status, recorder.keys) == (ended_as, [])
        if ended.status is RunStatus.FAILED:
            assert notebook.spans["pay"].error is not None
            assert notebook.spans["pay"].error.code == "write-needs-confirm"
            assert notebook.spans["pay"].resolved_config is not None


async def test_parallel_branches_that_refer_to_everything_are_reused_unless_one_of_them_changes() -> None:
    recorder = NodeRecorder(broken={"add3"})
    drawing = "start > pay1 > add1 > add3; start > pay2 > add2 > add3"
    whole: dict[str, Json] = {"config": {"by": "{{ nodes }}"}}
    options = dict.fromkeys(("pay1", "add1", "pay2", "add2"), whole)
    past = await run_first(compile_drawing(drawing, recorder.kinds, options))
    recorder.broken.clear()
    plan = decisions(plan_of(past))
    assert plan == {**dict.fromkeys(("start", *options), "reuse"), "add3": "rerun"}
    edited = compile_drawing(drawing, recorder.kinds, {**options, "add1": {"config": {"by": 5}}})
    changed = decisions(plan_of(past, edited))
    assert changed["add1"] == "rerun"
    assert {changed["pay2"], changed["add2"]}.isdisjoint({"reuse"})


async def test_a_candidate_that_is_no_longer_reached_is_skipped() -> None:
    recorder = NodeRecorder()
    drawing = "start > add > branch; branch > pay; branch:other > add2"
    past = await run_first(compile_drawing(drawing, recorder.kinds))
    changed = compile_drawing(drawing, recorder.kinds, {"add": {"config": {"by": 1}}})
    plan = plan_of(past, changed)
    ended, notebook = await run_again(past, plan, changed)
    assert ended == RunOutcome(RunStatus.COMPLETED)
    assert (notebook.status("pay"), notebook.status("add2")) == ("skipped", "completed")


async def test_results_without_a_complete_key_are_not_reused() -> None:
    recorder = NodeRecorder()
    past = await run_first(compile_drawing("start > add > pay", recorder.kinds))
    old = [replace(span, hashes=(span.hashes or b"")[:128]) for span in past.spans]
    plan = plan_of(RecordedRun(past.program, past.trigger, old))
    assert decisions(plan) == {"start": "rerun", "add": "rerun", "pay": "ask"}
    assert reasons(plan, "pay") == ["no-result", "write-needs-confirm"]


async def test_a_forced_node_runs_again_and_those_behind_it_only_with_another_input() -> None:
    recorder = NodeRecorder()
    past = await run_first(compile_drawing("start > add > parity > add2", recorder.kinds))
    recorder.calls.clear()
    plan = plan_of(past, forced=frozenset({"add"}))
    assert decisions(plan) == {"start": "reuse", "add": "rerun", "parity": "maybe", "add2": "maybe"}
    await run_again(past, plan)
    assert recorder.calls == ["add"]


@pytest.mark.parametrize(
    "drawing", ["start > read > add", "start > loop; loop:continue > read; loop:done > add"]
)
async def test_nodes_that_read_run_again_only_where_that_is_asked_for(drawing: str) -> None:
    recorder = NodeRecorder()
    past = await run_first(compile_drawing(drawing, recorder.kinds))
    assert set(decisions(plan_of(past)).values()) == {"reuse"}
    recorder.calls.clear()
    plan = plan_of(past, refreshes_reads=True)
    assert (decisions(plan)["read"], decisions(plan)["add"]) == ("rerun", "maybe")
    assert reasons(plan, "read") == ["refreshed"]
    ended, notebook = await run_again(past, plan)
    assert ended == RunOutcome(RunStatus.COMPLETED)
    assert {call.partition(".")[0] for call in recorder.calls} == {"read"} | {"loop"} & set(decisions(plan))
    assert notebook.spans["add"].reused_from == EARLIER, "what was read is the same"


async def test_a_refreshed_loop_asks_for_the_writes_in_it() -> None:
    recorder = NodeRecorder()
    past = await run_first(compile_drawing("start > loop; loop:continue > read > pay", recorder.kinds))
    assert plan_of(past).unconfirmed == ()
    assert plan_of(past, refreshes_reads=True).unconfirmed == ("pay",)


async def test_a_changed_data_source_or_code_is_a_reason() -> None:
    recorder = NodeRecorder()
    past = await run_first(compile_drawing("start > add", recorder.kinds))
    used = [
        replace(span, hashes=(span.hashes or b"") + b'[["ds_1",1]]') if span.node_id == "add" else span
        for span in past.spans
    ]
    assert decisions(plan_of(RecordedRun(past.program, past.trigger, used)))["add"] == "reuse"
    newer = [replace(span, hashes=(span.hashes or b"").replace(b",1]", b",2]")) for span in used]
    assert reasons(plan_of(RecordedRun(past.program, past.trigger, newer)), "add") == ["source-changed"]
    kinds = {**recorder.kinds, "add": pure_node(recorder.add, code=b"new")}
    assert reasons(plan_of(past, compile_drawing("start > add", kinds)), "add") == ["implementation-changed"]


async def test_reasons_name_the_changed_parts() -> None:
    recorder = NodeRecorder()
    options: dict[str, dict[str, Json]] = {"add": {"config": {"by": {"a": [1, 2], "b": 3}}}}
    past = await run_first(compile_drawing("start > add > pay", recorder.kinds, options), {"x": 1, "y": 2})
    edited: dict[str, dict[str, Json]] = {"add": {"config": {"by": {"a": [1, 5], "c": 3}}}}
    plan = plan_of(past, compile_drawing("start > add > pay > add2", recorder.kinds, edited))
    (reason,) = plan.nodes[1].reasons
    assert (reason.code, reason.paths) == ("config-changed", ("by.b", "by.c", "by.a.1"))
    assert reasons(plan, "add2") == ["new-node"]
    assert reasons(plan, "pay") == ["upstream-maybe", "write-needs-confirm"]
    other = plan_of(past, trigger={"x": 1, "y": 3})
    assert [(reason.code, reason.paths) for reason in other.nodes[1].reasons] == [
        ("input-changed", ("data.y",))
    ]
    lacking = plan_of(past, compile_drawing("start > pay", recorder.kinds))
    assert lacking.removed == ("add",)
    assert "removed-node" in reasons(lacking, "pay")


# ── loops ───────────────────────────────────────────────────────────────────────────────────────────────────

LOOP = "start > loop; loop:continue > pay > add; loop:done > add2"


async def test_a_failed_loop_runs_its_failed_iterations_alone() -> None:
    recorder = NodeRecorder(broken={"add.1"})
    past = await run_first(compile_drawing(LOOP, recorder.kinds))
    recorder.broken.clear()
    recorder.calls.clear()
    plan = plan_of(past)
    (loop,) = [node for node in plan.nodes if node.node_id == "loop"]
    assert (loop.decision, loop.failed_only, plan.unconfirmed) == (ReplayDecision.RERUN, True, ())
    ended, notebook = await run_again(past, plan)
    assert ended == RunOutcome(RunStatus.COMPLETED)
    assert {"pay.0", "pay.1"}.isdisjoint(recorder.calls)
    assert "add.1" in recorder.calls
    assert cast("dict[str, Json]", notebook.output("loop"))["count"] == 3


async def test_a_loop_with_a_mended_body_keeps_its_good_iterations_if_asked_to() -> None:
    recorder = NodeRecorder(broken={"add.2"})
    past = await run_first(compile_drawing(LOOP, recorder.kinds))
    recorder.broken.clear()
    mended = compile_drawing(LOOP, recorder.kinds, {"add": {"config": {"by": 5}}})
    whole = plan_of(past, mended)
    assert whole.unconfirmed == ("pay",)  # every iteration would run again
    assert reasons(whole, "loop") == ["failed", "config-changed"]
    recorder.calls.clear()
    plan = plan_of(past, mended, failed_only=True)
    assert plan.unconfirmed == ()
    ended, _ = await run_again(past, plan, mended)
    assert ended == RunOutcome(RunStatus.COMPLETED)
    assert recorder.calls == ["loop", "add.2", "add2"]


async def test_a_completed_loop_is_reused_unless_its_body_has_changed() -> None:
    recorder = NodeRecorder()
    past = await run_first(compile_drawing(LOOP, recorder.kinds))
    assert set(decisions(plan_of(past)).values()) == {"reuse"}
    changed = compile_drawing(LOOP, recorder.kinds, {"add": {"config": {"by": 5}}})
    plan = plan_of(past, changed)
    assert (decisions(plan)["loop"], plan.unconfirmed) == ("rerun", ("pay",))
    behind = plan_of(past, forced=frozenset({"start"}))
    assert decisions(behind)["loop"] in {"reuse", "maybe"}


async def test_a_forced_node_of_a_loop_runs_again_with_its_loop() -> None:
    recorder = NodeRecorder()
    past = await run_first(compile_drawing(LOOP, recorder.kinds))
    plan = plan_of(past, forced=frozenset({"add"}))
    assert decisions(plan) == {
        "start": "reuse", "loop": "rerun", "pay": "ask", "add": "rerun", "add2": "maybe",
    }  # fmt: skip
    assert reasons(plan, "loop") == ["forced"]
    recorder.calls.clear()
    ended, _ = await run_again(past, plan_of(past, forced=frozenset({"add"}), confirmed=frozenset({"pay"})))
    assert ended == RunOutcome(RunStatus.COMPLETED)
    assert {"add.0", "add.1", "add.2", "pay.0", "pay.1", "pay.2"} <= set(recorder.calls)


async def test_a_forced_node_of_a_failed_loop_runs_again_in_its_failed_iterations() -> None:
    recorder = NodeRecorder(broken={"add.1"})
    past = await run_first(compile_drawing(LOOP, recorder.kinds))
    recorder.broken.clear()
    recorder.calls.clear()
    plan = plan_of(past, forced=frozenset({"add"}))
    assert (reasons(plan, "loop"), plan.unconfirmed) == (["forced", "failed"], ())
    ended, _ = await run_again(past, plan)
    assert ended == RunOutcome(RunStatus.COMPLETED)
    assert {"pay.0", "pay.1"}.isdisjoint(recorder.calls)


async def test_a_write_that_moves_into_a_loop_or_out_of_it_is_asked_about() -> None:
    recorder = NodeRecorder()
    outside = "start > pay > loop; loop:continue > add; loop:done > add2"
    inside = "start > loop; loop:continue > pay > add; loop:done > add2"
    for before, after in ((outside, inside), (inside, outside)):
        past = await run_first(compile_drawing(before, recorder.kinds))
        moved = compile_drawing(after, recorder.kinds)
        assert plan_of(past, moved).unconfirmed == ("pay",)
        assert plan_of(past, moved, failed_only=True).unconfirmed == ("pay",)
        allowed = plan_of(past, moved, confirmed=frozenset({"pay"}))
        ended, _ = await run_again(past, allowed, moved)
        assert ended == RunOutcome(RunStatus.COMPLETED)


# ── rules ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_attempt_proves_nothing_about_the_first() -> None:
    recorder = NodeRecorder(broken={"pay"}, error="http-409")
    past = asyncio.run(run_first(compile_drawing("start > pay", recorder.kinds)))
    (span,) = [span for span in past.spans if span.node_id == "pay"]
    assert not may_have_happened(span)
    assert may_have_happened(replace(span, attempt=2))
    assert not may_have_happened(replace(span, status=SpanStatus.CANCELLED, resolved_config=None))


def test_differences_are_named_by_their_places() -> None:
    assert diff_paths({"a": 1}, {"a": 1}) == []
    assert diff_paths(1, 2, "data") == ["data"]
    assert diff_paths([1], [1, 2], "data") == ["data"]
    assert len(diff_paths({}, {str(number): 0 for number in range(100)})) == 20
