"""Tool calls of agents that other processes do: sub-workflows and tasks, through every death of a worker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from engine.agents.agent_steps import StepStatus
from engine.agents.workflow_traits import UNKNOWN
from engine.findings import FindingType
from engine.graph import ParsedGraph
from engine.node_api import NodeEffect
from engine.program import WorkflowProgram
from engine.run_errors import NodeError
from engine.run_records import NodeSpan, RunOutcome, RunStatus, SpanStatus
from engine.services import RunCaller
from engine.task_node import NewTask
from engine.validation import validate_graph
from engine.values import Json
from json_text import decoding
from nodes.catalog import NodeCatalog, load_catalog
from nodes.custom_types import PINNED, catalog_of_definition
from tests.custom_types import custom_type
from tests.unit.test_agent_runs import AGENT, ScriptedModel, World, turn
from tests.unit.test_nested_agents import TwoScripts, build_helper

pytestmark = pytest.mark.anyio

PARAMETERS: Json = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALLS = [turn(("child", "Oslo"), ("look", "Oslo"), ("look", "Rome")), turn(("child", "Rome"))]
LOOK_TYPE = custom_type(
    type="acme/look",
    effect={"default": "read"},
    category="custom",
    config={"type": "object", "properties": {"place": {}}},
)


def build_tool(name: str, target: Json, **config: Json) -> dict[str, Json]:
    given: dict[str, Json] = {"name": name, "description": name, "parameters": PARAMETERS, "target": target}
    return {"id": name, "type": "tool", "config": {**given, **config}}


def build_graph(**of_look: Json) -> ParsedGraph:
    """Return an agent with a workflow and a node of task workers as tools; `onUnknown` is for both."""
    of_child = {name: value for name, value in of_look.items() if name == "onUnknown"}
    task: Json = {"node": {"type": "acme/look", "config": {"place": "{{ args.city }}"}}}
    nodes: list[Json] = [
        {"id": "start", "type": "manual"},
        {"id": "agent", "type": "agent", "config": {**AGENT, "model": "first"}},
        build_tool("child", {"workflowId": "wf_child"}, **of_child),
        build_tool("look", task, **of_look),
    ]
    edges: list[Json] = [
        {"id": "1", "source": "start", "target": "agent"},
        {"id": "2", "source": "child", "target": "agent", "targetPort": "tools"},
        {"id": "3", "source": "look", "target": "agent", "targetPort": "tools"},
    ]
    return ParsedGraph.from_stored({"nodes": nodes, "connections": edges})


def build_catalog() -> NodeCatalog:
    pinned = {PINNED: {"acme/look": {"1.2.0": LOOK_TYPE}}}
    return catalog_of_definition(load_catalog(), pinned)


@dataclass
class ChildRuns:
    """Starter of runs that begins one for each node and iteration."""

    started: dict[tuple[str, str], Json] = field(default_factory=dict)
    tainted: list[bool] = field(default_factory=list)
    """Whether text of outsiders may be in the inputs, for each start."""
    read_only: list[bool] = field(default_factory=list)
    """Whether the workflow may not write, for each start."""
    writes: bool = True
    is_missing: bool = False

    async def start(
        self,
        caller: RunCaller,
        workflow_id: str,
        trigger_inputs: Json,
        *,
        node_id: str,
        iteration: str,
        awaited: bool,
    ) -> str:
        if self.is_missing:
            raise NodeError(f"There is no workflow {workflow_id}", code="workflow-not-found")
        assert (workflow_id, node_id, awaited) == ("wf_child", "child", True)
        self.tainted.append(caller.is_tainted)
        self.read_only.append(caller.is_read_only)
        self.started.setdefault((node_id, iteration), trigger_inputs)
        return f"exec_{iteration}"

    async def may_write(self, caller: RunCaller, workflow_id: str) -> bool:  # noqa: ARG002 - the protocol's parameters
        return self.writes


@dataclass
class WaitingWorld(World):
    """World with tools that others do; they answer when they are asked to."""

    runs: ChildRuns = field(default_factory=ChildRuns)
    tasks: dict[tuple[str, str], NewTask] = field(default_factory=dict)
    """Tasks by the place of their waits, each as it was created first."""

    def keep(self, journal: Any) -> None:  # noqa: ANN401 - the base's journal
        super().keep(journal)
        for span in self.spans:
            if span.task is not None:
                self.tasks.setdefault((span.node_id, span.iteration), decoding.decode(span.task, NewTask))

    def list_waits(self) -> list[NodeSpan]:
        return [span for span in self.spans if span.status is SpanStatus.WAITING and span.awaits is not None]

    def answer(self, span: NodeSpan, output: Json = None) -> None:
        place = span.node_id, span.iteration
        given = output or {"done": self.runs.started.get(place)}
        self.answers[place] = json.dumps({"output": given, "port": "output"}).encode()

    def answer_all(self) -> int:
        """Answer all open waits, and return their number."""
        waits = self.list_waits()
        for span in waits:
            self.answer(span)
        return len(waits)


def build_world(**of_look: Json) -> WaitingWorld:
    catalog = build_catalog()
    program = WorkflowProgram.compile(build_graph(**of_look), catalog, catalog.implementation)
    runs = ChildRuns()
    return WaitingWorld(program, ScriptedModel(CALLS), services={"runs": runs}, runs=runs)


async def work_to_the_end(world: WaitingWorld) -> None:
    """Work, and answer the waits of the tools, until the run has completed."""
    for _ in range(20):
        ended = await world.work()
        if ended == RunOutcome(RunStatus.COMPLETED):
            return
        assert ended is not None
        assert ended.status is RunStatus.WAITING, ended
        assert world.answer_all()
    raise AssertionError("the run does not end")


def list_results(world: World) -> Mapping[str, str]:
    return {
        f"{step.name} {msgspec.json.decode(step.arguments or b'{}')['city']}": msgspec.json.decode(
            step.result or b""
        )
        for step in world.steps
        if step.kind == "tool"
    }


async def test_an_agent_waits_for_a_workflow_and_for_tasks_without_a_worker() -> None:
    world = build_world()
    assert await world.work() == RunOutcome(RunStatus.WAITING)
    (child,) = world.list_waits()
    assert child.node_id == "child"
    assert json.loads(child.awaits or b"")["kind"] == "run"
    assert world.runs.started == {("child", child.iteration): {"city": "Oslo"}}
    assert not world.tasks, "the calls behind a write keep the order of the model"
    world.answer(child, {"temperature": -3})
    assert await world.work() == RunOutcome(RunStatus.WAITING)
    first, second = world.list_waits()
    assert {first.node_id, second.node_id} == {"look"}
    assert [json.loads(bytes(task.config)) for task in world.tasks.values()] == [
        {"place": "Oslo"},
        {"place": "Rome"},
    ], "readers are asked at the same time"
    keys = {task.key for task in world.tasks.values()}
    assert keys == {step.key for step in world.steps if step.name == "look"}
    world.answer(second, {"is": "late"})
    assert await world.work() == RunOutcome(RunStatus.WAITING)
    assert [span.iteration for span in world.list_waits()] == [first.iteration]
    world.answer(first, {"is": "early"})
    await work_to_the_end(world)
    results = list_results(world)
    assert results["child Oslo"] == '{"temperature":-3}'
    assert results["look Oslo"] == '{"is":"early"}'
    assert results["look Rome"] == '{"is":"late"}'
    assert len(world.runs.started) == len(world.tasks) == 2
    assert len(world.model.billed) == 3
    tools = [span for span in world.spans if span.type == "tool"]
    assert {span.status for span in tools} == {SpanStatus.COMPLETED}
    assert len(tools) == 4


async def test_a_workflow_that_an_agent_calls_knows_if_its_arguments_may_quote_outsiders() -> None:
    world = build_world()
    await work_to_the_end(world)
    assert world.runs.tainted == [False, True], "results of tasks were read before the second call"


async def count_commits(of_look: Mapping[str, Json]) -> int:
    """Return the most commits of one worker on the way to the end."""
    world, most = build_world(**of_look), 0
    for _ in range(20):
        worker = world.worker()
        ended = await worker.work()
        world.keep(worker.notebook)
        most = max(most, worker.notebook.commits)
        if ended.status is RunStatus.COMPLETED:
            return most
        world.answer_all()
    raise AssertionError("the run does not end")


@pytest.mark.parametrize("of_look", [{}, {"onUnknown": "fail"}])
async def test_a_death_at_any_commit_starts_no_second_run_or_task(of_look: Mapping[str, Json]) -> None:
    deaths = 0
    for last in range(1, await count_commits(of_look) + 1):
        for kill in (-last, last):
            world = build_world(**of_look)
            for _ in range(20):
                ended = await world.work(kill)
                if ended == RunOutcome(RunStatus.COMPLETED):
                    break
                if ended is None and world.died % 2:
                    continue  # the next worker may die too, before an answer is there
                world.answer_all()
                if world.died >= 2:
                    await work_to_the_end(world)
                    break
            assert len(world.runs.started) == len(world.tasks) == 2, kill
            assert {step.status for step in world.steps} == {StepStatus.COMPLETED}, kill
            assert 3 <= len(world.model.billed) <= 3 + world.died, kill
            assert not world.list_waits()
            deaths += world.died
    assert deaths > 10


async def test_failures_of_others_go_to_the_model() -> None:
    world = build_world()
    await world.work()
    (child,) = world.list_waits()
    error = {"error": {"code": "run-failed", "message": "It has failed"}}
    world.answers[child.node_id, child.iteration] = json.dumps(error).encode()
    await work_to_the_end(world)
    told = json.loads(list_results(world)["child Oslo"])
    assert told["error"] == "run-failed: It has failed"
    (span,) = [one for one in world.spans if one.iteration == child.iteration]
    assert span.status is SpanStatus.FAILED


async def test_a_missing_workflow_goes_to_the_model() -> None:
    world = build_world()
    world.runs.is_missing = True
    await work_to_the_end(world)
    assert "workflow-not-found" in list_results(world)["child Oslo"]
    assert not [span for span in world.spans if span.node_id == "child"]


async def test_tasks_have_the_rules_of_their_type_unless_the_tool_has_others() -> None:
    for of_look, limits in (({}, (120.0, 3)), ({"timeout": 5, "maxAttempts": 2}, (5.0, 2))):
        world = build_world(**of_look)
        await world.work()
        world.answer_all()
        await world.work()
        found = {(task.timeout_seconds, task.max_attempts) for task in world.tasks.values()}
        assert found == {limits}


def test_validation_knows_the_effects_and_resources_of_workflows_and_tasks() -> None:
    catalog = build_catalog()
    assert validate_graph(build_graph(), catalog).is_valid
    graph = build_graph()
    (agent,) = [node for node in graph.nodes if node.type == "agent"]
    reader = replace(agent, config={**agent.config, "effects": ["read"]})
    nodes = [reader if node is agent else node for node in graph.nodes]
    reading = replace(graph, nodes=nodes)
    assert validate_graph(reading, catalog).is_valid, "the workflow is unknown here"
    for effect, types in ((NodeEffect.WRITE, [FindingType.TOOL_WITHHELD]), (NodeEffect.READ, [])):
        traits = {"wf_child": replace(UNKNOWN, effect=effect)}
        found = validate_graph(reading, catalog, traits=traits)
        assert [one.type for one in found.warnings if one.node_id == "child"] == types


async def test_a_workflow_that_only_reads_is_called_without_an_approval() -> None:
    world = build_world()
    world.program = compile_world(approval="writes")
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.WAITING
    assert not world.runs.started, "a person is asked about a workflow that writes"

    world = build_world()
    world.program, world.runs.writes = compile_world(approval="writes", effects=["read"]), False
    await work_to_the_end(world)
    assert world.runs.read_only == [True, True]
    assert {step.effect for step in world.steps if step.kind == "tool"} == {"read"}


async def test_a_workflow_that_begins_to_write_is_no_tool_of_a_reader_any_more() -> None:
    world = build_world()
    world.program = compile_world(effects=["read"])
    await work_to_the_end(world)
    assert not world.runs.started
    assert [tool.name for tool in world.model.requests[0].tools] == ["look"]
    assert "There is no tool 'child'" in list_results(world)["child Oslo"]


async def test_a_workflow_may_not_begin_to_write_for_the_inner_agent_of_a_reader() -> None:
    nodes: list[Json] = [
        {"id": "start", "type": "manual"},
        {"id": "agent", "type": "agent", "config": {**AGENT, "model": "first", "effects": ["read"]}},
        build_helper(),
        build_tool("child", {"workflowId": "wf_child"}),
    ]
    edges: list[Json] = [
        {"id": "1", "source": "start", "target": "agent"},
        {"id": "2", "source": "helper", "target": "agent", "targetPort": "tools"},
        {"id": "3", "source": "child", "target": "helper", "targetPort": "tools"},
    ]
    world = build_world()
    catalog = build_catalog()
    graph = ParsedGraph.from_stored({"nodes": nodes, "connections": edges})
    world.program = WorkflowProgram.compile(graph, catalog, catalog.implementation)
    world.model = TwoScripts([turn(("helper", "Oslo"))], inner=[turn(("child", "Oslo"))])
    world.runs.writes = False
    world.model.on_request = lambda: setattr(world.runs, "writes", True)
    await work_to_the_end(world)
    assert {step.name: step.effect for step in world.steps if step.kind == "tool"} == {
        "helper": "read",
        "child": "write",
    }
    assert world.runs.read_only == [True], "the outer agent may only read"


def compile_world(**agent: Json) -> WorkflowProgram:
    """Compile the agent with another config."""
    catalog = build_catalog()
    graph = build_graph()
    nodes = [
        replace(node, config={**node.config, **agent}) if node.type == "agent" else node
        for node in graph.nodes
    ]
    return WorkflowProgram.compile(replace(graph, nodes=nodes), catalog, catalog.implementation)
