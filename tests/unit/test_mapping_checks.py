"""Mapping paths without a value, found before a run from the catalog's schemas and from past outputs."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.agents.agent_steps import AgentStep
from engine.findings import GraphFinding
from engine.graph import ParsedGraph
from engine.mapping_checks import MAX_EXPLAINED
from engine.program import WorkflowProgram
from engine.run_records import AttemptSpan, LogLine, NodeSpan, SpanStatus
from engine.services import NodeServices, RunControl
from engine.validation import validate_graph
from engine.values import Json, decode_json
from engine.workflow_runner import RunStart, run_workflow
from models.timestamps import DatabaseClock
from nodes import catalog
from tests.node_calls import CALLER, NoNetwork

CATALOG = catalog.load_catalog()
Nodes = Sequence[dict[str, Json]]


def make_node(name: str, node_type: str, **fields: Json) -> dict[str, Json]:
    return {"id": name, "type": node_type, "label": name.title(), **fields}


START = make_node("start", "rest-api")
PARSE = make_node("parse", "csv-parse", config={"text": "{{ trigger.body.csv }}"})
CALL = make_node("call", "http-request", config={"url": "https://a.b"})
WRITE = make_node("write", "template", config={"text": "hello"})
CHOOSE = make_node(
    "choose", "conditional", config={"condition": {"left": 1, "operator": "equals", "right": 1}}
)


def reading_node(*paths: str, node_type: str = "template") -> dict[str, Json]:
    """Return a node that reads some paths."""
    field = {"template": "text", "log": "message"}[node_type]
    return make_node("read", node_type, config={field: " ".join(f"{{{{ {path} }}}}" for path in paths)})


def chain_of_nodes(*nodes: dict[str, Json]) -> tuple[Nodes, list[str]]:
    names = [str(each["id"]) for each in nodes]
    return nodes, [f"{source} > {target}" for source, target in pairwise(names)]


def find_in_graph(
    nodes: Nodes, edges: Sequence[str], samples: Mapping[str, Sequence[Json]] | None = None
) -> list[GraphFinding]:
    """Return the findings about paths in a graph; an edge is `source:port > target`."""
    connections = []
    for edge in edges:
        source, target = edge.split(" > ")
        source_id, _, port = source.partition(":")
        connections.append({"id": edge, "source": source_id, "sourcePort": port, "target": target})
    drawn = ParsedGraph.from_stored(
        {"nodes": cast("Json", list(nodes)), "connections": cast("Json", connections)}
    )
    validation = validate_graph(drawn, CATALOG, samples=samples or {})
    return [warning for warning in validation.warnings if warning.type == "unresolved-mapping"]


def only_finding(findings: list[GraphFinding]) -> GraphFinding:
    assert len(findings) == 1, findings
    return findings[0]


# ── inputs of each node ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("parents", "path", "lost"),
    [
        ([], "data", 0),
        ([], "data.body.anything", 0),
        ([], "data.name", 1),
        ([], "data.headers.anything", 0),
        ([], "$.data.query.q", 0),
        ([], "trigger.body.x", 0),
        ([], "trigger.x", 1),
        ([], "execution.startedAt", 0),
        ([], "execution.started", 1),
        ([], "item.x", 1),
        ([PARSE], "data.rows[0].anything", 0),
        ([PARSE], "data.rows.first", 1),
        ([PARSE], "data.body.x", 1),
        ([PARSE], "data.count.x", 1),
        ([PARSE, CALL], "data.rows", 1),
        ([PARSE, CALL], "nodes.parse.rows", 0),
        ([PARSE, CALL], "nodes.parse.row", 1),
        ([PARSE, CALL], "data.body.x.y", 0),
        ([CHOOSE], "data.body.x", 0),
        ([CHOOSE], "data.rows", 1),
        ([PARSE, CHOOSE], "data.rows", 0),
        (
            [make_node("put", "set", config={"values": {"a": {"b": 1}, "c": "{{ data.body }}"}})],
            "data.a.b",
            0,
        ),
        (
            [make_node("put", "set", config={"values": {"a": {"b": 1}, "c": "{{ data.body }}"}})],
            "data.a.x",
            1,
        ),
        (
            [make_node("put", "set", config={"values": {"a": {"b": 1}, "c": "{{ data.body }}"}})],
            "data.c.x",
            0,
        ),
        ([make_node("put", "set", config={"values": {"a": 1}})], "data.body.x", 0),
        ([make_node("put", "set", config={"values": {"a": 1}, "mode": "replace"})], "data.body.x", 1),
        ([make_node("put", "set", config={"values": {"a": 1}, "mode": "{{ data.body.m }}"})], "data.x", 0),
        ([make_node("put", "set", config={"values": {"a": {"$op": "now", "args": []}}})], "data.a.x", 0),
    ],
)
def test_a_path_is_checked_against_the_outputs_of_earlier_nodes(
    parents: list[dict[str, Json]], path: str, lost: int
) -> None:
    findings = find_in_graph(*chain_of_nodes(START, *parents, reading_node(path)))
    assert [finding.node_id for finding in findings] == ["read"] * lost


@pytest.mark.parametrize(
    ("path", "lost"),
    [("approval.ask.url", 0), ("approval.ask.link", 1), ("approval.read.url", 1), ("approval.gone.url", 1)],
)
def test_a_link_of_an_approval_needs_a_node_that_asks(path: str, lost: int) -> None:
    asks = make_node("ask", "human-input", config={"title": "Go on?"})
    findings = find_in_graph(*chain_of_nodes(START, reading_node(path), asks))
    assert [finding.node_id for finding in findings] == ["read"] * lost
    if findings:
        assert "approval.ask.url" in str(findings[0].as_json())


def test_mapped_fields_extend_the_input_for_the_config_alone() -> None:
    mapped = make_node(
        "read",
        "template",
        config={"text": "{{ data.id }} {{ data.rows }} {{ data.first.anything }} {{ data.body.x }}"},
        inputMappings={"id": 7, "first": "data.rows[0]", "again": "data.id"},
    )
    findings = find_in_graph(*chain_of_nodes(START, PARSE, mapped))
    assert [finding.message.split(": ")[1:] for finding in findings] == [
        ["inputMappings.again", "data.id finds nothing"],
        ["config.text", "data.body.x finds nothing"],
    ]


def test_a_value_is_passed_through_under_its_new_name() -> None:
    writing = WRITE | {"passThroughValues": {"lines": "rows", "place": "citty"}}
    mapped = writing | {"inputMappings": {"city": "trigger.body.city"}}
    findings = find_in_graph(
        *chain_of_nodes(START, PARSE, mapped, reading_node("data.lines[0].x", "data.text", "data.rows"))
    )
    assert [(finding.node_id, finding.message.split(": ")[1:]) for finding in findings] == [
        ("write", ["passThroughValues.place", "citty finds nothing"]),
        ("read", ["config.text", "data.rows finds nothing"]),
    ]
    assert findings[0].as_json()["fix"] == {
        "action": "set-pass-through-value",
        "nodeId": "write",
        "path": ["place"],
        "value": "city",
    }


@pytest.mark.parametrize(
    ("path", "lost"),
    [
        ("data.rows", 0),
        ("data.text", 0),
        ("data.parse.rows", 0),
        ("data.write.text", 0),
        ("data.write.rows", 1),
        ("data.parse", 0),
        ("data.status", 1),
    ],
)
def test_several_parents_give_their_fields_together_and_each_under_its_id(path: str, lost: int) -> None:
    nodes = [START, PARSE, WRITE, reading_node(path)]
    edges = ["start > parse", "start > write", "parse > read", "write > read"]
    assert len(find_in_graph(nodes, edges)) == lost


@pytest.mark.parametrize(
    ("config", "path", "lost"),
    [
        ({}, "data.parse.rows", 0),
        ({}, "data.rows", 1),
        ({"combine": "merged"}, "data.rows", 0),
        ({"combine": "merged"}, "data.parse.rows", 1),
        ({"combine": "list"}, "data[1].text", 0),
        ({"combine": "list"}, "data.text", 1),
        ({"combine": "list"}, "data[0].status", 1),
        ({"mode": "any"}, "data.text", 0),
        ({"mode": "any"}, "data.write.text", 1),
        ({"mode": "most"}, "data.anything", 0),
    ],
)
def test_a_merge_outputs_its_combined_inputs(config: dict[str, Json], path: str, lost: int) -> None:
    nodes = [START, PARSE, WRITE, make_node("merge", "merge", config=config), reading_node(path)]
    edges = ["start > parse", "start > write", "parse > merge", "write > merge", "merge > read"]
    assert len(find_in_graph(nodes, edges)) == lost


def test_a_possible_field_of_one_parent_is_not_suggested_from_another() -> None:
    nodes = [
        START,
        make_node("put", "set", config={"values": {"body": 1}}),
        CHOOSE,
        reading_node("data.body.x"),
    ]
    edges = ["start > put", "start > choose", "put > read", "choose:true > read"]
    assert find_in_graph(nodes, edges) == []


def test_by_its_error_port_a_node_gives_the_error_and_its_data() -> None:
    paths = ["data.error.message", "data.data.body", "data.error.massage", "data.status", "data.data.rows"]
    nodes, edges = [START, CALL, reading_node(*paths)], ["start > call", "call:error > read"]
    assert [finding.message.split(": ")[2] for finding in find_in_graph(nodes, edges)] == [
        "data.error.massage finds nothing",
        "data.status finds nothing",
        "data.data.rows finds nothing",
    ]
    both = [*edges, "call > read"]
    assert [finding.message.split(": ")[2] for finding in find_in_graph(nodes, both)] == [
        "data.error.massage finds nothing",
        "data.data.rows finds nothing",
    ]


def test_an_undescribed_output_gives_no_findings() -> None:
    unknown = make_node("odd", "no-such-type")
    tangled = [PARSE, reading_node("data.x", "nodes.parse.x")]
    assert find_in_graph(*chain_of_nodes(START, unknown, reading_node("data.x.y"))) == []
    assert find_in_graph(tangled, ["parse > read", "read > parse"]) == []
    assert find_in_graph([START, *tangled, PARSE], ["start > parse", "parse > read"]) == []


@pytest.mark.parametrize(
    "config",
    [
        {"condition": {"left": "{{ data.x }}", "operator": "exists"}},
        {"condition": {"any": [{"left": "{{ data.x }}", "operator": "not-exists"}]}},
        {
            "condition": {
                "left": {"$op": "default", "args": ["{{ data.x }}", 1]},
                "operator": "==",
                "right": 1,
            }
        },
    ],
)
def test_a_path_that_may_well_find_nothing_is_no_finding(config: dict[str, Json]) -> None:
    assert find_in_graph(*chain_of_nodes(START, CHOOSE | {"config": config})) == []


def test_the_last_resort_of_a_default_must_be_there() -> None:
    values: Json = {"a": {"$op": "coalesce", "args": ["{{ data.x }}", "{{ data.y }}"]}}
    finding = only_finding(
        find_in_graph(*chain_of_nodes(START, make_node("put", "set", config={"values": values})))
    )
    assert "config.values.a.args.1: data.y" in finding.message


# ── nodes named by their ids ────────────────────────────────────────────────────────────────────────────────


def test_a_node_that_is_named_must_run_before() -> None:
    nodes = [START, PARSE, WRITE, reading_node("nodes.parse.rows", "nodes.write.text", "nodes.read.text")]
    findings = find_in_graph(nodes, ["start > parse", "start > write", "parse > read"])
    assert [finding.message.split(": ")[2] for finding in findings] == [
        "nodes.write.text does not run before this one",
        "nodes.read.text is this node itself",
    ]
    assert "no connection leads here from 'Write'" in findings[0].message
    assert (
        find_in_graph(
            [*nodes[:3], reading_node("nodes.start.body", "nodes")], ["start > parse", "parse > read"]
        )
        == []
    )


@pytest.mark.parametrize("name", ["pars", 'nodes["Parse"]', "PARSE"])
def test_a_node_that_is_not_there_is_answered_with_the_nearest(name: str) -> None:
    path = name if name.startswith("nodes") else f"nodes.{name}"
    finding = only_finding(
        find_in_graph(*chain_of_nodes(START, PARSE, WRITE, reading_node(f"{path}.rows[0]")))
    )
    assert "names no node of the workflow" in finding.message
    assert finding.suggestion == "Did you mean nodes.parse.rows[0]?"
    assert finding.as_json()["fix"] == {
        "action": "set-config",
        "nodeId": "read",
        "path": ["text"],
        "value": "{{ nodes.parse.rows[0] }}",
    }


def test_a_node_like_no_other_is_answered_with_those_that_run_before() -> None:
    finding = only_finding(find_in_graph(*chain_of_nodes(START, PARSE, reading_node("nodes.quux.rows"))))
    assert finding.suggestion == "The nodes before this one are parse, start."
    assert finding.fix is None


# ── suggestions ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("data.row", "data.rows"),
        ("data.Rows[0].x", "data.rows[0].x"),
        ("$.data.colums", "data.columns"),
        ("data.output.rows[0]", "data.rows[0]"),
        ("nodes.start.boddy.x", "nodes.start.body.x"),
        ("trigger.bodi", "trigger.body"),
        ("execution.workflowid", "execution.workflowId"),
    ],
)
def test_the_nearest_path_is_named_and_put_in_place(path: str, meant: str) -> None:
    finding = only_finding(find_in_graph(*chain_of_nodes(START, PARSE, reading_node("trigger.body", path))))
    assert finding.suggestion == f"Did you mean {meant}?"
    assert finding.as_json()["fix"] == {
        "action": "set-config",
        "nodeId": "read",
        "path": ["text"],
        "value": f"{{{{ trigger.body }}}} {{{{ {meant} }}}}",
    }


def test_a_mapping_is_put_right_where_it_stands() -> None:
    mappings: Json = {
        "first": "data.row[0]",
        "title": "the {{ data.cuont }} rows",
        "deep": [{"x": "{{ data.row }}"}],
    }
    findings = find_in_graph(*chain_of_nodes(START, PARSE, WRITE | {"inputMappings": mappings}))
    assert [finding.as_json()["fix"] for finding in findings] == [
        {"action": "set-input-mapping", "nodeId": "write", "path": path, "value": value}
        for path, value in [
            (["first"], "data.rows[0]"),
            (["title"], "the {{ data.count }} rows"),
            (["deep", 0, "x"], "{{ data.rows }}"),
        ]
    ]


@pytest.mark.parametrize(
    ("parents", "path", "suggestion"),
    [
        ([], "data.name", "data has body, headers, query: is it data.body.name?"),
        ([CALL], "data.items[0]", "data has status, headers, body, url: is it data.body.items[0]?"),
        ([PARSE], "data.quux", "data has rows, columns, count."),
        ([PARSE], "data.rows.x", "data.rows is a list: data.rows[0] is its first item."),
        ([PARSE], "data.count.x", "data.count has no fields."),
    ],
)
def test_without_a_certain_suggestion_the_known_names_are_listed(
    parents: list[dict[str, Json]], path: str, suggestion: str
) -> None:
    finding = only_finding(find_in_graph(*chain_of_nodes(START, *parents, reading_node(path))))
    assert (finding.suggestion, finding.fix) == (suggestion, None)


def test_an_odd_name_is_written_so_that_it_can_be_read_back() -> None:
    put = make_node("put", "set", config={"values": {'an "odd" key': {"x": 1}}, "mode": "replace"})
    finding = only_finding(find_in_graph(*chain_of_nodes(START, put, reading_node("data.x"))))
    assert finding.suggestion == r'Did you mean data["an \"odd\" key"].x?'
    assert find_in_graph(*chain_of_nodes(START, put, reading_node(r'data["an \"odd\" key"].x'))) == []


def test_of_many_paths_only_the_first_are_explained() -> None:
    paths = [f"data.row[{number}]" for number in range(MAX_EXPLAINED + 5)]
    findings = find_in_graph(*chain_of_nodes(START, PARSE, reading_node(*paths)))
    assert len(findings) == len(paths)
    assert [finding.fix is None for finding in findings] == [False] * MAX_EXPLAINED + [True] * 5
    assert all(finding.suggestion for finding in findings)


# ── outputs of past runs ────────────────────────────────────────────────────────────────────────────────────

ANSWER: Json = {
    "status": 200,
    "headers": {},
    "url": "u",
    "body": {"order": {"id": 7}, "lines": [{"sku": "x"}, {"n": 1}]},
}


@pytest.mark.parametrize(
    ("path", "lost"),
    [
        ("data.body.order.id", 0),
        ("data.body.order", 0),
        ("data.body.order.total", 1),
        ("data.body.lines[3].sku", 0),
        ("data.body.lines[0].n", 0),
        ("data.body.lines[0].price", 1),
        ("data.body.customer", 1),
        ("data.headers.anything", 0),
        ("data.body.order.id.x", 1),
    ],
)
def test_past_outputs_complete_the_schema(path: str, lost: int) -> None:
    findings = find_in_graph(*chain_of_nodes(START, CALL, reading_node(path)), samples={"call": [ANSWER]})
    assert len(findings) == lost
    assert all("found nothing in past runs" in finding.message for finding in findings)


def test_a_path_that_any_past_run_found_is_no_finding() -> None:
    other: Json = {"status": 200, "headers": {}, "url": "u", "body": {"customer": {"name": "Ada"}}}
    graph = chain_of_nodes(START, CALL, reading_node("data.body.customer.name", "data.body.order.id"))
    assert find_in_graph(*graph, samples={"call": [ANSWER, other]}) == []


def test_past_outputs_name_the_path_that_was_meant() -> None:
    finding = only_finding(
        find_in_graph(*chain_of_nodes(START, CALL, reading_node("data.order.id")), samples={"call": [ANSWER]})
    )
    assert finding.suggestion == "Did you mean data.body.order.id?"
    finding = only_finding(
        find_in_graph(
            *chain_of_nodes(START, reading_node("data.name")), samples={"start": [{"body": {"name": "Ada"}}]}
        )
    )
    assert finding.suggestion == "Did you mean data.body.name?"


@pytest.mark.parametrize("body", [None, {}, [], {"x": None}])
def test_an_empty_past_output_tells_nothing(body: Json) -> None:
    output: Json = {"status": 204, "headers": {}, "body": body, "url": "u"}
    assert (
        find_in_graph(*chain_of_nodes(START, CALL, reading_node("data.body.x.y")), samples={"call": [output]})
        == []
    )


def test_past_outputs_of_a_node_that_hands_its_input_on_are_not_asked() -> None:
    put = make_node("put", "set", config={"values": {"new": 1}})
    samples: dict[str, list[Json]] = {"put": [{"old": 1}]}
    assert find_in_graph(*chain_of_nodes(START, put, reading_node("data.new")), samples=samples) == []


def test_a_past_output_has_more_than_the_schema_says() -> None:
    samples: dict[str, list[Json]] = {"start": [{"body": 1, "headers": {}, "query": {}, "extra": {"x": 1}}]}
    assert find_in_graph(*chain_of_nodes(START, reading_node("data.extra.x")), samples=samples) == []


# ── the same graphs, run ────────────────────────────────────────────────────────────────────────────────────


class SpanJournal:
    """Journal that stores the spans of one run."""

    def __init__(self) -> None:
        self.spans: dict[str, NodeSpan] = {}

    def record(self, span: NodeSpan) -> None:
        self.spans[span.node_id] = span

    def log(self, line: LogLine) -> None: ...

    def record_attempt(self, attempt: AttemptSpan) -> None: ...

    def record_step(self, step: AgentStep) -> None: ...

    def set_metadata(self, metadata: Mapping[str, str]) -> None: ...

    def advance(self, share: float) -> None: ...

    async def commit(self) -> None: ...

    def holds_lease(self) -> bool:
        return True


async def run_and_record(graph: ParsedGraph, trigger: Json) -> dict[str, NodeSpan]:
    now = datetime.now(UTC)
    journal = SpanJournal()
    program = WorkflowProgram.compile(graph, CATALOG, CATALOG.implementation)
    start = RunStart(CALLER, trigger, DatabaseClock(), deadline=now + timedelta(seconds=20), started_at=now)
    await run_workflow(program, start, journal, RunControl(), NodeServices(NoNetwork()))
    return journal.spans


PATHS = st.sampled_from([
    "data", "data.a", "data.a.b", "data.b", "data.body.a", "data.body.a.b", "data.rows[0].a", "data.rows.a", "data[0]",
    "data.text", "data.error.code", "data.data.a", "data.n0.a", "data.n1.rows", "data.n2.text", "data.items",
    "trigger.body.a", "trigger.a", "nodes.start.body.a", "nodes.start.a", "nodes.n0.a", "nodes.n1.rows[0].a",
    "nodes.zzz.a", "execution.id", "execution.a",
])  # fmt: skip
TEMPLATES = PATHS.map(lambda path: f"{{{{ {path} }}}}")
CONSTANTS: list[Json] = [1, "x", None, [], {}, {"a": 1}, {"b": {"a": 2}}]
VALUES = st.sampled_from(CONSTANTS) | TEMPLATES
OBJECTS = st.dictionaries(st.sampled_from(["a", "b", "rows"]), VALUES, max_size=2)
CONDITIONS = st.fixed_dictionaries({"left": VALUES, "operator": st.just("equals"), "right": VALUES})
CONFIGS = st.one_of(
    st.tuples(
        st.just("set"), st.fixed_dictionaries({"values": OBJECTS}, optional={"mode": st.just("replace")})
    ),
    st.tuples(st.just("log"), st.fixed_dictionaries({"message": VALUES})),
    st.tuples(st.just("template"), st.fixed_dictionaries({"text": TEMPLATES.map("got {}".format)})),
    st.tuples(
        st.just("csv-parse"),
        st.fixed_dictionaries({"text": st.sampled_from(["a,b\n1,2\n", "a\n1,2\n", "a\n"])}),
    ),
    st.tuples(
        st.just("filter"), st.fixed_dictionaries({"items": st.just([{"a": 1}]), "condition": CONDITIONS})
    ),
    st.tuples(st.just("conditional"), st.fixed_dictionaries({"condition": CONDITIONS})),
)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Nodes, list[dict[str, Json]]]:
    """Return some nodes behind a trigger, each led to by one, two or three of those before it."""
    nodes: list[dict[str, Json]] = [START]
    edges: list[dict[str, Json]] = []
    for name in ("n0", "n1", "n2", "n3", "n4"):
        node_type, config = draw(CONFIGS)
        mappings = draw(
            st.dictionaries(
                st.sampled_from(["a", "c"]), PATHS | TEMPLATES | st.just(CONSTANTS[-2]), max_size=1
            )
        )
        passed = draw(
            st.dictionaries(st.sampled_from(["a", "d"]), st.sampled_from(["a", "b", "rows"]), max_size=1)
        )
        for source in draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3)):
            ports = ["true", "false"] if source["type"] == "conditional" else ["output"]
            port = draw(st.sampled_from([*ports, "error"]) if source is not START else st.just("output"))
            edges.append({"id": f"e{len(edges)}", "source": source["id"], "sourcePort": port, "target": name})
        nodes.append(
            make_node(name, node_type, config=config, inputMappings=mappings, passThroughValues=dict(passed))
        )
    return nodes, edges


@given(drawn=graphs(), body=st.sampled_from([{}, {"a": 1}, {"a": {"b": [1]}}, "text", [{"a": 1}]]))
def test_paths_reported_as_unresolved_find_nothing_at_run_time(
    drawn: tuple[Nodes, list[dict[str, Json]]], body: Json
) -> None:
    nodes, edges = drawn
    graph = ParsedGraph.from_stored({"nodes": cast("Json", list(nodes)), "connections": cast("Json", edges)})
    spans = asyncio.run(run_and_record(graph, {"body": body, "headers": {}, "query": {}}))
    done = {name: span for name, span in spans.items() if span.status is SpanStatus.COMPLETED}
    past = {name: [decode_json(span.output)] for name, span in done.items() if span.output is not None}
    for samples in ({}, past):
        for finding in validate_graph(graph, CATALOG, samples=samples).warnings:
            if (
                finding.type == "unresolved-mapping"
                and finding.node_id in done
                and "run before" not in finding.message
            ):
                path = finding.message.split(": ")[2].split()[0]
                read = path.split(".")[1].split("[")[0] if path.startswith("nodes.") else ""
                if read in spans and spans[read].status is SpanStatus.SKIPPED:
                    continue  # it was not run this time, and its paths are null
                assert path in done[finding.node_id].unresolved, finding


def test_a_path_with_a_fallback_may_find_nothing_and_the_last_of_several_may_not() -> None:
    assert (
        find_in_graph(
            *chain_of_nodes(START, reading_node('trigger.nam ?? "you"', "trigger.bdy ?? trigger.body"))
        )
        == []
    )
    finding = only_finding(find_in_graph(*chain_of_nodes(START, reading_node("trigger.nam ?? trigger.bdy"))))
    assert finding.fix is not None
    assert finding.fix.value == "{{ trigger.nam ?? trigger.body }}"
    mapped = make_node(
        "read",
        "log",
        config={"message": "x"},
        inputMappings={"a": "data.bdy ?? 1", "b": "data.x ?? data.bdy"},
    )
    finding = only_finding(find_in_graph(*chain_of_nodes(START, mapped)))
    assert finding.fix is not None
    assert finding.fix.value == "data.x ?? data.body"
