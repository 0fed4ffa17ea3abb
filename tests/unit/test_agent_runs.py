"""Runs of agents with their tools: through every death of a worker, with costs counted outside."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from engine import run_progress
from engine.agents import agent_wiring
from engine.agents.agent_steps import AgentStep, StepStatus
from engine.graph import ParsedGraph, RetryPolicy
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
from engine.model_prices import ModelPrice
from engine.program import WorkflowProgram
from engine.replay_changes import changed_body_nodes
from engine.run_errors import NodeError
from engine.run_records import NodeSpan, RunOutcome, RunStatus, SpanStatus
from engine.services import ControlRequest, NodeServices, RunCaller
from engine.values import Json
from nodes.catalog import load_catalog
from nodes.outbound_http import OutboundRefusalCode, OutboundRefused
from tests.unit.run_harness import InMemoryJournal, SimulatedWorker, require_error, wait_soon

pytestmark = pytest.mark.anyio

LOOK: dict[str, Json] = {
    "name": "look",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "target": {"node": {"type": "http-request", "config": {"url": "https://a.example/{{ args.city }}"}}},
}
SEND: dict[str, Json] = {
    **LOOK,
    "name": "send",
    "description": "Sends a report.",
    "target": {
        "node": {
            "type": "http-request",
            "config": {
                "url": "https://b.example/{{ trigger.team }}",
                "method": "POST",
                "body": {"to": "{{ args.city }}", "by": "{{ data.team }}"},
            },
        }
    },
}
AGENT: dict[str, Json] = {
    "prompt": "Report to {{ data.team }}.",
    "effects": ["read", "write"],
    "approval": "never",
}
TRIGGER: Json = {"team": "north"}


def compile_agent(
    edit: Callable[[dict[str, Json]], None] = lambda _: None, /, **agent: Json
) -> WorkflowProgram:
    """Compile an agent with two tools; `edit` changes one, and `fallbackModelIds` is a field of its model."""
    model = {name: agent.pop(name) for name in ("fallbackModelIds",) if name in agent}
    send = json.loads(json.dumps(SEND))
    edit(send)
    stored: dict[str, Json] = {
        "nodes": [
            {"id": "start", "type": "manual"},
            {"id": "agent", "type": "agent", "config": {**AGENT, **agent}},
            {"id": "model", "type": "llm", "config": {"model": "first", "system": "Be short.", **model}},
            {"id": "look", "type": "tool", "config": LOOK},
            {"id": "send", "type": "tool", "config": send},
        ],
        "connections": [
            {"id": "1", "source": "start", "target": "agent"},
            {"id": "2", "source": "model", "target": "agent", "targetPort": "ai"},
            {"id": "3", "source": "look", "target": "agent", "targetPort": "tools"},
            {"id": "4", "source": "send", "target": "agent", "targetPort": "tools"},
        ],
    }
    catalog = load_catalog()
    return WorkflowProgram.compile(ParsedGraph.from_stored(stored), catalog, catalog.implementation)


def turn(*calls: tuple[str, str]) -> list[RequestedToolCall]:
    return [RequestedToolCall(f"c{index}", name, {"city": city}) for index, (name, city) in enumerate(calls)]


TURNS = [
    turn(("look", "Oslo"), ("look", "Rome")),
    turn(("send", "Oslo"), ("look", "Bonn"), ("send", "Rome")),
    turn(("look", "Kyiv")),
    turn(("send", "Kyiv")),
    turn(("look", "Riga"), ("send", "Riga")),
]
STEPS = 1 + len(TURNS) + sum(map(len, TURNS))


FREE = ModelPrice("0", "0")


@dataclass
class ScriptedModel:
    """Model that follows the turns of a script by the length of the conversation, and bills each answer."""

    turns: Sequence[Sequence[RequestedToolCall]] = field(default_factory=lambda: TURNS)
    billed: list[str] = field(default_factory=list)
    requests: list[ChatRequest] = field(default_factory=list)
    failures: int = 0
    wait_seconds: float | None = None
    """Time that a failure names for the next request."""
    refusals: int = 0
    """Requests that the budget refuses."""
    prices: Mapping[str, ModelPrice] = field(default_factory=lambda: {"first": FREE})
    """Prices by which an agent estimates costs; each answer costs 1,000 nano-dollars nevertheless."""
    on_request: Callable[[], None] = lambda: None

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
        if self.failures:
            self.failures -= 1
            raise ModelCallFailed(
                "busy",
                code="model-busy",
                retryable=True,
                can_fall_back=True,
                retry_after_seconds=self.wait_seconds,
            )
        if self.refusals:
            self.refusals -= 1
            raise NodeError("The budget doesn't suffice", code="model-budget-exceeded")
        self.billed.append(idempotency_key)
        await asyncio.sleep(0)
        done = sum(message.role is MessageRole.ASSISTANT for message in request.messages)
        calls = self.turns[done] if done < len(self.turns) and request.tools else ()
        reason = FinishReason.TOOL_CALLS if calls else FinishReason.STOP
        text = "" if calls else "Reported."
        return ModelReply(ChatAnswer(text, reason, TokenUsage(100, 20), "first-1", calls), 1_000)

    async def read_price(self, caller: RunCaller, model_id: str) -> ModelPrice | None:  # noqa: ARG002 - the protocol's parameters
        return self.prices.get(model_id)


@dataclass
class Answer:
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    body: bytes = b"{}"
    url: str = ""


@dataclass
class Outside:
    """Servers of the tools; they do an effect once for each key."""

    effects: list[str] = field(default_factory=list)
    bodies: list[Json] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    broken: bool = False
    delay_seconds: float = 0.0
    on_request: Callable[[], None] = lambda: None

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout_seconds: float,  # noqa: ARG002 - the protocol's parameters
        follow_redirects: bool = True,  # noqa: ARG002 - as above
    ) -> Answer:
        self.urls.append(url)
        self.on_request()
        await asyncio.sleep(self.delay_seconds)
        if self.broken:
            return Answer(500)
        key = {name.lower(): value for name, value in headers.items()}.get("idempotency-key")
        if method == "POST":
            assert key is not None
            if key not in self.effects:
                self.effects.append(key)
                self.bodies.append(json.loads(body or b""))
        return Answer(body=json.dumps({"at": url}).encode())


class DyingJournal(InMemoryJournal):
    """Journal of a worker that dies before (negative) or after a commit, and stops there."""

    def __init__(self, spans: Sequence[NodeSpan], steps: Sequence[AgentStep], last: int) -> None:
        super().__init__(spans)
        self.steps = {(step.node_id, step.iteration, step.number): step for step in steps}
        self.died = asyncio.Event()
        self._last = last

    async def commit(self) -> None:
        if self.commits + 1 == -self._last:
            self.died.set()
            await asyncio.Event().wait()
        await super().commit()
        if self._last and self.commits == self._last:
            self.died.set()
            await asyncio.Event().wait()


@dataclass
class World:
    """All that outlives a worker."""

    program: WorkflowProgram = field(default_factory=compile_agent)
    model: ScriptedModel = field(default_factory=ScriptedModel)
    outside: Outside = field(default_factory=Outside)
    spans: list[NodeSpan] = field(default_factory=list)
    steps: list[AgentStep] = field(default_factory=list)
    answers: dict[tuple[str, str], bytes] = field(default_factory=dict)
    """Answers to the questions about tool calls."""
    services: Mapping[str, Any] = field(default_factory=dict)
    """Further services of nodes, by their names."""
    is_tainted: bool = False
    """Whether another run has started this one with text of outsiders."""
    died: int = 0

    def worker(self, last: int = 0) -> SimulatedWorker:
        services = NodeServices(http=self.outside, models=self.model, **self.services)
        worker = SimulatedWorker(
            self.program, TRIGGER, recorded=self.spans, services=services, wait_answers=dict(self.answers)
        )
        worker.notebook = DyingJournal(self.spans, self.steps, last)
        numbers = [0, *(span.sequence for span in self.spans), *(step.sequence for step in self.steps)]
        caller = msgspec.structs.replace(worker.start.caller, is_tainted=self.is_tainted)
        worker.start = msgspec.structs.replace(worker.start, caller=caller)
        worker.start = msgspec.structs.replace(
            worker.start, steps=sorted(self.steps, key=lambda step: step.number), sequence=max(numbers)
        )
        return worker

    def keep(self, journal: InMemoryJournal) -> None:
        self.spans, self.steps = list(journal.rows.values()), list(journal.steps.values())

    async def work(self, last: int = 0) -> RunOutcome | None:
        """Work until the end, or until the worker dies at a commit; return the outcome, None for a death."""
        worker = self.worker(last)
        journal = worker.notebook
        assert isinstance(journal, DyingJournal)
        task = worker.begin()
        death = asyncio.create_task(journal.died.wait())
        await asyncio.wait([task, death], return_when=asyncio.FIRST_COMPLETED, timeout=20)
        if death.done():
            self.died += 1
            # A dead process records nothing more.
            journal.is_held = False
            task.cancel()
            await asyncio.wait([task])
            self.keep(journal)
            return None
        death.cancel()
        self.keep(journal)
        return task.result()

    @property
    def output(self) -> dict[str, Any]:
        (span,) = [span for span in self.spans if span.node_id == "agent"]
        found = json.loads(span.output or b"null")
        assert isinstance(found, dict), span.error
        return found


class LateOutside(Outside):
    """Servers whose answers come after the run has been cancelled."""

    async def request(self, method: str, url: str, **options: Any) -> Answer:  # noqa: ANN401 - passed on
        self.on_request()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return await super().request(method, url, **options)


@pytest.mark.parametrize("cities", [[("send", "Oslo")], [("look", "Oslo"), ("look", "Rome")]])
async def test_a_result_after_a_cancel_is_recorded_and_not_given_to_the_model(
    cities: list[tuple[str, str]],
) -> None:
    world = World(model=ScriptedModel(turns=[turn(*cities)]), outside=LateOutside())
    worker = world.worker()
    world.outside.on_request = lambda: worker.control.ask(ControlRequest.CANCEL)
    assert (await worker.work()).status is RunStatus.CANCELLED
    world.keep(worker.notebook)
    _, *called = sorted(world.steps, key=lambda step: step.number)
    assert [step.status for step in called] == [StepStatus.COMPLETED] * len(cities)
    assert all(b"https://" in (step.result or b"") for step in called)
    assert len(world.model.requests) == 1
    (span,) = [span for span in world.spans if span.node_id == "agent"]
    assert span.status is SpanStatus.CANCELLED


async def test_an_agent_waits_for_its_provider_only_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_progress, "MAX_PROVIDER_WAITS", 2)
    model = ScriptedModel(failures=1_000, wait_seconds=0.001)
    world = World(model=model)
    outcome = await world.work()
    assert outcome is not None
    assert outcome.status is RunStatus.FAILED
    # Two requests that are waited behind, and the attempts of the node.
    assert len(model.requests) == 2 + RetryPolicy().max_attempts


class LinkMaker:
    """Makes links that answer questions without an account."""

    async def create_links(self, caller: RunCaller, places: Sequence[tuple[str, str]]) -> Sequence[str]:  # noqa: ARG002 - the protocol's parameters
        return ["https://flows.example/secret"] * len(places)


async def test_a_model_gets_no_link_of_an_approval_sent_by_a_tool() -> None:
    city = "?at=https://approval.invalid/ask"
    world = World(model=ScriptedModel([turn(("look", city))]), services={"approvals": LinkMaker()})
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert world.outside.urls == []
    assert "links of approvals" in world.model.requests[-1].messages[-1].content


async def test_the_rounds_of_a_run_are_counted_right_behind_the_last_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_progress, "MAX_PROVIDER_WAITS", 1)
    monkeypatch.setattr(run_progress, "MAX_ROUND_SECONDS", 0.001)
    program = compile_agent()
    settings = replace(program.graph.settings, retry_on_failure=True, max_retries=3)
    model = ScriptedModel(failures=1_000, wait_seconds=0.001)
    world = World(replace(program, graph=replace(program.graph, settings=settings)), model)
    outcome = await world.work()
    assert outcome is not None
    assert outcome.status is RunStatus.FAILED
    assert len(model.requests) == 1 + 4 * RetryPolicy().max_attempts


async def count_commits() -> int:
    world = World()
    worker = world.worker()
    assert (await worker.work()).status is RunStatus.COMPLETED
    return worker.notebook.commits


@pytest.mark.parametrize("fallbacks", [[], ["second"]])
async def test_a_limit_of_costs_needs_the_price_of_each_model(fallbacks: list[Json]) -> None:
    program = compile_agent(budget={"maxCost": "1"}, fallbackModelIds=fallbacks)
    priced = World(program, ScriptedModel(prices={"first": FREE, "second": FREE}))
    assert await priced.work() == RunOutcome(RunStatus.COMPLETED)
    known = {"first": FREE} if fallbacks else {}
    world = World(program, ScriptedModel(prices=known))
    outcome = await world.work()
    assert outcome is not None
    assert outcome.status is RunStatus.FAILED
    (failed,) = [span for span in world.spans if span.node_id == "agent"]
    assert failed.error is not None
    assert failed.error.code == "model-price-unknown"
    assert world.model.requests == []


async def test_an_agent_calls_its_tools_and_answers() -> None:
    world = World()
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    output = world.output
    assert (output["response"], output["stopReason"], output["toolCalls"]) == ("Reported.", "finished", 9)
    assert output["cost"] == "0.000006"
    assert output["usage"]["inputTokens"] == 600
    assert len(output["steps"]) == len(world.steps) == STEPS
    assert [span.node_id for span in world.spans] == ["start", "agent"], "providers never run"
    first = world.model.requests[0]
    assert [(one.role.value, one.content) for one in first.messages] == [
        ("system", "Be short."),
        ("user", "Report to north."),
    ]
    assert [tool.name for tool in first.tools] == ["look", "send"]
    assert world.outside.bodies == [{"to": city, "by": "north"} for city in ("Oslo", "Rome", "Kyiv", "Riga")]
    assert world.outside.urls[:3] == [
        "https://a.example/Oslo",
        "https://a.example/Rome",
        "https://b.example/north",
    ]
    assert world.outside.effects[0] == "exec_2:agent:0:4"


async def test_a_turn_costs_two_commits_and_each_write_one_more() -> None:
    writes = sum(call.name == "send" for calls in TURNS for call in calls)
    # Besides, one before the agent begins and one with its result.
    assert await count_commits() == 2 * (len(TURNS) + 1) + writes + 2


async def test_a_death_at_any_commit_costs_at_most_one_answer_and_repeats_no_effect() -> None:
    for last in range(1, await count_commits() + 1):
        for kill in (-last, last):
            world = World()
            assert await world.work(kill) is None, kill
            assert await world.work() == RunOutcome(RunStatus.COMPLETED)
            recorded = len(TURNS) + 1
            assert recorded <= len(world.model.billed) <= recorded + world.died, kill
            assert len(set(world.model.billed)) == len(world.model.billed), (
                "each request has a key of its own"
            )
            assert len(world.outside.effects) == 4, kill
            assert world.output["response"] == "Reported."
            assert world.output["lostAttempts"] <= 1
            assert len(world.steps) == STEPS


@pytest.mark.parametrize("kills", [[3] * 30, [-3, 3] * 15, [2, 5, -4] * 10])
async def test_many_deaths_in_one_run_cost_one_answer_each_at_most(kills: list[int]) -> None:
    world = World()
    for kill in kills:
        if await world.work(kill) is not None:
            break
    else:
        assert (await world.work()) is not None
    assert world.output["response"] == "Reported."
    assert world.died >= 5
    assert len(TURNS) + 1 <= len(world.model.billed) <= len(TURNS) + 1 + world.died
    assert len(world.outside.effects) == 4


async def test_three_lost_answers_fail_the_agent() -> None:
    world = World()
    for _ in range(3):
        assert await world.work(-3) is None
    ended = await world.work()
    assert ended is not None
    error = require_error(ended)
    assert error.cause is not None
    assert error.cause.code == "lost-attempt"
    assert len(world.model.billed) == 3


async def test_a_write_with_an_unknown_outcome_is_told_to_the_model_if_it_must_not_be_repeated() -> None:
    def fail_if_unknown(tool: dict[str, Json]) -> None:
        tool["onUnknown"] = "fail"

    world = World(compile_agent(fail_if_unknown), ScriptedModel([turn(("send", "Oslo"))]))
    assert await world.work(-4) is None  # before the result of the write is durable
    assert len(world.outside.effects) == 1
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(world.outside.urls) == 1
    (sent,) = [step for step in world.steps if step.name == "send"]
    assert sent.status is StepStatus.FAILED
    assert "outcome is unknown" in world.model.requests[-1].messages[-1].content


async def test_errors_of_tools_go_to_the_model() -> None:
    world = World(model=ScriptedModel([turn(("look", "Oslo")), turn(("fly", "Oslo"))]))
    world.outside.broken = True
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    told = [json.loads(one["content"]) for one in world.output["messages"] if one["role"] == "tool"]
    assert "500" in told[0]["error"]
    assert told[1]["error"] == "There is no tool 'fly'"
    assert all(one["hint"] for one in told)


async def test_a_writing_tool_is_not_offered_to_an_agent_that_may_only_read() -> None:
    world = World(compile_agent(effects=["read"]))
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert [tool.name for tool in world.model.requests[0].tools] == ["look"]
    assert world.outside.effects == []


async def test_a_failed_answer_is_asked_for_again_by_the_retry_of_the_node() -> None:
    world = World(model=ScriptedModel(failures=1))
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.FAILED
    # A resumed run continues with the steps of the failed one.
    world.spans = [span for span in world.spans if span.status is SpanStatus.COMPLETED]
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert [step.attempt for step in world.steps][:2] == [2, 1]
    assert world.output["lostAttempts"] == 0


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (ControlRequest.STOP, RunStatus.STOPPED),
        (ControlRequest.HAND_OFF, RunStatus.RELEASED),
        (ControlRequest.CANCEL, RunStatus.CANCELLED),
    ],
)
async def test_an_agent_leaves_between_two_steps(request_: ControlRequest, status: RunStatus) -> None:
    world = World()
    worker = world.worker()
    asked = asyncio.Event()

    def ask() -> None:
        if len(world.model.requests) == 2:
            asked.set()
            worker.control.ask(request_)

    world.model.on_request = ask
    task = worker.begin()
    await wait_soon(asked)
    assert (await task).status is status
    world.keep(worker.notebook)
    assert len(world.model.requests) == 2
    if request_ is not ControlRequest.CANCEL:
        assert all(step.ended_at for step in world.steps if step.kind == "model")
    if request_ is ControlRequest.HAND_OFF:
        assert await world.work() == RunOutcome(RunStatus.COMPLETED)
        assert len(world.model.billed) == len(TURNS) + 1
        assert len(world.outside.effects) == 4


async def test_a_write_with_an_unknown_outcome_gets_no_further_attempt_if_it_must_not_be_repeated() -> None:
    def limit(tool: dict[str, Json]) -> None:
        tool.update(onUnknown="fail", maxAttempts=3, timeout=0.05)

    world = World(compile_agent(limit), ScriptedModel([turn(("send", "Oslo"))]))
    world.outside.delay_seconds = 30.0
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(world.outside.urls) == 1
    told = json.loads(world.model.requests[-1].messages[-1].content)
    assert told["error"].startswith("timeout: ")
    assert "may have been done" in told["hint"]


async def test_a_write_with_a_refused_answer_may_have_been_done() -> None:
    def refuse() -> None:
        if "b.example" in world.outside.urls[-1]:
            raise OutboundRefused(OutboundRefusalCode.RESPONSE_TOO_LARGE, "more than 10 MB")

    world = World(model=ScriptedModel([turn(("send", "Oslo"))]))
    world.outside.on_request = refuse
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    told = json.loads(world.model.requests[-1].messages[-1].content)
    assert told["error"].startswith("response-too-large: ")
    assert "may have been done" in told["hint"]


async def test_a_config_of_a_tool_that_can_not_be_rendered_is_an_error_for_the_model() -> None:
    def spoil(tool: dict[str, Json]) -> None:
        config: Json = {"url": "https://b.example", "method": "POST", "body": "{{ args.city }}" * 300}
        tool["target"] = {"node": {"type": "http-request", "config": config}}

    program = compile_agent(spoil)
    long = "x" * 100_000
    world = World(program, ScriptedModel([turn(("send", long), ("send", long))]))
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    told = [json.loads(one["content"]) for one in world.output["messages"] if one["role"] == "tool"]
    assert [one["error"].partition(":")[0] for one in told] == ["expression-error"] * 2


async def test_a_refused_reservation_is_no_lost_answer() -> None:
    world = World(model=ScriptedModel(refusals=4))
    for _ in range(4):
        ended = await world.work()
        assert ended is not None
        error = require_error(ended)
        assert error.cause is not None
        assert error.cause.code == "model-budget-exceeded"
        world.spans = [span for span in world.spans if span.status is SpanStatus.COMPLETED]
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert world.output["lostAttempts"] == 0


async def test_a_recorded_call_of_a_tool_that_is_gone_is_not_done() -> None:
    world = World(model=ScriptedModel([turn(("send", "Oslo"))]))
    assert await world.work(3) is None  # the call is recorded, and not done
    assert world.outside.effects == []
    world.program = compile_agent(lambda tool: tool.update(name="post"))
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert world.outside.effects == []
    assert "no tool 'send' any more" in world.model.requests[-1].messages[-1].content


@pytest.mark.parametrize(
    "edit", [{"description": "Sends it."}, {"parameters": {"type": "object"}}, {"maxResultBytes": 20_000}]
)
def test_the_key_of_an_agent_has_all_that_its_model_reads_of_a_tool(edit: dict[str, Json]) -> None:
    changed = compile_agent(lambda tool: tool.update(edit)).nodes["agent"]
    assert changed.implementation != compile_agent().nodes["agent"].implementation


def test_an_agent_in_a_loop_is_edited_by_an_edit_of_its_tool() -> None:
    catalog = load_catalog()

    def draw(tool: Mapping[str, Json]) -> ParsedGraph:
        ends = [("start", "output", "each", "input"), ("each", "continue", "agent", "input")]
        ends += [("agent", "output", "last", "input"), ("model", "output", "agent", "ai")]
        ends += [("tool", "output", "agent", "tools")]
        names = ("source", "sourcePort", "target", "targetPort")
        stored: dict[str, Json] = {
            "nodes": [
                {"id": "start", "type": "manual"},
                {"id": "each", "type": "loop", "config": {"items": [1]}},
                {"id": "agent", "type": "agent", "config": AGENT},
                {"id": "last", "type": "set", "config": {"values": {}}},
                {"id": "model", "type": "llm", "config": {"model": "first"}},
                {"id": "tool", "type": "tool", "config": dict(tool)},
            ],
            "connections": [
                {"id": str(number), **dict(zip(names, one, strict=True))} for number, one in enumerate(ends)
            ],
        }
        return ParsedGraph.from_stored(stored)

    before, after = draw(LOOK), draw({**LOOK, "description": "The weather."})
    program = WorkflowProgram.compile(after, catalog, catalog.implementation)
    original = agent_wiring.remove_providers(before)
    rewired = agent_wiring.find_rewired_agents(before, after)
    found = changed_body_nodes(program.nodes["each"], original, program.graph, rewired)
    assert found == {"agent", "last"}
    assert agent_wiring.find_rewired_agents(before, before) == frozenset()
