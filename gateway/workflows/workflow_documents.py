"""Copies, exports and imports of workflows; credentials are always removed from copies and exports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from engine import config_places, inline_secrets
from engine.findings import FindingType, GraphFinding, ValidationResult
from engine.validation import validate_graph
from gateway.http import errors, limits, text_rules
from gateway.http.errors import ApiError
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import StrictWire, WireStruct, convert
from gateway.workflows import graph_shapes, workflow_shapes
from gateway.workflows.graph_shapes import ConnectionInput, Connections, NodeInput, Nodes
from gateway.workflows.stored_workflow import StoredWorkflow
from gateway.workflows.workflow_shapes import (
    CreateWorkflow,
    Description,
    Name,
    ShownConnection,
    ShownNode,
    Tags,
    UpdateWorkflow,
)
from journal import definition_snapshot
from models import ids
from models.workflow import Workflow

if TYPE_CHECKING:
    from engine.values import Json
    from models.access import ApiCaller
    from nodes.catalog import NodeCatalog

FORMAT: Final = "pilotflame/workflow"
FORMAT_VERSION: Final = 1
COPY: Final = " (copy)"
FILE_NAME_LENGTH: Final = 60
_NODE_PARTS: Final = ("label", "config", "inputMappings")
"""Fields of a node with free content."""
_NODE_FIELDS: Final = [field.encode_name for field in msgspec.structs.fields(ShownNode)]


class RemovedSecret(WireStruct):
    """Removed value that looked like a credential."""

    node_id: str | None
    """Null: it was in the description, settings or config of the workflow."""
    path: str


class ReferenceUse(WireStruct):
    """Field that names an external resource."""

    node_id: str
    path: str


class ExternalReference(WireStruct):
    """External resource that the nodes of a workflow name."""

    kind: str
    """`datasources` or `models`."""
    id: str
    used_by: Sequence[ReferenceUse]


class WorkflowDocument(WireStruct):
    """Exported workflow."""

    format: str
    format_version: int
    name: str
    description: str
    tags: Sequence[str]
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    nodes: Sequence[ShownNode]
    connections: Sequence[ShownConnection]
    references: Sequence[ExternalReference]
    removed_secrets: Sequence[RemovedSecret]


class ImportedDocument(StrictWire):
    """Exported workflow to import; the references are read from its nodes."""

    format: str
    format_version: int
    name: Name
    description: Description | None = None
    tags: Tags | None = None
    settings: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    nodes: Nodes | None = None
    connections: Connections | None = None
    references: list[dict[str, Any]] | None = None
    removed_secrets: list[dict[str, Any]] | None = None


class ImportWorkflow(StrictWire):
    """Document to import. Without `references` no workflow is created: the answer lists those to resolve."""

    document: ImportedDocument
    references: Annotated[dict[str, str | None], Meta(max_length=limits.NODES)] | None = None
    """Replacement id for each id in the document; null leaves the field empty."""
    name: str | None = None
    """Name of the workflow, by default that of the document."""


# ── removal of credentials ──────────────────────────────────────────────────────────────────────────────────


class CredentialFreeWorkflow(Struct, frozen=True):
    """Workflow without its credentials."""

    stored: StoredWorkflow
    removed: Sequence[RemovedSecret]
    """Paths of the removed values: the first `limits.REMOVED_SECRETS`."""


def strip_credentials(stored: StoredWorkflow) -> CredentialFreeWorkflow:
    """Return a workflow without values that look like credentials, and the paths of the removed ones.

    At most 1,000 paths are listed; all are removed, from description, settings, config and nodes.
    """
    removed: list[RemovedSecret] = []

    def kept(value: Json, part: str, node_id: str | None) -> Json:
        left, paths = inline_secrets.remove_secrets(value)
        room = limits.REMOVED_SECRETS - len(removed)
        removed.extend(RemovedSecret(node_id=node_id, path=_join_path(part, path)) for path in paths[:room])
        return left

    workflow = stored.workflow
    columns = {part: kept(value, part, None) for part, value in _iterate_parts(workflow)}
    nodes = [
        {**node, **{part: kept(node[part], part, str(node["id"])) for part in _NODE_PARTS}}
        for node in stored.nodes
    ]
    return CredentialFreeWorkflow(replace(stored.with_columns(**columns), nodes=nodes), removed)


def _iterate_parts(workflow: Workflow) -> Iterator[tuple[str, Json]]:
    """Yield the fields of a workflow with free content, besides its graph, each with its name."""
    yield "description", workflow.description
    yield "settings", workflow.settings
    yield "config", workflow.config


def _join_path(part: str, path: str) -> str:
    """Return the path of a value within a part; the name of the part for an empty path."""
    return f"{part}.{path}" if path else part


# ── copies ──────────────────────────────────────────────────────────────────────────────────────────────────


def copy_workflow(
    source: StoredWorkflow, caller: ApiCaller, now: datetime, *, is_template: bool = False
) -> CredentialFreeWorkflow:
    """Return a new draft of the caller with the content of another workflow, not stored, and the removed credentials.

    Shares and history are left out too. `strictMappings` is true if the source has no such setting.
    """
    found = strip_credentials(source)
    content = found.stored.workflow
    workflow = Workflow(
        id=ids.new_id("wf"),
        organization_id=caller.organization_id,
        shard=caller.shard,
        owner_id=caller.user_id,
        name=content.name,
        description=content.description,
        tags=content.tags,
        settings=workflow_shapes.with_strict_mappings(content.settings),
        config=content.config,
        scopes=content.scopes,
        is_template=is_template,
        created_at=now,
        updated_at=now,
    )
    return replace(found, stored=replace(found.stored, workflow=workflow, shared_with={}))


def name_of_copy(name: str) -> str:
    """Return the name of a copied workflow: the original name, cut if it is too long, and " (copy)".

    It has at most 200 characters in all.
    """
    return name[: limits.WORKFLOW_NAME_LENGTH - len(COPY)].rstrip() + COPY


# ── export ──────────────────────────────────────────────────────────────────────────────────────────────────


def export_document(stored: StoredWorkflow, catalog: NodeCatalog) -> dict[str, object]:
    """Return a workflow as a document for export, with the external resources that it names but without credentials;
    equal content gives equal documents, for every caller.
    """
    found = strip_credentials(stored)
    workflow = found.stored.workflow
    return {
        "format": FORMAT,
        "formatVersion": FORMAT_VERSION,
        "name": workflow.name,
        "description": workflow.description,
        "tags": list(workflow.tags),
        "settings": definition_snapshot.effective_settings(workflow.settings),
        "config": workflow.config,
        "nodes": [_in_order(graph_shapes.shown_node(node)) for node in found.stored.nodes],
        "connections": [graph_shapes.shown_connection(edge) for edge in found.stored.connections],
        "references": list_references(found.stored, catalog),
        "removedSecrets": found.removed,
    }


def _in_order(node: Mapping[str, Json]) -> dict[str, Json]:
    """Return a node with its fields in a fixed order."""
    return {name: node[name] for name in _NODE_FIELDS if name in node}


def file_name(workflow: Workflow) -> str:
    """Return a file name for a workflow's document, such as `workflow-daily-report.json`.

    It has at most 60 characters of the name, is valid on every file system, and needs no quoting in a header.
    """
    readable = re.sub(r"[^a-z0-9]+", "-", workflow.name.lower())[:FILE_NAME_LENGTH].strip("-")
    return f"workflow-{readable}.json" if readable else "workflow.json"


def list_references(stored: StoredWorkflow, catalog: NodeCatalog) -> list[ExternalReference]:
    """Return the external resources that the nodes name, such as data sources, sorted, each once with the
    fields that name it.
    """
    uses: dict[tuple[str, str], list[ReferenceUse]] = {}
    for found in config_places.list_references(graph_shapes.graph_of(stored), catalog):
        uses.setdefault((found.kind, found.id), []).append(
            ReferenceUse(node_id=found.node_id, path=found.path)
        )
    return [
        ExternalReference(kind=kind, id=resource_id, used_by=used)
        for (kind, resource_id), used in sorted(uses.items())
    ]


# ── import ──────────────────────────────────────────────────────────────────────────────────────────────────


def read_document(value: Json) -> ImportWorkflow:
    """Return the parsed body of an import; raises a 422 error for another format, and for unknown or invalid
    fields of it.
    """
    given = value.get("document") if isinstance(value, dict) else None
    unknown: list[dict[str, Json]] = []
    if isinstance(given, dict):
        _require_format(given)
        known = {field.encode_name for field in msgspec.structs.fields(ImportedDocument)}
        unknown = [_unknown_field(name) for name in given if name not in known]
    try:
        body = convert(value, ImportWorkflow)
    except ApiError as error:
        raise errors.invalid([*unknown, *error.details]) from error
    if unknown:
        raise errors.invalid(unknown)
    return body


def _require_format(given: Mapping[str, Json]) -> None:
    """Raise a 422 error for a document of another format or version than this server reads.

    It is checked before the fields are read, which may have another meaning.
    """
    if given.get("format") != FORMAT:
        message = f"document.format must be {FORMAT!r}: send a document from `GET /workflows/:id/export`"
        raise errors.invalid([errors.problem("document.format", "unknown-format", message)])
    version = given.get("formatVersion")
    if type(version) is not int or version != FORMAT_VERSION:
        message = f"document.formatVersion must be {FORMAT_VERSION}: this server reads no other"
        raise errors.invalid([errors.problem("document.formatVersion", "unknown-format-version", message)])


def _unknown_field(name: str) -> dict[str, Json]:
    path = f"document.{name[: limits.NODE_TYPE_LENGTH]}"
    return errors.problem(path, "unknown-field", f"{path} is not a field of a document")


def import_document(
    caller: ApiCaller, body: ImportWorkflow, catalog: NodeCatalog, now: datetime
) -> StoredWorkflow:
    """Return the workflow of a document, as a draft of the caller, not stored; raises a 422 error with all
    problems.

    A `name` in the body replaces that of the document; nodes without a position get one.
    """
    given = body.document
    wanted = CreateWorkflow(
        name=given.name,
        description=given.description,
        nodes=given.nodes,
        connections=given.connections,
        tags=given.tags,
        settings=given.settings,
        config=given.config,
    )
    problems = ProblemCollector()
    _check_graph(given.nodes or [], given.connections or [], problems)
    stored = workflow_shapes.draft_workflow(caller, wanted, catalog, problems, now)
    if problems.found:
        raise errors.invalid({**found, "path": f"document.{found['path']}"} for found in problems.found)
    stored = replace(stored, nodes=graph_shapes.with_all_positions(stored.nodes, stored.connections))
    return workflow_shapes.apply_changes(stored, UpdateWorkflow(name=body.name), catalog)


def _check_graph(
    nodes: Sequence[NodeInput], connections: Sequence[ConnectionInput], problems: ProblemCollector
) -> None:
    """Add problems that a draft may have, but no document: duplicate ids and connections to unknown nodes."""
    _check_ids("nodes", "duplicate-node-id", [node.id for node in nodes], problems)
    _check_ids("connections", "broken-connection", [edge.id for edge in connections], problems)
    known = {node.id for node in nodes}
    for index, edge in enumerate(connections):
        ends = {
            "sourceNodeId": edge.source_node_id or edge.source,
            "targetNodeId": edge.target_node_id or edge.target,
        }
        for field, end in ends.items():
            if end and end not in known:
                path = f"connections.{index}.{field}"
                problems.add(path, "broken-connection", f"{path} names no node of the document: {end[:64]}")


def _check_ids(kind: str, code: str, given: Sequence[str | None], problems: ProblemCollector) -> None:
    """Add a problem with `code` for each id that occurred before in the list `kind` (`nodes` or `connections`); None is
    no id.
    """
    seen: set[str] = set()
    for index, item_id in enumerate(given):
        if item_id and item_id in seen:
            path = f"{kind}.{index}.id"
            problems.add(path, code, f"{path} is a duplicate: {item_id[:64]}")
        elif item_id:
            seen.add(item_id)


def resolve_references(
    stored: StoredWorkflow, named: Sequence[ExternalReference], given: Mapping[str, str | None]
) -> StoredWorkflow:
    """Return a workflow with its references, which `named` lists, replaced by the given ids; None as an id removes the
    field.

    Raises a 422 error for a reference without a replacement, an unknown reference, and an invalid id.
    """
    problems = ProblemCollector()
    for reference in named:
        if reference.id not in given:
            path = f"references.{reference.id}"
            message = f"{path} is required: the id that replaces this one of {reference.kind}, or null"
            problems.add(path, "unresolved-reference", message)
    known = {reference.id for reference in named}
    for resource_id, replacement in given.items():
        path = f"references.{resource_id[:64]}"
        if resource_id not in known:
            problems.add(path, "unknown-reference", f"{path} is not a reference of the document")
        elif replacement is not None:
            text_rules.check_identifier(replacement, path, problems)
    problems.raise_any()
    replacements: dict[str, dict[str, str | None]] = {}
    for reference in named:
        for use in reference.used_by:
            replacements.setdefault(use.node_id, {})[use.path] = given[reference.id]
    nodes = [
        {**node, "config": _replace_values(replacements.get(str(node["id"]), {}), node["config"])}
        for node in stored.nodes
    ]
    return replace(stored, nodes=nodes)


def _replace_values(replacements: Mapping[str, str | None], value: Json, path: str = "") -> Json:
    """Return a value with the leaves at the given paths, such as `items.0.id`, replaced; None removes the field or
    item.

    `path` is that of the value itself.
    """
    if isinstance(value, dict):
        fields = [(key, item, f"{path}.{key}" if path else key) for key, item in value.items()]
        return {
            key: _replace_values(replacements, item, below)
            for key, item, below in fields
            if replacements.get(below, "") is not None
        }
    if isinstance(value, list):
        items = [(item, f"{path}.{index}") for index, item in enumerate(value)]
        return [
            _replace_values(replacements, item, below)
            for item, below in items
            if replacements.get(below, "") is not None
        ]
    return replacements.get(path, value)


def validate_draft(stored: StoredWorkflow, catalog: NodeCatalog) -> ValidationResult:
    """Return the findings of a draft: those of its graph, and warnings about credentials outside of its nodes."""
    validation = validate_graph(graph_shapes.graph_of(stored), catalog, is_draft=True)
    inline = [
        GraphFinding(
            FindingType.INLINE_SECRET,
            f"{_join_path(part, path)} looks like a credential: everybody who may read the workflow can see it",
            "Store it in a data source, and name that.",
        )
        for part, value in _iterate_parts(stored.workflow)
        for path in inline_secrets.find_secrets(value)
    ]
    return replace(validation, warnings=(*validation.warnings, *inline))
