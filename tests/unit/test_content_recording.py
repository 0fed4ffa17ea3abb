"""Nodes with `recordContent: false`: their contents are in no record, through every death of a worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from engine import content_recording, workflow_runner
from engine.agents.agent import MAX_CONVERSATIONS
from engine.agents.agent_steps import StepStatus
from engine.agents.tool_calls import ReadOnlyBlobs
from engine.findings import FindingType
from engine.graph import ParsedGraph
from engine.model_calls import ModelReply
from engine.model_prices import show_cost
from engine.program import WorkflowProgram
from engine.run_errors import NodeError
from engine.run_records import AttemptSpan, LogLine, RunOutcome, RunStatus
from engine.services import BlobService, ControlRequest, RunCaller, ThrottleService
from engine.validation import validate_graph
from engine.values import Json
from nodes.catalog import load_catalog
from tests.unit import test_agent_runs
from tests.unit.run_harness import InMemoryJournal, require_error, wait_soon
from tests.unit.test_agent_runs import LOOK, ScriptedModel, World, turn

pytestmark = pytest.mark.anyio

CANARY = "canary"
TURNS = [
    turn(("look", f"{CANARY}-1"), ("look", f"{CANARY}-2")),
    turn((f"{CANARY}-tool", CANARY)),
    turn(("look", CANARY)),
]
AGENT: dict[str, Json] = {"prompt": f"Find {CANARY} for {{{{ data.team }}}}.", "model": "first"}
HELPER_AGENT: dict[str, Json] = {"prompt": f"{CANARY} {{{{ args.city }}}}", "model": "first"}
UNRECORDED: dict[str, Json] = {"recordContent": False}


def build_graph(
    nodes: dict[str, tuple[str, dict[str, Json]]], tools: Sequence[tuple[str, str]] = ()
) -> ParsedGraph:
    """Return a graph in which all nodes that are no tools follow `start`, each with its type and config."""
    stored: list[Json] = [
        {"id": name, "type": kind, "config": config} for name, (kind, config) in nodes.items()
    ]
    providers = {tool for tool, _ in tools}
    edges: list[Json] = [
        {"id": name, "source": "start", "target": name} for name in nodes if name not in providers
    ]
    edges += [
        {"id": f"{tool} {agent}", "source": tool, "target": agent, "targetPort": "tools"}
        for tool, agent in tools
    ]
    return ParsedGraph.from_stored(
        {"nodes": [{"id": "start", "type": "manual"}, *stored], "connections": edges}
    )


def compile_graph(graph: ParsedGraph) -> WorkflowProgram:
    catalog = load_catalog()
    return WorkflowProgram.compile(graph, catalog, catalog.implementation)


def build_agent(agent: dict[str, Json], look: dict[str, Json] | None = None) -> ParsedGraph:
    nodes = {"agent": ("agent", {**AGENT, **agent}), "look": ("tool", {**LOOK, **(look or {})})}
    return build_graph(nodes, [("look", "agent")])


@dataclass
class RecordedWorld(World):
    """World that keeps the log lines and attempts of all workers too."""

    lines: list[LogLine] = field(default_factory=list)
    attempts: list[AttemptSpan] = field(default_factory=list)

    def keep(self, journal: InMemoryJournal) -> None:
        super().keep(journal)
        self.lines += journal.lines
        self.attempts += journal.attempts.values()

    def list_records(self, *, with_outputs: bool = False) -> str:
        spans = (
            self.spans
            if with_outputs
            else [msgspec.structs.replace(span, output=None) for span in self.spans]
        )
        return repr((spans, self.steps, self.lines, self.attempts))


async def test_contents_of_an_agent_are_recorded_unless_its_config_says_otherwise() -> None:
    world = RecordedWorld(compile_graph(build_agent({})), ScriptedModel(TURNS))
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert CANARY in world.list_records()


async def test_a_death_at_any_commit_begins_a_new_conversation_and_records_no_content() -> None:
    program = compile_graph(build_agent(UNRECORDED))
    commits = 2 * (len(TURNS) + 1) + 2
    for last in range(1, commits + 1):
        for kill in (-last, last):
            world = RecordedWorld(program, ScriptedModel(TURNS))
            assert await world.work(kill) is None, kill
            assert CANARY not in world.list_records(), kill
            assert await world.work() == RunOutcome(RunStatus.COMPLETED)
            assert CANARY not in world.list_records(with_outputs=True), kill
            answers = [
                step for step in world.steps if step.kind == "model" and step.status is StepStatus.COMPLETED
            ]
            assert len(answers) <= len(world.model.billed) <= len(answers) + world.died, kill
            assert len(set(world.model.billed)) == len(world.model.billed), (
                "each request has a key of its own"
            )
            assert len({step.key for step in world.steps if step.key}) == sum(
                step.kind == "tool" for step in world.steps
            )
            assert all(step.ended_at is not None for step in world.steps), "no step stays open"
            output = world.output
            assert (output["response"], output["messages"]) == ("Reported.", [])
            assert output["cost"] == show_cost(len(answers) * 1_000), "lost conversations cost too"
            assert len(world.model.billed) - len(answers) <= output["lostAttempts"] <= world.died
            assert CANARY not in json.dumps(output)


async def test_a_graceful_move_to_another_worker_begins_a_new_conversation_too() -> None:
    world = RecordedWorld(compile_graph(build_agent(UNRECORDED)), ScriptedModel(TURNS))
    worker = world.worker()
    asked = asyncio.Event()

    def ask() -> None:
        if len(world.model.requests) == 2:
            asked.set()
            worker.control.ask(ControlRequest.HAND_OFF)

    world.model.on_request = ask
    task = worker.begin()
    await wait_soon(asked)
    assert (await task).status is RunStatus.RELEASED
    world.keep(worker.notebook)
    world.model.on_request = lambda: None
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(world.model.billed) == 2 + len(TURNS) + 1
    assert (world.output["lostAttempts"], world.output["cost"]) == (
        0,
        show_cost(len(world.model.billed) * 1_000),
    )
    assert CANARY not in world.list_records(with_outputs=True)


async def test_a_retry_in_the_same_worker_continues_the_conversation() -> None:
    world = RecordedWorld(compile_graph(build_agent(UNRECORDED)), ScriptedModel(TURNS, wait_seconds=0.001))

    def fail_once() -> None:
        world.model.failures = int(len(world.model.requests) == 2)

    world.model.on_request = fail_once
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(world.model.billed) == len(TURNS) + 1
    assert "first: busy" not in world.list_records(with_outputs=True), "a provider may quote the prompt"


@pytest.mark.parametrize("has_room", [True, False])
async def test_a_wait_for_a_provider_keeps_the_worker_with_the_conversation_if_there_is_room(
    monkeypatch: pytest.MonkeyPatch, *, has_room: bool
) -> None:
    monkeypatch.setattr(workflow_runner, "SHORT_WAIT_SECONDS", 0.0)
    world = RecordedWorld(compile_graph(build_agent(UNRECORDED)), ScriptedModel(TURNS, wait_seconds=0.2))

    def fail_once() -> None:
        world.model.failures = int(len(world.model.requests) == 2)

    world.model.on_request = fail_once
    worker = world.worker()
    worker.start = msgspec.structs.replace(worker.start, may_hold=lambda: has_room)
    outcome = await worker.work()
    world.keep(worker.notebook)
    if has_room:
        assert outcome == RunOutcome(RunStatus.COMPLETED)
        assert len(world.model.billed) == len(TURNS) + 1
        return
    assert outcome.status is RunStatus.WAITING
    monkeypatch.undo()
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(world.model.billed) == 1 + len(TURNS) + 1


async def test_an_agent_begins_three_times_at_most() -> None:
    world = RecordedWorld(compile_graph(build_agent(UNRECORDED)), ScriptedModel(TURNS))
    for _ in range(MAX_CONVERSATIONS):
        assert await world.work(4) is None
    ended = await world.work()
    assert ended is not None
    cause = require_error(ended).cause
    assert cause is not None
    assert (cause.code, "begun 3 times" in cause.message) == ("lost-attempt", True)
    assert len(world.model.billed) == MAX_CONVERSATIONS


async def test_lost_conversations_count_in_the_budget() -> None:
    program = compile_graph(build_agent({**UNRECORDED, "budget": {"maxCost": "0.000005"}}))
    world = RecordedWorld(program, ScriptedModel(TURNS))
    assert await world.work(5) is None  # behind the second answer
    assert len(world.model.billed) == 2
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert world.output["stopReason"] == "max-cost"
    assert len(world.model.billed) == 5


async def test_an_error_that_quotes_nothing_keeps_its_message() -> None:
    program = compile_graph(build_agent({**UNRECORDED, "maxIterations": 1, "onLimit": "error"}))
    world = RecordedWorld(program, ScriptedModel(TURNS))
    ended = await world.work()
    assert ended is not None
    cause = require_error(ended).cause
    assert cause is not None
    assert (cause.code, cause.message) == ("agent-limit", "The agent has reached a limit: max-iterations")


async def test_limits_and_checks_of_repetition_count_the_present_conversation_alone() -> None:
    turns = [turn(("look", "Oslo")), turn(("look", "Rome")), turn(("look", "Bonn"))]
    program = compile_graph(build_agent({**UNRECORDED, "maxIterations": 4, "maxToolCalls": 4}))
    world = RecordedWorld(program, ScriptedModel(turns))
    for _ in range(2):
        assert await world.work(6) is None
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert world.output["stopReason"] == "finished"


def build_nested(
    agent: dict[str, Json], helper: dict[str, Json], helper_agent: dict[str, Json]
) -> ParsedGraph:
    target: Json = {"node": {"type": "agent", "config": {**HELPER_AGENT, **helper_agent}}}
    nodes = {
        "agent": ("agent", {**AGENT, **agent}),
        "helper": ("tool", {**LOOK, "name": "helper", "target": target, **helper}),
        "look": ("tool", LOOK),
    }
    return build_graph(nodes, [("helper", "agent"), ("look", "helper")])


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_contents_of_agents_inside_each_other_are_recorded_all_or_none(place: int) -> None:
    """One flag, at the agent, its tool, or the agent in it, holds for all of them, since each has the contents."""
    program = compile_graph(build_nested(*(UNRECORDED if place == each else {} for each in range(3))))
    for kill in (4, -5, 6, -7, 8):
        # The agent inside does not know its prompt again, and asks for one call in each of its conversations.
        world = RecordedWorld(program, ScriptedModel([turn(("helper", CANARY), ("look", CANARY))]))
        assert await world.work(kill) is None
        assert await world.work() == RunOutcome(RunStatus.COMPLETED)
        assert CANARY not in world.list_records(with_outputs=True), kill
        answers = [
            step for step in world.steps if step.kind == "model" and step.status is StepStatus.COMPLETED
        ]
        assert len(answers) <= len(world.model.billed) <= len(answers) + world.died, kill
        assert world.output["cost"] == show_cost(len(answers) * 1_000), kill
        assert all(step.ended_at is not None for step in world.steps), kill


SCHEMA: Json = {"type": "object", "properties": {"city": {"type": "integer"}}, "required": ["city"]}


class TalkingModel(ScriptedModel):
    """Model that repeats the question in each answer."""

    async def complete(self, *given: Any, **named: Any) -> ModelReply:  # noqa: ANN401 - as the protocol has them
        reply = await super().complete(*given, **named)
        answer = msgspec.structs.replace(reply.answer, text=json.dumps({"city": CANARY}))
        return msgspec.structs.replace(reply, answer=answer)


@pytest.mark.parametrize("kind", ["llm", "extract"])
async def test_corrected_answers_and_errors_that_quote_them_are_not_recorded(kind: str) -> None:
    fields: dict[str, dict[str, Json]] = {
        "llm": {"prompt": f"{CANARY} {{{{ data.team }}}}", "outputSchema": SCHEMA},
        "extract": {"input": f"{CANARY} {{{{ data.team }}}}", "schema": SCHEMA},
    }
    for more, is_recorded in (({}, True), (UNRECORDED, False)):
        world = RecordedWorld(
            compile_graph(build_graph({"ask": (kind, {"model": "first", **fields[kind], **more})})),
            TalkingModel(),
        )
        assert await world.work(2) is None  # behind the first answer
        ended = await world.work()
        assert ended is not None
        error = require_error(ended)
        assert error.cause is not None
        assert error.cause.code == "invalid-answer"
        # A recorded answer is not asked for again.
        assert len(world.model.billed) == (3 if is_recorded else 4)
        assert (CANARY in world.list_records(with_outputs=True)) is is_recorded
        assert (CANARY in repr(ended)) is is_recorded


async def test_lines_of_tools_are_recorded_without_their_texts() -> None:
    code: Json = {"node": {"type": "code", "config": {"code": f"print('{CANARY}')\nreturn args"}}}
    graph = build_agent(UNRECORDED, {"target": {"node": {"type": "log", "config": {"message": CANARY}}}})
    world = RecordedWorld(compile_graph(graph), ScriptedModel(TURNS))
    assert code
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert CANARY not in world.list_records(with_outputs=True)
    assert [line.message for line in world.lines] == [content_recording.HIDDEN_LINE] * 3


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("set-metadata", {"metadata": {"city": "{{ args.city }}"}}),
        ("throttle", {"key": "{{ args.city }}", "limit": 1, "perSeconds": 1}),
    ],
)
async def test_tools_keep_nothing_in_the_run(kind: str, config: Json) -> None:
    graph = build_agent(UNRECORDED, {"target": {"node": {"type": kind, "config": config}}})
    throttle = KeptKeys()
    world = RecordedWorld(compile_graph(graph), ScriptedModel(TURNS[:1]), services={"throttle": throttle})
    worker = world.worker()
    assert await worker.work() == RunOutcome(RunStatus.COMPLETED)
    assert (worker.notebook.metadata, throttle.keys) == ({}, [])
    told = world.model.requests[-1].messages[-1].content
    assert "can keep nothing in the run" in told


async def test_tools_may_read_blobs() -> None:
    worker = RecordedWorld().worker()
    blobs = ReadOnlyBlobs(KeptBlobs())
    with pytest.raises(NodeError, match="can keep nothing"):
        await blobs.put(worker.start.caller, b"x", media_type="text/plain")
    assert await blobs.get(worker.start.caller, None, max_bytes=1) == b"kept"


class KeptKeys(ThrottleService):
    """Throttle that never delays."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    async def reserve(
        self,
        caller: RunCaller,  # noqa: ARG002 - the protocol's parameters
        key: str,
        *,
        limit: int,  # noqa: ARG002 - as above
        per_seconds: float,  # noqa: ARG002 - as above
        max_wait_seconds: float,  # noqa: ARG002 - as above
    ) -> datetime:
        self.keys.append(key)
        return datetime.now(UTC)


class KeptBlobs(BlobService):
    """Blobs that a run has received."""

    async def put(
        self, caller: RunCaller, content: bytes, *, media_type: str, name: str = ""
    ) -> dict[str, Json]:
        raise NotImplementedError

    async def get(self, caller: RunCaller, reference: Json, *, max_bytes: int) -> bytes:  # noqa: ARG002 - the protocol's parameters
        return b"kept"


def find_messages(graph: ParsedGraph) -> list[str]:
    found = validate_graph(graph, load_catalog())
    assert all(finding.type is FindingType.INVALID_CONFIG for finding in found.errors)
    return [finding.message for finding in found.errors]


def test_an_agent_without_recorded_contents_may_not_write_ask_or_wait() -> None:
    assert find_messages(build_agent({**UNRECORDED, "approval": "writes"})) == []
    (message,) = find_messages(build_agent({**UNRECORDED, "effects": ["read", "write"]}))
    assert "would repeat its writes" in message
    (message,) = find_messages(build_agent({"approval": "always"}, UNRECORDED))
    assert "a question keeps the arguments" in message
    assert 'by "look"' in message
    (message,) = find_messages(build_agent(UNRECORDED, {"approval": "always"}))
    assert "a question keeps the arguments" in message
    (message,) = find_messages(build_agent(UNRECORDED, {"target": {"workflowId": "wf_1"}}))
    assert "keeps its arguments in a run" in message
    (message,) = find_messages(build_nested({}, {}, {**UNRECORDED, "effects": ["write"]}))
    assert "would repeat its writes" in message


@pytest.mark.parametrize("more", [{"effects": "{{ trigger.effects }}"}, {"approval": "{{ trigger.rule }}"}])
async def test_values_of_expressions_are_checked_when_the_agent_begins(
    more: dict[str, Json], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_agent_runs, "TRIGGER", {"effects": ["write"], "rule": "always"})
    world = RecordedWorld(compile_graph(build_agent({**UNRECORDED, **more})), ScriptedModel(TURNS))
    ended = await world.work()
    assert ended is not None
    cause = require_error(ended).cause
    assert cause is not None
    assert cause.code == content_recording.REFUSED_CODE
    assert world.model.requests == []
