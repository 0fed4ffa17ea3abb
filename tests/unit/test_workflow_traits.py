"""Traits of workflows by their nodes, tools, agents and the workflows that they call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from engine.agents import tool_reach, workflow_traits
from engine.agents.workflow_traits import UNKNOWN, TraitsById, WorkflowTraits
from engine.findings import FindingType
from engine.graph import ParsedGraph
from engine.node_api import NodeEffect
from engine.validation import validate_graph
from engine.values import Json
from nodes.catalog import load_catalog

CATALOG = load_catalog()
HARMLESS = WorkflowTraits(NodeEffect.READ, gives_outside_text=False, gives_private_data=False, can_send=False)
PAGE: dict[str, Json] = {"url": "https://a.example/page"}
TABLE: dict[str, Json] = {"dataSource": "ds_1", "query": "SELECT 1"}
MAIL: dict[str, Json] = {"dataSource": "ds_2", "to": "a@b.example", "subject": "s", "text": "t"}


def chain(*nodes: tuple[str, Mapping[str, Json]], trigger: str = "manual") -> ParsedGraph:
    """Return a trigger and nodes behind one another, with their types for ids."""
    shown: list[Any] = [{"id": "start", "type": trigger}]
    shown += [{"id": kind, "type": kind, "config": dict(config)} for kind, config in nodes]
    edges: list[Any] = [
        {"id": f"{index}", "source": shown[index]["id"], "target": shown[index + 1]["id"]}
        for index in range(len(shown) - 1)
    ]
    return ParsedGraph.from_stored({"nodes": shown, "connections": edges})


def agent(*targets: Mapping[str, Json], **config: Json) -> ParsedGraph:
    """Return an agent with tools for these targets."""
    nodes: list[Any] = [
        {"id": "start", "type": "manual"},
        {
            "id": "agent",
            "type": "agent",
            "label": "Clerk",
            "config": {"prompt": "p", "model": "echo", **config},
        },
    ]
    edges: list[Any] = [{"id": "start", "source": "start", "target": "agent"}]
    for number, target in enumerate(targets):
        name = f"tool{number}"
        tool = {"name": name, "description": "d", "target": dict(target)}
        nodes.append({"id": name, "type": "tool", "label": name, "config": tool})
        edges.append({"id": name, "source": name, "target": "agent", "targetPort": "tools"})
    return ParsedGraph.from_stored({"nodes": nodes, "connections": edges})


def node(kind: str, config: Mapping[str, Json]) -> dict[str, Json]:
    return {"node": {"type": kind, "config": dict(config)}}


def describe(graph: ParsedGraph, traits: TraitsById | None = None, **settings: Json) -> WorkflowTraits:
    return tool_reach.describe_workflow(graph, settings, CATALOG, traits or {})


CALL: dict[str, Json] = {"workflowId": "wf_1"}


@pytest.mark.parametrize(
    ("graph", "effect"),
    [
        (chain(("set", {"values": {}})), NodeEffect.READ),
        (chain(("http-request", PAGE)), NodeEffect.READ),
        (chain(("http-request", {**PAGE, "method": "POST"})), NodeEffect.WRITE),
        (chain(("http-request", {**PAGE, "method": "{{ data.method }}"})), NodeEffect.WRITE),
        (chain(("acme/unknown", {})), NodeEffect.WRITE),
        (agent(node("http-request", PAGE)), NodeEffect.READ),
        (agent(node("email-send", MAIL)), NodeEffect.WRITE),
        (agent(CALL), NodeEffect.WRITE),
    ],
)
def test_a_workflow_has_the_greatest_effect_of_its_nodes_and_tools(
    graph: ParsedGraph, effect: NodeEffect
) -> None:
    assert describe(graph).effect is effect


@pytest.mark.parametrize(
    ("graph", "exposed"),
    [
        (chain(("sub-workflow", CALL)), ""),
        (agent(CALL, approval="never", effects=["read", "write"]), "Clerk"),
    ],
)
def test_the_traits_of_a_called_workflow_are_those_of_its_caller(graph: ParsedGraph, exposed: str) -> None:
    assert workflow_traits.list_called(graph) == {"wf_1"}
    assert describe(graph) == replace(UNKNOWN, exposed_agent=exposed)
    assert describe(graph, {"wf_1": HARMLESS}) == HARMLESS


def test_a_failure_action_writes_and_sends() -> None:
    described = describe(chain(("http-request", PAGE)), onFailure={"workflowId": "wf_2"})
    assert (described.effect, described.can_send) == (NodeEffect.WRITE, True)


def test_data_comes_from_outsiders_and_from_the_organization_and_leaves_by_free_addresses() -> None:
    free = {"url": "{{ data.url }}"}
    described = describe(chain(("postgresql-source", TABLE), ("http-request", free)))
    assert (described.gives_outside_text, described.gives_private_data, described.can_send) == (True,) * 3
    described = describe(chain(("postgresql-source", TABLE)))
    assert (described.gives_outside_text, described.gives_private_data, described.can_send) == (
        *(False, True, False),
    )


@pytest.mark.parametrize(
    ("config", "label"), [({"approval": "never", "effects": ["read", "write"]}, "Clerk"), ({}, "")]
)
def test_an_agent_is_exposed_if_it_may_send_private_data_unasked(
    config: Mapping[str, Json], label: str
) -> None:
    graph = agent(node("postgresql-source", TABLE), node("email-send", MAIL), **config)
    assert describe(graph).exposed_agent == label


def list_paths(graph: ParsedGraph, traits: TraitsById) -> list[str]:
    """Return the ids of the nodes that validation warns of."""
    found = validate_graph(graph, CATALOG, traits=traits)
    return [one.node_id or "" for one in found.warnings if one.type is FindingType.AGENT_EXFILTRATION_PATH]


def test_validation_finds_each_part_of_an_exfiltration_path_behind_a_workflow() -> None:
    free: dict[str, Json] = {"approval": "never", "effects": ["read", "write"]}
    table, page, mail = node("postgresql-source", TABLE), node("http-request", PAGE), node("email-send", MAIL)
    for trait, others in (
        ({"gives_outside_text": True}, (table, mail)),
        ({"gives_private_data": True}, (page, mail)),
        ({"can_send": True, "effect": NodeEffect.WRITE}, (page, table)),
    ):
        graph = agent(CALL, *others, **free)
        assert list_paths(graph, {"wf_1": HARMLESS}) == []
        traits = {name: getattr(HARMLESS, name) for name in WorkflowTraits.__struct_fields__} | trait
        assert list_paths(graph, {"wf_1": WorkflowTraits(**traits)}) == ["agent"], trait


@pytest.mark.parametrize(("trigger", "found"), [("email-trigger", ["sub-workflow"]), ("manual", [])])
def test_validation_warns_of_texts_of_outsiders_for_an_agent_in_a_called_workflow(
    trigger: str, found: list[str]
) -> None:
    exposed = WorkflowTraits(NodeEffect.WRITE, False, True, True, "Clerk")  # noqa: FBT003 - in the order of the fields
    graph = chain(("sub-workflow", CALL), trigger=trigger)
    assert list_paths(graph, {"wf_1": exposed}) == found
