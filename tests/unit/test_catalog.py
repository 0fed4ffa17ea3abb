import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema_rs
import pytest

import nodes.library
from engine.node_api import OF_EACH, FieldCompilation, NodeEffect, NodeType
from engine.values import Json, decode_json, encode_json
from nodes import catalog
from nodes.catalog import InvalidCatalogEntry, NodeCatalog, UnknownNodeType
from nodes.config_formats import PATTERN_DESCRIPTIONS
from nodes.config_problems import TEMPLATE_SCHEMA
from tests.each_case import check_each
from tests.node_calls import call

pytestmark = pytest.mark.anyio

CATALOG = catalog.load_catalog()
DRAWN_ONLY = {"tool"}
LENT = {"tool"}
"""Node types that are connected to an agent, which calls them: they have no input ports."""

SHOUT = """
type = "shout-it"
name = "Shout"
version = "2.0.0"
category = "transform"
description = "Says it louder."
effect = "pure"

[config]
type = "object"
required = ["text"]
properties.text.type = "string"
"""
LOOKS_UP = """
import sys
from nodes import catalog

catalog.load_catalog().with_defaults(catalog.load_catalog().get("filter"), {})
heavy = ("nodes.library.", "jsonschema_rs", "aiohttp")
print([name for name in sys.modules if name.startswith(heavy)])
"""
SHOUT_RUN = """
def run(call):
    return call.config["text"].upper()
"""


@check_each(CATALOG.node_types.items())
def test_an_entry_is_complete(node_type: NodeType) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", node_type.type)
    assert re.fullmatch(r"\d+\.\d+\.\d+", node_type.version)
    assert node_type.category in {"triggers", "sources", "transform", "control", "io", "ai"}
    assert all((node_type.name, node_type.description, node_type.output.description))
    assert bool(node_type.input_description) == bool(node_type.inputs)
    assert 1 <= len(node_type.examples) <= 3
    assert re.fullmatch(r"s3://[a-z-]+/[a-z0-9-]+/[0-9.]+", node_type.s3_location)
    assert {*node_type.resources} == {"cpu", "memory"}


@check_each(CATALOG.node_types.items())
def test_a_config_is_described_by_a_strict_schema(node_type: NodeType) -> None:
    schema = node_type.config_schema
    jsonschema_rs.meta.validate(dict(schema))
    assert (schema["type"], schema["additionalProperties"]) == ("object", False)
    properties = schema["properties"]
    assert isinstance(properties, dict)
    for name, of_field in properties.items():
        assert isinstance(of_field, dict)
        assert "description" in of_field, name
        resource = str(of_field.get("x-resource", "models:invoke"))
        assert re.fullmatch(r"[a-z]+:(read|write|invoke|execute)", resource)
    assert {place.partition(OF_EACH)[0] for place in node_type.compiled} <= set(properties)


@check_each(CATALOG.node_types.items())
def test_the_refusal_of_a_text_describes_the_expected_one(node_type: NodeType) -> None:
    patterns = re.findall(r'"pattern":("(?:[^"\\]|\\.)*")', encode_json(node_type.config_schema).decode())
    conditions = {TEMPLATE_SCHEMA["pattern"], "^hmac-"}
    assert {decode_json(pattern.encode()) for pattern in patterns} <= PATTERN_DESCRIPTIONS.keys() | conditions


@check_each(CATALOG.node_types.items())
def test_the_defaults_and_the_examples_satisfy_the_schema(node_type: NodeType) -> None:
    for example in node_type.examples:
        config = example["config"]
        assert isinstance(config, dict)
        assert CATALOG.config_problems(node_type, CATALOG.with_defaults(node_type, config)) == []


@check_each(CATALOG.node_types.items())
def test_the_output_of_every_example_fits_the_schema_of_the_output(node_type: NodeType) -> None:
    output = node_type.output
    jsonschema_rs.meta.validate(dict(output.schema))
    for example in node_type.examples:
        assert "error" in example or jsonschema_rs.is_valid(dict(output.schema), example["output"])
    for name in [output.fields_of, *([output.dropped_by[0]] if output.dropped_by else [])]:
        assert name is None or name in str(node_type.config_schema["properties"])
    assert bool(output.schema) != output.keeps_input, "what it gives is its own, or it is what arrived"


@check_each(CATALOG.node_types.items())
def test_every_type_that_runs_has_an_implementation(node_type: NodeType) -> None:
    assert node_type.runnable == (node_type.type not in DRAWN_ONLY)
    if node_type.runnable:
        assert callable(CATALOG.implementation(node_type.type))


@check_each(CATALOG.node_types.items())
def test_every_node_takes_an_input_unless_it_starts_a_graph_or_is_lent_to_an_agent(
    node_type: NodeType,
) -> None:
    has_input = not node_type.is_trigger and node_type.type not in LENT
    assert ("input" in node_type.inputs[:1]) == has_input
    assert not (node_type.is_trigger and node_type.inputs)


def test_a_language_model_and_tools_lead_to_ports_of_the_agent() -> None:
    assert CATALOG.get("agent").inputs == ("input", "ai", "tools")
    assert CATALOG.get("llm").outputs == CATALOG.get("tool").outputs == ("output",)


def test_the_library_is_read_once() -> None:
    assert catalog.load_catalog() is catalog.load_catalog()


def test_a_process_that_runs_no_nodes_loads_none_and_no_schemas() -> None:
    ran = subprocess.run([sys.executable, "-c", LOOKS_UP], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


async def test_a_node_is_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shout_it.toml").write_text(SHOUT)
    (tmp_path / "shout_it.py").write_text(SHOUT_RUN)
    monkeypatch.setattr(nodes.library, "__path__", [str(tmp_path)])
    monkeypatch.setattr(catalog, "load_catalog", lambda: catalog.read_catalog(tmp_path))
    assert (await call("shout-it", {"text": "hello {{ data }}"}, "you")).output == "HELLO YOU"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (SHOUT.replace("name =", "nmae ="), "nmae"),
        (SHOUT.replace('"pure"', '"harmless"'), "harmless"),
        (SHOUT + '[ports]\nouputs = ["a"]', "ouputs"),
        (SHOUT + '[compiled]\ntext = "code"', "code"),
        (SHOUT + '[compiled]\n"text[0]" = "value"', "compiled"),
        (SHOUT + '[ports]\noutputs_from = "text"', "outputs_from"),
        (SHOUT + "[[examples]]\ninput = 1", "either an output or an error"),
        (SHOUT.replace("shout-it", "shout"), "must be shout.toml"),
        ("type = ?", "line 1"),
    ],
)
def test_an_entry_with_unknown_fields_is_refused(wrong: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "shout_it.toml").write_text(wrong)
    with pytest.raises(InvalidCatalogEntry, match=r"shout_it\.toml") as raised:
        catalog.read_catalog(tmp_path)
    assert said in str(raised.value)


def test_an_unknown_type_is_answered_with_the_nearest_ones() -> None:
    with pytest.raises(UnknownNodeType, match=r"did you mean http-request\?") as raised:
        CATALOG.get("htp-request")
    assert (raised.value.nearest, raised.value.version) == (("http-request",), None)


def test_a_type_like_no_other_is_answered_with_the_nearest_three() -> None:
    with pytest.raises(UnknownNodeType, match=r"did you mean [a-z-]+ or [a-z-]+ or [a-z-]+\?$") as raised:
        CATALOG.get("quux")
    assert len(raised.value.nearest) == 3


def test_a_version_that_the_catalogue_lacks_is_answered_with_the_one_it_has() -> None:
    assert CATALOG.get("set", "1.0.0") is CATALOG.get("set")
    with pytest.raises(UnknownNodeType, match=r"no version '9.0.0': the catalog has 1.0.0") as raised:
        CATALOG.get("set", "9.0.0")
    assert raised.value.version == "1.0.0"


def test_an_earlier_version_differs_where_its_entry_says_so_and_nowhere_else() -> None:
    now, before = CATALOG.get("csv-format"), CATALOG.get("csv-format", "1.0.0")
    assert (now.version, before.version, before.s3_location) == (
        "1.1.0",
        "1.0.0",
        "s3://pilotflame-nodes/csv-format/1.0.0",
    )
    defaults = CATALOG.with_defaults(now, {})
    assert CATALOG.with_defaults(before, {}) == defaults | {"formulas": "keep"}
    assert [CATALOG.config_problems(each, {"formulas": "never"}) for each in (now, before)] != [[], []]
    with pytest.raises(UnknownNodeType, match=r"the catalog has 1\.1\.0 and 1\.0\.0") as raised:
        CATALOG.get("csv-format", "0.9.0")
    assert raised.value.version == "1.1.0"


@pytest.mark.parametrize(
    ("config", "effect"),
    [
        ({"method": "GET"}, NodeEffect.READ),
        ({"method": "HEAD"}, NodeEffect.READ),
        ({"method": "POST"}, NodeEffect.WRITE),
        ({"method": "{{ data.method }}"}, NodeEffect.WRITE),
        ({}, NodeEffect.READ),
    ],
)
def test_the_method_of_a_request_decides_its_effect(config: dict[str, Json], effect: NodeEffect) -> None:
    node_type = CATALOG.get("http-request")
    assert node_type.effect.of(CATALOG.with_defaults(node_type, config)) is effect


def test_defaults_are_filled_in_at_every_depth_and_nothing_is_changed() -> None:
    inner: dict[str, Json] = {"type": "object", "properties": {"a": {"default": 1}, "b": {"default": 2}}}
    schema: dict[str, Json] = {
        "properties": {"here": inner, "absent": inner, "whole": {**inner, "default": {}}}
    }
    node_type = NodeType("t", "T", "1.0.0", "io", "", CATALOG.get("set").effect, schema)
    config: dict[str, Json] = {"here": {"a": None}}
    filled = NodeCatalog({}).with_defaults(node_type, config)
    assert filled == {"here": {"a": None, "b": 2}, "whole": {"a": 1, "b": 2}}
    assert config == {"here": {"a": None}}


CONDITION: dict[str, Json] = {"left": "{{ item.x }}", "operator": "equals", "right": 1}
TOOL: dict[str, Json] = {"name": "look", "description": "Looks.", "target": {}}
LLM: dict[str, Json] = {"model": "echo", "prompt": "Hello"}
BOTH_TARGETS: Json = {"node": {"type": "set"}, "workflowId": "wf_1"}
SUM: dict[str, Json] = {"function": "sum", "field": "x", "as": "total"}


@pytest.mark.parametrize(
    ("node_type", "config", "path", "message", "keyword"),
    [
        ("http-request", {}, "url", "url is required", "required"),
        (
            "http-request",
            {"url": "u", "metod": "GET"},
            "metod",
            "did you mean method?",
            "additionalProperties",
        ),
        ("http-request", {"url": "u", "method": "get"}, "method", 'must be one of "GET", "HEAD"', "enum"),
        (
            "http-request",
            {"url": "u", "headers": {"x-key": ["s3cret"]}},
            "headers.x-key",
            "a list of 1",
            "type",
        ),
        ("http-request", {"url": 1}, "url", "must be a text, not a number", "type"),
        (
            "http-request",
            {"url": "u", "timeoutSeconds": 301},
            "timeoutSeconds",
            "must be at most 300",
            "maximum",
        ),
        ("manual", {"x": 1}, "x", "there is no such field", "additionalProperties"),
        ("log", {"message": "m", "zzz": 1}, "zzz", "there is message, level", "additionalProperties"),
        ("wait", {}, "seconds", "seconds or until is required", "required"),
        ("wait", {"seconds": 1, "until": "x"}, "config", "must have 1 or fewer fields", "maxProperties"),
        ("aggregate", {"aggregations": []}, "aggregations", "must have 1 or more items", "minItems"),
        (
            "aggregate",
            {"aggregations": [{"function": "sum", "as": "x"}]},
            "aggregations.0.field",
            "is required",
            "required",
        ),
        (
            "aggregate",
            {"aggregations": [SUM, {**SUM, "function": "median"}]},
            "aggregations.1.function",
            '"sum"',
            "enum",
        ),
        ("template", {"text": "", "items": []}, "each", "each is required", "required"),
        ("tool", TOOL, "target.node", "target.node or target.workflowId is required", "required"),
        ("tool", {**TOOL, "target": BOTH_TARGETS}, "target", "keep the fields of one", "oneOf"),
        ("csv-parse", {"text": "", "delimiter": ";;"}, "delimiter", "one character", "pattern"),
        ("llm", {**LLM, "budget": {"maxCost": "5 USD"}}, "budget.maxCost", 'text, such as "0.5"', "pattern"),
        ("filter", {"condition": 1}, "condition", "must be an object, not a number", "type"),
        ("merge", {"mode": "{{ data.mode }}"}, "mode", 'must be one of "all", "any"', "enum"),
        ("switch", {"cases": [{"equals": 1}]}, "cases.0.port", "is required", "required"),
        ("switch", {"cases": [{"port": "a"}]}, "cases.0.equals", "cases.0.condition is required", "required"),
        ("switch", {"cases": [{"port": "error", "equals": 1}]}, "cases.0.port", "name of a port", "pattern"),
        (
            "switch",
            {"cases": [{"port": "{{ data }}", "equals": 1}]},
            "cases.0.port",
            "name of a port",
            "pattern",
        ),
        ("switch", {"cases": ["{{ data.case }}"]}, "cases.0", "must be an object, not a text", "type"),
        ("switch", {"cases": "{{ data.cases }}"}, "cases", "must be a list, not a text", "type"),
        (
            "switch",
            {"cases": [{"port": "a", "condition": 1}]},
            "cases.0.condition",
            "must be an object",
            "type",
        ),
    ],
)
def test_a_problem_has_a_path_and_a_message(
    node_type: str, config: dict[str, Json], path: str, message: str, keyword: str
) -> None:
    (problem,) = CATALOG.config_problems(CATALOG.get(node_type), config)
    assert (problem.path, problem.keyword) == (path, keyword)
    assert message in problem.message


@pytest.mark.parametrize(
    ("node_type", "config", "steps", "meant"),
    [
        ("http-request", {"url": "u", "metod": "GET"}, ("metod",), "method"),
        ("http-request", {"url": "u", "metod": "GET", "method": "GET"}, ("metod",), None),
        ("http-request", {"url": "u", "colour": "red"}, ("colour",), None),
        ("http-request", {"url": "u", "method": "post"}, ("method",), "POST"),
        ("http-request", {"url": "u", "method": "FETCH"}, ("method",), None),
        ("log", {"message": "m", "level": "warn"}, ("level",), "warning"),
        (
            "aggregate",
            {"aggregations": [{**SUM, "function": "cuont"}]},
            ("aggregations", 0, "function"),
            "count",
        ),
        ("http-request", {"url": "u", "timeoutSeconds": 301}, ("timeoutSeconds",), None),
    ],
)
def test_a_problem_suggests_the_intended_name_if_it_is_certain(
    node_type: str, config: dict[str, Json], steps: tuple[str | int, ...], meant: str | None
) -> None:
    (problem,) = CATALOG.config_problems(CATALOG.get(node_type), config)
    assert (problem.steps, problem.meant) == (steps, meant)


LARGE: dict[str, Callable[[], dict[str, Json]]] = {
    "one-wrong-field": lambda: {"headers": [0] * 20_000},
    "many-wrong-values": lambda: {"headers": {str(number): [] for number in range(20_000)}},
    "many-unknown-fields": lambda: {str(number): 0 for number in range(20_000)},
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_config_that_is_wrong_is_refused_without_a_large_report(kind: str) -> None:
    config = {"url": "u", **LARGE[kind]()}
    (problem,) = CATALOG.config_problems(CATALOG.get("http-request"), config)
    assert "too large to locate the error" in problem.message


def test_a_problem_never_shows_a_value() -> None:
    config: dict[str, Json] = {
        "url": "u",
        "headers": {"a": ["s3cret"]},
        "method": "s3cret",
        "query": "s3cret",
    }
    problems = CATALOG.config_problems(CATALOG.get("http-request"), config)
    assert len(problems) == 3
    assert "s3cret" not in str(problems)


@pytest.mark.parametrize(
    ("node_type", "config"),
    [
        ("wait", {"seconds": "{{ data.seconds }}"}),
        ("filter", {"items": "{{ data.rows }}", "condition": CONDITION}),
        ("http-request", {"url": "u", "method": "{{ data.method }}", "followRedirects": "{{ data.follow }}"}),
        ("http-request", {"url": "u", "headers": {"x": "a {{ data.x }}"}, "query": {"q": "{{ data.q }}"}}),
        ("http-request", {"url": "u", "method": "{{ data.method }}", "waitForCallback": True}),
        ("aggregate", {"groupBy": ["{{ data.by }}"], "aggregations": [{**SUM, "function": "{{ data.f }}"}]}),
        ("aggregate", {"aggregations": "{{ data.aggregations }}"}),
        (
            "switch",
            {"cases": [{"port": "a", "equals": "{{ data.a }}"}, {"port": "b", "condition": CONDITION}]},
        ),
    ],
)
def test_a_template_may_stand_for_a_value_of_any_type(node_type: str, config: dict[str, Json]) -> None:
    assert CATALOG.config_problems(CATALOG.get(node_type), config) == []


def test_a_condition_has_its_schema_and_its_description() -> None:
    node_type = CATALOG.get("filter")
    assert node_type.compiled == {"condition": FieldCompilation.CONDITION}
    properties = node_type.config_schema["properties"]
    assert isinstance(properties, dict)
    condition = properties["condition"]
    assert isinstance(condition, dict)
    assert "as `item`" in str(condition["description"])
    assert condition["anyOf"]


def test_the_outputs_of_a_switch_are_those_of_its_cases_and_one_for_the_rest() -> None:
    switch = CATALOG.get("switch")
    config: dict[str, Json] = {"cases": [{"port": "b"}, {"port": "a"}, {"port": "b"}]}
    assert switch.outputs_of(config) == ("b", "a", "default")
    broken: list[dict[str, Json]] = [{}, {"cases": {}}, {"cases": [1, {}, {"port": 1}]}]
    assert [switch.outputs_of(config) for config in broken] == [("default",)] * 3
    assert CATALOG.get("set").outputs_of(config) == ("output",)


def test_types_that_begin_like_a_name_come_before_those_that_are_alike() -> None:
    with pytest.raises(UnknownNodeType) as raised:
        CATALOG.get("mysql")
    assert set(raised.value.nearest) == {"mysql-source", "mysql-destination"}


@pytest.mark.parametrize("alias", ["queue", "email", "event", "schedule"])
def test_the_kind_of_a_trigger_determines_its_type(alias: str) -> None:
    assert CATALOG.get(CATALOG.canonical_name(alias)).is_trigger
    assert CATALOG.canonical_name("set") == "set"
