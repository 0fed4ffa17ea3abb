"""Nodes that are tools without a `tool`: parameters, calls, and fields that their author alone fills in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from engine.agents import agent_wiring, direct_tools
from engine.findings import FindingType
from engine.graph import GraphNode, ParsedGraph
from engine.model_calls import RequestedToolCall
from engine.program import WorkflowProgram
from engine.run_records import RunOutcome, RunStatus
from engine.validation import validate_graph
from engine.values import Json
from nodes.catalog import load_catalog
from tests.unit.test_agent_runs import ScriptedModel, World

pytestmark = pytest.mark.anyio
CATALOG = load_catalog()
FREE: dict[str, Json] = {"approval": "never", "effects": ["read", "write"]}
FETCH: dict[str, Any] = {
    "id": "fetch page",
    "type": "http-request",
    "label": "Fetch a page",
    "config": {"url": "https://a.example/{{ trigger.team }}"},
}


def build_graph(*tools: Mapping[str, Any], **agent: Json) -> ParsedGraph:
    nodes: list[Any] = [
        {"id": "start", "type": "manual"},
        {"id": "agent", "type": "agent", "config": {"prompt": "p", "model": "first", **FREE, **agent}},
        *map(dict, tools),
    ]
    edges: list[Any] = [
        {"id": "start", "source": "start", "target": "agent"},
        *(
            {"id": each["id"], "source": each["id"], "target": "agent", "targetPort": "tools"}
            for each in tools
        ),
    ]
    return ParsedGraph.from_stored({"nodes": nodes, "connections": edges})


def node(kind: str, **config: Json) -> dict[str, Any]:
    return {"id": kind, "type": kind, "config": config}


def build_world(graph: ParsedGraph, *calls: tuple[str, dict[str, Any]]) -> World:
    turns = [[RequestedToolCall("c", name, arguments)] for name, arguments in calls]
    program = WorkflowProgram.compile(graph, CATALOG, CATALOG.implementation)
    return World(program, ScriptedModel(turns))


def list_open(each: Mapping[str, Any]) -> set[str]:
    """Return the fields of a node that a model fills in."""
    found = GraphNode.from_stored(each)
    return set(direct_tools.build_parameters(found, CATALOG.get(found.type))["properties"])


async def test_an_agent_calls_a_node_with_its_open_fields_as_parameters() -> None:
    world = build_world(
        build_graph(FETCH),
        ("fetch_page", {"query": {"q": "{{ trigger.team }}"}}),
        ("fetch_page", {"url": "https://b"}),
    )
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    (tool,) = world.model.requests[0].tools
    assert tool.name == "fetch_page"
    assert tool.description.startswith("Fetch a page. ")
    (url,) = world.outside.urls
    assert url.startswith("https://a.example/north?q=")
    assert "trigger.team" in url, "nothing that a model writes is evaluated"
    refused = json.loads(world.model.requests[2].messages[-1].content)
    assert "url" in refused["error"], "a fixed field is no parameter"
    assert [span.node_id for span in world.spans] == ["start", "agent"], "the node never runs alone"


async def test_a_writing_node_is_approved_like_every_tool() -> None:
    post = {**FETCH, "config": {**FETCH["config"], "method": "POST"}}
    world = build_world(build_graph(post, approval="writes"), ("fetch_page", {"body": {"a": 1}}))
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.WAITING
    assert world.outside.effects == []


@pytest.mark.parametrize(
    ("each", "closed"),
    [
        (node("http-request"), {"method", "dataSource", "headers", "waitForCallback"}),
        (node("postgresql-source"), {"dataSource", "query"}),
        (node("code"), {"source"}),
        (node("email-send"), {"dataSource", "headers"}),
        (node("llm"), {"model", "fallbackModelIds", "budget", "recordContent"}),
    ],
)
def test_what_decides_about_effect_access_and_code_is_no_parameter(
    each: Mapping[str, Any], closed: set[str]
) -> None:
    schema: Mapping[str, Any] = CATALOG.get(each["type"]).config_schema
    properties = set(schema["properties"])
    assert closed <= properties
    assert list_open(each) == properties - closed


def test_an_agent_a_workflow_and_a_tool_of_a_server_take_only_their_input() -> None:
    assert list_open(node("agent")) == {"prompt"}
    assert list_open(node("sub-workflow", workflowId="wf_1")) == {"inputs"}
    assert list_open(node("mcp-tool", toolServer="ds_1", tool="find")) == {"arguments"}


@pytest.mark.parametrize(
    ("each", "found"),
    [
        (FETCH, []),
        (node("http-request"), []),
        (node("http-request", speed=3), [FindingType.INVALID_CONFIG]),
        (node("postgresql-source", dataSource="ds_1"), [FindingType.MISSING_CONFIG]),
        (node("wait", seconds=1), [FindingType.INVALID_CONFIG]),
        (node("webhook"), [FindingType.INVALID_CONFIG]),
        ({**node("agent", model="first"), "id": "helper"}, []),
    ],
)
def test_validation_accepts_only_callable_targets(each: Mapping[str, Any], found: list[FindingType]) -> None:
    result = validate_graph(build_graph(each), CATALOG)
    findings = [*result.errors, *result.warnings]
    assert [one.type for one in findings if one.type is not FindingType.MULTIPLE_TRIGGERS] == found, findings


def test_validation_knows_the_effect_and_the_free_address_of_a_node() -> None:
    post = {**FETCH, "config": {**FETCH["config"], "method": "POST"}}
    found = validate_graph(build_graph(post, effects=["read"]), CATALOG)
    assert [one.type for one in found.errors] == [FindingType.INVALID_CONFIG]
    table = node("postgresql-source", dataSource="ds_1", query="SELECT 1")
    warnings = validate_graph(build_graph(node("http-request"), table), CATALOG).warnings
    assert [one.type for one in warnings] == [FindingType.AGENT_EXFILTRATION_PATH]
    assert not validate_graph(build_graph(FETCH, table), CATALOG).warnings


async def test_an_agent_is_a_tool_with_its_own_tools() -> None:
    graph = build_graph(node("agent", model="first") | {"id": "helper"}, FETCH)
    inner = replace(graph.edges[-1], target="helper")
    graph = replace(graph, edges=[*graph.edges[:-1], inner])
    assert agent_wiring.list_direct_tools(graph) == {"helper", "fetch page"}
    assert validate_graph(graph, CATALOG).is_valid
    world = build_world(graph, ("helper", {"prompt": "Fetch it."}))
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert [tool.name for tool in world.model.requests[1].tools] == ["fetch_page"]
    assert world.model.requests[1].messages[-1].content == "Fetch it."
