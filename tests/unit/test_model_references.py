"""Language models that configs name: placeholders, and the default model of the organization."""

from collections.abc import Mapping
from typing import Any, cast

import pytest

from engine.config_places import required_scopes
from engine.findings import FindingType
from engine.graph import ParsedGraph
from engine.validation import validate_graph
from engine.values import Json
from journal.definition_snapshot import build_definition, check_graph
from nodes import catalog, custom_types

LIBRARY = catalog.load_catalog()
UNNAMED = FindingType.UNRESOLVED_MODEL_PLACEHOLDER
START = {"id": "start", "type": "manual"}
SET: Json = {"node": {"type": "set", "config": {"values": {}}}}


def make_nodes(node_type: str, **config: Any) -> list[dict[str, Json]]:  # noqa: ANN401 - any JSON value
    given = {"prompt": "p", **config}
    return cast("list[dict[str, Json]]", [START, {"id": "ask", "type": node_type, "config": given}])


def connect(*edges: tuple[str, str, str]) -> list[dict[str, Json]]:
    return [
        {"id": f"{source}-{target}", "source": source, "target": target, "targetPort": port}
        for source, target, port in edges
    ]


FLOW = connect(("start", "ask", "input"))


def with_default(model_id: str | None) -> catalog.NodeCatalog:
    return custom_types.build_catalog(LIBRARY, {}, [], model_id)


def inner_agent(model: str) -> tuple[list[dict[str, Json]], list[dict[str, Json]]]:
    """Return an agent with a tool that is an agent with this model."""
    parameters: Json = {"type": "object", "properties": {}}
    target: Json = {"node": {"type": "agent", "config": {"model": model, "prompt": "p"}}}
    tool: Mapping[str, Json] = {"name": "t", "description": "d", "parameters": parameters, "target": target}
    nodes = make_nodes("agent", model="echo")
    nodes.append({"id": "tool", "type": "tool", "config": dict(tool)})
    return nodes, [*FLOW, *connect(("tool", "ask", "tools"))]


@pytest.mark.parametrize("text", ["", " ", "{{AI_MODEL_ID}}", "{{ AI_MODEL_ID }}", "default"])
@pytest.mark.parametrize("where", ["model", "fallback", "agent", "inner agent"])
def test_a_placeholder_is_a_warning_in_a_draft_and_else_the_only_error(where: str, text: str) -> None:
    connections = FLOW
    if where == "inner agent":
        nodes, connections = inner_agent(text)
    elif where == "fallback":
        nodes = make_nodes("llm", model="echo", fallbackModelIds=["echo", text])
    else:
        nodes = make_nodes("agent" if where == "agent" else "llm", model=text)
    graph = ParsedGraph.from_stored(build_definition(nodes, connections, {}))
    draft = validate_graph(graph, LIBRARY, is_draft=True)
    assert draft.is_valid
    assert UNNAMED in [one.type for one in draft.warnings]
    assert [one.type for one in check_graph(nodes, connections, LIBRARY).errors] == [UNNAMED]


@pytest.mark.parametrize("text", ["{{ data.model }}", "model_1", "echo"])
def test_ids_and_expressions_are_no_placeholders(text: str) -> None:
    for nodes, connections in ((make_nodes("llm", model=text), FLOW), inner_agent(text)):
        assert check_graph(nodes, connections, LIBRARY).is_valid


def test_the_own_model_of_an_agent_is_ignored_if_a_model_is_connected() -> None:
    nodes = make_nodes("agent", model="{{AI_MODEL_ID}}")
    nodes.append({"id": "model", "type": "llm", "config": {"model": "echo"}})
    connections = [*FLOW, *connect(("model", "ask", "ai"))]
    assert UNNAMED not in [one.type for one in check_graph(nodes, connections, LIBRARY).errors]


def test_a_definition_has_the_id_of_the_default_model() -> None:
    nodes, connections = inner_agent("default")
    nodes += make_nodes("llm", model="default", fallbackModelIds=["echo", "default"])[1:]
    before = [dict(node) for node in nodes]
    found = cast("Any", build_definition(nodes, connections, {}, with_default("model_1")))["nodes"]
    assert found[2]["config"]["target"]["node"]["config"]["model"] == "model_1"
    assert (found[3]["config"]["model"], found[3]["config"]["fallbackModelIds"]) == (
        "model_1",
        ["echo", "model_1"],
    )
    assert nodes == before
    graph = ParsedGraph.from_stored(build_definition(nodes[:3], connections, {}))
    assert required_scopes(graph, LIBRARY) == ["models:invoke:echo"]
    assert required_scopes(graph, with_default("model_1")) == ["models:invoke:echo", "models:invoke:model_1"]
    assert check_graph(nodes[:3], connections, with_default("model_1")).is_valid


def test_texts_that_are_no_models_keep_the_word() -> None:
    nodes = make_nodes("llm", model="echo", prompt="default")
    nodes.append({"id": "x", "type": "none", "config": {}})
    nodes.append({"id": "set", "type": "set", "config": {"values": {"model": "default"}}})
    found = build_definition(nodes, [], {}, with_default("model_1"))["nodes"]
    assert found == nodes
