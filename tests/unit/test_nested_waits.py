"""Waits of the tool calls of agents that do the tool calls of others: no death of a worker loses or mixes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from engine.agents import tool_calls
from engine.agents.agent_steps import AgentStep, StepStatus
from engine.graph import ParsedGraph
from engine.program import WorkflowProgram
from engine.run_records import RunOutcome, RunStatus, SpanStatus
from engine.values import Json
from tests.unit.test_agent_runs import AGENT, turn
from tests.unit.test_agent_waits import ChildRuns, WaitingWorld, build_catalog, build_tool
from tests.unit.test_nested_agents import TwoScripts, build_helper

if TYPE_CHECKING:
    from engine.frames import NodeVisit
    from engine.span_recorder import SpanRecorder

pytestmark = pytest.mark.anyio

OUTER = [turn(("helper", "Oslo"), ("child", "Oslo")), turn(("helper", "Rome"))]
INNER = [turn(("child", "Oslo"), ("look", "Oslo"), ("look", "Rome"))]
ANSWERS = (len(OUTER) + 1) + 2 * (len(INNER) + 1)
RUNS, TASKS = 2 + 1, 2 * 2


def build_world() -> WaitingWorld:
    """Return an agent with a workflow as tool, and with an agent that has the same tool and a task."""
    task: Json = {"node": {"type": "acme/look", "config": {"place": "{{ args.city }}"}}}
    tools = [("child", "agent"), ("helper", "agent"), ("child", "helper"), ("look", "helper")]
    nodes: list[Json] = [
        {"id": "start", "type": "manual"},
        {"id": "agent", "type": "agent", "config": {**AGENT, "model": "first"}},
        build_tool("child", {"workflowId": "wf_child"}),
        build_tool("look", task),
        build_helper(),
    ]
    edges: list[Json] = [{"id": "start", "source": "start", "target": "agent"}]
    edges += [
        {"id": f"{source} {target}", "source": source, "target": target, "targetPort": "tools"}
        for source, target in tools
    ]
    catalog = build_catalog()
    graph = ParsedGraph.from_stored({"nodes": nodes, "connections": edges})
    program = WorkflowProgram.compile(graph, catalog, catalog.implementation)
    runs = ChildRuns()
    return WaitingWorld(program, TwoScripts(OUTER, inner=INNER), services={"runs": runs}, runs=runs)


async def work_to_the_end(world: WaitingWorld, kills: Sequence[int] = ()) -> None:
    """Work and answer until the run has completed.

    The workers die at `kills`, one after the other; an answer is there after each second death alone.
    """
    left = list(kills)
    for _ in range(30):
        ended = await world.work(left.pop(0) if left else 0)
        if ended == RunOutcome(RunStatus.COMPLETED):
            return
        if ended is not None:
            assert ended.status is RunStatus.WAITING, ended
            assert world.list_waits()
        if ended is not None or world.died % 2 == 0:
            for span in world.list_waits():
                # Each answer names the call that it is for.
                world.answer(span, {"for": [span.node_id, span.iteration]})
    raise AssertionError("the run does not end")


def check_results(world: WaitingWorld) -> None:
    """Check that each call has the answer to its own wait, and that nothing was begun twice."""
    assert len(world.runs.started) == RUNS
    assert len(world.tasks) == TASKS
    assert {step.status for step in world.steps} == {StepStatus.COMPLETED}
    assert not world.list_waits()
    places = {
        **world.runs.started,
        **{place: json.loads(bytes(task.input)) for place, task in world.tasks.items()},
    }
    found = []
    for step in world.steps:
        if step.kind == "tool" and step.name != "helper":
            told = json.loads(json.loads(step.result or b""))["for"]
            assert told[0] == step.name
            assert places[told[0], told[1]] == json.loads(step.arguments or b"")
            assert f"-{step.number}-" in f"-{told[1]}"
            found.append((*told,))
    assert sorted(found) == sorted(places)
    assert world.output["usage"]["inputTokens"] == 100 * ANSWERS


async def test_agents_inside_agents_wait_without_a_worker() -> None:
    world = build_world()
    await work_to_the_end(world)
    check_results(world)
    assert len(world.model.billed) == ANSWERS


async def test_a_death_at_any_commit_mixes_no_answers_of_the_inner_agent() -> None:
    deaths = 0
    for last in range(1, 15):
        for kill in (-last, last):
            world = build_world()
            await work_to_the_end(world, [kill, kill])
            check_results(world)
            assert ANSWERS <= len(world.model.billed) <= ANSWERS + world.died, kill
            assert len(set(world.model.billed)) == len(world.model.billed), kill
            deaths += world.died
    assert deaths > 20


@pytest.mark.parametrize("is_inside", [False, True])
async def test_the_open_waits_of_an_agent_that_has_ended_are_withdrawn(*, is_inside: bool) -> None:
    world = build_world()
    await world.work()
    (wait,) = world.list_waits()
    if not is_inside:
        world.model.turns = [turn(("child", "Oslo"))]
        world = replace(build_world(), model=world.model)
        await world.work()
        (wait,) = world.list_waits()
    steps: dict[tuple[str, str], list[AgentStep]] = {}
    for step in world.steps:
        steps.setdefault((step.node_id, step.iteration), []).append(step)
    program = world.program.nodes["agent"]
    own = steps.pop(("agent", ""))
    visit = SimpleNamespace(program=program, steps=own, nested_steps=steps)
    ended = []
    recorder = SimpleNamespace(record_tool_wait_end=lambda node, *rest: ended.append((node.id, *rest[:2])))
    tool_calls.withdraw_waits(cast("NodeVisit", visit), cast("SpanRecorder", recorder))
    assert ("child", wait.iteration, SpanStatus.CANCELLED) in ended
    assert len(set(ended)) == len(ended) == (4 if is_inside else 1), "one for each call that has not ended"
    assert wait.iteration.count("-") == (3 if is_inside else 1)
