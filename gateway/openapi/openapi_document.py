"""Builder of the OpenAPI document: each route becomes an operation."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from gateway.executions.execution_shapes import ExecutionErrorShape
from gateway.http.endpoint import OPEN_QUERIES, AccessRule
from gateway.http.operation_docs import ETAG, EVENT_STREAM, JSON, HeaderDoc, OperationDoc
from gateway.http.refusals import BODY_CODES, ERROR_CODES, JSON_CODES, ErrorResponse, example
from gateway.http.sender import TOKEN
from gateway.http.session_cookies import SAFE_METHODS
from gateway.http.wire import WireStruct, is_strict_body
from gateway.ingest import hooks
from gateway.openapi import examples, schemas
from gateway.openapi.examples import NO_EXAMPLE, OperationExample
from gateway.openapi.path_parameters import PLACES
from gateway.workflows.run_settings import KnownSettings
from models.access import KeyScope

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.http.parameters import QueryParameter
    from gateway.http.route import Route

Part: TypeAlias = dict[str, Any]
"""Fragment of the document: JSON of any shape."""

ANY_SERVER: Final = "/"
"""Relative URL of the server that served the document."""
KEY: Final = "X-API-Key"
SENDERS_KEY: Final = "key"
ITEM_SCHEMA: Final = "x-itemSchema"
"""Extension key for the schema of each event of a stream."""
REQUEST_ID: Final = HeaderDoc("X-Request-Id", "Id of the request: the client's own, or a new id.")
TRACEPARENT: Final = HeaderDoc(
    "Traceparent",
    "Span of the request by W3C Trace Context, if the server records traces.",
    {"type": "string", "pattern": "^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"},
    is_always_sent=False,
)
_SENT_WITH_ALL: Final = (REQUEST_ID, TRACEPARENT)
"""Headers of every response."""
RETRY_AFTER: Final = HeaderDoc(
    "Retry-After", "Seconds to wait before the request is repeated.", {"type": "integer", "minimum": 1}
)
AUTHENTICATE: Final = HeaderDoc(
    "WWW-Authenticate", "Scheme of the missing credentials.", {"type": "string", "const": "ApiKey"}
)
_SENT_WITH: Final[Mapping[int, HeaderDoc]] = {
    401: AUTHENTICATE,
    412: ETAG,
    429: RETRY_AFTER,
    503: RETRY_AFTER,
}
"""Response headers of error responses by status."""
_NAMED: Final = re.compile(r"([^/]+)/(?=\{(\w+)\})")

TAGS: Final[Mapping[str, str]] = {
    "Access": "API keys, sessions, users and the signing secret of an organization.",
    "Workflows": "Workflows: create, read, change, copy, share, import and export, and their graphs.",
    "Nodes": "Node types, the nodes of a workflow, their tests, and validation.",
    "Deployments": "Deployments of workflows, their lifecycle policies, and calls of their pods.",
    "Tasks": "Tasks of custom nodes for your own workers, and the workers.",
    "Events": "Events of an organization, and the tokens of their senders.",
    "Queues": "Messages for workflows with a queue trigger, one or many.",
    "Mail": "Mails for workflows with an email trigger, and the addresses at which they arrive.",
    "Webhooks": "Webhooks, and the tokens in the URLs of triggers.",
    "Deliveries": "Requests that arrived, samples of refused ones, and dead letters.",
    "Bulk": "Acts on all executions or dead letters that match a filter.",
    "Explanations": "Reasons why runs and workflows do not move.",
    "Server": "Health and drift of the server, and this document.",
}
"""Tags of several modules, so that the list of tags stays short."""
_TAG_OF_MODULE: Final[Mapping[str, str]] = {
    module: tag
    for tag, modules in {
        "Access": ("access", "sessions", "sign_in", "signing", "invitations"),
        "Workflows": ("workflows", "workflow_logs", "apply", "copies", "sharing", "graph", "node_statistics"),
        "Nodes": ("validation", "catalog", "nodes", "node_tests", "custom_nodes"),
        "Deployments": ("discover", "deployments", "lifecycle", "lifecycle_hold", "trigger"),
        "Tasks": ("task_protocol", "task_lists"),
        "Events": ("events", "event_tokens"),
        "Queues": ("enqueue", "enqueue_batch"),
        "Mail": ("email_trigger", "mail_addresses"),
        "Webhooks": ("trigger_tokens", "trigger_token_list", "hooks"),
        "Schedule": ("schedule", "schedule_timeline"),
        "Deliveries": (
            "deliveries",
            "intake_samples",
            "dead_letters",
            "dead_letter_groups",
            "organization_dead_letters",
        ),
        "Executions": ("executions", "inputs", "run_graphs", "span_comparison"),
        "Bulk": ("bulk", "bulk_operations", "bulk_replay"),
        "Explanations": ("run_explanations", "workflow_explanations", "organization_explanations"),
        "Server": ("health", "drift", "server_health", "document"),
    }.items()
    for module in modules
}


def build_document(table: Sequence[Route], *, server: str = ANY_SERVER) -> Part:
    """Return the OpenAPI 3.1 document of a route table; `server` is the base URL of its paths."""
    from importlib import metadata  # noqa: PLC0415 - loads the parsers of mails and archives

    found, named = schemas.build_schemas(
        [kind for line in table for kind in _list_types(line) if kind is not None]
        + [ErrorResponse, KnownSettings, ExecutionErrorShape],
        warning=[kind for line in table if may_warn(line) for kind in _list_types(line)[1:]],
    )
    in_turn = iter(found)
    paths: dict[str, Part] = {}
    for line in table:
        shapes = [None if kind is None else next(in_turn) for kind in _list_types(line)]
        paths.setdefault(line.path, {})[line.method.lower()] = _build_operation(line, *shapes)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Pilotflame",
            "version": metadata.version("pilotflame"),
            "description": resources.files(__package__).joinpath("introduction.md").read_text(),
        },
        "servers": [{"url": server}],
        "tags": _build_tags(table),
        "paths": paths,
        "components": {
            "securitySchemes": {
                KEY: {
                    "type": "apiKey",
                    "in": "header",
                    "name": KEY,
                    "description": "API key of a user: `sk-...`.",
                },
                SENDERS_KEY: {
                    "type": "apiKey",
                    "in": "query",
                    "name": SENDERS_KEY,
                    "description": "Trigger or event token of a sender that cannot set headers: `tt-...` or `et-...`.",
                },
            },
            "schemas": named,
            "responses": {
                _name_of(of_status): _build_refusal(status, of_status)
                for line in table
                for status, of_status in _by_status(codes(line)).items()
            },
            "headers": {one.name: _build_header(one) for one in _SENT_WITH_ALL},
            "examples": {
                code: {"summary": refusal.meaning, "value": msgspec.to_builtins(example(code))}
                for code, refusal in ERROR_CODES.items()
            },
        },
        "x-refusals": msgspec.to_builtins(ERROR_CODES),
    }


def _list_types(line: Route) -> list[object]:
    """Return the types of an operation's request body, main response, streamed events and other success responses;
    None for absent ones.
    """
    note = _note(line)
    return [line.body, line.answer, note.stream, *(also.answer for also in note.also.values())]


def may_warn(line: Route) -> bool:
    """Return whether a response may list ignored fields of the request in `warnings`.

    These are unknown fields of a body that isn't strict, and read-only fields of a new object.
    """
    if line.body is None or not issubclass(line.body, WireStruct):
        return False
    return not is_strict_body(line.body) or (line.method == "POST" and bool(line.body.read_only))


def _note(line: Route) -> OperationDoc:
    return line.docs


def _build_tags(table: Iterable[Route]) -> list[Part]:
    """Return the tags (groups of operations) with descriptions in the order of their first operations.

    Paths outside `/api/` come last; the description is the docstring of the handlers' module.
    """
    in_order = sorted(table, key=lambda line: not line.path.startswith("/api/"))
    modules = dict.fromkeys(line.handler.__module__ for line in in_order)
    names = dict.fromkeys(_tag(module) for module in modules)
    described = {_tag(module): inspect.getdoc(sys.modules[module]) for module in reversed(modules)}
    return [{"name": name, "description": TAGS.get(name, described[name])} for name in names]


def _tag(module_name: str) -> str:
    """Return the tag of a module of handlers, by its name."""
    stem = module_name.rpartition(".")[2]
    return _TAG_OF_MODULE.get(stem, stem.replace("_", " ").capitalize())


# ── an operation ────────────────────────────────────────────────────────────────────────────────────────────


def _build_operation(
    line: Route, body: Part | None, answer: Part | None, stream: Part | None, *others: Part | None
) -> Part:
    """Return an operation of the OpenAPI document from its route, docstring, documentation and examples.

    `body`, `answer`, `stream` and `others` are the schemas of its types, None for absent ones; the docstring's first
    paragraph is the summary.
    """
    note, shown = _note(line), examples.find_example(line.method, line.path)
    summary, _, description = (inspect.getdoc(line.handler) or "").partition("\n\n")
    operation: Part = {
        "operationId": operation_id(line),
        "tags": [_tag(line.handler.__module__)],
        "summary": " ".join(summary.split()).removesuffix("."),
        "description": "\n\n".join([*filter(None, [description]), _describe_access(line.access)]),
        **_build_security(line.access),
        "parameters": [*_in_path(line, shown), *_in_query(line.query, shown), *map(_in_header, note.takes)],
        "responses": {
            str(line.status): _build_success(HTTPStatus(line.status).phrase, note, answer, stream, shown),
            **{
                str(status): _build_success(also.meaning, note, other)
                for (status, also), other in zip(note.also.items(), others, strict=True)
            },
            **{
                str(status): {"$ref": f"#/components/responses/{_name_of(of_status)}"}
                for status, of_status in _by_status(codes(line)).items()
            },
        },
    }
    if body is not None and line.body is not None:
        operation["requestBody"] = {
            "required": any(field.required for field in msgspec.structs.fields(line.body)),
            "content": {JSON: {"schema": body, "examples": _name_examples(shown.bodies)}},
        }
    return operation


def operation_id(line: Route) -> str:
    """Return the operation id: the name of the handler's module, then of the handler, such as `executionsShow`.

    The method follows for the further methods of webhooks.
    """
    words = line.handler.__name__.split("_")
    if line.handler is hooks.receive and line.method != "POST":
        words.append(line.method)
    return line.handler.__module__.rpartition(".")[2] + "".join(word.capitalize() for word in words)


def codes(line: Route) -> list[str]:
    """Return the error codes that an operation may answer, in the order of their status.

    Those of access, method, path, query and body follow from the route; others are documented with it.
    """
    found = set(_note(line).refusals)
    if line.access is not AccessRule.PUBLIC:
        found |= {"unauthorized", "rate-limited", "internal-error", "not-ready"}
        if line.method not in SAFE_METHODS:
            found |= {"cross-site-request"}
    if line.access not in {AccessRule.PUBLIC, AccessRule.ANY_KEY}:
        found |= {"scope-required"}
    if line.access is AccessRule.ADMIN:
        found |= {"admin-required"}
    if "{" in line.path:
        found |= {"not-found"}
    if set(line.query) - {TOKEN} or line.access not in OPEN_QUERIES:
        found |= {"invalid-query"}
    if line.body is not None:
        found |= {*BODY_CODES}
    return [code for code in ERROR_CODES if code in found]


def _describe_access(access: KeyScope | AccessRule) -> str:
    """Return a sentence about the key that an operation requires."""
    match access:
        case AccessRule.PUBLIC:
            return "Requires no key."
        case AccessRule.ANY_KEY:
            return "Requires a key of any scope."
        case AccessRule.ADMIN:
            return f"Requires the key of an admin with the scope `{KeyScope.USERS_WRITE}`."
        case AccessRule.SENDER:
            return f"Requires a key with the scope `{KeyScope.WORKFLOWS_EXECUTE}`, or the sender's token as `key`."
        case _:
            return f"Requires a key with the scope `{access}`."


def _build_security(access: KeyScope | AccessRule) -> Part:
    """Return the security requirement of an operation: no key, a key, or also a sender's token."""
    if access is AccessRule.PUBLIC:
        return {"security": []}
    if access is AccessRule.SENDER:
        return {
            "security": [{KEY: []}, {SENDERS_KEY: []}],
            "x-required-scope": str(KeyScope.WORKFLOWS_EXECUTE),
        }
    security: Part = {"security": [{KEY: []}]}
    if access is not AccessRule.ANY_KEY:
        security["x-required-scope"] = str(KeyScope.USERS_WRITE if access is AccessRule.ADMIN else access)
    return security


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────


def _in_path(line: Route, shown: OperationExample) -> Iterator[Part]:
    """Yield the documentation of the parameters in a path; the segment before a parameter decides its description."""
    for place, name in _NAMED.findall(line.path):
        yield {
            "name": name,
            "in": "path",
            "required": True,
            "description": PLACES[place].description,
            "schema": PLACES[place].schema,
            "example": shown.path.get(name, PLACES[place].example),
        }


def _in_query(parameters: Iterable[QueryParameter[Any]], shown: OperationExample) -> Iterator[Part]:
    for one in parameters:
        parameter = {"name": one.name, "in": "query", "description": one.description, "schema": one.schema}
        example = {"example": _value_of(shown.query[one.name], one.schema)} if one.name in shown.query else {}
        yield parameter | {"allowEmptyValue": True} | example


def _value_of(text: str, schema: Mapping[str, Json]) -> Json:
    """Return the JSON value of a query text, converted by its schema: integer, boolean, list with commas,
    else text.
    """
    match schema.get("type"):
        case "integer":
            return int(text)
        case "boolean":
            return text == "true"
        case "array":
            return [*text.split(",")]
        case _:
            return text


def _in_header(header: HeaderDoc) -> Part:
    return {"name": header.name, "in": "header", "description": header.description, "schema": header.schema}


# ── responses ───────────────────────────────────────────────────────────────────────────────────────────────


def _build_success(
    meaning: str,
    note: OperationDoc,
    answer: Part | None,
    stream: Part | None = None,
    shown: OperationExample = NO_EXAMPLE,
) -> Part:
    """Return the documentation of a success response; without a schema `answer` it has no body.

    `meaning` is its description, and `stream` the schema of the events that may be sent instead.
    """
    response = _build_response(meaning, note.sends)
    if answer is None:
        return response
    if note.media_type == EVENT_STREAM:
        response["content"] = {EVENT_STREAM: _build_stream(answer, shown.answer)}
        return response
    example = {} if shown.answer is None else {"example": shown.answer}
    response["content"] = {note.media_type: {"schema": answer} | example}
    if stream is not None:
        response["content"][EVENT_STREAM] = _build_stream(stream, shown.stream)
    return response


def _build_stream(event: Part, shown: object) -> Part:
    # The stream is text that clients must not parse as one event. OpenAPI 3.2 has `itemSchema` for the events.
    return {"schema": {"type": "string"}, ITEM_SCHEMA: event, "example": _encode_event(shown)}


def _encode_event(event: object) -> str:
    """Return an event in the wire format of server-sent events."""
    fields: dict[str, str] = msgspec.convert(event, dict[str, str])
    return "".join(f"{name}: {value}\n" for name, value in fields.items()) + "\n"


def _by_status(found: Iterable[str]) -> dict[int, list[str]]:
    by_status: dict[int, list[str]] = {}
    for code in found:
        by_status.setdefault(ERROR_CODES[code].status, []).append(code)
    return by_status


def _name_of(of_status: Iterable[str]) -> str:
    """Return the name of the error response that operations share: its codes joined; the codes of invalid
    JSON count as one.
    """
    return "-".join(dict.fromkeys(JSON_CODES[0] if code in JSON_CODES else code for code in of_status))


def _build_refusal(status: int, of_status: Iterable[str]) -> Part:
    """Return the documentation of an error response with a status: the meaning and an example of each code."""
    meanings = "\n".join(f"- `{code}`: {ERROR_CODES[code].meaning}" for code in of_status)
    response = _build_response(meanings, [_SENT_WITH[status]] if status in _SENT_WITH else [])
    shown = {code: {"$ref": f"#/components/examples/{code}"} for code in of_status}
    response["content"] = {
        JSON: {"schema": {"$ref": f"{schemas.REF}{ErrorResponse.__name__}"}, "examples": shown}
    }
    return response


def _build_response(description: str, sent: Iterable[HeaderDoc]) -> Part:
    headers = {one.name: {"$ref": f"#/components/headers/{one.name}"} for one in _SENT_WITH_ALL}
    return {"description": description, "headers": headers | {one.name: _build_header(one) for one in sent}}


def _build_header(header: HeaderDoc) -> Part:
    return {"description": header.description, "required": header.is_always_sent, "schema": header.schema}


def _name_examples(values: Mapping[str, object]) -> Part:
    return {name: {"value": value} for name, value in values.items()}
