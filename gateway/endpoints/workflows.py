"""Workflows: list, create, get, update, delete, status and statistics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import structlog
from msgspec import Meta
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.values import encode
from gateway import errors, graph_shapes, idempotency, limits, text, workflow_rows
from gateway.ending import ask_to_end
from gateway.errors import ApiError
from gateway.graph_shapes import Connections, Nodes
from gateway.request import Request
from gateway.responses import JsonResponse, NoContent
from gateway.text import Problems
from gateway.wire import Wire, convert, decode_body, instant, read_json
from gateway.workflow_rows import Filter, Stored
from journal.store import ExecutionKey
from models import ids
from models.workflow import Workflow, WorkflowStatus

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.catalog import Catalog

Saved = TypeVar("Saved")

log = structlog.get_logger()

SAVE_ATTEMPTS = 5
CANCELS_AT_ONCE = 20


class CreateWorkflow(Wire):
    """A workflow that somebody wants."""

    name: str
    description: str | None = None
    status: WorkflowStatus | None = None
    nodes: Nodes | None = None
    connections: Connections | None = None
    tags: list[str] | None = None
    settings: dict[str, Any] | None = None
    config: dict[str, Any] | None = None


class UpdateWorkflow(Wire):
    """What is to change; the rest stays."""

    name: str | None = None
    description: str | None = None
    nodes: Nodes | None = None
    connections: Connections | None = None
    tags: list[str] | None = None
    settings: dict[str, Any] | None = None
    config: dict[str, Any] | None = None


class KnownSettings(Wire):
    """The settings that a run obeys."""

    timeout: Annotated[float, Meta(gt=0, le=limits.TIMEOUT_SECONDS)] = 3600
    retry_on_failure: bool = False
    max_retries: Annotated[int, Meta(ge=0, le=limits.RETRIES)] = 3
    strict_mappings: bool = False


class SetStatus(Wire):
    """The status that is wanted."""

    status: WorkflowStatus


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────


async def index(request: Request) -> JsonResponse:
    query = request.query
    part = query.page()
    order = query.order(workflow_rows.SORTABLE)
    wanted = Filter(query.choice("status", WorkflowStatus), query.text("tag"), query.text("search"))
    async with request.gateway.database.read() as connection:
        count, workflows = await workflow_rows.page(connection, request.caller, wanted, part, order)
    shown = [_summary(workflow) for workflow in workflows]
    return JsonResponse({"count": count, "limit": part.limit, "offset": part.offset, "workflows": shown})


async def show(request: Request) -> JsonResponse:
    async with request.gateway.database.read() as connection:
        return JsonResponse(_shown(await _readable(connection, request)))


async def stats(request: Request) -> JsonResponse:
    async with request.gateway.database.read() as connection:
        counts = await workflow_rows.count_by_status(connection, request.caller.organization_id)
    shown = {status.value: counts.get(status, 0) for status in WorkflowStatus}
    return JsonResponse({"total": sum(shown.values()), **shown})


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────


async def create(request: Request) -> JsonResponse:
    value = await read_json(request)
    body = convert(value, CreateWorkflow)
    promise = idempotency.requested(request, value)
    made = _made(request, body)
    workflow = made.workflow

    async def insert(connection: AsyncConnection) -> str:
        if promise is not None:
            bound = await idempotency.reserve(
                connection,
                promise,
                lane=workflow.lane,
                resource_id=workflow.id,
                now=workflow.created_at,
            )
            if bound != workflow.id:
                return bound
        # An earlier try may have been committed though its answer was lost.
        if not await workflow_rows.exists(connection, workflow.id):
            await workflow_rows.add(connection, made)
        return workflow.id

    workflow_id = await request.gateway.database.transaction(insert)
    if workflow_id != workflow.id:
        return JsonResponse({"workflowId": workflow_id}, status=201, headers=idempotency.REPLAYED)
    log.info("workflow created", workflow_id=workflow_id, organization_id=workflow.organization_id)
    return JsonResponse({"workflowId": workflow_id}, status=201)


async def update(request: Request) -> JsonResponse:
    body = await decode_body(request, UpdateWorkflow)
    catalog = request.gateway.catalog

    def change(before: Stored) -> Stored:
        after = _changed(before, body, catalog)
        is_other_graph = (after.nodes, after.connections) != (before.nodes, before.connections)
        if is_other_graph and after.workflow.status == WorkflowStatus.ACTIVE:
            graph_shapes.require_valid(graph_shapes.check(after.nodes, after.connections, catalog))
        return after

    after = await _edit(request, change)
    log.info("workflow updated", workflow_id=after.workflow.id, revision=after.workflow.revision)
    return JsonResponse(_shown(after))


async def set_status(request: Request) -> JsonResponse:
    wanted = (await decode_body(request, SetStatus)).status
    catalog = request.gateway.catalog

    def change(before: Stored) -> Stored:
        if wanted is WorkflowStatus.ACTIVE and before.workflow.status != wanted:
            graph_shapes.require_valid(graph_shapes.check(before.nodes, before.connections, catalog))
        return _with(before, status=wanted)

    after = await _edit(request, change)
    log.info("workflow status set", workflow_id=after.workflow.id, status=after.workflow.status)
    return JsonResponse(_shown(after))


async def delete(request: Request) -> NoContent:
    """Delete a workflow; `force=true` cancels what runs, without it that is a conflict."""
    is_forced = request.query.flag("force")

    async def remove(connection: AsyncConnection) -> list[ExecutionKey]:
        before = await _writable(connection, request)
        # Written first: from here on no run is accepted, so those that are found are all there are.
        gone = _revised(before, deleted_at=datetime.now(UTC))
        if not await workflow_rows.save(connection, before, gone, request.caller):
            raise Outrun
        live = await workflow_rows.live_executions(connection, before.workflow)
        if live and not is_forced:
            message = f"{len(live)} executions have not ended: wait for them, or cancel them with ?force=true"
            raise errors.conflict("workflow-running", message)
        return live

    live = await _until_saved(request, remove)
    for start in range(0, len(live), CANCELS_AT_ONCE):
        cancelled = live[start : start + CANCELS_AT_ONCE]
        await asyncio.gather(*(ask_to_end(request.gateway, one, "cancel") for one in cancelled))
    log.info("workflow deleted", workflow_id=request.path_params["id"], cancelled=len(live))
    return NoContent()


# ── one workflow, read and written ──────────────────────────────────────────────────────────────────────────


class Outrun(Exception):
    """Somebody else changed the workflow between its reading and its writing: read it again."""


async def _readable(connection: AsyncConnection, request: Request) -> Stored:
    """Return the workflow of the path; raises 404 for one that the caller may not read."""
    stored = await workflow_rows.find(connection, request.path_params["id"], request.caller)
    if stored is None:
        raise errors.not_found("workflow")
    return stored


async def _writable(connection: AsyncConnection, request: Request) -> Stored:
    """Return the workflow of the path; raises 403 for one that the caller may read, but not change."""
    stored = await _readable(connection, request)
    if stored.workflow.owner_id != request.caller.user_id and not request.caller.is_admin:
        raise ApiError(
            403, "not-owner", "Only the workflow's owner and admins of the organisation may do this"
        )
    return stored


async def _edit(request: Request, change: Callable[[Stored], Stored]) -> Stored:
    """Apply `change` to the workflow of the path, again if somebody else was faster; returns what is stored then."""

    async def work(connection: AsyncConnection) -> Stored:
        before = await _writable(connection, request)
        after = change(before)
        if after == before:
            return before
        after = _revised(after)
        if not await workflow_rows.save(connection, before, after, request.caller):
            raise Outrun
        return after

    return await _until_saved(request, work)


async def _until_saved(request: Request, work: Callable[[AsyncConnection], Awaitable[Saved]]) -> Saved:
    for _ in range(SAVE_ATTEMPTS):
        try:
            return await request.gateway.database.transaction(work)
        except Outrun:
            continue
    raise errors.conflict("edit-conflict", "Others keep changing this workflow: read it and try again")


def _revised(stored: Stored, **changes: Any) -> Stored:  # noqa: ANN401 - columns of any type
    revision = stored.workflow.revision + 1
    return _with(stored, revision=revision, updated_at=datetime.now(UTC), **changes)


def _with(stored: Stored, **changes: Any) -> Stored:  # noqa: ANN401 - columns of any type
    return replace(stored, workflow=Workflow(**{**stored.workflow.model_dump(), **changes}))


# ── from body to row ────────────────────────────────────────────────────────────────────────────────────────


def _made(request: Request, body: CreateWorkflow) -> Stored:
    """Return a new workflow of the caller; raises 422."""
    caller, catalog = request.caller, request.gateway.catalog
    now = datetime.now(UTC)
    problems = Problems()
    workflow = Workflow(
        id=ids.new("wf"),
        organization_id=caller.organization_id,
        lane=caller.lane,
        owner_id=caller.user_id,
        name=_name(body.name, problems),
        description=_description(body.description or "", problems),
        status=body.status or WorkflowStatus.DRAFT,
        tags=_tags(body.tags or [], problems),
        settings=_settings({}, body.settings or {}, problems),
        config=_merged({}, body.config or {}, "config", problems),
        scopes=[],
        created_at=now,
        updated_at=now,
    )
    nodes = graph_shapes.stored_nodes(body.nodes or [], catalog, problems)
    connections = graph_shapes.stored_connections(body.connections or [], problems)
    problems.raise_any()
    if workflow.status == WorkflowStatus.ACTIVE:
        graph_shapes.require_valid(graph_shapes.check(nodes, connections, catalog))
    return Stored(workflow, nodes, connections, shared_with=[])


def _changed(before: Stored, body: UpdateWorkflow, catalog: Catalog) -> Stored:
    """Return a workflow with what the body gives in the place of what was; raises 422."""
    workflow = before.workflow
    problems = Problems()
    changes: dict[str, object] = {}
    nodes, connections = before.nodes, before.connections
    if body.name is not None:
        changes["name"] = _name(body.name, problems)
    if body.description is not None:
        changes["description"] = _description(body.description, problems)
    if body.tags is not None:
        changes["tags"] = _tags(body.tags, problems)
    if body.settings is not None:
        changes["settings"] = _settings(workflow.settings, body.settings, problems)
    if body.config is not None:
        changes["config"] = _merged(workflow.config, body.config, "config", problems)
    if body.nodes is not None:
        nodes = graph_shapes.stored_nodes(body.nodes, catalog, problems)
    if body.connections is not None:
        connections = graph_shapes.stored_connections(body.connections, problems)
    problems.raise_any()
    return replace(_with(before, **changes), nodes=nodes, connections=connections)


def _name(given: str, problems: Problems) -> str:
    return text.line(given, "name", problems, max_length=limits.WORKFLOW_NAME_LENGTH)


def _description(given: str, problems: Problems) -> str:
    return text.paragraphs(given, "description", problems, max_length=limits.DESCRIPTION_LENGTH)


def _tags(given: Sequence[str], problems: Problems) -> list[str]:
    """Return the tags in the order in which they were given, each once."""
    if len(given) > limits.TAGS:
        problems.add("tags", "too-many", f"A workflow may have at most {limits.TAGS} tags")
        return []
    return list(
        dict.fromkeys(
            text.line(tag, f"tags.{position}", problems, max_length=limits.TAG_LENGTH)
            for position, tag in enumerate(given)
        )
    )


def _settings(before: Mapping[str, Json], given: Mapping[str, Json], problems: Problems) -> dict[str, Json]:
    """Return settings with the given ones merged in, complete; keys that mean nothing here are kept as they are."""
    try:
        convert({key: value for key, value in given.items() if value is not None}, KnownSettings, "settings")
    except ApiError as error:
        problems.found.extend(error.details)
    return graph_shapes.effective(_merged(before, given, "settings", problems))


def _merged(
    before: Mapping[str, Json], given: Mapping[str, Json], path: str, problems: Problems
) -> dict[str, Json]:
    """Return `before` with the given keys set; null takes a key away."""
    merged: dict[str, Json] = {key: value for key, value in {**before, **given}.items() if value is not None}
    if len(encode(merged)) > limits.SETTINGS_BYTES:
        problems.add(path, "too-large", f"{path} may take at most {limits.SETTINGS_BYTES:,} bytes")
    return merged


# ── from row to body ────────────────────────────────────────────────────────────────────────────────────────


def _summary(workflow: Workflow) -> dict[str, Json]:
    return {
        "id": workflow.id,
        "name": workflow.name,
        "description": workflow.description,
        "status": workflow.status,
        "version": workflow.version,
        "tags": list(workflow.tags),
        "organizationId": workflow.organization_id,
        "ownerId": workflow.owner_id,
        "isPublic": workflow.is_public,
        "isTemplate": workflow.is_template,
        "createdAt": instant(workflow.created_at),
        "updatedAt": instant(workflow.updated_at),
    }


def _shown(stored: Stored) -> dict[str, Json]:
    """Return the Workflow object."""
    workflow = stored.workflow
    return {
        **_summary(workflow),
        "nodes": [graph_shapes.shown_node(node) for node in stored.nodes],
        "connections": [graph_shapes.shown_connection(edge) for edge in stored.connections],
        "config": workflow.config,
        "settings": graph_shapes.effective(workflow.settings),
        "scopes": list(workflow.scopes),
        "sharedWith": list(stored.shared_with),
    }
