"""Endpoints of the catalog: node types, and the schemas of their configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, UnsetType

from engine.node_api import NodeEffect, UnknownNodeType
from gateway.http.errors import ApiError
from gateway.http.parameters import LIMIT, OFFSET, FlagParameter, TextParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct
from nodes.custom_types import TaskConcurrencyDocument, TaskDocument, TaskRetryDocument

if TYPE_CHECKING:
    from engine.node_api import EffectRule, NodeType, OutputDescription
    from nodes.catalog import NodeCatalog

SEARCH = TextParameter("search", "Only types with this text in their type, name or description.")
CATEGORY = TextParameter(
    "category", "Only types of this category: `triggers`, `sources`, `transform`, `control`, `io`, `ai`."
)
TYPE = TextParameter("type", "Only the type with exactly this name.")
DEPRECATED = FlagParameter("deprecated", "Include custom types whose versions are all deprecated.")
LISTED = (SEARCH, CATEGORY, TYPE, DEPRECATED, LIMIT, OFFSET)


class EffectShape(WireStruct):
    """Effect of a node on the outside: `default`, unless the value of the config's `field` is in `cases`."""

    default: NodeEffect
    field: str | UnsetType = UNSET
    cases: Mapping[str, NodeEffect] | UnsetType = UNSET


class PortsShape(WireStruct):
    """Ports of a node type; every node also has the output port `error`."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    outputs_from: str | UnsetType = UNSET
    """Path in the config that lists the names of further outputs, such as `cases[].port`."""


class NodeTypeShape(WireStruct):
    """Node type."""

    type: str
    name: str
    version: str
    category: str
    description: str
    effect: EffectShape
    ports: PortsShape
    resources: Mapping[str, Any]
    """Requested resources of a pod, as Kubernetes quantities."""
    s3_location: str
    """Address of the package of this version; types that ship with the server are loaded from its own files.
    """
    runnable: bool
    """False if this server can't run the type; it can still be drawn, connected and configured."""
    is_trigger: bool
    task: TaskDocument | UnsetType = UNSET
    """Rules for the tasks of a custom type."""
    hash: str | UnsetType = UNSET
    """SHA-256 of the content of a custom type."""
    deprecated: bool | UnsetType = UNSET
    """True if the list of the catalog hides this version of a custom type."""


class NodeTypeList(WireStruct):
    """Page of the catalog; `count` is the total."""

    count: int
    limit: int
    offset: int
    nodes: Sequence[NodeTypeShape]


class OutputShape(WireStruct):
    """Output of a node."""

    description: str
    schema: Mapping[str, Any]
    """JSON Schema; empty if the output has no fixed shape."""
    keeps_input: bool
    """True if the output includes the fields of the input.

    They are excluded if the config's field in `droppedBy` has the value there.
    """
    dropped_by: Mapping[str, Any]
    fields_of: str | None
    """Field of the config with keys that are fields of the output."""


class NodeTypeSchema(NodeTypeShape, kw_only=True):
    """Node type with the schema of its config."""

    config: Mapping[str, Any]
    """JSON Schema, draft 2020-12.

    `x-resource` marks fields with the id of a resource outside of the workflow.
    """
    defaults: Mapping[str, Any]
    """Default config of a node."""
    evaluated: Mapping[str, str]
    """Fields of the config that may contain conditions or computed values.

    `[]` stands for each item of a list.
    """
    input_description: str
    output: OutputShape
    examples: Sequence[Mapping[str, Any]]


async def index(request: GatewayRequest) -> JsonResponse:
    """List the node types of the catalog."""
    query = request.query
    part = query.page()
    search, category, wanted = query[SEARCH], query[CATEGORY], query[TYPE]
    catalog, with_deprecated = await request.catalog(), query[DEPRECATED]
    types = [
        node_type
        for _, node_type in sorted(catalog.node_types.items())
        if (with_deprecated or not node_type.is_deprecated or wanted is not None)
        and wanted in (None, node_type.type)
        and category in (None, node_type.category)
        and (search is None or _matches_search(node_type, search))
    ]
    shown = [_shown(node_type) for node_type in types[part.offset : part.offset + part.limit]]
    return JsonResponse(NodeTypeList(count=len(types), limit=part.limit, offset=part.offset, nodes=shown))


async def schema(request: GatewayRequest) -> JsonResponse:
    """Show the newest version of a node type with its ports, output, defaults, examples and the JSON Schema of its
    config.

    Raises a 404 error for an unknown type.
    """
    catalog = await request.catalog()
    try:
        node_type = catalog.get(request.path_params["type"])
    except UnknownNodeType as error:
        raise ApiError(404, "not-found", error.message) from error
    return JsonResponse(show_schema(catalog, node_type))


def show_schema(catalog: NodeCatalog, node_type: NodeType) -> NodeTypeSchema:
    """Return a node type as the API shows it, with the schema of its config, defaults, output and examples."""
    return NodeTypeSchema(
        **_fields(node_type),
        config=node_type.config_schema,
        defaults=catalog.with_defaults(node_type, {}),
        evaluated=node_type.compiled,
        input_description=node_type.input_description,
        output=_output(node_type.output),
        examples=node_type.examples,
    )


def _matches_search(node_type: NodeType, search: str) -> bool:
    """Return whether name, description or type of a node type contain the text, in upper or lower case."""
    texts = (node_type.type, node_type.name, node_type.description)
    return any(search.casefold() in text.casefold() for text in texts)


def _shown(node_type: NodeType) -> NodeTypeShape:
    return NodeTypeShape(**_fields(node_type))


def _fields(node_type: NodeType) -> dict[str, Any]:
    """Return the fields that lists and single node types show."""
    return {
        "type": node_type.type,
        "name": node_type.name,
        "version": node_type.version,
        "category": node_type.category,
        "description": node_type.description,
        "effect": _effect(node_type.effect),
        "ports": _ports(node_type),
        "resources": node_type.resources,
        "s3_location": node_type.s3_location,
        "runnable": node_type.runnable,
        "is_trigger": node_type.is_trigger,
        **_custom_fields(node_type),
    }


def _custom_fields(node_type: NodeType) -> dict[str, Any]:
    """Return the fields that only custom types have: the rules of their tasks, hash, and whether deprecated;
    {} for others.
    """
    rules = node_type.task
    if rules is None:
        return {}
    return {
        "task": TaskDocument(
            timeout_seconds=rules.timeout_seconds,
            lease_seconds=rules.lease_seconds,
            retry=TaskRetryDocument(
                max_attempts=rules.max_attempts,
                backoff="exponential" if rules.delay_grows else "fixed",
                delay=rules.first_delay_seconds,
                max_delay=rules.max_delay_seconds,
            ),
            concurrency=None
            if rules.concurrency_limit is None
            else TaskConcurrencyDocument(rules.concurrency_limit, rules.concurrency_key),
            pool=rules.pool,
            start_timeout_seconds=rules.start_timeout_seconds,
        ),
        "hash": node_type.content_hash,
        "deprecated": node_type.is_deprecated,
    }


def _ports(node_type: NodeType) -> PortsShape:
    """Return the ports of a node type as the API shows them."""
    return PortsShape(
        inputs=node_type.inputs, outputs=node_type.outputs, outputs_from=node_type.outputs_from or UNSET
    )


def _effect(rule: EffectRule) -> EffectShape:
    """Return the effect of a node type as the API shows it: fixed, or decided by a field of the config."""
    if rule.deciding_field is None:
        return EffectShape(default=rule.default)
    return EffectShape(default=rule.default, field=rule.deciding_field, cases=rule.cases)


def _output(output: OutputDescription) -> OutputShape:
    """Return the description of an output as the API shows it."""
    return OutputShape(
        description=output.description,
        schema=output.schema,
        keeps_input=output.keeps_input,
        dropped_by=dict([output.dropped_by] if output.dropped_by else []),
        fields_of=output.fields_of,
    )
