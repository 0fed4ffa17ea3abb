"""External resources of a graph, read from the configs of its nodes."""

from typing import cast

import pytest
from msgspec.structs import replace

from engine.config_places import ResourceReference, list_references, required_scopes
from engine.graph import ParsedGraph
from engine.values import Json
from nodes import catalog
from nodes.catalog import NodeCatalog

CATALOG = catalog.load_catalog()


def make_graph(*nodes: dict[str, Json]) -> ParsedGraph:
    return ParsedGraph.from_stored({"nodes": cast("Json", list(nodes)), "connections": []})


def source_node(name: str, data_source: Json) -> dict[str, Json]:
    return {"id": name, "type": "mysql-source", "config": {"dataSource": data_source, "query": "SELECT 1"}}


def test_scopes_are_sorted_and_each_is_there_once() -> None:
    model: dict[str, Json] = {"id": "model", "type": "llm", "config": {"model": "model_001"}}
    agent: dict[str, Json] = {"id": "agent", "type": "agent", "config": {"model": "model_000", "prompt": "p"}}
    drawn = make_graph(
        model, source_node("b", "ds_002"), source_node("a", "ds_001"), source_node("c", "ds_001"), agent
    )
    assert required_scopes(drawn, CATALOG) == [
        "datasources:read:ds_001",
        "datasources:read:ds_002",
        "models:invoke:model_000",
        "models:invoke:model_001",
    ]


def test_every_place_that_names_something_is_told() -> None:
    assert list_references(make_graph(source_node("a", "ds_001"), source_node("b", "ds_001")), CATALOG) == [
        ResourceReference("datasources", "ds_001", "a", "dataSource", "read", ["mysql"]),
        ResourceReference("datasources", "ds_001", "b", "dataSource", "read", ["mysql"]),
    ]


@pytest.mark.parametrize(
    "data_source", ["{{ data.source }}", "", "a b", "x" * 65, "ds:001", 7, None, ["ds_001"]]
)
def test_malformed_ids_and_those_known_to_a_run_alone_are_left_out(data_source: Json) -> None:
    assert required_scopes(make_graph(source_node("a", data_source)), CATALOG) == []


def test_graphs_without_resources_and_unknown_types_need_no_scopes() -> None:
    odd: dict[str, Json] = {"id": "odd", "type": "no-such-type", "config": {"dataSource": "ds_001"}}
    other: dict[str, Json] = {"id": "set", "type": "set", "config": {"values": {"dataSource": "ds_001"}}}
    assert (
        required_scopes(make_graph(odd, other, {**source_node("a", "ds_001"), "version": "9.9.9"}), CATALOG)
        == []
    )


def test_ids_are_found_in_lists_and_objects_too() -> None:
    schema: dict[str, Json] = {
        "properties": {
            "targets": {
                "type": "array",
                "items": {"properties": {"store": {"type": "string", "x-resource": "datasources:write"}}},
            }
        }
    }
    copying = NodeCatalog({"set": replace(CATALOG.get("set"), config_schema=schema)})
    node: dict[str, Json] = {
        "id": "copy",
        "type": "set",
        "config": {"targets": [{"store": "ds_001"}, {"store": "{{ data.x }}"}, {"store": "ds_002"}]},
    }
    assert list_references(make_graph(node), copying) == [
        ResourceReference("datasources", "ds_001", "copy", "targets.0.store", "write"),
        ResourceReference("datasources", "ds_002", "copy", "targets.2.store", "write"),
    ]
