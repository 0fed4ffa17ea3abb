"""Endpoints of versions: create, list, show, compare and restore snapshots of a workflow."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from gateway.http import errors, limits, read_only, text_rules
from gateway.http.parameters import OFFSET, IntegerParameter
from gateway.http.responses import JsonResponse
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import GuardedWire, Instant, WireStruct, body_of, instant, read_json
from gateway.workflows import (
    editing,
    graph_difference,
    graph_shapes,
    stored_workflow,
    version_rows,
    workflow_documents,
    workflow_rows,
    workflow_shapes,
)
from gateway.workflows.graph_difference import ItemsDifference, ValueChange
from gateway.workflows.workflow_shapes import ShownConnection, ShownNode
from journal import definition_snapshot
from models.audit import AuditAction
from models.workflow import WorkflowVersion

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from gateway.http.request import GatewayRequest
    from gateway.workflows.editing import WorkflowEdit
    from gateway.workflows.stored_workflow import StoredWorkflow
    from gateway.workflows.version_rows import VersionRow

CURRENT: Final = "current"
"""Name of the current workflow in place of a version number."""
LIMIT: Final = IntegerParameter(
    "limit", "Maximum number of versions.", limits.VERSIONS_LISTED, minimum=1, maximum=limits.VERSIONS_LISTED
)
LISTED: Final = (LIMIT, OFFSET)

_NUMBER = re.compile(r"[1-9][0-9]{0,8}\Z")

State: TypeAlias = int | Literal["current"]
"""Version number, or `current` for the workflow itself."""


class CreateVersion(GuardedWire):
    """Version to create."""

    read_only: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("version", "workflowId", "createdBy", "createdAt", "snapshot", "warnings"), ""
    )

    version_tag: Annotated[str, text_rules.describe_length(limits.VERSION_TAG_LENGTH, min_length=1)]
    description: Annotated[str, text_rules.describe_length(limits.DESCRIPTION_LENGTH)] | None = None


class CreatedVersion(WireStruct):
    """Created version."""

    workflow_id: str
    version: int
    version_tag: str


class VersionHead(WireStruct):
    """Version without its snapshot."""

    version: int
    version_tag: str
    description: str
    created_by: str
    created_at: Instant


class VersionList(WireStruct):
    """Versions of a workflow, the oldest first."""

    workflow_id: str
    current_version: int
    versions: Sequence[VersionHead]


class WorkflowSnapshot(WireStruct):
    """Workflow at the time of a version."""

    name: str
    description: str
    nodes: Sequence[ShownNode]
    connections: Sequence[ShownConnection]
    config: Mapping[str, Any]
    settings: Mapping[str, Any]


class WorkflowVersionShape(VersionHead):
    """Version with its snapshot."""

    workflow_id: str
    snapshot: WorkflowSnapshot


class VersionDifference(WireStruct):
    """Differences between two versions, or between a version and the current workflow."""

    workflow_id: str
    from_: State = msgspec.field(name="from")
    to: State
    nodes: ItemsDifference
    connections: ItemsDifference
    settings: dict[str, ValueChange]
    config: dict[str, ValueChange]
    fields: dict[str, ValueChange]
    """Name and description of the workflow."""


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────


async def index(request: GatewayRequest) -> JsonResponse:
    """List a workflow's versions, the oldest first."""
    part = request.query.page(LIMIT)
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        heads = await version_rows.list_versions(connection, workflow.id, part)
    listed = VersionList(
        workflow_id=workflow.id,
        current_version=workflow.version,
        versions=[_show_head(head) for head in heads],
    )
    return JsonResponse(listed, headers=editing.entity_tag(workflow))


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a version with its snapshot of the workflow; that of a template has no credentials."""
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request.requested_object)
        version = await _find(connection, stored, request.path_params["version"])
    head = {**msgspec.to_builtins(_show_head(version)), "workflowId": stored.workflow.id}
    snapshot = _show_snapshot(_readable_snapshot(stored, version.snapshot))
    return editing.answer(stored, {**head, "snapshot": snapshot})


async def compare(request: GatewayRequest) -> JsonResponse:
    """Compare two versions; `current` names the workflow as it is now.

    Nodes and connections are matched by their ids. `changes` of a node that was only moved is empty.
    """
    names = request.path_params
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request.requested_object)
        from_, before = await _read_state(connection, stored, names["version"])
        to, after = await _read_state(connection, stored, names["other"])
    # A thread, so that large graphs do not block other requests.
    difference = await asyncio.to_thread(_compare_snapshots, stored, (from_, before), (to, after))
    return editing.answer(stored, difference)


def _compare_snapshots(
    stored: StoredWorkflow, from_: tuple[State, Mapping[str, Any]], to: tuple[State, Mapping[str, Any]]
) -> VersionDifference:
    """Return the differences between two snapshots of a workflow as the API shows them; for a template, credentials are
    removed from both first.
    """
    before, after = [_show_snapshot(_readable_snapshot(stored, snapshot)) for _, snapshot in (from_, to)]
    fields = [{name: state[name] for name in ("name", "description")} for state in (before, after)]
    return VersionDifference(
        workflow_id=stored.workflow.id,
        from_=from_[0],
        to=to[0],
        nodes=graph_difference.compare_items(before["nodes"], after["nodes"]),
        connections=graph_difference.compare_items(before["connections"], after["connections"]),
        settings=graph_difference.compare_fields(before["settings"], after["settings"]),
        config=graph_difference.compare_fields(before["config"], after["config"]),
        fields=graph_difference.compare_fields(*fields),
    )


async def find_restored(connection: AsyncConnection, stored: StoredWorkflow, number: str) -> StoredWorkflow:
    """Return a workflow as it would be after the restore of a version, not stored, and for a template without
    credentials; raises a 404 error for an unknown version.
    """
    version = await _find(connection, stored, number)
    return _restore_snapshot(stored, _readable_snapshot(stored, version.snapshot))


async def _read_state(
    connection: AsyncConnection, stored: StoredWorkflow, name: str
) -> tuple[State, Mapping[str, Any]]:
    """Return the version number and the snapshot of a version, or of the workflow itself if `name` is `current`.

    Raises a 404 error for an unknown version.
    """
    if name == CURRENT:
        return CURRENT, workflow_rows.snapshot(stored)
    version = await _find(connection, stored, name)
    return version.version, version.snapshot


async def _find(connection: AsyncConnection, stored: StoredWorkflow, number: str) -> WorkflowVersion:
    """Return the version that a number in a path names; raises a 404 error for unknown versions and other texts."""
    version = None
    if _NUMBER.match(number):
        version = await version_rows.find_version(connection, stored.workflow.id, int(number))
    if version is None:
        raise errors.not_found("version")
    return version


def _show_head(version: VersionRow | WorkflowVersion) -> VersionHead:
    return VersionHead(
        version=version.version,
        version_tag=version.version_tag,
        description=version.description,
        created_by=version.created_by,
        created_at=instant(version.created_at),
    )


def _readable_snapshot(stored: StoredWorkflow, snapshot: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a snapshot for readers, without credentials if the workflow is a template, which the whole
    organization reads.
    """
    if not stored.workflow.is_template:
        return snapshot
    return workflow_rows.snapshot(
        workflow_documents.strip_credentials(_restore_snapshot(stored, snapshot)).stored
    )


def _show_snapshot(snapshot: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a snapshot as the API shows it: with effective settings, and nodes and connections as in the
    Workflow object.
    """
    snapshot = stored_workflow.move_foreign_settings(snapshot)
    return {
        **snapshot,
        "nodes": [graph_shapes.shown_node(node) for node in snapshot["nodes"]],
        "connections": [graph_shapes.shown_connection(edge) for edge in snapshot["connections"]],
        "settings": definition_snapshot.effective_settings(snapshot["settings"]),
    }


# ── creation and restore ────────────────────────────────────────────────────────────────────────────────────


async def create(request: GatewayRequest) -> JsonResponse:
    """Create a version: an immutable snapshot of the current workflow.

    Refused if another version of the workflow has the tag.
    """
    value = await read_json(request)
    body = body_of(request, value, CreateVersion)
    problems = ProblemCollector()
    tag = text_rules.check_line(
        body.version_tag, "versionTag", problems, max_length=limits.VERSION_TAG_LENGTH
    )
    description = text_rules.check_paragraphs(
        body.description or "", "description", problems, max_length=limits.DESCRIPTION_LENGTH
    )
    problems.raise_any()
    now = request.gateway.clock()

    async def keep(connection: AsyncConnection, edited: WorkflowEdit) -> None:
        workflow = edited.after.workflow
        taken = await version_rows.find_tagged(connection, workflow.id, tag)
        if taken is not None:
            raise errors.conflict("version-tag-taken", f"Version {taken.version} has the tag {tag} already")
        catalog = await request.gateway.workflow_editor.read_catalog(connection, workflow.organization_id)
        version = WorkflowVersion(
            workflow_id=workflow.id,
            version=workflow.version,
            shard=workflow.shard,
            version_tag=tag,
            description=description,
            snapshot=workflow_rows.snapshot(edited.after),
            created_by=request.caller.user_id,
            created_at=now,
            definition_hash=await workflow_rows.hash_definition(edited.after, catalog),
        )
        await version_rows.add_version(connection, version)

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object, AuditAction.VERSION_CREATED, _with_next_version, also=keep
    )
    workflow = edited.after.workflow
    given_by_server: dict[str, Json] = {
        "version": workflow.version,
        "workflowId": workflow.id,
        "createdBy": request.caller.user_id,
        "createdAt": instant(now),
    }
    read_only.warn_of_new(request, value, CreateVersion, lambda: given_by_server)
    created = CreatedVersion(workflow_id=workflow.id, version=workflow.version, version_tag=tag)
    return editing.answer(edited.after, created, status=201)


async def restore(request: GatewayRequest) -> JsonResponse:
    """Restore a version's graph, settings, config, name and description.

    The workflow keeps its version number.
    """
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request.requested_object)
        version = await _find(connection, stored, request.path_params["version"])
    edited = await request.gateway.workflow_editor.edit(
        request.requested_object,
        AuditAction.VERSION_RESTORED,
        lambda before: _restore_snapshot(before, version.snapshot),
    )
    return editing.answer(edited.after, workflow_shapes.show_workflow(edited.after))


def _with_next_version(before: StoredWorkflow) -> StoredWorkflow:
    """Return a workflow with the next version number; raises a 409 error beyond 10,000 versions."""
    if before.workflow.version >= limits.VERSIONS:
        raise errors.conflict(
            "too-many-versions", f"A workflow may have at most {limits.VERSIONS:,} versions"
        )
    return before.with_columns(version=before.workflow.version + 1)


def _restore_snapshot(before: StoredWorkflow, snapshot: Mapping[str, Any]) -> StoredWorkflow:
    """Return a workflow with name, description, settings, config and graph of a snapshot; nothing is written.

    Its status, shares and version number stay.
    """
    snapshot = stored_workflow.move_foreign_settings(snapshot)
    columns = {name: snapshot[name] for name in ("name", "description", "settings", "config")}
    return replace(
        before.with_columns(**columns), nodes=snapshot["nodes"], connections=snapshot["connections"]
    )
