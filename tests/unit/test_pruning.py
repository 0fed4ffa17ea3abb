"""Trials of a part of a graph: up to one node, and with outputs that are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.graph import GraphEdge, GraphNode, ParsedGraph
from engine.node_api import LoopRequest, NodeCall, NodeResult
from engine.node_key import decode_key
from engine.pruning import prune_graph
from engine.run_errors import InvalidDefinition
from engine.values import Json
from tests.unit.run_harness import (
    InMemoryJournal,
    MadeUpNodeType,
    MadeUpNodeTypes,
    SimulatedWorker,
    compile_drawing,
    echo_data,
    pure_node,
    run_to_completion,
    write_world,
)


def loop_over_data(call: NodeCall) -> LoopRequest:
    return LoopRequest(cast("list[Json]", call.data))


KINDS: dict[str, MadeUpNodeType] = {
    "loop": pure_node(loop_over_data, loops=True),
    "route": pure_node(lambda call: NodeResult(call.data, port="left")),
    "show": pure_node(lambda call: dict(call.config)),
    "merge": pure_node(echo_data, joins=True),
    "pay": write_world(lambda call: call.data),
}
GRAPH = "start > echo1 > echo2 > echo3 > pay; echo1 > echo4"


async def run_trial(
    drawing: str, given: Json = None, nodes: Mapping[str, Mapping[str, Json]] | None = None, **trial: Json
) -> InMemoryJournal:
    graph = compile_drawing(drawing, KINDS, nodes, trial=trial)
    notebook = await run_to_completion(SimulatedWorker(graph, given))
    assert {node_id for node_id, _ in notebook.rows} == {node.id for node in graph.graph.nodes}
    return notebook


async def test_a_trial_ends_with_the_node_that_it_names() -> None:
    notebook = await run_trial(GRAPH, 7, upTo="echo3")
    assert notebook.statuses == dict.fromkeys(("start", "echo1", "echo2", "echo3"), "completed")


async def test_a_pinned_node_outputs_its_pinned_value_and_no_node_before_it_runs() -> None:
    notebook = await run_trial(GRAPH, 7, upTo="pay", pinned={"echo2": {"set": True}})
    assert notebook.statuses == dict.fromkeys(("echo2", "echo3", "pay"), "completed")
    assert notebook.output("pay") == {"set": True}
    assert notebook.spans["echo2"].input == b"null"
    assert decode_key(notebook.spans["echo2"].hashes) is not None


async def test_a_node_needed_by_another_branch_runs_though_it_precedes_a_pinned_node() -> None:
    notebook = await run_trial(GRAPH, 7, pinned={"echo2": 1})
    assert (notebook.output("pay"), notebook.output("echo4")) == (1, 7)


async def test_a_node_named_by_an_expression_runs_though_it_precedes_a_pinned_node() -> None:
    config: dict[str, Json] = {"config": {"first": "{{ nodes.echo1 }}"}}
    notebook = await run_trial(
        "start > echo1 > echo2 > echo3 > show", 7, {"show": config}, pinned={"echo3": 1}
    )
    assert notebook.output("show") == {"first": 7}
    assert notebook.status("echo2") is None
    mapped: dict[str, Json] = {"inputMappings": {"first": "nodes.echo1"}}
    notebook = await run_trial("start > echo1 > echo2 > echo3", 7, {"echo3": mapped}, pinned={"echo2": {}})
    assert notebook.output("echo3") == {"first": 7}


async def test_where_all_that_is_needed_is_pinned_no_trigger_runs() -> None:
    notebook = await run_trial("start > echo1 > echo2", 7, pinned={"echo2": 1})
    assert notebook.statuses == {"echo2": "completed"}
    notebook = await run_trial("start > echo1", 7, pinned={"start": 1})
    assert notebook.output("echo1") == 1


async def test_a_pinned_write_has_no_effect_and_a_pinned_merge_does_not_wait() -> None:
    def fail(_call: NodeCall) -> Json:
        raise AssertionError

    graph = compile_drawing(
        "start > pay > echo", {"pay": write_world(fail)}, trial={"pinned": {"pay": "paid"}}
    )
    notebook = await run_to_completion(SimulatedWorker(graph))
    assert (notebook.output("echo"), notebook.commits) == ("paid", 1)
    notebook = await run_trial(
        "start > echo1 > merge; start > echo2 > merge; merge > pay", pinned={"merge": 3}
    )
    assert notebook.output("pay") == 3


async def test_the_output_of_a_pinned_router_leaves_by_the_port_that_leads_on() -> None:
    notebook = await run_trial("start > route; route:left > echo1; route > echo2", 7, pinned={"route": 1})
    assert (notebook.output("echo2"), notebook.status("echo1").value) == (1, "skipped")  # type: ignore[union-attr]


LOOP = "start > echo1 > loop; loop:continue > echo2 > echo3; echo2 > echo4; loop:done > echo5 > echo6"


async def test_a_loop_that_is_needed_runs_with_its_whole_body() -> None:
    notebook = await run_trial(LOOP, [1, 2], upTo="echo5")
    assert cast("Mapping[str, Json]", notebook.output("echo5"))["results"] == [
        {"echo3": n, "echo4": n} for n in (1, 2)
    ]
    assert notebook.status("echo6") is None


async def test_a_trial_may_end_in_the_body_of_a_loop() -> None:
    notebook = await run_trial(LOOP, [1, 2], upTo="echo3")
    assert {node_id for node_id, _ in notebook.rows} == {"start", "echo1", "loop", "echo2", "echo3"}
    assert notebook.output("echo3", "1") == 2


async def test_a_trial_may_end_with_a_loop() -> None:
    notebook = await run_trial(LOOP, [1, 2], upTo="loop")
    assert notebook.output("echo4", "1") == 2
    assert notebook.status("echo5") is None


async def test_a_pinned_loop_has_no_turns() -> None:
    notebook = await run_trial(LOOP, [1, 2], pinned={"loop": {"results": [3]}})
    assert notebook.output("echo6") == {"results": [3]}
    assert set(notebook.statuses) == {"loop", "echo5", "echo6"}


async def test_a_pinned_node_in_a_body_gives_the_same_in_each_turn() -> None:
    notebook = await run_trial(LOOP, [1, 2], pinned={"echo2": 9})
    assert [notebook.output("echo3", turn) for turn in ("0", "1")] == [9, 9]


@pytest.mark.parametrize("trial", [{"upTo": "nowhere"}, {"pinned": {"nowhere": 1}}], ids=str)
def test_nodes_named_by_a_test_run_must_exist(trial: dict[str, Json]) -> None:
    with pytest.raises(InvalidDefinition, match="nowhere"):
        compile_drawing(GRAPH, KINDS, trial=trial)


@st.composite
def draw_trial(draw: st.DrawFn) -> ParsedGraph:
    ids = [f"n{number}" for number in range(draw(st.integers(1, 9)))]
    pairs = [(source, target) for place, target in enumerate(ids) for source in ids[:place]]
    drawn = draw(st.lists(st.sampled_from(pairs))) if pairs else []
    edges = [GraphEdge(f"e{number}", *ends) for number, ends in enumerate(drawn)]
    pinned = draw(st.dictionaries(st.sampled_from(ids), st.none(), max_size=3))
    up_to = draw(st.sampled_from([None, *ids]))
    return ParsedGraph([GraphNode(node_id, "echo") for node_id in ids], edges, up_to=up_to, pinned=pinned)


@given(draw_trial())
@settings(max_examples=100)
def test_the_remaining_graph_leads_to_the_end_without_passing_a_pinned_node(graph: ParsedGraph) -> None:
    kinds = MadeUpNodeTypes({"echo": pure_node(echo_data)})
    left = {node.id for node in prune_graph(graph, kinds).nodes}

    def is_wanted(node_id: str) -> bool:
        if graph.up_to is not None:
            return node_id == graph.up_to
        return not graph.outbound[node_id]

    def leads_on(node_id: str) -> bool:
        return is_wanted(node_id) or any(
            edge.target not in graph.pinned and leads_on(edge.target) for edge in graph.outbound[node_id]
        )

    if graph.up_to is None and not graph.pinned:
        assert left == graph.by_id.keys()
    else:
        assert left == {node_id for node_id in graph.by_id if leads_on(node_id)}
