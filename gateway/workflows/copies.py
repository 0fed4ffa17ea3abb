"""Endpoints that create workflows from others: duplicates, templates, exports and imports."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import replace

from concurrency import offload
from engine import config_places
from gateway.data_sources.data_source_shapes import CreateDataSource, build_data_source
from gateway.http import errors, limits
from gateway.http.request import GatewayRequest, read_idempotency_key
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, StrictWire, WireStruct, body_of, read_json
from gateway.workflows import (
    editing,
    finding_shapes,
    graph_shapes,
    shipped_templates,
    workflow_documents,
    workflow_rows,
    workflow_shapes,
)
from gateway.workflows.finding_shapes import FindingShape
from gateway.workflows.workflow_documents import CredentialFreeWorkflow, ExternalReference, RemovedSecret
from gateway.workflows.workflow_shapes import (
    Description,
    Name,
    ShownConnection,
    ShownNode,
    Tags,
    UpdateWorkflow,
)
from models.access import KeyScope
from models.audit import AuditAction
from models.data_source_types import DataSourceType
from nodes.ai.model_connection import ECHO_MODEL_ID

if TYPE_CHECKING:
    from datetime import datetime

    from engine.values import Json
    from gateway.workflows.stored_workflow import StoredWorkflow
    from gateway.workflows.workflow_documents import ImportWorkflow
    from models.access import ApiCaller
    from nodes.catalog import NodeCatalog


READABLE_BYTES: Final = 500_000
"""Longest document that is indented for readers."""


class UseTemplate(StrictWire):
    """Template to create a workflow from."""

    template_id: str
    name: Name | None = None
    """Name of the workflow, by default that of the template."""
    references: Annotated[dict[str, str | None], Meta(max_length=limits.NODES)] | None = None
    """Replacement id for each data source or model of the template; null leaves the field empty.

    By default, references of the organization's own templates are kept. Of shipped ones, the built-in model `echo`
    is kept, and SQLite databases become the caller's data source *Sample database*, which a key with the scope
    `datasources:write` creates if it is missing; without that scope they are left empty, like all others.
    """


class SaveAsTemplate(StrictWire):
    """Name and description of a template; absent fields are those of the workflow."""

    name: Name | None = None
    description: Description | None = None
    tags: Tags | None = None


class CopyResult(WireStruct):
    """Id of a copied workflow, with the credentials that were removed."""

    workflow_id: str
    removed_secrets: Sequence[RemovedSecret]
    """Values that look like credentials and were removed."""


class WorkflowTemplate(WireStruct):
    """Template of a workflow."""

    id: str
    name: str
    description: str
    tags: Sequence[str]
    nodes: Sequence[ShownNode]
    connections: Sequence[ShownConnection]
    created_at: Instant


_TEMPLATE_FIELDS = [field.encode_name for field in msgspec.structs.fields(WorkflowTemplate)]


class TemplateList(WireStruct):
    """Page of a list of templates; `count` is the total."""

    count: int
    limit: int
    offset: int
    templates: Sequence[WorkflowTemplate]


class ImportFindings(WireStruct):
    """Errors and warnings of an imported draft."""

    errors: Sequence[FindingShape]
    warnings: Sequence[FindingShape]


class ImportAnswer(WireStruct):
    """Result or preview of an import."""

    created: bool
    name: str
    node_count: int
    connection_count: int
    references: Sequence[ExternalReference]
    """External references in the document: each needs an id of this server, or null."""
    findings: ImportFindings
    workflow_id: str | UnsetType = UNSET
    """Id of the created workflow."""


# ── copies and templates ────────────────────────────────────────────────────────────────────────────────────


async def duplicate(request: GatewayRequest) -> JsonResponse:
    """Copy a workflow into a new draft of the caller, without credentials and shares."""
    source = await request.gateway.workflow_editor.read(request.requested_object)
    named = source.with_columns(name=workflow_documents.name_of_copy(source.workflow.name))
    # A thread, here and below, so that a large graph does not block other requests.
    copy = await asyncio.to_thread(
        workflow_documents.copy_workflow, named, request.caller, request.gateway.clock()
    )
    return await _create(request, {}, copy, AuditAction.WORKFLOW_DUPLICATED)


async def save_as_template(request: GatewayRequest) -> JsonResponse:
    """Copy a workflow into a template that the whole organization can read and use; for admins.

    A template is otherwise a draft: readers may execute it, and its owner and admins may change it.
    """
    value = await read_json(request)
    body = body_of(request, value, SaveAsTemplate)
    source = await request.gateway.workflow_editor.read(request.requested_object)
    if not request.caller.is_admin:
        raise errors.admin_required()
    described = UpdateWorkflow(name=body.name, description=body.description, tags=body.tags)
    changed = workflow_shapes.apply_changes(source, described, await request.catalog())
    copy = await asyncio.to_thread(
        workflow_documents.copy_workflow, changed, request.caller, request.gateway.clock(), is_template=True
    )
    return await _create(request, value, copy, AuditAction.TEMPLATE_SAVED)


async def templates(request: GatewayRequest) -> JsonResponse:
    """List the templates of the caller's organization, then those that ship with the server.

    The organization's own are sorted by creation, the newest first. Templates contain no credentials.
    """
    part = request.query.page()
    async with request.gateway.database.read() as connection:
        own, found = await workflow_rows.list_templates(connection, request.caller, part)
    common = list(shipped_templates.load_templates().values())
    first = max(part.offset - own, 0)
    here = common[first : first + part.limit - len(found)]

    catalog = await request.catalog()

    def shown() -> list[dict[str, Json]]:
        return [_show_template(workflow_documents.strip_credentials(stored).stored) for stored in found] + [
            _show_template(one.build_list_item(request.caller, catalog)) for one in here
        ]

    body = {"count": own + len(common), "limit": part.limit, "offset": part.offset}
    return JsonResponse({**body, "templates": await asyncio.to_thread(shown)})


async def use_template(request: GatewayRequest) -> JsonResponse:
    """Create a draft from a template.

    It belongs to the caller, and is a copy: later changes of the template do not reach it.
    """
    value = await read_json(request)
    body = body_of(request, value, UseTemplate)
    catalog = await request.catalog()
    template, references = await _find_template(request, body)

    def copied() -> CredentialFreeWorkflow:
        named = workflow_shapes.apply_changes(template, UpdateWorkflow(name=body.name), catalog)
        if references is not None:
            named = workflow_documents.resolve_references(
                named, workflow_documents.list_references(named, catalog), references
            )
        return workflow_documents.copy_workflow(named, request.caller, request.gateway.clock())

    return await _create(request, value, await asyncio.to_thread(copied), AuditAction.TEMPLATE_USED)


async def _find_template(
    request: GatewayRequest, body: UseTemplate
) -> tuple[StoredWorkflow, Mapping[str, str | None] | None]:
    """Return the template that a body names, and a replacement for each reference by the id in the template.

    None in place of the mapping keeps all references; a value None empties the field. References of a template that
    ships with the server have defaults, see `UseTemplate`. Raises a 404 error unless the id is that of a template that
    the caller may read.
    """
    common = shipped_templates.load_templates().get(body.template_id)
    if common is not None:
        catalog = request.gateway.catalog
        stored = common.build_draft(request.caller, catalog, request.gateway.clock())
        given = body.references or {}
        named = config_places.list_references(graph_shapes.graph_of(stored), catalog)
        defaults: dict[str, str | None] = {one.id: None for one in named}
        if ECHO_MODEL_ID in defaults:
            defaults[ECHO_MODEL_ID] = ECHO_MODEL_ID
        databases = {one.id for one in named if DataSourceType.SQLITE in one.source_types} - given.keys()
        if databases and request.caller.has_scope(KeyScope.DATASOURCES_WRITE):
            defaults |= dict.fromkeys(databases, await _find_sample_database(request))
        return stored, defaults | given
    async with request.gateway.database.read() as connection:
        template = await workflow_rows.find_workflow(connection, body.template_id, request.caller)
    if template is None or not template.workflow.is_template:
        raise errors.not_found("template")
    return template, body.references


async def _find_sample_database(request: GatewayRequest) -> str:
    """Return the id of the caller's data source *Sample database*, a SQLite file; it is created if it is missing."""
    sample = CreateDataSource(
        name="Sample database",
        type=DataSourceType.SQLITE,
        settings={"file": f"sample-{request.caller.user_id}.db"},
    )
    source = build_data_source(request.caller, sample, request.gateway.vault, request.gateway.clock())
    return await request.gateway.data_source_editor.find_or_create(request.caller, source)


async def _create(
    request: GatewayRequest, body: Json, copy: CredentialFreeWorkflow, action: AuditAction
) -> JsonResponse:
    """Create the copied workflow, once per idempotency key, and return the answer with its id and the removed
    credentials.
    """

    def copied(workflow_id: str) -> CopyResult:
        return CopyResult(workflow_id=workflow_id, removed_secrets=copy.removed)

    idempotency_key = await offload.run(
        request.idempotency_key, body, workflow_id=request.path_params.get("id", "")
    )
    return await request.gateway.workflow_editor.create(
        request.caller, copy.stored, action, idempotency_key, shown=copied
    )


def _show_template(stored: StoredWorkflow) -> dict[str, Json]:
    whole = workflow_shapes.show_workflow(stored)
    return {field: whole[field] for field in _TEMPLATE_FIELDS}


# ── documents ───────────────────────────────────────────────────────────────────────────────────────────────


async def export_workflow(request: GatewayRequest) -> JsonResponse:
    """Export a workflow as a document without credentials, for a backup or an import elsewhere."""
    stored = await request.gateway.workflow_editor.read(request.requested_object)
    written = await asyncio.to_thread(_encode_document, stored, await request.catalog())
    disposition = f'attachment; filename="{workflow_documents.file_name(stored.workflow)}"'
    headers = {"Content-Disposition": disposition, **editing.entity_tag(stored.workflow)}
    return JsonResponse(msgspec.Raw(written), headers=headers)


def _encode_document(stored: StoredWorkflow, catalog: NodeCatalog) -> bytes:
    """Return the exported document of a workflow as JSON, indented unless it has over 500,000 bytes."""
    written = msgspec.json.encode(workflow_documents.export_document(stored, catalog))
    # Indentation makes a deeply nested document sixty times as long.
    return written if len(written) > READABLE_BYTES else msgspec.json.format(written, indent=2)


async def import_workflow(request: GatewayRequest) -> JsonResponse:
    """Create a workflow from a document; without `references`, only list the references to resolve.

    In that case no workflow is created, and the status is 200. The keys of `references` are ids of data
    sources and models in the document; each value is the replacement id, or null to leave the field empty.
    Credentials in the document are kept, with a warning.
    """
    value = await read_json(request)
    body = workflow_documents.read_document(value)
    stored, answer = await asyncio.to_thread(
        _plan_import, body, request.caller, await request.catalog(), request.gateway.clock()
    )
    if not answer.created:
        read_idempotency_key(request.headers)  # an invalid key is refused, though no workflow is created
        return JsonResponse(answer)
    idempotency_key = await offload.run(request.idempotency_key, value)
    return await request.gateway.workflow_editor.create(
        request.caller,
        stored,
        AuditAction.WORKFLOW_IMPORTED,
        idempotency_key,
        shown=lambda workflow_id: replace(answer, workflow_id=workflow_id),
    )


def _plan_import(
    body: ImportWorkflow, caller: ApiCaller, catalog: NodeCatalog, now: datetime
) -> tuple[StoredWorkflow, ImportAnswer]:
    """Return the workflow to create, and the answer with its references and findings; raises a 422 error for
    an invalid document.

    Without `references` in the body it is only a preview.
    """
    stored = workflow_documents.import_document(caller, body, catalog, now)
    named = workflow_documents.list_references(stored, catalog)
    if body.references is not None:
        stored = workflow_documents.resolve_references(stored, named, body.references)
    found = workflow_documents.validate_draft(stored, catalog)
    return stored, ImportAnswer(
        created=body.references is not None,
        name=stored.workflow.name,
        node_count=len(stored.nodes),
        connection_count=len(stored.connections),
        references=named,
        findings=ImportFindings(
            errors=finding_shapes.show_findings(found.errors),
            warnings=finding_shapes.show_findings(found.warnings),
        ),
    )
