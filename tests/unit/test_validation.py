from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from types import FrameType
from typing import cast

import pytest

from engine.graph import Graph
from engine.validation import Finding, Validation, validate
from engine.values import Json
from nodes import catalog
from nodes.catalog import Catalog

CATALOG = catalog.load()

START: dict[str, Json] = {"id": "start", "type": "manual"}
SET: dict[str, Json] = {"id": "set", "type": "set", "config": {"values": {"a": 1}}}
CHOOSE: dict[str, Json] = {
    "id": "choose",
    "type": "conditional",
    "config": {"condition": {"left": "{{ data.a }}", "operator": "equals", "right": 1}},
}


def edge(source: str, target: str, **ports: str) -> dict[str, Json]:
    source_id, _, port = source.partition(":")
    return {"id": f"{source} > {target}", "source": source_id, "sourcePort": port, "target": target, **ports}


def graph(nodes: list[dict[str, Json]], edges: list[dict[str, Json]]) -> Graph:
    return Graph.of({"nodes": cast("Json", nodes), "connections": cast("Json", edges)})


def check(
    nodes: list[dict[str, Json]], edges: list[dict[str, Json]], catalogue: Catalog = CATALOG
) -> Validation:
    return validate(graph(nodes, edges), catalogue)


def only_error(validation: Validation) -> Finding:
    assert len(validation.errors) == 1, validation.errors
    assert not validation.is_valid
    return validation.errors[0]


def test_a_sound_graph_has_no_findings() -> None:
    nodes = [START, SET, CHOOSE, SET | {"id": "yes"}, SET | {"id": "no"}, SET | {"id": "on error"}]
    edges = [
        edge("start", "set"),
        edge("set", "choose"),
        edge("choose:true", "yes"),
        edge("choose:false", "no"),
        edge("choose:error", "on error"),
    ]
    assert check(nodes, edges) == Validation()


def test_a_workflow_without_nodes_is_empty() -> None:
    assert only_error(check([], [])).type == "empty-workflow"


def test_a_workflow_needs_a_trigger() -> None:
    assert only_error(check([SET], [])).type == "missing-trigger"


def test_a_workflow_has_one_trigger_and_each_further_one_is_named() -> None:
    second, third = START | {"id": "second", "type": "webhook"}, START | {"id": "third"}
    errors = check([START, second, third], []).errors
    assert [(error.type, error.node_id) for error in errors] == [
        ("multiple-triggers", "second"),
        ("multiple-triggers", "third"),
    ]


@pytest.mark.parametrize(("source", "target"), [("gone", "set"), ("set", "gone"), ("gone", "gone too")])
def test_a_connection_whose_end_is_missing_is_broken(source: str, target: str) -> None:
    error = only_error(check([START, SET], [edge("start", "set"), edge(source, target)]))
    assert (error.type, error.connection_id) == ("broken-connection", f"{source} > {target}")
    assert "gone" in error.message


def test_two_connections_with_one_id_are_broken() -> None:
    twin = edge("choose:true", "set") | {"id": "start > choose"}
    error = only_error(check([START, CHOOSE, SET], [edge("start", "choose"), twin]))
    assert (error.type, error.connection_id) == ("broken-connection", "start > choose")


@pytest.mark.parametrize("other_type", ["set", "log", "no-such-type"])
def test_an_id_given_to_two_nodes_is_an_error_whatever_they_are(other_type: str) -> None:
    twin: dict[str, Json] = {"id": "set", "type": other_type, "config": {"message": "hello"}}
    for nodes in ([START, SET, twin], [START, twin, SET]):
        errors = {(error.type, error.node_id) for error in check(nodes, [edge("start", "set")]).errors}
        assert ("duplicate-node-id", "set") in errors
        assert (("unknown-node-type", "set") in errors) == (other_type == "no-such-type")


def test_a_node_of_an_unknown_type_is_named_with_what_comes_nearest() -> None:
    error = only_error(check([START, SET | {"type": "condtional"}], [edge("start", "set")]))
    assert (error.type, error.node_id) == ("unknown-node-type", "set")
    assert "conditional" in error.message


def test_a_version_that_the_catalogue_lacks_is_an_unknown_type() -> None:
    error = only_error(check([START, SET | {"version": "9.9.9"}], [edge("start", "set")]))
    assert error.type == "unknown-node-type"


def test_an_unknown_type_might_be_the_trigger_so_none_is_missed() -> None:
    assert only_error(check([{"id": "a", "type": "no-such-type"}], [])).type == "unknown-node-type"


@pytest.mark.parametrize(
    ("connection", "node_id"),
    [
        (edge("choose", "set"), "choose"),
        (edge("choose:maybe", "set"), "choose"),
        (edge("choose:true", "set", targetPort="tools"), "set"),
        (edge("choose:true", "start"), "start"),
    ],
    ids=["no port output", "no such port", "no such input", "into a trigger"],
)
def test_a_connection_to_a_port_that_is_not_there_is_an_error(
    connection: dict[str, Json], node_id: str
) -> None:
    errors = check([START, CHOOSE, SET], [edge("start", "choose"), connection]).errors
    assert ("invalid-port", node_id) in {(error.type, error.node_id) for error in errors}


@pytest.mark.parametrize("around", [["a"], ["a", "b"], ["a", "b", "c", "d", "e", "f", "g", "h", "i"]])
def test_a_cycle_is_an_error_and_is_shown(around: list[str]) -> None:
    nodes = [START, *(SET | {"id": node_id} for node_id in around)]
    edges = [edge("start", around[0]), *map(edge, around, [*around[1:], around[0]])]
    error = only_error(check(nodes, edges))
    assert error.type == "cycle"
    assert error.node_id in around
    assert len(error.message) < 120


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"values": 3}, "values"),
        ({"values": {}, "extra": 1}, "extra"),
        ({"values": {"a": "{{ nonsense }}"}}, "nonsense"),
        ({"values": {"a": {"$op": "no-such"}}}, "no-such"),
    ],
    ids=["against the schema", "unknown field", "bad expression", "bad operation"],
)
def test_a_config_that_cannot_be_is_an_error(config: dict[str, Json], word: str) -> None:
    error = only_error(check([START, SET | {"config": config}], [edge("start", "set")]))
    assert (error.type, error.node_id) == ("invalid-config", "set")
    assert word in error.message


def test_a_mapping_that_cannot_be_read_is_an_error() -> None:
    error = only_error(check([START, SET | {"inputMappings": {"x": "nonsense"}}], [edge("start", "set")]))
    assert (error.type, error.node_id) == ("invalid-config", "set")


def test_a_type_that_cannot_run_is_an_error_of_its_own() -> None:
    drawn_only = Catalog({**CATALOG.node_types, "set": replace(CATALOG.get("set"), runnable=False)})
    error = only_error(check([START, SET], [edge("start", "set")], drawn_only))
    assert (error.type, error.node_id) == ("not-runnable", "set")


def test_a_config_that_lacks_something_is_a_warning() -> None:
    validation = check([START, SET | {"config": {}}], [edge("start", "set")])
    assert validation.is_valid
    (warning,) = validation.warnings
    assert (warning.type, warning.node_id) == ("missing-config", "set")
    assert "values" in warning.message


def test_a_node_that_nothing_leads_to_is_a_warning() -> None:
    validation = check([START, SET], [])
    assert validation.is_valid
    assert [(warning.type, warning.node_id) for warning in validation.warnings] == [
        ("disconnected-node", "set")
    ]


def test_every_finding_says_what_and_where_and_what_to_do() -> None:
    nodes = [START, START | {"id": "again"}, SET, SET | {"type": "nope"}, SET | {"id": "alone", "config": {}}]
    validation = check(nodes, [edge("start", "gone"), edge("start:nope", "alone")])
    findings = [*validation.errors, *validation.warnings]
    assert len({finding.type for finding in findings}) >= 6
    for finding in findings:
        shown = finding.as_json()
        assert shown.keys() >= {"type", "message", "suggestion"}
        assert shown.keys() & {"nodeId", "connectionId"}
        assert all(shown.values())


def test_ten_thousand_nodes_are_checked_without_recursion_in_linear_time() -> None:
    def cost(size: int) -> int:
        ids = [f"n{number}" for number in range(size)]
        nodes = [START, *(SET | {"id": node_id} for node_id in ids)]
        drawn = graph(nodes, [edge("start", "n0"), *map(edge, ids, [*ids[1:], ids[0]])])
        calls: Counter[str] = Counter()

        def count(_frame: FrameType, event: str, _argument: object) -> None:
            calls[event] += 1

        sys.setprofile(count)
        try:
            assert only_error(validate(drawn, CATALOG)).type == "cycle"
        finally:
            sys.setprofile(None)
        return calls.total()

    assert cost(10_000) < 10.5 * cost(1_000)
