"""OpenAPI document: it describes everything that each operation does, and nothing else."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from gateway import routes
from gateway.executions import bulk_replay, node_tests
from gateway.http import parameters
from gateway.http.endpoint import AccessRule
from gateway.http.operation_docs import IDEMPOTENCY_KEY, IF_MATCH
from gateway.http.refusals import ERROR_CODES, JSON_CODES
from gateway.http.route import Route
from gateway.http.sender import TOKEN
from gateway.http.wire import WireStruct, is_strict_body
from gateway.ingest import dead_letters, deliveries, events, hooks, organization_dead_letters
from gateway.openapi import examples, openapi_document
from gateway.workflows import nodes
from tests.api_document import read_document
from tests.each_case import check_each
from tests.unit.call_graph import CallGraph, CodeDefinition

DOCUMENT_URI = "urn:pilotflame:openapi"
LINES = [(f"{line.method} {line.path}", line) for line in routes.TABLE]
CONTRACT = json.loads((Path(__file__).parents[1] / "contract/endpoints.json").read_text())

COMPUTED: dict[str, set[str]] = {
    "gateway.dashboard.page_request._value_of": set(),  # the refusals of other routes
    "gateway.http.wire.json_of": {*JSON_CODES},
    "gateway.executions.callbacks._decode_json": {*JSON_CODES},
    "gateway.executions.acceptance.require_open": {"workflow-paused", "workflow-archived"},
    "gateway.http.errors.no_such_trigger": {
        *("no-queue-trigger", "no-email-trigger", "no-event-trigger", "no-webhook-trigger")
    },
    "gateway.ingest.event_dispatch.EventDispatcher.dispatch": {*JSON_CODES},
    "gateway.ingest.event_signatures.refusal_error": {
        *JSON_CODES,
        *("unsupported-media-type", "duplicate-header", "malformed-form", "invalid-event"),
    },
    "gateway.ingest.mail_verification.refusal_error": {
        *("duplicate-header", "malformed-form", "malformed-mail", "malformed-message", "unknown-mail"),
        *("raw-delivery", "unknown-topic", "untrusted-certificate", "invalid-certificate"),
    },
}
"""Refusals of functions that don't name the code themselves."""
OF_THE_ENDPOINT = {
    "unauthorized",
    "rate-limited",
    "scope-required",
    "admin-required",
    "cross-site-request",
    "internal-error",
    "not-ready",
    "invalid-query",
}
"""Refusals of an `Endpoint` before or after it calls a handler."""
MATCHING = "gateway.http.preconditions.require_match"
"""Function that compares `If-Match` with the current state."""
NEVER = {
    (nodes.index, "validation-failed"),
    (node_tests.run_node, "concurrency-limit"),
    (events.emit, "concurrency-limit"),
    (events.emit, "workflow-not-active"),
    (events.emit, "not-found"),
    (dead_letters.purge, "idempotency-mismatch"),
    (organization_dead_letters.purge, "idempotency-mismatch"),
    (deliveries.redrive_all, "not-found"),
    (hooks.options, "no-verification"),
    (hooks.options, "validation-failed"),
}
"""Refusals that the call graph finds and that never occur. These handlers read stored data with the functions
for bodies, leave out limited data, report refusals inside their answer, never get signed requests, or hide refusals.
"""
TOLD_OF_EACH = {
    bulk_replay.replay: CodeDefinition("gateway.executions.bulk_replay", "_replay_one"),
    organization_dead_letters.replay: CodeDefinition("gateway.executions.bulk_replay", "_replay_one"),
    deliveries.redrive_many: CodeDefinition("gateway.ingest.redrive_runs", "RunRedriver.redrive_delivery"),
    deliveries.redrive_all: CodeDefinition("gateway.ingest.redrive_runs", "RunRedriver.redrive_delivery"),
    dead_letters.redrive: CodeDefinition("gateway.ingest.redrive_runs", "RunRedriver.redrive_dead_letter"),
    organization_dead_letters.redrive: CodeDefinition(
        "gateway.ingest.redrive_runs", "RunRedriver.redrive_dead_letter"
    ),
}
"""Repeated operations of handlers that report in their answer why each item was refused."""
NO_TRIGGER = COMPUTED["gateway.http.errors.no_such_trigger"]
"""Of these codes, an operation that ingests requests has the one for its kind."""


@cache
def call_graph() -> CallGraph:
    """Return the call graph of the gateway, which takes a second to build."""
    return CallGraph()


def document_operation(line: Route) -> dict[str, Any]:
    found: dict[str, Any] = read_document()["paths"][line.path][line.method.lower()]
    return found


def handler_of(line: Route) -> CodeDefinition:
    return CodeDefinition(line.handler.__module__, line.handler.__name__)


def codes_of(function: CodeDefinition) -> set[str]:
    return {code for name in call_graph().codes(function) for code in COMPUTED.get(name, {name})}


def reachable_codes(line: Route) -> set[str]:
    """Return the codes that the source of a handler can lead to."""
    found = codes_of(handler_of(line))
    found -= NO_TRIGGER - set(openapi_document.codes(line))
    if line.handler in TOLD_OF_EACH:
        found -= codes_of(TOLD_OF_EACH[line.handler]) - set(openapi_document.codes(line))
    return {code for code in found if (line.handler, code) not in NEVER}


def reaches(line: Route, function: str) -> bool:
    return function in map(str, call_graph().reached(handler_of(line)))


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────


def test_tags_are_words_and_unique() -> None:
    names = [tag["name"] for tag in read_document()["tags"]]
    assert [name for name in names if not re.fullmatch(r"[A-Z][a-z]*( [a-z]+)*", name)] == []
    assert len(set(names)) == len(names)


def test_each_path_is_documented_with_all_of_its_methods() -> None:
    served = routes.endpoints([*routes.TABLE, *routes.ALIASES, *routes.FOR_BROWSERS])
    for path, methods in read_document()["paths"].items():
        assert {method.upper() for method in methods} == {*served[path].operations} - {"HEAD"}, path


def test_no_example_deletes_an_object_that_the_caller_is_or_uses() -> None:
    caller = examples.find_example("GET", "/api/v1/auth/whoami").answer
    deleted = {
        parameter["example"]
        for methods in read_document()["paths"].values()
        for parameter in methods.get("delete", {}).get("parameters", ())
        if parameter["in"] == "path"
    }
    assert not deleted & {caller["userId"], caller["keyId"]}


def test_server_is_that_of_the_document_unless_an_address_is_set() -> None:
    assert read_document()["servers"] == [{"url": "/"}]
    public = openapi_document.build_document(routes.TABLE, server="https://flows.example.com/below")
    assert public["servers"] == [{"url": "https://flows.example.com/below"}]


# ── every operation ─────────────────────────────────────────────────────────────────────────────────────────


@check_each(LINES)
def test_an_operation_documents_its_effect_and_its_scope(line: Route) -> None:
    said = document_operation(line)
    assert said["summary"]
    assert said["tags"]
    assert said["description"]
    assert (said["security"] == []) is (line.access is AccessRule.PUBLIC)
    assert all(parameter["description"] for parameter in said["parameters"])


@check_each(LINES)
def test_an_operation_has_examples_of_its_own(line: Route) -> None:
    shown = examples.find_example(line.method, line.path)
    assert bool(shown.bodies) is (line.body is not None)
    assert (shown.answer is not None) is (line.answer is not None)
    assert set(shown.query) <= {parameter.name for parameter in line.query}


@check_each(LINES)
def test_an_operation_is_documented_with_the_refusals_that_its_source_leads_to(line: Route) -> None:
    documented, found = set(openapi_document.codes(line)), reachable_codes(line)
    assert found - documented == set(), "not in the document: add it to NOTES"
    assert documented - found - OF_THE_ENDPOINT - {"not-found"} == set(), (
        "nothing raises it: take it out of the docs of its route"
    )


@check_each(LINES)
def test_an_operation_is_documented_with_the_headers_that_it_reads(line: Route) -> None:
    taken = line.docs.takes
    assert (IF_MATCH in taken) is reaches(line, MATCHING)
    assert (IDEMPOTENCY_KEY in taken) is reaches(line, "gateway.http.request.read_idempotency_key")


@check_each(LINES)
def test_a_body_is_read_where_one_is_documented(line: Route) -> None:
    assert (line.body is not None) is reaches(line, "gateway.http.wire.json_of")


@check_each(LINES)
def test_an_answer_is_documented_with_warnings_where_fields_may_be_ignored(line: Route) -> None:
    warns_of_new = reaches(line, "gateway.http.read_only.warn_of_new")
    is_open = line.body is not None and issubclass(line.body, WireStruct) and not is_strict_body(line.body)
    assert openapi_document.may_warn(line) is (is_open or warns_of_new)
    if openapi_document.may_warn(line):
        schema = document_operation(line)["responses"][str(line.status)]["content"]["application/json"][
            "schema"
        ]
        references = [schema["$ref"]] if "$ref" in schema else [one["$ref"] for one in schema["anyOf"]]
        for reference in references:
            named = read_document()["components"]["schemas"][reference.rpartition("/")[2]]
            assert named["properties"]["warnings"]["type"] == "array"


@check_each((name, line) for name, line in LINES if line.query)
def test_every_parameter_of_a_query_is_read(line: Route) -> None:
    known = vars(parameters) | vars(sys.modules[line.handler.__module__])
    read = {
        known.get(node.id)
        for thing in call_graph().reached(handler_of(line))
        for node in ast.walk(call_graph().modules[thing.module].functions[thing.path])
        if isinstance(node, ast.Name) and isinstance(known.get(node.id), parameters.QueryParameter)
    }
    # The sender's token is read before the handler is called.
    assert set(line.query) - {TOKEN} <= read


def test_names_are_given_once() -> None:
    names = [openapi_document.operation_id(line) for line in routes.TABLE]
    assert len(names) == len(set(names))
    assert [name for name in read_document()["components"]["schemas"] if "." in name or "_" in name] == []


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_code_that_the_gateway_refuses_with_has_a_meaning() -> None:
    # Answers to pods are in no document.
    public = (thing for thing in call_graph().everything() if not thing.module.startswith("gateway.pods."))
    named = {code for thing in public for code in call_graph().codes_of(thing)}
    assert {code for name in named for code in COMPUTED.get(name, {name})} == set(ERROR_CODES)


# ── the document ────────────────────────────────────────────────────────────────────────────────────────────


def test_schemas_are_json_schemas() -> None:
    # That the whole is OpenAPI 3.1 is checked by schemathesis, which sends requests by it.
    for schema in read_document()["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def test_every_reference_leads_somewhere() -> None:
    def references(value: Any) -> Iterator[str]:  # noqa: ANN401 - any JSON value
        if isinstance(value, dict) and isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from references(item)

    for reference in references(read_document()):
        place: Any = read_document()
        for key in reference.removeprefix("#/").split("/"):
            place = place[key]


def make_validator(schema: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    """Return a validator that knows the document's schemas; one for all places that have the same schema."""
    return _compile_validator(_refer_to_document(schema))


@cache
def _compile_validator(schema: str) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(
        json.loads(schema), registry=_document_schemas(), validate_formats=True
    )


@cache
def _document_schemas() -> jsonschema_rs.Registry:
    """Return the schemas that others refer to; a validator that held them itself would read all of them."""
    schemas = read_document()["components"]["schemas"]
    return jsonschema_rs.Registry(
        [(DOCUMENT_URI, json.loads(_refer_to_document({"components": {"schemas": schemas}})))]
    )


def _refer_to_document(schema: dict[str, Any]) -> str:
    """Return a schema as JSON whose references name the document, so that they lead to `_document_schemas`."""
    return json.dumps(schema).replace('"$ref": "#/', f'"$ref": "{DOCUMENT_URI}#/')


@check_each(LINES)
def test_examples_match_their_schemas(line: Route) -> None:
    said = document_operation(line)
    for content in said.get("requestBody", {}).get("content", {}).values():
        for example in content["examples"].values():
            make_validator(content["schema"]).validate(example["value"])
    for content in said["responses"][str(line.status)].get("content", {}).values():
        make_validator(content["schema"]).validate(content["example"])


@check_each(LINES)
def test_examples_of_parameters_match_their_schemas(line: Route) -> None:
    for parameter in document_operation(line)["parameters"]:
        if "example" in parameter:
            make_validator(parameter["schema"]).validate(parameter["example"])


def test_examples_of_refusals_are_refusals_with_their_own_code() -> None:
    refused_schema = {"$ref": "#/components/schemas/ErrorResponse"}
    for code, example in read_document()["components"]["examples"].items():
        make_validator(refused_schema).validate(example["value"])
        assert example["value"]["error"]["code"] == code
    for response in read_document()["components"]["responses"].values():
        for content in response["content"].values():
            assert content["schema"] == refused_schema
            assert {one["$ref"].rpartition("/")[2] for one in content["examples"].values()} == {
                *content["examples"]
            }


def test_operations_have_the_tags_that_are_described() -> None:
    used = {tag for line in routes.TABLE for tag in document_operation(line)["tags"]}
    assert used == {tag["name"] for tag in read_document()["tags"]}
    assert [tag["name"] for tag in read_document()["tags"] if not tag["description"]] == []


def test_the_settings_that_runs_obey_are_described() -> None:
    described = read_document()["components"]["schemas"]
    referred = described["CreateWorkflow"]["properties"]["settings"]["anyOf"][0]["$ref"].rpartition("/")[2]
    assert {"timeout", "concurrency", "onFailure"} <= described[referred]["properties"].keys()


@pytest.mark.parametrize("shape", ["Execution", "Progress", "DeadLetter"])
def test_the_cause_of_an_error_is_described(shape: str) -> None:
    schemas = read_document()["components"]["schemas"]
    assert schemas[shape]["properties"]["error"]["anyOf"][0]["$ref"] == "#/components/schemas/ExecutionError"
    assert schemas["ExecutionError"]["properties"]["cause"]["$ref"] == "#/components/schemas/FailureCause"
    fields = {"code", "message", "nodeId", "method", "url", "executionId"}
    assert schemas["FailureCause"]["properties"].keys() == fields


def test_the_contract_is_among_the_examples() -> None:
    shown = {re.sub(r"{\w+}", "{}", f"{line.method} {line.path}"): line for line in routes.TABLE}
    compared = 0
    for endpoint in CONTRACT["endpoints"]:
        line = shown.get(re.sub(r":\w+", "{}", f"{endpoint['method']} {endpoint['path']}"))
        if line is None:
            continue
        example = examples.find_example(line.method, line.path)
        if endpoint["body"] is not None:
            assert endpoint["body"]["example"] in example.bodies.values()
        if endpoint["response"] is not None:
            assert contains_fields(example.answer, endpoint["response"]), f"{line.method} {line.path}"
        compared += 1
    assert compared > 20


def contains_fields(value: Any, less: Any) -> bool:  # noqa: ANN401 - any JSON value
    """Return whether a value has every field of another, with the same values."""
    if isinstance(less, dict):
        return isinstance(value, dict) and all(
            key in value and contains_fields(value[key], less[key]) for key in less
        )
    if isinstance(less, list):
        return isinstance(value, list) and len(value) >= len(less) and all(map(contains_fields, value, less))
    return type(value) is type(less) and bool(value == less)


# ── requirements of client generators ───────────────────────────────────────────────────────────────────────


def iterate_schemas(part: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: ANN401 - any part of the document
    """Yield everything below a part that is, or may be, a schema, with its path."""
    if isinstance(part, list):
        for number, item in enumerate(part):
            yield from iterate_schemas(item, f"{path}/{number}")
    elif isinstance(part, dict):
        yield path, part
        for key, item in part.items():
            if key not in {"example", "examples", "default", "x-refusals"}:
                yield from iterate_schemas(item, f"{path}/{key}")


def test_a_schema_leaves_nothing_to_be_guessed() -> None:
    """Generators read an object without fields as an empty one, and refuse lists of any items and enums
    without a type.
    """
    vague = []
    for path, schema in iterate_schemas(read_document()):
        kinds = schema.get("type", [])
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if "object" in kinds and not {"properties", "additionalProperties"} & set(schema):
            vague.append(f"{path}: any object")
        if "array" in kinds and not {"items", "prefixItems"} & set(schema):
            vague.append(f"{path}: a list of anything")
        if isinstance(schema.get("enum"), list) and not kinds:
            vague.append(f"{path}: words of no type")
        if isinstance(reference := schema.get("$ref"), str):
            target: Any = read_document()
            for key in reference.removeprefix("#/").split("/"):
                target = target[key]
    assert vague == []


def test_an_input_may_hold_anything() -> None:
    named = read_document()["components"]["schemas"]
    assert named["ExecuteRequest"]["properties"]["triggerInputs"]["additionalProperties"] is True
    assert named["PendingInput"]["properties"]["choices"]["items"] == {}
    assert named["ErrorResponse"]["properties"]["success"] == {"type": "boolean", "enum": [False]}
