"""Agents that do the tool calls of other agents: steps of their own, one budget, through every death of a worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.agents import call_approvals
from engine.findings import FindingType
from engine.graph import ParsedGraph
from engine.model_calls import (
    ChatAnswer,
    ChatRequest,
    FinishReason,
    MessageRole,
    ModelCallFailed,
    ModelReply,
    NodeSpending,
    RequestedToolCall,
    TokenUsage,
)
from engine.node_api import NodeEffect
from engine.program import WorkflowProgram
from engine.run_errors import InvalidDefinition
from engine.run_records import RunOutcome, RunStatus, SpanStatus
from engine.services import ControlRequest, RunCaller
from engine.validation import validate_graph
from engine.values import Json
from nodes.catalog import load_catalog
from tests.unit.test_agent_runs import AGENT, LOOK, SEND, ScriptedModel, World, turn

pytestmark = pytest.mark.anyio

OUTER = [turn(("helper", "Oslo")), turn(("look", "Rome"), ("helper", "Rome"))]
INNER = [turn(("look", "Bonn"), ("look", "Kyiv")), turn(("send", "Kyiv"))]
ANSWERS = (len(OUTER) + 1) + 2 * (len(INNER) + 1)
TOOLS = (("look", "agent"), ("helper", "agent"), ("look", "helper"), ("send", "helper"))
PRICE = 1_000
"""Nano-dollars of one answer."""
USAGE = TokenUsage(100, 20)


def build_helper(name: str = "helper", agent: dict[str, Json] | None = None) -> dict[str, Json]:
    config: dict[str, Json] = {**AGENT, "prompt": "Help with {{ args.city }}.", "model": "first"}
    config |= agent or {}
    target: Json = {
        "node": {
            "type": "agent",
            "config": {key: value for key, value in config.items() if value is not None},
        }
    }
    return {"id": name, "type": "tool", "config": {**LOOK, "name": name, "target": target}}


def build_graph(
    outer: dict[str, Json] | None = None,
    inner: dict[str, Json] | None = None,
    wires: Sequence[tuple[str, str]] = (),
    more: Sequence[dict[str, Json]] = (),
    tools: Sequence[tuple[str, str]] = TOOLS,
) -> ParsedGraph:
    """Return an agent with the tools `look` and `helper`, an agent with the tools `look` and `send`."""
    nodes: list[Json] = [
        {"id": "start", "type": "manual"},
        {"id": "agent", "type": "agent", "config": {**AGENT, "model": "first", **(outer or {})}},
        {"id": "look", "type": "tool", "config": LOOK},
        {
            "id": "send",
            "type": "tool",
            "config": {**SEND, "approval": (inner or {}).get("approval", "never")},
        },
        build_helper(agent=inner),
        *more,
    ]
    connected = {"start", "agent", *(source for source, _ in (*tools, *wires))}
    nodes = [node for node in nodes if isinstance(node, dict) and node["id"] in connected]
    edges: list[Json] = [{"id": "start", "source": "start", "target": "agent"}]
    edges += [
        {"id": f"{source} {target}", "source": source, "target": target, "targetPort": "tools"}
        for source, target in (*tools, *wires)
    ]
    return ParsedGraph.from_stored({"nodes": nodes, "connections": edges})


@dataclass
class TwoScripts(ScriptedModel):
    """Model that follows one script for the outer agent, and another for the inner one."""

    inner: Sequence[Sequence[RequestedToolCall]] = field(default_factory=lambda: INNER)
    busy: int = 0
    """Requests of the inner agent that fail."""

    async def complete(
        self,
        caller: RunCaller,  # noqa: ARG002 - the protocol's parameters
        model_id: str,  # noqa: ARG002 - as above
        request: ChatRequest,
        *,
        idempotency_key: str,
        spending: NodeSpending,  # noqa: ARG002 - as above
        on_text: Callable[[str], None] | None = None,  # noqa: ARG002 - as above
    ) -> ModelReply:
        self.requests.append(request)
        self.on_request()
        is_inner = "Help with" in request.messages[0].content
        if is_inner and self.busy:
            self.busy -= 1
            raise ModelCallFailed("busy", code="model-busy", retryable=True, can_fall_back=False)
        self.billed.append(idempotency_key)
        turns = self.inner if is_inner else self.turns
        done = sum(message.role is MessageRole.ASSISTANT for message in request.messages)
        calls = turns[done] if done < len(turns) and request.tools else ()
        reason = FinishReason.TOOL_CALLS if calls else FinishReason.STOP
        text = "" if calls else "Helped." if is_inner else "Reported."
        return ModelReply(ChatAnswer(text, reason, USAGE, "first-1", calls), PRICE)


def build_world(
    outer: dict[str, Json] | None = None,
    inner: dict[str, Json] | None = None,
    tools: Sequence[tuple[str, str]] = TOOLS,
) -> World:
    catalog = load_catalog()
    graph = build_graph(outer, inner, tools=tools)
    program = WorkflowProgram.compile(graph, catalog, catalog.implementation)
    return World(program, TwoScripts(OUTER))


async def test_an_agent_works_in_steps_of_its_own_for_another_one() -> None:
    world = build_world()
    assert world.program.nodes["agent"].effect is NodeEffect.WRITE
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    output = world.output
    assert (output["response"], output["toolCalls"]) == ("Reported.", 3)
    assert output["usage"]["inputTokens"] == 100 * ANSWERS, "the steps of the inner agent count too"
    assert output["cost"] == f"0.{1_000 * ANSWERS:09d}".rstrip("0")
    told = [one["content"] for one in output["messages"] if one["role"] == "tool"]
    assert told[0] == told[2] == "Helped."
    nested = [step for step in world.steps if step.node_id == "helper"]
    assert len(nested) == 2 * (len(INNER) + 1 + 3)
    assert len({step.iteration for step in nested}) == 2
    assert len({step.key for step in world.steps if step.key}) == 3 + 6
    assert len(world.outside.effects) == 2
    (span,) = [span for span in world.spans if span.node_id == "agent"]
    assert len(json.loads(span.model_calls or b"[]")) == ANSWERS
    assert "Help with Oslo." in world.model.requests[1].messages[0].content


async def test_a_death_at_any_commit_costs_one_answer_and_repeats_no_effect_of_the_inner_agent() -> None:
    worker = build_world().worker()
    assert (await worker.work()).status is RunStatus.COMPLETED
    lost_inside = 0
    for last in range(1, worker.notebook.commits + 1):
        for kill in (-last, last):
            world = build_world()
            assert await world.work(kill) is None, kill
            assert await world.work() == RunOutcome(RunStatus.COMPLETED)
            assert ANSWERS <= len(world.model.billed) <= ANSWERS + 1, kill
            assert len(set(world.model.billed)) == len(world.model.billed), kill
            assert len(world.outside.effects) == 2, kill
            assert world.output["usage"]["inputTokens"] == 100 * ANSWERS, kill
            lost = len(world.model.billed) - ANSWERS
            assert world.output["lostAttempts"] >= lost, kill
            lost_inside += any(step.losses for step in world.steps if step.node_id == "helper")
    assert lost_inside


@pytest.mark.parametrize("most", range(700, 2_500, 60))
async def test_the_budget_of_the_outer_agent_holds_for_the_inner_one(most: int) -> None:
    world = build_world({"budget": {"maxTokens": most}, "maxTokens": 100}, {"maxTokens": 100})
    ended = await world.work()
    assert ended is not None
    spent = len(world.model.billed) * (USAGE.input_tokens + USAGE.output_tokens)
    assert spent <= most
    assert world.output["response"] == "Reported.", "a last answer has room"
    assert len(world.model.billed) < ANSWERS or most > 120 * ANSWERS


@pytest.mark.parametrize("most", [2_000, 2_500, 4_000, 6_000, 50_000])
async def test_many_calls_of_an_inner_agent_cost_no_more_than_the_outer_budget(most: int) -> None:
    world = build_world({"budget": {"maxCost": f"0.{most:09d}"}})
    cities = ("Oslo", "Rome", "Bonn", "Kyiv")
    world.model.turns = [turn(*(("helper", city) for city in cities))]
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    spent = PRICE * len(world.model.billed)
    assert spent <= most
    told = [one["content"] for one in world.output["messages"] if one["role"] == "tool"]
    assert len(told) == len(cities)
    is_enough = most == 50_000
    assert ("agent-limit" in told[-1]) is not is_enough
    assert world.output["response"] == "Reported.", "a last answer has room"


async def test_a_run_that_is_cancelled_inside_an_inner_agent_keeps_the_cost_of_a_lost_worker() -> None:
    world = build_world()
    assert await world.work(5) is None
    assert [step.name for step in world.steps if step.node_id == "helper" and not step.ended_at] == [
        "look",
        "look",
    ]
    worker = world.worker()
    world.outside.on_request = lambda: worker.control.ask(ControlRequest.CANCEL)
    world.outside.delay_seconds = 30.0
    assert (await worker.work()).status is RunStatus.CANCELLED
    world.keep(worker.notebook)
    (span,) = [span for span in world.spans if span.node_id == "agent"]
    assert len(json.loads(span.model_calls or b"[]")) == len(world.model.billed) == 2


async def test_a_run_that_is_cancelled_inside_an_inner_agent_keeps_the_cost_of_its_own_worker() -> None:
    world = build_world()
    worker = world.worker()
    world.outside.on_request = lambda: worker.control.ask(ControlRequest.CANCEL)
    world.outside.delay_seconds = 30.0
    assert (await worker.work()).status is RunStatus.CANCELLED
    world.keep(worker.notebook)
    (span,) = [span for span in world.spans if span.node_id == "agent"]
    assert len(json.loads(span.model_calls or b"[]")) == len(world.model.billed) == 2


async def test_the_cost_of_an_inner_agent_that_fails_counts_too() -> None:
    world = build_world(inner={"maxIterations": 1, "onLimit": "error"})
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    told = [json.loads(one["content"]) for one in world.output["messages"] if one["role"] == "tool"]
    assert "agent-limit" in told[0]["error"]
    assert world.output["usage"]["inputTokens"] == 100 * len(world.model.billed)


async def test_the_node_waits_for_a_busy_model_of_the_inner_agent() -> None:
    world = build_world()
    assert isinstance(world.model, TwoScripts)
    world.model.busy = 1
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.FAILED, "one attempt of the node"
    world.spans = [span for span in world.spans if span.status is SpanStatus.COMPLETED]
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(world.model.billed) == ANSWERS
    assert len(world.outside.effects) == 2


async def test_a_person_approves_the_calls_of_the_inner_agent() -> None:
    world = build_world(inner={"approval": "writes"})
    for _ in range(2):
        ended = await world.work()
        assert ended is not None
        assert ended.status is RunStatus.WAITING
        assert ended.due_at is not None, "the question expires"
        (asked,) = [span for span in world.spans if span.status is SpanStatus.WAITING and span.awaits]
        request: Any = json.loads(asked.awaits or b"")["request"]
        assert (asked.node_id, request["toolCall"]["agentId"]) == ("send", "helper")
        answer = {"output": {"choice": call_approvals.APPROVE}, "port": call_approvals.APPROVE}
        world.answers[asked.node_id, asked.iteration] = json.dumps(answer).encode()
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(world.outside.effects) == 2
    assert len(world.model.billed) == ANSWERS


async def test_text_of_outsiders_for_the_outer_agent_is_one_for_the_inner_one() -> None:
    tools = [("helper", "agent"), ("send", "helper"), ("look", "agent")]
    world = build_world(inner={"approval": "tainted"}, tools=tools)
    world.model.turns = [turn(("look", "Oslo")), turn(("helper", "Oslo"))]
    assert isinstance(world.model, TwoScripts)
    world.model.inner = [turn(("send", "Oslo"))]
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.WAITING
    assert world.outside.effects == []


async def test_a_worker_hands_off_between_two_steps_of_an_inner_agent() -> None:
    world = build_world()
    worker = world.worker()

    def hand_off() -> None:
        if len(world.model.requests) == 2:
            worker.control.ask(ControlRequest.HAND_OFF)

    world.model.on_request = hand_off
    assert (await worker.work()).status is RunStatus.RELEASED
    world.keep(worker.notebook)
    assert len(world.model.billed) == 2
    assert all(step.ended_at for step in world.steps if step.kind == "model")
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(world.model.billed) == ANSWERS
    assert len(world.outside.effects) == 2


@pytest.mark.parametrize("has_look", [True, False])
async def test_text_of_outsiders_for_the_inner_agent_is_one_for_the_outer_one(*, has_look: bool) -> None:
    tools = [("helper", "agent"), ("send", "agent"), *([("look", "helper")] if has_look else [])]
    world = build_world(inner={"approval": "tainted"}, tools=tools)
    world.model.turns = [turn(("helper", "Oslo")), turn(("send", "Oslo"))]
    ended = await world.work()
    assert ended is not None
    assert ended.status is (RunStatus.WAITING if has_look else RunStatus.COMPLETED)
    assert len(world.outside.effects) == (0 if has_look else 1)


async def test_an_approval_of_an_inner_agent_does_not_hold_for_it_with_another_tool() -> None:
    rule: dict[str, Json] = {"approval": "writes"}
    tools = [("helper", "agent"), ("send", "helper")]
    world = build_world(rule, tools=tools)
    for program in (build_world(rule, tools=[*tools, ("look", "helper")]).program, world.program):
        ended = await world.work()
        assert ended is not None
        assert ended.status is RunStatus.WAITING
        (asked,) = [
            span
            for span in world.spans
            if span.status is SpanStatus.WAITING
            and span.awaits
            and (span.node_id, span.iteration) not in world.answers
        ]
        assert asked.node_id == "helper"
        answer = {"output": {"choice": call_approvals.APPROVE}, "port": call_approvals.APPROVE}
        world.answers[asked.node_id, asked.iteration] = json.dumps(answer).encode()
        world.program = program
    assert [step for step in world.steps if step.node_id == "helper"] == []


async def test_agents_that_only_read_work_one_after_the_other() -> None:
    tools = [("helper", "agent"), ("look", "helper")]
    world = build_world(tools=tools)
    world.model.turns = [turn(("helper", "Oslo"), ("helper", "Rome"))]
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    inner = sorted((step.sequence, step.iteration) for step in world.steps if step.node_id == "helper")
    places = [place for _, place in inner]
    assert places == sorted(places)
    assert len(set(places)) == 2


@pytest.mark.parametrize(
    "tools",
    [
        [("look", "agent"), ("notes", "agent"), ("helper", "agent"), ("send", "helper")],
        [("notes", "agent"), ("send", "agent"), ("helper", "agent"), ("look", "helper")],
        [("look", "agent"), ("send", "agent"), ("helper", "agent"), ("notes", "helper")],
    ],
)
def test_a_way_out_through_an_agent_inside_another_is_warned_of(tools: list[tuple[str, str]]) -> None:
    notes: Json = {"node": {"type": "sqlite-source", "config": {"dataSource": "ds_1", "query": "SELECT 1"}}}
    private: dict[str, Json] = {
        "id": "notes",
        "type": "tool",
        "config": {**LOOK, "name": "notes", "target": notes},
    }
    found = validate_graph(build_graph(tools=tools, more=[private]), load_catalog()).warnings
    assert "agent" in [one.node_id for one in found if one.type is FindingType.AGENT_EXFILTRATION_PATH]


def test_validation_follows_agents_inside_agents() -> None:
    catalog = load_catalog()
    assert not validate_graph(build_graph(), catalog).errors
    only_reads = validate_graph(build_graph({"effects": ["read"]}), catalog).errors
    assert [(one.type, one.node_id) for one in only_reads] == [(FindingType.INVALID_CONFIG, "helper")]
    without_model = validate_graph(build_graph(inner={"model": None}), catalog).warnings
    assert (FindingType.MISSING_CONFIG, "helper") in [(one.type, one.node_id) for one in without_model]
    names = ["second", "third"]
    deep = build_graph(
        wires=[("second", "helper"), ("third", "second")], more=[build_helper(name) for name in names]
    )
    too_deep = validate_graph(deep, catalog).errors
    assert [one.node_id for one in too_deep] == ["third"]
    assert "at most 3 deep" in too_deep[0].message


@pytest.mark.parametrize(("count", "is_valid"), [(64, True), (65, False)])
def test_an_agent_has_at_most_64_tools(count: int, *, is_valid: bool) -> None:
    more: list[dict[str, Json]] = [
        {"id": f"look-{number}", "type": "tool", "config": {**LOOK, "name": f"look-{number}"}}
        for number in range(count - 1)
    ]
    wires = [(str(tool["id"]), "agent") for tool in more]
    graph = build_graph({"effects": ["read"]}, tools=[("look", "agent")], wires=wires, more=more)
    found = validate_graph(graph, load_catalog()).errors
    assert [one.message for one in found if "64 tools" not in one.message] == []
    assert (not found) is is_valid


def test_agents_with_too_many_tools_are_refused_before_all_their_paths_are_followed() -> None:
    names = [f"helper-{number}" for number in range(150)]
    wires = [(source, target) for place, source in enumerate(names) for target in ("agent", *names[:place])]
    graph = build_graph(wires=wires, more=[build_helper(name) for name in names])
    catalog = load_catalog()
    (found,) = validate_graph(graph, catalog).errors
    assert (found.type, found.node_id) == (FindingType.INVALID_CONFIG, "agent")
    assert "more than 256 tools" in found.message
    with pytest.raises(InvalidDefinition, match="too many tools"):
        WorkflowProgram.compile(graph, catalog, catalog.implementation)
