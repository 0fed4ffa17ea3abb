"""Workflows made out of others: duplicates, templates, exports and imports."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import replace

from gateway.http import errors, idempotency, limits
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, StrictWire, WireStruct, body_of, read_json
from gateway.workflows import (
    editing,
    finding_shapes,
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
from models.audit import AuditAction

if TYPE_CHECKING:
    from datetime import datetime

    from engine.values import Json
    from gateway.workflows.stored_workflow import StoredWorkflow
    from gateway.workflows.workflow_documents import ImportWorkflow
    from models.access import ApiCaller
    from nodes.catalog import NodeCatalog


READABLE_BYTES: Final = 500_000
"""A document that is longer isn't put into lines."""


class UseTemplate(StrictWire):
    """A template to begin with."""

    template_id: str
    name: Name | None = None
    """Instead of the template's own."""
    references: Annotated[dict[str, str | None], Meta(max_length=limits.NODES)] | None = None
    """For each data source or model that the template names, the id to put in its place; null leaves the field empty.

    Without it, what an own template names stays, and what a shipped one names is left empty.
    """


class SaveAsTemplate(StrictWire):
    """How a template is to be described; what is absent stays as it is in the workflow."""

    name: Name | None = None
    description: Description | None = None
    tags: Tags | None = None


class CopyResult(WireStruct):
    """The id of a workflow that was made out of another, and what it lacks."""

    workflow_id: str
    removed_secrets: Sequence[RemovedSecret]
    """What looked like a credential, and was left out."""


class WorkflowTemplate(WireStruct):
    """A workflow to begin with."""

    id: str
    name: str
    description: str
    tags: Sequence[str]
    nodes: Sequence[ShownNode]
    connections: Sequence[ShownConnection]
    created_at: Instant


_TEMPLATE_FIELDS = [field.encode_name for field in msgspec.structs.fields(WorkflowTemplate)]


class TemplateList(WireStruct):
    """A part of a list of templates; `count` tells how many there are in all."""

    count: int
    limit: int
    offset: int
    templates: Sequence[WorkflowTemplate]


class ImportFindings(WireStruct):
    """What is to mend in a draft that is imported."""

    errors: Sequence[FindingShape]
    warnings: Sequence[FindingShape]


class ImportAnswer(WireStruct):
    """What an import has created, or would create."""

    created: bool
    name: str
    node_count: int
    connection_count: int
    references: Sequence[ExternalReference]
    """What the nodes name in the place that the document comes from: each needs an id here, or null."""
    findings: ImportFindings
    workflow_id: str | UnsetType = UNSET
    """The id of the workflow that was created."""


# ── copies and templates ────────────────────────────────────────────────────────────────────────────────────


async def duplicate(request: GatewayRequest) -> JsonResponse:
    """Copy a workflow into a new draft of the caller's, without credentials and without shares."""
    source = await editing.read_workflow(request)
    named = source.with_columns(name=workflow_documents.name_of_copy(source.workflow.name))
    # In a thread, here and below: others are served while a large graph is gone through.
    copy = await asyncio.to_thread(
        workflow_documents.copy_workflow, named, request.caller, request.gateway.clock()
    )
    return await _create(request, {}, copy, AuditAction.WORKFLOW_DUPLICATED)


async def save_as_template(request: GatewayRequest) -> JsonResponse:
    """Copy a workflow into a template that everybody in the organisation can read and use; for admins.

    Other than that, a template is a draft like any: whoever reads it may execute it, its owner and admins change it.
    """
    value = await read_json(request)
    body = body_of(request, value, SaveAsTemplate)
    source = await editing.read_workflow(request)
    if not request.caller.is_admin:
        raise errors.admin_required()
    described = UpdateWorkflow(name=body.name, description=body.description, tags=body.tags)
    changed = workflow_shapes.apply_changes(source, described, request.gateway.catalog)
    copy = await asyncio.to_thread(
        workflow_documents.copy_workflow, changed, request.caller, request.gateway.clock(), is_template=True
    )
    return await _create(request, value, copy, AuditAction.TEMPLATE_SAVED)


async def templates(request: GatewayRequest) -> JsonResponse:
    """List the templates of the caller's organisation, the newest first, then those that ship with the server.

    None has credentials in it.
    """
    part = request.query.page()
    async with request.gateway.database.read() as connection:
        own, found = await workflow_rows.templates(connection, request.caller, part)
    common = list(shipped_templates.load_templates().values())
    first = max(part.offset - own, 0)
    here = common[first : first + part.limit - len(found)]

    def shown() -> list[dict[str, Json]]:
        catalog = request.gateway.catalog
        return [_template(workflow_documents.strip_credentials(stored).stored) for stored in found] + [
            _template(one.shown(request.caller, catalog)) for one in here
        ]

    body = {"count": own + len(common), "limit": part.limit, "offset": part.offset}
    return JsonResponse({**body, "templates": await asyncio.to_thread(shown)})


async def use_template(request: GatewayRequest) -> JsonResponse:
    """Create a draft out of a template."""
    value = await read_json(request)
    body = body_of(request, value, UseTemplate)
    catalog = request.gateway.catalog
    template, references = await _to_use(request, body)

    def copied() -> CredentialFreeWorkflow:
        named = workflow_shapes.apply_changes(template, UpdateWorkflow(name=body.name), catalog)
        if references is not None:
            named = workflow_documents.resolve_references(
                named, workflow_documents.references(named, catalog), references
            )
        return workflow_documents.copy_workflow(named, request.caller, request.gateway.clock())

    return await _create(request, value, await asyncio.to_thread(copied), AuditAction.TEMPLATE_USED)


async def _to_use(
    request: GatewayRequest, body: UseTemplate
) -> tuple[StoredWorkflow, Mapping[str, str | None] | None]:
    """Return the template, and what is to take the place of what it names; raises 404."""
    common = shipped_templates.load_templates().get(body.template_id)
    if common is not None:
        stored = common.stored(request.caller, request.gateway.catalog, request.gateway.clock())
        named = workflow_documents.references(stored, request.gateway.catalog)
        return stored, {one.id: None for one in named} | (body.references or {})
    async with request.gateway.database.read() as connection:
        template = await workflow_rows.find_workflow(connection, body.template_id, request.caller)
    if template is None or not template.workflow.is_template:
        raise errors.not_found("template")
    return template, body.references


async def _create(
    request: GatewayRequest, body: Json, copy: CredentialFreeWorkflow, action: AuditAction
) -> JsonResponse:
    def copied(workflow_id: str) -> CopyResult:
        return CopyResult(workflow_id=workflow_id, removed_secrets=copy.removed)

    return await editing.create_workflow(request, body, copy.stored, action, shown=copied)


def _template(stored: StoredWorkflow) -> dict[str, Json]:
    whole = workflow_shapes.show_workflow(stored)
    return {field: whole[field] for field in _TEMPLATE_FIELDS}


# ── documents ───────────────────────────────────────────────────────────────────────────────────────────────


async def export_workflow(request: GatewayRequest) -> JsonResponse:
    """Give a workflow as a document to keep or to import elsewhere, without credentials."""
    stored = await editing.read_workflow(request)
    written = await asyncio.to_thread(_written, stored, request.gateway.catalog)
    disposition = f'attachment; filename="{workflow_documents.file_name(stored.workflow)}"'
    headers = {"Content-Disposition": disposition, **editing.entity_tag(stored)}
    return JsonResponse(msgspec.Raw(written), headers=headers)


def _written(stored: StoredWorkflow, catalog: NodeCatalog) -> bytes:
    """Return a document as JSON, in lines to be read where it isn't so long that nobody reads it."""
    written = msgspec.json.encode(workflow_documents.export_document(stored, catalog))
    # What is nested deeply is sixty times as long with its indents.
    return written if len(written) > READABLE_BYTES else msgspec.json.format(written, indent=2)


async def import_workflow(request: GatewayRequest) -> JsonResponse:
    """Create a workflow out of a document; without `references`, only tell which there are to resolve.

    Nothing is created then, and the status is 200. Each id in `references` stands for a data source or model of the
    place that the document comes from; its value is the id to put there instead, or null to leave the field empty.
    Credentials that the document holds are kept, and warned of.
    """
    value = await read_json(request)
    body = workflow_documents.read_document(value)
    stored, answer = await asyncio.to_thread(
        _imported, body, request.caller, request.gateway.catalog, request.gateway.clock()
    )
    if not answer.created:
        idempotency.read_key(request)  # what is no key is refused, though nothing is created
        return JsonResponse(answer)
    return await editing.create_workflow(
        request,
        value,
        stored,
        AuditAction.WORKFLOW_IMPORTED,
        shown=lambda workflow_id: replace(answer, workflow_id=workflow_id),
    )


def _imported(
    body: ImportWorkflow, caller: ApiCaller, catalog: NodeCatalog, now: datetime
) -> tuple[StoredWorkflow, ImportAnswer]:
    """Return the workflow that would be created, and what there is to say about it; raises 422."""
    stored = workflow_documents.import_document(caller, body, catalog, now)
    named = workflow_documents.references(stored, catalog)
    if body.references is not None:
        stored = workflow_documents.resolve_references(stored, named, body.references)
    found = workflow_documents.findings(stored, catalog)
    return stored, ImportAnswer(
        created=body.references is not None,
        name=stored.workflow.name,
        node_count=len(stored.nodes),
        connection_count=len(stored.connections),
        references=named,
        findings=ImportFindings(
            errors=finding_shapes.show_finding(found.errors),
            warnings=finding_shapes.show_finding(found.warnings),
        ),
    )
