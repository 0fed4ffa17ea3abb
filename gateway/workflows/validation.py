"""Endpoints that validate a workflow's graph and compute its required scopes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine import config_places
from engine.findings import ValidationResult
from engine.validation import validate_graph
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct
from gateway.workflows import editing, finding_shapes, graph_shapes, output_samples
from gateway.workflows.finding_shapes import FindingShape
from models.audit import AuditAction
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from gateway.workflows.output_samples import PastOutput
    from gateway.workflows.stored_workflow import StoredWorkflow
    from nodes.catalog import NodeCatalog


class ValidationShape(WireStruct):
    """Findings about a graph; with warnings alone it is valid."""

    workflow_id: str
    valid: bool
    errors: Sequence[FindingShape]
    warnings: Sequence[FindingShape]
    node_count: int
    connection_count: int
    truncated: bool
    """True if there are more findings than listed."""


class WorkflowScopes(WireStruct):
    """Permissions that a workflow needs, each as `resource:action:id`."""

    workflow_id: str
    scopes: Sequence[str]


async def check(request: GatewayRequest) -> JsonResponse:
    """Validate a workflow's graph and list all errors and warnings, with suggestions."""
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request.requested_object)
        past = await output_samples.recent_outputs(connection, stored.workflow, request.caller)
    # A thread, so that a large graph does not block other requests.
    validation = await asyncio.to_thread(_checked, stored, past, await request.catalog())
    return editing.answer(stored, _shown(stored, validation))


async def compute_scopes(request: GatewayRequest) -> JsonResponse:
    """Compute the permissions that a workflow needs, from its nodes, and store them."""
    catalog = await request.catalog()

    def with_scopes(before: StoredWorkflow) -> StoredWorkflow:
        return before.with_columns(
            scopes=config_places.required_scopes(graph_shapes.graph_of(before), catalog)
        )

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object, AuditAction.WORKFLOW_SCOPES_COMPUTED, with_scopes
    )
    workflow = edited.after.workflow
    return editing.answer(edited.after, WorkflowScopes(workflow_id=workflow.id, scopes=workflow.scopes))


def _checked(stored: StoredWorkflow, past: Sequence[PastOutput], catalog: NodeCatalog) -> ValidationResult:
    graph = graph_shapes.graph_of(stored)
    is_draft = stored.workflow.status == WorkflowStatus.DRAFT
    return validate_graph(
        graph, catalog, is_draft=is_draft, samples=output_samples.output_samples(past, graph, catalog)
    )


def _shown(stored: StoredWorkflow, validation: ValidationResult) -> ValidationShape:
    return ValidationShape(
        workflow_id=stored.workflow.id,
        valid=validation.is_valid,
        errors=finding_shapes.show_finding(validation.errors),
        warnings=finding_shapes.show_finding(validation.warnings),
        node_count=len(stored.nodes),
        connection_count=len(stored.connections),
        truncated=validation.is_truncated,
    )
