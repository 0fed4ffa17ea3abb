"""What a workflow's graph is checked for: what is wrong with it, and what it needs to be allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine import resource_scopes
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
    """The findings about a graph; with warnings alone it is valid."""

    workflow_id: str
    valid: bool
    errors: Sequence[FindingShape]
    warnings: Sequence[FindingShape]
    node_count: int
    connection_count: int
    truncated: bool
    """There is more than is listed."""


class WorkflowScopes(WireStruct):
    """What a workflow needs to be allowed, each as `resource:action:id`."""

    workflow_id: str
    scopes: Sequence[str]


async def check(request: GatewayRequest) -> JsonResponse:
    """Check a workflow's graph: everything that is wrong with it, and what to do about it."""
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request)
        past = await output_samples.recent_outputs(connection, stored.workflow, request.caller)
    # In a thread: others are served while a large graph is gone through.
    validation = await asyncio.to_thread(_checked, stored, past, request.gateway.catalog)
    return editing.answer(stored, _shown(stored, validation))


async def compute_scopes(request: GatewayRequest) -> JsonResponse:
    """Work out what a workflow needs to be allowed, from the configs of its nodes, and keep it with the workflow."""
    catalog = request.gateway.catalog

    def with_scopes(before: StoredWorkflow) -> StoredWorkflow:
        return before.with_columns(
            scopes=resource_scopes.required_scopes(graph_shapes.graph_of(before), catalog)
        )

    edited = await editing.edit_workflow(request, AuditAction.WORKFLOW_SCOPES_COMPUTED, with_scopes)
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
