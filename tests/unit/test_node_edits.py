from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from itertools import combinations
from typing import TypeAlias

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.canvas_layout import CARD_HEIGHT, CARD_WIDTH
from engine.values import Json
from gateway.http import limits
from gateway.http.errors import ApiError
from gateway.workflows import graph_shapes, node_edits
from gateway.workflows.graph_shapes import ConnectionInput, NodeInput
from gateway.workflows.node_edits import NodeChanges
from gateway.workflows.stored_workflow import StoredWorkflow
from journal import definition_snapshot
from models.workflow import Workflow
from nodes import catalog

CATALOG = catalog.load_catalog()
NEVER_LEFT_BEHIND = {"broken-connection", "duplicate-node-id", "invalid-port", "cycle", "unknown-node-type"}
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)

Edit: TypeAlias = Callable[[StoredWorkflow], StoredWorkflow]

NODE_IDS = [f"node-{letter}" for letter in "abcdef"]
EDGE_IDS = [f"conn-{letter}" for letter in "abcdefghij"]

node_ids, edge_ids = st.sampled_from(NODE_IDS), st.sampled_from(EDGE_IDS)
types = st.sampled_from(["set", "conditional", "agent", "llm", "manual", "nothing"])
sources, targets = st.sampled_from(["output", "true", "error"]), st.sampled_from(["input", "input", "ai"])
texts = st.text(max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts, lambda inner: st.dictionaries(texts, inner, max_size=2)
)


def empty_workflow() -> StoredWorkflow:
    workflow = Workflow(
        id="wf_1",
        organization_id="org_1",
        shard=0,
        owner_id="user_1",
        name="A workflow",
        tags=[],
        settings={},
        config={},
        scopes=[],
        created_at=NOON,
        updated_at=NOON,
    )
    return StoredWorkflow(workflow, nodes=[], connections=[], shared_with={})


def add_edit(node_id: str, node_type: str = "set", **fields: object) -> Edit:
    node = msgspec.convert({"id": node_id, "nodeId": node_type, **fields}, NodeInput)
    return lambda before: node_edits.with_node(before, node, CATALOG)


def connect_edit(
    source: str, target: str, source_port: str = "", target_port: str = "", connection_id: str = ""
) -> Edit:
    edge = ConnectionInput(
        id=connection_id or graph_shapes.new_id("conn"),
        source=source,
        target=target,
        source_port=source_port,
        target_port=target_port,
    )
    return lambda before: node_edits.with_connection(before, edge, CATALOG)


def configure_edit(node_id: str, **changes: object) -> Edit:
    wanted = msgspec.convert(changes, NodeChanges)
    return lambda before: node_edits.with_changes(before, node_id, wanted, CATALOG)


def remove_edit(node_id: str) -> Edit:
    return lambda before: node_edits.without_node(before, node_id)


def disconnect_edit(connection_id: str) -> Edit:
    return lambda before: node_edits.without_connection(before, connection_id)


def mapping_edit(node_id: str, mappings: dict[str, Json]) -> Edit:
    return lambda before: node_edits.with_mappings(before, node_id, mappings)


connections = st.builds(connect_edit, node_ids, node_ids, sources, targets, edge_ids)
edits = st.one_of(
    connections,
    connections,
    connections,
    st.builds(add_edit, node_ids, types),
    st.builds(remove_edit, node_ids),
    st.builds(disconnect_edit, edge_ids),
    st.builds(mapping_edit, node_ids, st.dictionaries(texts, st.sampled_from(["data.a", 5]))),
    st.builds(
        lambda node_id, config: configure_edit(node_id, config=config),
        node_ids,
        st.dictionaries(texts, json_values),
    ),
)


def apply_edits(*steps: Edit) -> StoredWorkflow:
    stored = empty_workflow()
    for step in steps:
        stored = step(stored)
    return stored


def apply_unless_refused(edit: Edit, before: StoredWorkflow) -> StoredWorkflow:
    try:
        return edit(before)
    except ApiError:
        return before


def edit_refused(edit: Edit, before: StoredWorkflow) -> ApiError:
    with pytest.raises(ApiError) as caught:
        edit(before)
    return caught.value


def assert_consistent(stored: StoredWorkflow) -> None:
    validation = definition_snapshot.check_graph(stored.nodes, stored.connections, CATALOG)
    assert not NEVER_LEFT_BEHIND & {finding.type for finding in validation.errors}
    assert len({edge["id"] for edge in stored.connections}) == len(stored.connections)
    places = [msgspec.convert(node["position"], graph_shapes.CanvasPosition) for node in stored.nodes]
    for one, other in combinations(places, 2):
        assert abs(one.x - other.x) >= CARD_WIDTH or abs(one.y - other.y) >= CARD_HEIGHT


@given(st.lists(types, min_size=6, max_size=6), st.lists(edits, min_size=25, max_size=60))
def test_any_sequence_of_edits_leaves_a_consistent_graph(kinds: list[str], steps: list[Edit]) -> None:
    stored = empty_workflow()
    for step in [*map(add_edit, NODE_IDS, kinds), *steps]:
        graph = msgspec.json.encode([stored.nodes, stored.connections])
        changed = apply_unless_refused(step, stored)
        # An edit may be made again, from the start, where its transaction was undone.
        assert msgspec.json.encode([stored.nodes, stored.connections]) == graph
        if changed is not stored:
            assert_consistent(changed)
        stored = changed


def test_a_cycle_is_shown_with_the_nodes_on_it() -> None:
    names = [f"n{number}" for number in range(10)]
    line = apply_edits(*map(add_edit, names), *map(connect_edit, names, names[1:]))
    (flaw,) = edit_refused(connect_edit("n3", "n1"), line).details
    assert flaw["message"] == "The connection would close a cycle: n3 → n1 → n2 → n3"
    (flaw,) = edit_refused(connect_edit("n9", "n0"), line).details
    assert flaw["message"] == "The connection would close a cycle: n9 → n0 → n1 → n2 → n3 → n4 → …"


def test_both_ends_that_are_absent_are_told_at_once() -> None:
    flaws = edit_refused(connect_edit("starts", "nobody"), apply_edits(add_edit("start", "manual"))).details
    assert [flaw["path"] for flaw in flaws] == ["sourceNodeId", "targetNodeId"]
    assert flaws[0]["suggestion"] == "Did you mean start?"


def test_a_graph_that_is_full_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    full = apply_edits(add_edit("a"), add_edit("b"), connect_edit("a", "b"))
    monkeypatch.setattr(limits, "NODES", 2)
    monkeypatch.setattr(limits, "CONNECTIONS", 1)
    for edit in (add_edit("c"), connect_edit("a", "b", source_port="error")):
        (flaw,) = edit_refused(edit, full).details
        assert flaw["code"] == "too-many"


def test_a_graph_grows_to_a_size_that_can_be_sent() -> None:
    stored = apply_edits(add_edit("a", config={"text": "x" * (limits.GRAPH_BYTES - 1_000)}))
    more = "x" * 2_000
    for edit in (
        add_edit("b", config={"more": more}),
        configure_edit("a", config={"more": more}),
        mapping_edit("a", {"field": more}),
        lambda before: node_edits.with_pass_through(before, "a", {"field": more}),
    ):
        (flaw,) = edit_refused(edit, stored).details
        assert (flaw["path"], flaw["code"]) == ("nodes", "too-large")
    assert remove_edit("a")(stored).nodes == []
