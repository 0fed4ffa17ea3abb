"""Keys of nodes: every value that a node can reach is in its key, and nothing else is."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.node_api import FieldCompilation, LoopRequest, NodeCall
from engine.node_key import MAX_SOURCES, NodeKey, decode_key, encode_sources, list_digests
from engine.services import note_source_use
from engine.values import Json
from nodes.catalog import load_catalog
from tests.unit.run_harness import (
    MadeUpNodeType,
    SimulatedWorker,
    compile_drawing,
    pure_node,
    read_world,
    run_to_completion,
    write_world,
)

PLACES = ("early", "mapping", "when", "each", "raw")
ROOTS = ("data", "trigger", "nodes.far")
FIELDS = ("x", "y")


def state(call: NodeCall) -> Json:
    return call.config["out"]


def evaluate(call: NodeCall) -> Json:
    """Evaluate what the node evaluates late, and return nothing that could tell."""
    for condition in call.conditions.values():
        condition.test(call.scope, call.unresolved)
    for template in call.values.values():
        template.render(call.scope, call.unresolved)
    return "done"


async def evaluate_later(call: NodeCall) -> Json:
    await asyncio.sleep(0)
    return evaluate(call)


COMPILED = {
    "when": FieldCompilation.CONDITION,
    "each": FieldCompilation.VALUE,
    "raw": FieldCompilation.LITERAL,
}
KINDS = {
    "far": pure_node(state),
    "near": pure_node(state),
    "node": pure_node(evaluate, compiled=COMPILED),
    "late": pure_node(evaluate_later, compiled=COMPILED),
}


async def read_key(node: str, reading: dict[str, str], values: dict[str, dict[str, Json]]) -> NodeKey:
    """Run a node that reads one path at each of some places, and return its key."""
    config: dict[str, Json] = {}
    mappings: dict[str, Json] = {}
    for place, path in reading.items():
        if place == "mapping":
            mappings["m"] = path
        elif place == "when":
            # Evaluation stops before the path: what it can reach counts all the same.
            config["when"] = {
                "any": [
                    {"left": 1, "operator": "==", "right": 1},
                    {"left": f"{{{{ {path} }}}}", "operator": "exists"},
                ]
            }
        else:
            config[place] = f"{{{{ {path} }}}}"
    nodes: dict[str, dict[str, Json]] = {
        "far": {"config": {"out": values["nodes.far"]}},
        "near": {"config": {"out": values["data"]}},
        node: {"config": config, "inputMappings": mappings},
    }
    program = compile_drawing(f"start > far > near > {node}", KINDS, nodes)
    notebook = await run_to_completion(SimulatedWorker(program, values["trigger"]))
    key = decode_key(notebook.spans[node].hashes)
    assert key is not None
    return key


@settings(max_examples=60, deadline=None)
@given(
    node=st.sampled_from(["node", "late"]),
    reading=st.dictionaries(
        st.sampled_from(PLACES),
        st.builds("{}.{}".format, st.sampled_from(ROOTS), st.sampled_from(FIELDS)),
        min_size=1,
    ),
    changed=st.tuples(st.sampled_from(ROOTS), st.sampled_from(FIELDS)),
    values=st.lists(
        st.none() | st.integers() | st.text("ab1", max_size=3), min_size=2, max_size=2, unique=True
    ),
)
def test_a_change_of_a_value_that_a_node_can_reach_changes_its_key_and_no_other_does(
    node: str, reading: dict[str, str], changed: tuple[str, str], values: list[Json]
) -> None:
    before: dict[str, dict[str, Json]] = {root: dict.fromkeys(FIELDS, values[0]) for root in ROOTS}
    root, field = changed
    after: dict[str, dict[str, Json]] = {**before, root: {**before[root], field: values[1]}}
    same = asyncio.run(read_key(node, reading, before)) == asyncio.run(read_key(node, reading, after))
    is_reached = root == "data" or f"{root}.{field}" in reading.values()
    assert same is not is_reached


async def test_the_key_of_a_loop_covers_its_body_and_the_values_that_the_body_reads() -> None:
    kinds = {
        "loop": pure_node(lambda _call: LoopRequest([1, 2]), loops=True),
        "far": pure_node(state),
        "inner": pure_node(echo),
    }

    async def loop_key(inner: dict[str, Json], far: Json = 1) -> NodeKey | None:
        nodes: dict[str, dict[str, Json]] = {
            "far": {"config": {"out": far}},
            "inner": {"config": inner},
            "loop": {"inputMappings": {"fixed": "trigger.fixed"}},
        }
        drawing = "start > far > loop; loop:continue > inner"
        worker = SimulatedWorker(compile_drawing(drawing, kinds, nodes), {"fixed": 1})
        return decode_key((await run_to_completion(worker)).spans["loop"].hashes)

    plain: dict[str, Json] = {"a": 1}
    reading: dict[str, Json] = {"a": "{{ nodes.far }}"}
    assert await loop_key(plain) == await loop_key(plain)
    assert await loop_key(plain) != await loop_key({"a": 2})
    assert await loop_key(reading, far=1) != await loop_key(reading, far=2)


def echo(call: NodeCall) -> Json:
    return call.data


async def test_a_node_has_the_revisions_of_the_data_sources_that_it_used_in_its_key() -> None:
    async def use_source(_call: NodeCall) -> Json:
        await asyncio.sleep(0)
        note_source_use("ds_1", 3)
        return None

    kinds: dict[str, MadeUpNodeType] = {
        "reader": read_world(use_source),
        "loop": pure_node(lambda _call: LoopRequest([1]), loops=True),
        "payer": write_world(use_source),
    }
    program = compile_drawing("start > reader; start > loop; loop:continue > payer", kinds)
    spans = (await run_to_completion(SimulatedWorker(program))).spans
    for node_id, used in (("start", ()), ("reader", (("ds_1", 3),)), ("loop", (("ds_1", 3),))):
        key = decode_key(spans[node_id].hashes)
        assert key is not None
        assert key.sources == used


def test_an_incomplete_key_is_none() -> None:
    assert decode_key(None) is None
    assert decode_key(bytes(range(128))) is None  # of an earlier release
    full = bytes(range(1, 177))
    assert decode_key(full) is not None
    assert decode_key(full[:-16] + bytes(16)) is None
    many = {(f"ds_{number}", 1) for number in range(MAX_SOURCES + 1)}
    assert decode_key(full + encode_sources(many)) is None


def test_the_digests_of_a_key_are_listed_for_every_release() -> None:
    full = bytes(range(1, 177))
    assert list(list_digests(full + b'[["ds_1",1]]')) == [
        "type", "config", "mappings", "input", "implementation", "ports", "reads",
    ]  # fmt: skip
    assert list(list_digests(full[:128])) == ["type", "config", "mappings", "input"]
    assert list_digests(full)["reads"] == full[160:176]


@pytest.mark.parametrize(
    ("type_name", "config", "is_volatile"),
    [
        ("code", {"source": "1"}, True),
        ("date-time", {}, True),
        ("date-time", {"date": "{{ data.at }}"}, False),
        ("date-time", {"date": 0, "operation": "difference"}, True),
        ("set", {}, False),
    ],
)
def test_nodes_that_read_clock_or_chance_are_known(
    type_name: str,
    config: dict[str, Any],
    is_volatile: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    node_type = load_catalog().get(type_name)
    assert any(rule.applies_to(config) for rule in node_type.volatile) is is_volatile
