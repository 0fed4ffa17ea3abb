"""A workflow made out of another, by a copy or by way of a document; credentials never come along."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta

from engine import inline_secrets, resource_scopes
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
"""What a node holds that is anybody's to fill in."""
_NODE_FIELDS: Final = [field.encode_name for field in msgspec.structs.fields(ShownNode)]


class RemovedSecret(WireStruct):
    """Something that looked like a credential, and was left out."""

    node_id: str | None
    """Null: it stood in the description, settings or config of the workflow."""
    path: str


class ReferenceUse(WireStruct):
    """Where something is named."""

    node_id: str
    path: str


class ExternalReference(WireStruct):
    """Something outside of the workflow that its nodes name."""

    kind: str
    """`datasources` or `models`."""
    id: str
    used_by: Sequence[ReferenceUse]


class WorkflowDocument(WireStruct):
    """A workflow as it is exported."""

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
    """An exported workflow, as it is to be imported; its references are those that its nodes name."""

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
    """A document to import. Without `references` nothing is created: the answer tells which there are to resolve."""

    document: ImportedDocument
    references: Annotated[dict[str, str | None], Meta(max_length=limits.NODES)] | None = None
    """For each id in the document, the id to put in its place; null leaves the field empty."""
    name: str | None = None
    """Instead of the document's own."""


# ── without credentials ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class CredentialFreeWorkflow:
    """A workflow without its credentials."""

    stored: StoredWorkflow
    removed: Sequence[RemovedSecret]
    """Where they stood: the first `limits.REMOVED_SECRETS`."""


def strip_credentials(stored: StoredWorkflow) -> CredentialFreeWorkflow:
    """Leave out what looks like a credential."""
    removed: list[RemovedSecret] = []

    def kept(value: Json, part: str, node_id: str | None) -> Json:
        left, paths = inline_secrets.remove_secrets(value)
        room = limits.REMOVED_SECRETS - len(removed)
        removed.extend(RemovedSecret(node_id=node_id, path=_at(part, path)) for path in paths[:room])
        return left

    workflow = stored.workflow
    columns = {part: kept(value, part, None) for part, value in _parts(workflow)}
    nodes = [
        {**node, **{part: kept(node[part], part, str(node["id"])) for part in _NODE_PARTS}}
        for node in stored.nodes
    ]
    return CredentialFreeWorkflow(replace(stored.with_columns(**columns), nodes=nodes), removed)


def _parts(workflow: Workflow) -> Iterator[tuple[str, Json]]:
    """Return what a workflow holds besides its graph that is anybody's to fill in."""
    yield "description", workflow.description
    yield "settings", workflow.settings
    yield "config", workflow.config


def _at(part: str, path: str) -> str:
    """Return a place within a part; without a path it is the part itself, a text."""
    return f"{part}.{path}" if path else part


# ── copies ──────────────────────────────────────────────────────────────────────────────────────────────────


def copy_workflow(
    source: StoredWorkflow, caller: ApiCaller, now: datetime, *, is_template: bool = False
) -> CredentialFreeWorkflow:
    """Return a new draft of the caller's with the content of another workflow, and nothing else of it."""
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
        settings=workflow_shapes.strict(content.settings),
        config=content.config,
        scopes=content.scopes,
        is_template=is_template,
        created_at=now,
        updated_at=now,
    )
    return replace(found, stored=replace(found.stored, workflow=workflow, shared_with={}))


def name_of_copy(name: str) -> str:
    """Return the name that a duplicate gets."""
    return name[: limits.WORKFLOW_NAME_LENGTH - len(COPY)].rstrip() + COPY


# ── out as a document ───────────────────────────────────────────────────────────────────────────────────────


def export_document(stored: StoredWorkflow, catalog: NodeCatalog) -> dict[str, object]:
    """Return a workflow as a `Document`: the same for the same content, whoever asks."""
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
        "references": references(found.stored, catalog),
        "removedSecrets": found.removed,
    }


def _in_order(node: Mapping[str, Json]) -> dict[str, Json]:
    """Return a node with its fields in one order, whichever way it became what it is."""
    return {name: node[name] for name in _NODE_FIELDS if name in node}


def file_name(workflow: Workflow) -> str:
    """Return a name that every file system takes, and that means nothing in a header."""
    readable = re.sub(r"[^a-z0-9]+", "-", workflow.name.lower())[:FILE_NAME_LENGTH].strip("-")
    return f"workflow-{readable}.json" if readable else "workflow.json"


def references(stored: StoredWorkflow, catalog: NodeCatalog) -> list[ExternalReference]:
    """Return what the nodes name, sorted, each once."""
    uses: dict[tuple[str, str], list[ReferenceUse]] = {}
    for found in resource_scopes.list_references(graph_shapes.graph_of(stored), catalog):
        uses.setdefault((found.kind, found.id), []).append(
            ReferenceUse(node_id=found.node_id, path=found.path)
        )
    return [
        ExternalReference(kind=kind, id=resource_id, used_by=used)
        for (kind, resource_id), used in sorted(uses.items())
    ]


# ── in from a document ──────────────────────────────────────────────────────────────────────────────────────


def read_document(value: Json) -> ImportWorkflow:
    """Return the body of an import; raises 422."""
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
    """Refuse a document of another kind before its fields are looked at: they may mean something else."""
    if given.get("format") != FORMAT:
        message = f"document.format must be {FORMAT!r}: what `GET /workflows/:id/export` gives"
        raise errors.invalid([errors.problem("document.format", "unknown-format", message)])
    version = given.get("formatVersion")
    if type(version) is not int or version != FORMAT_VERSION:
        message = f"document.formatVersion must be {FORMAT_VERSION}: this server reads no other"
        raise errors.invalid([errors.problem("document.formatVersion", "unknown-format-version", message)])


def _unknown_field(name: str) -> dict[str, Json]:
    path = f"document.{name[: limits.NODE_TYPE_LENGTH]}"
    return errors.problem(path, "unknown-field", f"{path} is no field of a document")


def import_document(
    caller: ApiCaller, body: ImportWorkflow, catalog: NodeCatalog, now: datetime
) -> StoredWorkflow:
    """Return the workflow that a document describes, as a draft of the caller's; raises 422 with all that is wrong."""
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
    stored = replace(stored, nodes=graph_shapes.placed(stored.nodes, stored.connections))
    return workflow_shapes.apply_changes(stored, UpdateWorkflow(name=body.name), catalog)


def _check_graph(
    nodes: Sequence[NodeInput], connections: Sequence[ConnectionInput], problems: ProblemCollector
) -> None:
    """Note what a draft may have, but no document: ids that stand twice, and edges that lead nowhere."""
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
    seen: set[str] = set()
    for index, item_id in enumerate(given):
        if item_id and item_id in seen:
            path = f"{kind}.{index}.id"
            problems.add(path, code, f"{path} stands there more than once: {item_id[:64]}")
        elif item_id:
            seen.add(item_id)


def resolve_references(
    stored: StoredWorkflow, named: Sequence[ExternalReference], given: Mapping[str, str | None]
) -> StoredWorkflow:
    """Return a workflow with the given ids in the place of those that it names; raises 422 unless each has one."""
    problems = ProblemCollector()
    for reference in named:
        if reference.id not in given:
            path = f"references.{reference.id}"
            message = f"{path} must say what takes the place of this one of {reference.kind}: an id, or null"
            problems.add(path, "unresolved-reference", message)
    known = {reference.id for reference in named}
    for resource_id, replacement in given.items():
        path = f"references.{resource_id[:64]}"
        if resource_id not in known:
            problems.add(path, "unknown-reference", f"{path} stands for nothing that the document names")
        elif replacement is not None:
            text_rules.check_identifier(replacement, path, problems)
    problems.raise_any()
    replacements: dict[str, dict[str, str | None]] = {}
    for reference in named:
        for use in reference.used_by:
            replacements.setdefault(use.node_id, {})[use.path] = given[reference.id]
    nodes = [
        {**node, "config": _with(replacements.get(str(node["id"]), {}), node["config"])}
        for node in stored.nodes
    ]
    return replace(stored, nodes=nodes)


def _with(replacements: Mapping[str, str | None], value: Json, path: str = "") -> Json:
    """Return a value with others at some paths; where null stands for one, its field or item is left out."""
    if isinstance(value, dict):
        fields = [(key, item, f"{path}.{key}" if path else key) for key, item in value.items()]
        return {
            key: _with(replacements, item, below)
            for key, item, below in fields
            if replacements.get(below, "") is not None
        }
    if isinstance(value, list):
        items = [(item, f"{path}.{index}") for index, item in enumerate(value)]
        return [
            _with(replacements, item, below)
            for item, below in items
            if replacements.get(below, "") is not None
        ]
    return replacements.get(path, value)


def findings(stored: StoredWorkflow, catalog: NodeCatalog) -> ValidationResult:
    """Return what validation finds in a draft, and the credentials that stand outside of its nodes."""
    validation = validate_graph(graph_shapes.graph_of(stored), catalog, is_draft=True)
    inline = [
        GraphFinding(
            FindingType.INLINE_SECRET,
            f"{_at(part, path)} looks like a credential: everybody who may read the workflow can see it",
            "Keep it in a data source, and name that.",
        )
        for part, value in _parts(stored.workflow)
        for path in inline_secrets.find_secrets(value)
    ]
    return replace(validation, warnings=(*validation.warnings, *inline))
