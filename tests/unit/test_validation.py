from __future__ import annotations

import re
import sys
from collections import Counter
from types import FrameType
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from docs.tables import ROOT
from engine.findings import MAX_FINDINGS, FindingType, FixAction, GraphFinding, ValidationResult
from engine.graph import ParsedGraph
from engine.validation import find_errors, validate_graph
from engine.values import Json
from nodes import catalog
from nodes.catalog import NodeCatalog

CATALOG = catalog.load_catalog()

START: dict[str, Json] = {"id": "start", "type": "manual"}
SET: dict[str, Json] = {"id": "set", "type": "set", "config": {"values": {"a": 1}}}
CHOOSE: dict[str, Json] = {
    "id": "choose",
    "type": "conditional",
    "config": {"condition": {"left": "{{ data.a }}", "operator": "equals", "right": 1}},
}


def parse_edge(source: str, target: str, **ports: str) -> dict[str, Json]:
    source_id, _, port = source.partition(":")
    return {"id": f"{source} > {target}", "source": source_id, "sourcePort": port, "target": target, **ports}


def make_graph(nodes: list[dict[str, Json]], edges: list[dict[str, Json]]) -> ParsedGraph:
    return ParsedGraph.from_stored({"nodes": cast("Json", nodes), "connections": cast("Json", edges)})


def check(
    nodes: list[dict[str, Json]], edges: list[dict[str, Json]], catalogue: NodeCatalog = CATALOG
) -> ValidationResult:
    return validate_graph(make_graph(nodes, edges), catalogue)


def fix_of(finding: GraphFinding) -> Json:
    return finding.as_json().get("fix")


def only_error(validation: ValidationResult) -> GraphFinding:
    assert len(validation.errors) == 1, validation.errors
    assert not validation.is_valid
    return validation.errors[0]


def test_a_sound_graph_has_no_findings() -> None:
    nodes = [START, SET, CHOOSE, SET | {"id": "yes"}, SET | {"id": "no"}, SET | {"id": "on error"}]
    edges = [
        parse_edge("start", "set"),
        parse_edge("set", "choose"),
        parse_edge("choose:true", "yes"),
        parse_edge("choose:false", "no"),
        parse_edge("choose:error", "on error"),
    ]
    assert check(nodes, edges) == ValidationResult()


def test_a_workflow_without_nodes_is_empty() -> None:
    error = only_error(check([], []))
    assert (error.type, error.suggestion[:3]) == ("empty-workflow", "Add")


def test_a_workflow_needs_a_trigger() -> None:
    error = only_error(check([SET], []))
    assert (error.type, error.suggestion[:13]) == ("missing-trigger", "Add a trigger")


def test_a_workflow_has_one_trigger_and_each_further_one_is_named() -> None:
    second, third = START | {"id": "second", "type": "webhook"}, START | {"id": "third"}
    errors = check([START, second, third], []).errors
    assert [(error.type, error.node_id) for error in errors] == [
        ("multiple-triggers", "second"),
        ("multiple-triggers", "third"),
    ]


@pytest.mark.parametrize(("source", "target"), [("gone", "set"), ("set", "gone"), ("gone", "gone too")])
def test_a_connection_from_or_to_a_missing_node_is_broken(source: str, target: str) -> None:
    error = only_error(check([START, SET], [parse_edge("start", "set"), parse_edge(source, target)]))
    connection_id = f"{source} > {target}"
    assert (error.type, error.connection_id) == ("broken-connection", connection_id)
    assert "gone" in error.message
    assert "Remove the connection" in error.suggestion
    assert fix_of(error) == {"action": "remove-connection", "connectionId": connection_id}


def test_two_connections_with_one_id_are_broken() -> None:
    twin = parse_edge("choose:true", "set") | {"id": "start > choose"}
    error = only_error(check([START, CHOOSE, SET], [parse_edge("start", "choose"), twin]))
    assert (error.type, error.connection_id) == ("broken-connection", "start > choose")


@pytest.mark.parametrize("other_type", ["set", "log", "no-such-type"])
def test_a_duplicate_node_id_is_an_error_for_all_types(other_type: str) -> None:
    twin: dict[str, Json] = {"id": "set", "type": other_type, "config": {"message": "hello"}}
    for nodes in ([START, SET, twin], [START, twin, SET]):
        errors = {(error.type, error.node_id) for error in check(nodes, [parse_edge("start", "set")]).errors}
        assert ("duplicate-node-id", "set") in errors
        assert (("unknown-node-type", "set") in errors) == (other_type == "no-such-type")


def test_an_unknown_node_type_is_reported_with_the_nearest_name() -> None:
    error = only_error(check([START, SET | {"type": "condtional"}], [parse_edge("start", "set")]))
    assert (error.type, error.node_id) == ("unknown-node-type", "set")
    assert "conditional" in error.message
    assert error.suggestion == "Use the type conditional."
    assert fix_of(error) == {"action": "set-node-type", "nodeId": "set", "value": "conditional"}


def test_a_type_that_is_only_a_little_like_another_is_not_taken_for_it() -> None:
    error = only_error(check([START, SET | {"type": "mail"}], [parse_edge("start", "set")]))
    assert "did you mean manual or " in error.message
    assert fix_of(error) is None


def test_a_version_that_the_catalogue_lacks_is_an_unknown_type() -> None:
    error = only_error(check([START, SET | {"version": "9.9.9"}], [parse_edge("start", "set")]))
    assert error.type == "unknown-node-type"
    assert error.suggestion == "Use version 1.0.0."
    assert fix_of(error) == {"action": "set-version", "nodeId": "set", "value": "1.0.0"}


def test_an_unknown_type_might_be_the_trigger_so_none_is_missed() -> None:
    assert only_error(check([{"id": "a", "type": "no-such-type"}], [])).type == "unknown-node-type"


@pytest.mark.parametrize(
    ("connection", "node_id", "fix"),
    [
        (parse_edge("choose", "set"), "choose", None),
        (parse_edge("choose:fals", "set"), "choose", ["sourcePort", "false"]),
        (parse_edge("choose:true", "set", targetPort="tools"), "set", ["targetPort", "input"]),
        (parse_edge("set:done", "choose"), "set", ["sourcePort", "output"]),
    ],
    ids=["no port output", "nearly a port", "the only input", "the only output"],
)
def test_a_connection_to_a_port_that_is_not_there_is_an_error(
    connection: dict[str, Json], node_id: str, fix: list[str] | None
) -> None:
    errors = check([START, CHOOSE, SET], [parse_edge("start", "choose"), connection]).errors
    error = next(error for error in errors if error.type == "invalid-port")
    assert (error.node_id, error.connection_id) == (node_id, connection["id"])
    assert "Use one of: " in error.suggestion
    if fix is None:
        assert fix_of(error) is None
        return
    field, port = fix
    wanted = {"action": "set-port", "connectionId": connection["id"], "path": [field], "value": port}
    assert fix_of(error) == wanted


def test_the_outputs_of_a_switch_are_read_from_its_config() -> None:
    cases: Json = [{"port": "gold", "equals": 1}, {"port": "silver", "equals": 2}]
    switch: dict[str, Json] = {"id": "choose", "type": "switch", "config": {"cases": cases}}
    found = check(
        [START, switch, SET],
        [
            parse_edge("start", "choose"),
            *(parse_edge(f"choose:{port}", "set") for port in ("gold", "default", "error")),
        ],
    )
    assert found == ValidationResult()
    error = only_error(
        check([START, switch, SET], [parse_edge("start", "choose"), parse_edge("choose:sliver", "set")])
    )
    assert (error.type, error.suggestion) == ("invalid-port", "Use one of: gold, silver, default, error.")
    fix = {"action": "set-port", "connectionId": "choose:sliver > set"}
    assert fix_of(error) == {**fix, "path": ["sourcePort"], "value": "silver"}


def test_a_connection_into_a_trigger_is_to_be_removed() -> None:
    errors = check([START, CHOOSE, SET], [parse_edge("choose:true", "start")]).errors
    error = next(error for error in errors if error.type == "invalid-port")
    assert error.node_id == "start"
    assert "remove the connection" in error.suggestion
    assert fix_of(error) == {"action": "remove-connection", "connectionId": "choose:true > start"}


@pytest.mark.parametrize("around", [["a"], ["a", "b"], ["a", "b", "c", "d", "e", "f", "g", "h", "i"]])
def test_a_cycle_is_an_error_and_is_shown(around: list[str]) -> None:
    nodes = [START, *(SET | {"id": node_id} for node_id in around)]
    edges = [parse_edge("start", around[0]), *map(parse_edge, around, [*around[1:], around[0]])]
    error = only_error(check(nodes, edges))
    assert error.type == "cycle"
    assert error.node_id in around
    assert len(error.message) < 120
    assert f"{around[0]} > " in error.suggestion
    only_way_out = {"action": "remove-connection", "connectionId": "a > a"}
    assert fix_of(error) == (only_way_out if around == ["a"] else None)


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
    error = only_error(check([START, SET | {"config": config}], [parse_edge("start", "set")]))
    assert (error.type, error.node_id) == ("invalid-config", "set")
    assert word in error.message
    assert error.suggestion


@pytest.mark.parametrize(
    ("type_name", "config", "fix"),
    [
        (
            "set",
            {"values": {}, "mod": "merge"},
            {"action": "rename-config", "nodeId": "set", "path": ["mod"], "value": "mode"},
        ),
        (
            "set",
            {"values": {}, "mode": "Replace"},
            {"action": "set-config", "nodeId": "set", "path": ["mode"], "value": "replace"},
        ),
        ("set", {"values": {}, "colour": "red"}, None),
    ],
)
def test_a_config_that_is_nearly_right_comes_with_its_correction(
    type_name: str, config: dict[str, Json], fix: Json
) -> None:
    node = SET | {"type": type_name, "config": config}
    assert fix_of(only_error(check([START, node], [parse_edge("start", "set")]))) == fix


@pytest.mark.parametrize("source", ["nonsense", "{{ data.", {"a": ["{{ data }"]}])
def test_a_mapping_that_cannot_be_read_is_an_error(source: Json) -> None:
    error = only_error(check([START, SET | {"inputMappings": {"x": source}}], [parse_edge("start", "set")]))
    assert (error.type, error.node_id) == ("invalid-config", "set")
    assert "inputMappings.x" in error.message


def test_every_expression_that_cannot_be_read_is_told_with_its_place() -> None:
    config: Json = {"url": "{{ nonsense }}", "headers": {"a": "{{ data }}", "b": "{{ more nonsense }}"}}
    node: dict[str, Json] = {"id": "call", "type": "http-request", "config": config}
    errors = check([START, node], [parse_edge("start", "call")]).errors
    assert [error.message.split(": ")[1] for error in errors] == ["config.url", "config.headers.b"]


def test_an_expression_in_a_case_of_a_switch_is_told_with_its_place() -> None:
    cases: Json = [
        {"port": "a", "equals": "{{ nonsense }}"},
        {"port": "b", "condition": {"left": "{{ data.a }}", "operator": "near", "right": 1}},
        {"port": "c", "condition": {"left": "{{ nodes.gone.a }}", "operator": "equals", "right": 1}},
    ]
    node: dict[str, Json] = {"id": "choose", "type": "switch", "config": {"cases": cases}}
    found = check([START, node], [parse_edge("start", "choose")])
    assert [error.message.split(": ")[1] for error in found.errors] == [
        "config.cases.0.equals",
        "config.cases.1.condition",
    ]
    assert ["config.cases.2.condition.left" in warning.message for warning in found.warnings] == [True]


def test_a_type_that_cannot_run_is_an_error_of_its_own() -> None:
    drawn_only = NodeCatalog({**CATALOG.node_types, "set": replace(CATALOG.get("set"), runnable=False)})
    error = only_error(check([START, SET], [parse_edge("start", "set")], drawn_only))
    assert (error.type, error.node_id) == ("not-runnable", "set")
    assert "can't run it" in error.message
    assert "Replace it" in error.suggestion


def make_tool(node_type: str, name: str = "t", **config: Json) -> dict[str, Json]:
    """Return a tool with a node of this type as its target."""
    target: Json = {"node": {"type": node_type, "config": config}}
    return {"id": name, "type": "tool", "config": {"name": name, "description": "d", "target": target}}


TOOL = make_tool("http-request", "tool", url="https://a.b/{{ args.city }}")


def check_agent(*tools: dict[str, Json], **config: Json) -> ValidationResult:
    """Validate an agent with tools."""
    agent: dict[str, Json] = {
        "id": "agent",
        "type": "agent",
        "config": {"prompt": "hello", "model": "echo", **config},
    }
    edges = [parse_edge(str(tool["id"]), "agent", targetPort="tools") for tool in tools]
    return check([START, agent, *tools], [parse_edge("start", "agent"), *edges])


def test_an_agent_and_its_tools_are_checked() -> None:
    post = make_tool("http-request", url="https://a.b", method="POST")
    cases: list[tuple[list[dict[str, Json]], dict[str, Json], list[tuple[str, str]]]] = [
        ([TOOL], {}, []),
        ([post], {}, [("invalid-config", "t")]),
        ([post], {"effects": ["read", "write"]}, []),
        ([TOOL, {**TOOL, "id": "other"}], {}, [("invalid-config", "other")]),
        ([make_tool("loop", items=[])], {}, [("invalid-config", "t")]),
        ([make_tool("human-input", message="Well?")], {}, [("invalid-config", "t")]),
        ([make_tool("nothing")], {}, [("unknown-node-type", "t")]),
        ([make_tool("http-request", url="https://a.b", methd="GET")], {}, [("invalid-config", "t")]),
        ([SET | {"id": "tool"}], {}, []),
    ]
    for tools, config, errors in cases:
        found = check_agent(*tools, **config)
        assert [(error.type.value, error.node_id) for error in found.errors] == errors, (tools, found.errors)
    agent: dict[str, Json] = {"id": "agent", "type": "agent", "config": {"prompt": "x"}}
    without_model = check([START, agent], [parse_edge("start", "agent")])
    assert [(one.type.value, one.node_id) for one in without_model.warnings] == [("missing-config", "agent")]


def test_arguments_are_known_only_in_the_target_of_a_tool() -> None:
    step = SET | {"config": {"values": {"city": "{{ args.city }}"}}}
    (warning,) = check([START, step], [parse_edge("start", "set")]).warnings
    assert (warning.type, warning.node_id) == ("unresolved-mapping", "set")


def test_a_node_without_implementation_is_a_warning_in_a_draft() -> None:
    drawn = make_graph([START, SET, TOOL], [parse_edge("start", "set")])
    validation = validate_graph(drawn, CATALOG, is_draft=True)
    assert validation.is_valid
    assert {warning.type for warning in validation.warnings} == {"not-runnable", "disconnected-node"}
    assert not validate_graph(drawn, CATALOG).is_valid


def test_a_language_model_and_tools_are_connected_to_an_agent() -> None:
    nodes: list[dict[str, Json]] = [
        START,
        {"id": "agent", "type": "agent", "config": {"prompt": "hello"}},
        {"id": "model", "type": "llm", "config": {"model": "model_001"}},
        TOOL,
    ]
    edges = [
        parse_edge("start", "agent"),
        parse_edge("model", "agent", targetPort="ai"),
        parse_edge("tool", "agent", targetPort="tools"),
    ]
    assert check(nodes, edges) == ValidationResult()
    alone = [(warning.type, warning.node_id) for warning in check(nodes, edges[:2]).warnings]
    assert alone == [("disconnected-node", "tool")]


def test_a_config_that_lacks_something_is_a_warning() -> None:
    validation = check([START, SET | {"config": {}}], [parse_edge("start", "set")])
    assert validation.is_valid
    (warning,) = validation.warnings
    assert (warning.type, warning.node_id) == ("missing-config", "set")
    assert "values" in warning.message
    assert warning.suggestion == "Set values in its config."


def test_missing_requirements_of_a_node_are_one_warning() -> None:
    source: dict[str, Json] = {"id": "node_1", "type": "mysql-source", "label": "Extract Orders"}
    validation = validate_graph(
        make_graph([START, source], [parse_edge("start", "node_1")]), CATALOG, is_draft=True
    )
    (warning,) = [warning for warning in validation.warnings if warning.type == "missing-config"]
    assert warning.message.startswith('Node "Extract Orders" (mysql-source) needs configuration')
    assert "dataSource" in warning.message
    assert "query" in warning.message


def test_a_possible_credential_in_a_config_is_a_warning() -> None:
    config: Json = {"url": "https://a.b", "headers": {"authorization": "Bearer 0123456789abcdef"}}
    node: dict[str, Json] = {"id": "call", "type": "http-request", "config": config}
    (warning,) = check([START, node], [parse_edge("start", "call")]).warnings
    assert (warning.type, warning.node_id) == ("inline-secret", "call")
    assert "headers.authorization" in warning.message
    assert "0123456789abcdef" not in str(warning.as_json())
    assert warning.suggestion


def test_errors_can_be_had_without_the_warnings_that_take_time() -> None:
    nodes = [START, SET | {"config": {"values": {"a": "{{ data.nothing }}"}, "extra": 1}}]
    drawn = make_graph(nodes, [parse_edge("start", "set"), parse_edge("set", "gone")])
    assert find_errors(drawn, CATALOG).errors == validate_graph(drawn, CATALOG).errors
    assert find_errors(drawn, CATALOG).warnings == ()
    assert [warning.type for warning in validate_graph(drawn, CATALOG).warnings] == ["unresolved-mapping"]


def test_more_findings_than_anybody_reads_are_cut_off_and_that_is_told() -> None:
    wrong = {f"wrong-{number}": 1 for number in range(50)}
    nodes = [START, *(SET | {"id": f"n{number}", "config": {**wrong}} for number in range(100))]
    edges = [parse_edge("start", f"n{number}") for number in range(100)]
    validation = check(nodes, edges)
    assert len(validation.errors) == MAX_FINDINGS
    assert validation.is_truncated
    assert not check(nodes[:10], edges[:9]).is_truncated
    many = [SET | {"id": f"n{number}", "config": {}} for number in range(MAX_FINDINGS + 1)]
    warned = check([START, *many], [parse_edge("start", str(node["id"])) for node in many])
    assert (len(warned.warnings), warned.is_valid, warned.is_truncated) == (MAX_FINDINGS, True, True)


def test_a_node_that_nothing_leads_to_is_a_warning() -> None:
    validation = check([START, SET], [])
    assert validation.is_valid
    (warning,) = validation.warnings
    assert (warning.type, warning.node_id) == ("disconnected-node", "set")
    assert warning.suggestion == "Connect it, or remove it."


def test_every_finding_has_a_message_a_place_and_a_remedy() -> None:
    nodes = [START, START | {"id": "again"}, SET, SET | {"type": "nope"}, SET | {"id": "alone", "config": {}}]
    validation = check(nodes, [parse_edge("start", "gone"), parse_edge("start:nope", "alone")])
    findings = [*validation.errors, *validation.warnings]
    assert len({finding.type for finding in findings}) >= 6
    for finding in findings:
        shown = finding.as_json()
        assert shown.keys() >= {"type", "message", "suggestion"}
        assert shown.keys() & {"nodeId", "connectionId"}
        assert all(shown.values())


def test_every_finding_and_every_fix_is_documented() -> None:
    documented = set(re.findall(r"`([a-z-]+)`", (ROOT / "docs/validation.md").read_text()))
    assert {*FindingType, *FixAction} <= documented


IDS = st.sampled_from(["start", "a", "b", "c", ""])
TEXTS = st.sampled_from([
    "", "x", "data", "data.x", "{{ data.x }}", "{{ nodes.a.text }}", "{{ nodes.zzz }}", "{{ data.", "$.item[0]",
    "nodes.b", 'nodes["a"].rows[0]', "{{ trigger.body.x }} {{ execution.id }} {{ index }}", "get",
])  # fmt: skip
SCALARS = TEXTS | st.none() | st.booleans() | st.integers(-2, 2) | st.just(0.5)
KEYS = st.sampled_from([
    "values", "mode", "condition", "items", "text", "url", "method", "left", "operator", "right", "$op", "args", "all",
    "not", "dataSource", "x",
])  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=4)
NODES = st.fixed_dictionaries(
    {"id": IDS, "type": st.sampled_from([*CATALOG.types(), "sett", ""])},
    optional={
        "version": st.sampled_from(["1.0.0", "9"]),
        "label": TEXTS,
        "config": OBJECTS,
        "inputMappings": OBJECTS,
        "passThroughValues": OBJECTS,
    },
)
PORTS = st.sampled_from(["output", "input", "error", "true", "ai", "tools", "nope"])
EDGES = st.fixed_dictionaries({
    "id": IDS, "source": IDS, "target": IDS, "sourcePort": PORTS, "targetPort": PORTS
})  # fmt: skip


@given(
    nodes=st.lists(NODES, max_size=6),
    edges=st.lists(EDGES, max_size=8),
    samples=st.dictionaries(IDS, st.lists(VALUES, max_size=2), max_size=3),
)
def test_any_graph_gives_findings_and_no_exception(
    nodes: list[dict[str, Json]], edges: list[dict[str, Json]], samples: dict[str, list[Json]]
) -> None:
    drawn = make_graph(nodes, edges)
    validation = validate_graph(drawn, CATALOG, samples=samples)
    for finding in (*validation.errors, *validation.warnings):
        assert finding.message
        assert finding.suggestion
    assert find_errors(drawn, CATALOG).errors == validation.errors


def test_thousands_of_nodes_are_checked_without_recursion_in_linear_time() -> None:
    def cost(size: int) -> int:
        ids = [f"n{number}" for number in range(size)]
        before = ["start", *ids]
        nodes = [
            START,
            *(
                SET | {"id": node_id, "config": {"values": {node_id: f"{{{{ nodes.{earlier}.a }}}}"}}}
                for node_id, earlier in zip(ids, before, strict=False)
            ),
        ]
        edges = [*map(parse_edge, before, ids), *map(parse_edge, before, ids[2:])]
        drawn = make_graph(nodes, edges)
        calls: Counter[str] = Counter()

        def count(_frame: FrameType, event: str, _argument: object) -> None:
            calls[event] += 1

        sys.setprofile(count)
        try:
            assert validate_graph(drawn, CATALOG).is_valid
        finally:
            sys.setprofile(None)
        return calls.total()

    assert cost(4_000) < 10.5 * cost(400)


SUM: Json = {"$op": "add", "args": [1, 2]}


@pytest.mark.parametrize(
    "fields",
    [
        {"inputMappings": {"total": SUM}},
        {"inputMappings": {"total": {"inner": [SUM]}}},
        {
            "type": "http-request",
            "config": {"url": "https://example.com", "method": "POST", "body": {"n": SUM}},
        },
    ],
)
def test_an_operation_where_nothing_is_computed_is_an_error(fields: dict[str, Json]) -> None:
    error = only_error(check([START, SET | fields], [parse_edge("start", "set")]))
    assert error.type == "invalid-config"
    assert "$op add" in error.message


def test_an_operation_in_a_computed_field_is_none() -> None:
    nodes = [START, SET | {"config": {"values": {"total": SUM}}}]
    assert check(nodes, [parse_edge("start", "set")]).is_valid
