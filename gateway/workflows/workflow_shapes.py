"""Workflows in requests and answers: validated fields become a row, and a row becomes the Workflow object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, TypeAlias, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import replace

from engine.values import encode_json
from gateway.http import limits, text_rules
from gateway.http.errors import ApiError
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import GuardedWire, Instant, WireStruct, convert, instant, with_whole_numbers
from gateway.workflows import graph_shapes, run_settings, stored_workflow
from gateway.workflows.graph_shapes import CanvasPosition, Connections, Nodes, RetryShape
from gateway.workflows.run_settings import KnownSettings
from gateway.workflows.stored_workflow import KNOWN_SETTINGS, StoredWorkflow
from journal import definition_snapshot
from models import ids
from models.workflow import Workflow, WorkflowStatus

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.workflows.workflow_rows import Listed
    from models.access import ApiCaller
    from nodes.catalog import NodeCatalog


Name: TypeAlias = Annotated[str, text_rules.describe_length(limits.WORKFLOW_NAME_LENGTH, min_length=1)]
Description: TypeAlias = Annotated[str, text_rules.describe_length(limits.DESCRIPTION_LENGTH)]
Tag: TypeAlias = Annotated[str, text_rules.describe_length(limits.TAG_LENGTH, min_length=1)]
Tags: TypeAlias = Annotated[list[Tag], Meta(extra_json_schema={"maxItems": limits.TAGS})]
Settings: TypeAlias = Annotated[
    dict[str, Any], Meta(extra_json_schema={"$ref": "#/components/schemas/KnownSettings"})
]


_SHARE: Final = "POST /api/v1/workflows/:id/share"
_VISIBILITY: Final = "PUT /api/v1/workflows/:id/visibility"


class CreateWorkflow(GuardedWire):
    """Workflow to create."""

    read_only: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("id", "version", "organizationId", "ownerId", "scopes", "createdAt", "updatedAt"), ""
        ),
        "isPublic": _VISIBILITY,
        "isTemplate": _VISIBILITY,
        "sharedWith": _SHARE,
        "warnings": "",
    }

    name: Name
    description: Description | None = None
    status: WorkflowStatus | None = None
    """By default `draft`."""
    nodes: Nodes | None = None
    connections: Connections | None = None
    tags: Tags | None = None
    settings: Settings | None = None
    """Settings of runs and pods; keys of your own belong to `config`."""
    config: dict[str, Any] | None = None
    """Any values to store with the workflow."""


class UpdateWorkflow(GuardedWire):
    """Changes of a workflow; absent fields do not change."""

    read_only: ClassVar[Mapping[str, str]] = {
        **CreateWorkflow.read_only,
        "status": "PUT /api/v1/workflows/:id/status",
        "version": "POST /api/v1/workflows/:id/versions",
    }

    name: Name | None = None
    description: Description | None = None
    nodes: Nodes | None = None
    connections: Connections | None = None
    tags: Tags | None = None
    settings: dict[str, Any] | None = None
    """Merged: null removes one of `KnownSettings`. Keys of your own belong to `config`."""
    config: dict[str, Any] | None = None


class ShownNode(WireStruct):
    """Node of a workflow; its type has two names."""

    id: str
    node_id: str
    type: str
    label: str
    position: CanvasPosition
    config: Mapping[str, Any]
    input_mappings: Mapping[str, Any]
    pass_through_values: Mapping[str, str]
    version: str | UnsetType = UNSET
    retry: RetryShape | UnsetType = UNSET
    timeout: float | UnsetType = UNSET
    at_most_once: bool | UnsetType = UNSET


class ShownConnection(WireStruct):
    """Connection of a workflow."""

    id: str
    source_node_id: str
    source_port: str
    target_node_id: str
    target_port: str


class WorkflowSummary(WireStruct):
    """Workflow without its graph."""

    id: str
    name: str
    description: str
    status: WorkflowStatus
    version: int
    tags: Sequence[str]
    organization_id: str
    owner_id: str
    is_public: bool
    is_template: bool
    created_at: Instant
    updated_at: Instant


class WorkflowShape(WorkflowSummary):
    """Workflow."""

    nodes: Sequence[ShownNode]
    connections: Sequence[ShownConnection]
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    scopes: Sequence[str]
    """Permissions that its nodes need: `resource:action:id`."""
    shared_with: Sequence[str]
    """Ids of the users that it is shared with."""


READ_ONLY: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (field.encode_name for field in msgspec.structs.fields(WorkflowShape)), "PUT /api/v1/workflows/:id"
    ),
    **UpdateWorkflow.read_only,
}
"""Every field of a workflow with the route that changes it, for bodies of routes that change a single field.
"""


class NewWorkflow(WireStruct):
    """Id of a created workflow."""

    workflow_id: str


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────


def build_workflow(
    caller: ApiCaller, body: CreateWorkflow, catalog: NodeCatalog, now: datetime
) -> StoredWorkflow:
    """Return a new workflow of the caller, not stored, with positions for all nodes.

    Raises a 422 error for invalid fields, and for an invalid graph if it is active.
    """
    problems = ProblemCollector()
    stored = draft_workflow(caller, body, catalog, problems, now)
    problems.raise_any()
    if stored.workflow.status == WorkflowStatus.ACTIVE:
        graph_shapes.require_valid(definition_snapshot.check_graph(stored.nodes, stored.connections, catalog))
    return replace(stored, nodes=graph_shapes.with_all_positions(stored.nodes, stored.connections))


def draft_workflow(
    caller: ApiCaller, body: CreateWorkflow, catalog: NodeCatalog, problems: ProblemCollector, now: datetime
) -> StoredWorkflow:
    """Return an unsaved workflow of the caller, made from the request; invalid fields are added to `problems`.

    Missing positions of nodes are not generated, and the graph is not checked.
    """
    workflow_id = ids.new_id("wf")
    workflow = Workflow(
        id=workflow_id,
        organization_id=caller.organization_id,
        shard=caller.shard,
        owner_id=caller.user_id,
        name=_name(body.name, problems),
        description=_check_description(body.description or "", problems),
        status=body.status or WorkflowStatus.DRAFT,
        tags=_check_tags(body.tags or [], problems),
        settings=_merge_settings(workflow_id, {}, {}, with_strict_mappings(body.settings or {}), problems),
        config=_merge_config({}, body.config or {}, problems),
        scopes=[],
        created_at=now,
        updated_at=now,
    )
    nodes = graph_shapes.stored_nodes(body.nodes or [], catalog, problems)
    connections = graph_shapes.stored_connections(body.connections or [], problems)
    return StoredWorkflow(workflow, nodes, connections, shared_with={})


def apply_changes(before: StoredWorkflow, body: UpdateWorkflow, catalog: NodeCatalog) -> StoredWorkflow:
    """Return a workflow with the changes of a body, not stored; absent fields stay.

    Settings and config are merged (null removes a key), other fields replaced; nodes keep positions by their
    ids. Raises a 422 error for invalid fields.
    """
    workflow = before.workflow
    problems = ProblemCollector()
    changes: dict[str, object] = {}
    nodes, connections = before.nodes, before.connections
    if body.name is not None:
        changes["name"] = _name(body.name, problems)
    if body.description is not None:
        changes["description"] = _check_description(body.description, problems)
    if body.tags is not None:
        changes["tags"] = _check_tags(body.tags, problems)
    if body.settings is not None:
        changes["settings"] = _merge_settings(
            workflow.id, workflow.settings, workflow.config, body.settings, problems
        )
    if body.config is not None:
        changes["config"] = _merge_config(workflow.config, body.config, problems)
    if body.nodes is not None:
        nodes = graph_shapes.stored_nodes(body.nodes, catalog, problems)
    if body.connections is not None:
        connections = graph_shapes.stored_connections(body.connections, problems)
    problems.raise_any()
    if body.nodes is not None:
        nodes = graph_shapes.with_all_positions(nodes, connections, before.nodes)
    return replace(before.with_columns(**changes), nodes=nodes, connections=connections)


def _name(given: str, problems: ProblemCollector) -> str:
    return text_rules.check_line(given, "name", problems, max_length=limits.WORKFLOW_NAME_LENGTH)


def _check_description(given: str, problems: ProblemCollector) -> str:
    return text_rules.check_paragraphs(given, "description", problems, max_length=limits.DESCRIPTION_LENGTH)


def _check_tags(given: Sequence[str], problems: ProblemCollector) -> list[str]:
    """Return the tags in the given order, without duplicates.

    Invalid tags are added to `problems`; more than 50 are a problem and give none.
    """
    if len(given) > limits.TAGS:
        problems.add("tags", "too-many", f"A workflow may have at most {limits.TAGS} tags")
        return []
    return list(
        dict.fromkeys(
            text_rules.check_line(tag, f"tags.{position}", problems, max_length=limits.TAG_LENGTH)
            for position, tag in enumerate(given)
        )
    )


def with_strict_mappings(settings: Mapping[str, Json]) -> dict[str, Json]:
    """Return the settings of a new workflow, with `strictMappings: true` by default.

    Workflows from before that default keep their behavior, so that none of them begins to fail.
    """
    return {"strictMappings": True, **{key: value for key, value in settings.items() if value is not None}}


def _merge_settings(
    workflow_id: str,
    before: Mapping[str, Json],
    config: Mapping[str, Json],
    given: Mapping[str, Json],
    problems: ProblemCollector,
) -> dict[str, Json]:
    """Return all settings, with the given ones merged in and defaults for absent ones; null removes a key.

    `before` and `config` are the stored ones. Unknown keys are added to `problems`, except for those that older servers
    accepted: they may be sent with their stored values, from before or after their move to `config.settings`.
    """
    whole = cast("Mapping[str, Json]", with_whole_numbers(dict(given), KnownSettings))
    removed = {
        key: value for key, value in whole.items() if value is None and key in {*before, *KNOWN_SETTINGS}
    }
    fields: dict[str, Json] = {
        key: value
        for key, value in whole.items()
        if key not in removed
        and (
            key in KNOWN_SETTINGS or not stored_workflow.is_stored_foreign_setting(key, value, before, config)
        )
    }
    try:
        known = convert(fields, KnownSettings, "settings")
    except ApiError as error:
        problems.found.extend(error.details)
    else:
        run_settings.check_settings(known, workflow_id, problems)
    return definition_snapshot.effective_settings(
        _merge_keys(before, {**fields, **removed}, "settings", problems)
    )


def _merge_config(
    before: Mapping[str, Json], given: Mapping[str, Json], problems: ProblemCollector
) -> dict[str, Json]:
    """Return a config with the given one merged in; null removes a key.

    An invalid `appId`, the only key with a meaning for the server, and a result over 20,000 bytes are added
    to `problems`.
    """
    app_id = given.get("appId")
    if app_id is not None:
        text_rules.check_identifier(app_id if isinstance(app_id, str) else "", "config.appId", problems)
    return _merge_keys(before, given, "config", problems)


def _merge_keys(
    before: Mapping[str, Json], given: Mapping[str, Json], path: str, problems: ProblemCollector
) -> dict[str, Json]:
    """Return `before` with the given keys set, null removing a key.

    A result over 20,000 bytes as JSON is added to `problems` with `path`.
    """
    merged: dict[str, Json] = {key: value for key, value in {**before, **given}.items() if value is not None}
    if len(encode_json(merged)) > limits.SETTINGS_BYTES:
        problems.add(path, "too-large", f"{path} may take at most {limits.SETTINGS_BYTES:,} bytes")
    return merged


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


def summary_fields(workflow: Workflow | Listed) -> dict[str, Any]:
    """Return the fields of `WorkflowSummary` for a row, to build a shape that adds others."""
    return {
        "id": workflow.id,
        "name": workflow.name,
        "description": workflow.description,
        "status": WorkflowStatus(workflow.status),
        "version": workflow.version,
        "tags": list(workflow.tags),
        "organization_id": workflow.organization_id,
        "owner_id": workflow.owner_id,
        "is_public": workflow.is_public,
        "is_template": workflow.is_template,
        "created_at": instant(workflow.created_at),
        "updated_at": instant(workflow.updated_at),
    }


def show_summary(workflow: Workflow | Listed) -> dict[str, Json]:
    """Return a workflow as the API shows it in lists, without its graph."""
    shown: dict[str, Json] = msgspec.to_builtins(WorkflowSummary(**summary_fields(workflow)))
    return shown


def show_workflow(stored: StoredWorkflow) -> dict[str, Json]:
    """Return a workflow as the API shows it, with its graph, config, settings and shares."""
    workflow = stored.workflow
    return {
        **show_summary(workflow),
        "nodes": [graph_shapes.shown_node(node) for node in stored.nodes],
        "connections": [graph_shapes.shown_connection(edge) for edge in stored.connections],
        "config": workflow.config,
        "settings": definition_snapshot.effective_settings(workflow.settings),
        "scopes": list(workflow.scopes),
        "sharedWith": list(stored.shared_with),
    }
