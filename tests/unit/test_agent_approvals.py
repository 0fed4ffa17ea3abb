"""Approvals of the tool calls of agents: bound to the exact call, through every death of a worker."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from engine.agents import agent_exposure, call_approvals
from engine.agents.agent import EDITED_NOTE, AgentTask, is_conversation_tainted
from engine.agents.agent_steps import StepStatus
from engine.findings import FindingType
from engine.graph import ParsedGraph
from engine.run_records import NodeSpan, RunOutcome, RunStatus, SpanStatus
from engine.validation import validate_graph
from engine.values import Json
from nodes.catalog import load_catalog
from tests.unit.test_agent_runs import SEND, TURNS, ScriptedModel, World, compile_agent, turn

pytestmark = pytest.mark.anyio

EFFECTS = 4


def build_world(*turns: Any, **agent: Json) -> World:  # noqa: ANN401 - turns of the script
    return World(compile_agent(lambda _: None, approval="writes", **agent), ScriptedModel(turns or TURNS))


def list_questions(world: World) -> list[NodeSpan]:
    return [span for span in world.spans if span.status is SpanStatus.WAITING and span.awaits is not None]


def read_request(span: NodeSpan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(span.awaits or b"{}")["request"]
    return found


def decide(
    world: World, choice: str = "approve", reason: str | None = None, arguments: Json | None = None
) -> int:
    """Answer all open questions, as the journal stores answers; return their number."""
    asked = list_questions(world)
    for span in asked:
        data: Json = None if reason is None else {"reason": reason}
        output: dict[str, Json] = {"data": data, "choice": choice, "by": "user_1"}
        if arguments is not None:
            output["arguments"] = arguments
        answer = {"output": output, "port": choice}
        world.answers[span.node_id, span.iteration] = json.dumps(answer).encode()
    return len(asked)


async def work_to_the_end(world: World) -> None:
    """Work, and approve each question, until the run has completed."""
    for _ in range(20):
        ended = await world.work()
        if ended == RunOutcome(RunStatus.COMPLETED):
            return
        assert ended is not None
        assert ended.status is RunStatus.WAITING
        assert decide(world)
    raise AssertionError("the run does not end")


async def test_a_write_waits_for_the_approval_of_its_exact_arguments() -> None:
    world = build_world(turn(("look", "Oslo"), ("send", "Oslo"), ("send", "Rome")))
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.WAITING
    assert ended.due_at is not None
    assert world.outside.effects == []
    assert len(world.outside.urls) == 1, "the read before the writes is done meanwhile"
    first, second = list_questions(world)
    request = read_request(first)
    assert request["title"] == "Let agent call send?"
    assert '"city": "Oslo"' in request["description"]
    assert request["toolCall"]["tool"] == "send"
    assert request["toolCall"]["arguments"] == {"city": "Oslo"}
    assert first.node_id == second.node_id == "send"
    assert read_request(second)["toolCall"]["arguments"] == {"city": "Rome"}
    assert first.iteration != second.iteration
    assert decide(world) == 2
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert world.outside.bodies == [{"to": "Oslo", "by": "north"}, {"to": "Rome", "by": "north"}]
    assert list_questions(world) == []
    closed = [span for span in world.spans if span.node_id == "send"]
    assert {(span.status, span.port) for span in closed} == {(SpanStatus.COMPLETED, "approve")}


async def test_the_first_of_two_writes_is_done_before_the_second_is_approved() -> None:
    world = build_world(turn(("send", "Oslo"), ("send", "Rome")))
    await world.work()
    first, second = list_questions(world)
    decide(world)
    late = world.answers.pop((second.node_id, second.iteration))
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.WAITING
    assert [body["to"] for body in world.outside.bodies if isinstance(body, dict)] == ["Oslo"]
    assert [span.iteration for span in list_questions(world)] == [second.iteration]
    world.answers[second.node_id, second.iteration] = late
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(world.outside.effects) == 2
    assert first.iteration != second.iteration


async def test_a_denial_goes_to_the_model_with_its_reason() -> None:
    world = build_world(turn(("send", "Oslo")))
    await world.work()
    decide(world, "deny", "Oslo is closed")
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert world.outside.effects == []
    told = json.loads(world.model.requests[-1].messages[-1].content)
    assert told["error"] == "A person has denied this call: Oslo is closed"


async def test_an_edited_call_is_made_with_the_arguments_of_its_approver_and_the_model_gets_to_know_them() -> (
    None
):
    world = build_world(turn(("send", "Oslo")))
    await world.work()
    (asked,) = list_questions(world)
    assert read_request(asked)["toolCall"]["parameters"] == SEND["parameters"]
    decide(world, arguments={"city": "Rome"})
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert world.outside.bodies == [{"to": "Rome", "by": "north"}]
    (step,) = [step for step in world.steps if step.name == "send"]
    assert json.loads(step.arguments or b"") == {"city": "Rome"}
    assert step.request_hash != read_request(asked)["toolCall"]["hash"]
    told = world.model.requests[-1].messages[-1].content
    assert told.startswith(f'{EDITED_NOTE} {{"city":"Rome"}}\n\n')
    (closed,) = [span for span in world.spans if span.node_id == "send"]
    kept = json.loads(closed.output or b"")
    assert (closed.port, kept["by"], kept["arguments"]) == ("approve", "user_1", {"city": "Rome"})


async def test_edited_arguments_that_no_longer_fit_the_tool_are_not_used() -> None:
    world = build_world(turn(("send", "Oslo")))
    await world.work()
    decide(world, arguments={"city": 7})
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert world.outside.effects == []
    assert "they are invalid: city" in world.model.requests[-1].messages[-1].content


async def test_a_changed_tool_needs_another_approval_of_edited_arguments() -> None:
    def redirect(tool: dict[str, Json]) -> None:
        tool["target"] = {
            "node": {"type": "http-request", "config": {"url": "https://c.example/x", "method": "POST"}}
        }

    world = build_world(turn(("send", "Oslo")))
    await world.work()
    decide(world, arguments={"city": "Rome"})
    # Dies behind the commit of the approval, before the call is made.
    assert await world.work(2) is None
    assert world.outside.effects == []
    world.program = compile_agent(redirect, approval="writes")
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.WAITING
    (asked,) = list_questions(world)
    assert read_request(asked)["toolCall"]["arguments"] == {"city": "Rome"}


async def test_a_death_at_any_commit_makes_an_edited_call_once_with_its_new_arguments() -> None:
    for last in range(1, 5):
        for kill in (-last, last):
            world = build_world(turn(("send", "Oslo")), turn(("look", "Bonn")))
            for _ in range(20):
                if (ended := await world.work(kill)) is None:
                    ended = await world.work()
                if ended == RunOutcome(RunStatus.COMPLETED):
                    break
                decide(world, arguments={"city": "Rome"})
            assert world.output["response"] == "Reported.", kill
            assert len(world.outside.effects) == 1, kill
            assert {body["to"] for body in world.outside.bodies if isinstance(body, dict)} == {"Rome"}, kill


async def test_other_arguments_need_another_approval() -> None:
    world = build_world(turn(("send", "Oslo")), turn(("send", "Oslo")), turn(("send", "Rome")))
    places = set()
    for _ in range(3):
        ended = await world.work()
        assert ended is not None
        assert ended.status is RunStatus.WAITING
        places |= {span.iteration for span in list_questions(world)}
        assert decide(world) == 1
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(places) == len(world.outside.effects) == 3


async def test_an_approval_does_not_hold_for_a_recorded_call_that_was_changed() -> None:
    world = build_world(turn(("send", "Oslo")))
    await world.work()
    decide(world)
    world.steps = [
        msgspec.structs.replace(step, arguments=b'{"city":"Rome"}') if step.name == "send" else step
        for step in world.steps
    ]
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.WAITING
    assert world.outside.effects == []


async def test_a_changed_tool_needs_another_approval() -> None:
    def redirect(tool: dict[str, Json]) -> None:
        tool["target"] = {
            "node": {"type": "http-request", "config": {"url": "https://c.example/x", "method": "POST"}}
        }

    world = build_world(turn(("send", "Oslo")))
    await world.work()
    decide(world)
    world.program = compile_agent(redirect, approval="writes")
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.WAITING
    assert world.outside.effects == []
    assert decide(world)
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert "https://c.example/x" in world.outside.urls


async def test_a_call_without_approval_in_time_is_refused() -> None:
    world = build_world(turn(("send", "Oslo")), approvers={"expiresInSeconds": 3600})
    await world.work()
    (question,) = list_questions(world)
    (asked,) = [step for step in world.steps if step.status is StepStatus.WAITING]
    assert question.wake_at == asked.started_at + timedelta(hours=1)
    hours = timedelta(hours=2)
    world.steps = [msgspec.structs.replace(step, started_at=step.started_at - hours) for step in world.steps]
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert world.outside.effects == []
    assert "in time" in world.model.requests[-1].messages[-1].content
    (closed,) = [span for span in world.spans if span.node_id == "send"]
    assert (closed.status, closed.port) == (SpanStatus.COMPLETED, "expired")


async def test_a_tool_may_have_a_rule_of_its_own() -> None:
    free = compile_agent(lambda tool: tool.update(approval="never"), approval="always")
    world = World(free, ScriptedModel([turn(("send", "Oslo"), ("look", "Rome"))]))
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.WAITING
    assert len(world.outside.effects) == 1
    assert [span.node_id for span in list_questions(world)] == ["look"]


async def test_a_tainted_conversation_needs_an_approval_of_writes() -> None:
    program = compile_agent(approval="tainted")
    world = World(
        program, ScriptedModel([turn(("send", "Oslo")), turn(("look", "Rome")), turn(("send", "Bonn"))])
    )
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.WAITING
    (asked,) = list_questions(world)
    assert read_request(asked)["toolCall"]["arguments"] == {"city": "Bonn"}
    assert len(world.outside.effects) == 1, "no page was read before the first write"
    assert decide(world)
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(world.outside.effects) == 2


async def test_a_run_that_was_started_with_text_of_outsiders_asks_about_its_first_write() -> None:
    world = World(compile_agent(approval="tainted"), ScriptedModel([turn(("send", "Oslo"))]))
    world.is_tainted = True
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.WAITING
    assert world.outside.effects == []


def test_results_of_task_workers_may_hold_text_of_outsiders() -> None:
    nodes: list[Json] = [
        {"id": "start", "type": "manual"},
        {"id": "fetch", "type": "acme/fetch"},
        {"id": "agent", "type": "agent", "config": {"prompt": "p"}},
    ]
    edges: list[Json] = [
        {"id": "1", "source": "start", "target": "fetch"},
        {"id": "2", "source": "fetch", "target": "agent"},
    ]
    graph = ParsedGraph.from_stored({"nodes": nodes, "connections": edges})
    assert agent_exposure.has_tainted_input(graph.by_id["agent"], graph)
    assert not agent_exposure.has_tainted_input(graph.by_id["fetch"], graph)


async def test_the_text_of_a_tool_that_is_gone_stays_in_the_conversation() -> None:
    world = World(compile_agent(), ScriptedModel([turn(("look", "Rome"), ("invented", "Bonn"))]))
    await world.work()
    task = AgentTask([])
    assert is_conversation_tainted(task, world.steps)
    assert not is_conversation_tainted(task, [step for step in world.steps if step.name != "look"])


def test_the_results_of_an_earlier_agent_are_texts_of_outsiders() -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        config = {"name": name, "description": name, "target": {"node": {"type": kind, "config": {}}}}
        return {"id": name, "type": "tool", "config": config}

    stored: dict[str, Any] = {
        "nodes": [
            {"id": "start", "type": "manual"},
            *({"id": name, "type": "agent", "config": {"prompt": "p"}} for name in ("reader", "writer")),
            *(tool("page", "http-request"), tool("table", "postgresql-source")),
        ],
        "connections": [
            {"id": "1", "source": "start", "target": "reader"},
            {"id": "2", "source": "reader", "target": "writer"},
            {"id": "3", "source": "page", "target": "reader", "targetPort": "tools"},
            {"id": "4", "source": "table", "target": "reader", "targetPort": "tools"},
        ],
    }
    graph = ParsedGraph.from_stored(stored)
    reader, writer = graph.by_id["reader"], graph.by_id["writer"]
    assert not agent_exposure.has_tainted_input(reader, graph)
    assert agent_exposure.has_tainted_input(writer, graph)
    assert [node.id for node in agent_exposure.list_private(writer, graph)] == ["table"]


async def test_arguments_too_long_to_read_are_refused_without_a_question() -> None:
    world = build_world(turn(("send", "x" * 20_000)))
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert world.outside.effects == []
    assert "too long" in world.model.requests[-1].messages[-1].content


async def test_a_death_at_any_commit_repeats_no_approved_effect_and_no_question() -> None:
    whole = build_world()
    await work_to_the_end(whole)
    asked = {span.iteration for span in whole.spans if span.node_id == "send"}
    for last in range(1, 9):
        for kill in (-last, last):
            world = build_world()
            # A worker dies in every stretch of the work: before the vote and after it.
            for _ in range(40):
                ended = await world.work(kill)
                if ended == RunOutcome(RunStatus.COMPLETED):
                    break
                if ended is not None and ended.status is RunStatus.WAITING:
                    decide(world)
                elif await world.work() == RunOutcome(RunStatus.COMPLETED):
                    break
                else:
                    decide(world)
            assert world.output["response"] == "Reported.", kill
            assert len(world.outside.effects) == EFFECTS, kill
            assert {span.iteration for span in world.spans if span.node_id == "send"} == asked, kill


def test_invisible_characters_of_arguments_are_shown() -> None:
    shown = call_approvals.show_arguments({"to": "a\u202eb\u200bc", "å": "ø"})
    assert shown == '{\n  "to": "a\\u{202e}b\\u{200b}c",\n  "å": "ø"\n}'


def find_exfiltration(
    *, trigger: str = "email-trigger", url: str = "https://a.example", **agent: Json
) -> list[str]:
    """Return the messages about exfiltration by an agent that reads mail and a database, and writes to a URL."""
    source: dict[str, Json] = {"dataSource": "ds_1", "query": "SELECT 1"}
    post: dict[str, Json] = {"url": url, "method": agent.pop("method", "POST")}
    tools = {"customers": ("postgresql-source", source), "post": ("http-request", post)}
    stored: Any = {
        "nodes": [
            {"id": "mail", "type": trigger},
            {"id": "agent", "type": "agent", "config": {"prompt": "p", "model": "echo", **agent}},
            *(
                {
                    "id": name,
                    "type": "tool",
                    "config": {
                        "name": name,
                        "description": name,
                        "target": {"node": {"type": kind, "config": config}},
                    },
                }
                for name, (kind, config) in tools.items()
            ),
        ],
        "connections": [
            {"id": "1", "source": "mail", "target": "agent"},
            *({"id": name, "source": name, "target": "agent", "targetPort": "tools"} for name in tools),
        ],
    }
    found = validate_graph(ParsedGraph.from_stored(stored), load_catalog())
    return [one.message for one in found.warnings if one.type is FindingType.AGENT_EXFILTRATION_PATH]


def test_a_way_out_of_private_data_is_warned_of_with_its_three_nodes() -> None:
    (message,) = find_exfiltration(effects=["read", "write"], approval="never")
    assert all(f'"{name}"' in message for name in ("mail", "customers", "post"))


@pytest.mark.parametrize(
    "agent",
    [
        {"effects": ["read", "write"]},
        {"effects": ["read", "write"], "approval": "tainted"},
        {"effects": ["read"], "approval": "never"},
        {"method": "GET", "url": "https://a.example/{{ args.q }}"},
    ],
)
def test_an_approval_and_a_fixed_address_close_the_way_out(agent: dict[str, Any]) -> None:
    assert find_exfiltration(**agent) == []


def test_a_request_to_an_address_of_the_model_is_a_way_out_by_reading() -> None:
    assert find_exfiltration(method="GET", url="https://{{ args.host }}/x")
    assert find_exfiltration(method="GET", url="{{ args.url }}")


def test_the_types_of_exposure_are_those_of_the_catalog() -> None:
    catalog = load_catalog()
    for type_ in agent_exposure.UNTRUSTED_TYPES | agent_exposure.PRIVATE_TYPES:
        assert catalog.get(type_).type == type_
