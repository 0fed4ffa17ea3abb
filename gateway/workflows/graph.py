"""Endpoints of whole graphs: layout, and creation in one request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from concurrency import offload
from engine import canvas_layout as layouts
from engine.findings import FindingType
from gateway.http import limits
from gateway.http.parameters import FlagParameter
from gateway.http.request import GatewayRequest, read_idempotency_key
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct, read_json
from gateway.workflows import editing, graph_shapes, workflow_builder
from gateway.workflows.finding_shapes import FixShape
from gateway.workflows.workflow_shapes import ShownConnection, ShownNode
from models.audit import AuditAction
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.workflows.stored_workflow import StoredWorkflow

DRY_RUN = FlagParameter("dryRun", "Only report the problems of the workflow; it is not created.")


class LayoutResult(WireStruct):
    """Result of a layout."""

    workflow_id: str
    changed: bool
    nodes_repositioned: int
    """Number of nodes that were moved."""


class BuildFinding(WireStruct):
    """Problem of a request body, with its path; `type` and later fields are those of a validation finding."""

    path: str
    code: str
    message: str
    type: FindingType | UnsetType = UNSET
    suggestion: str | UnsetType = UNSET
    node_id: str | UnsetType = UNSET
    connection_id: str | UnsetType = UNSET
    fix: FixShape | UnsetType = UNSET


class BuiltWorkflow(WireStruct):
    """Created workflow with its stored graph."""

    workflow_id: str
    status: WorkflowStatus
    version: int
    nodes: Sequence[ShownNode]
    connections: Sequence[ShownConnection]
    warnings: Sequence[BuildFinding]
    node_count: int
    connection_count: int


class BuildFindings(WireStruct):
    """Problems of a workflow that was not created; it can be created with warnings alone."""

    valid: bool
    errors: Sequence[BuildFinding]
    warnings: Sequence[BuildFinding]


async def layout(request: GatewayRequest) -> JsonResponse:
    """Arrange the nodes of a workflow from left to right; an arranged graph does not change."""
    stored = await request.gateway.workflow_editor.read(request.requested_object)
    editing.require_writer(request.caller, stored.workflow)
    seen = graph_shapes.build_layout_input(stored.nodes, stored.connections)
    # A thread, here and below, so that a large graph does not block other requests.
    places = await asyncio.to_thread(layouts.arrange_cards, *seen)

    def arranged(before: StoredWorkflow) -> StoredWorkflow:
        current = graph_shapes.build_layout_input(before.nodes, before.connections)
        wanted = places if current == seen else layouts.arrange_cards(*current)
        return replace(before, nodes=graph_shapes.with_positions(before.nodes, wanted))

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object, AuditAction.WORKFLOW_LAID_OUT, arranged
    )
    nodes = zip(edited.before.nodes, edited.after.nodes, strict=True)
    count = sum(node["position"] != was["position"] for was, node in nodes)
    laid_out = LayoutResult(workflow_id=stored.workflow.id, changed=count > 0, nodes_repositioned=count)
    return editing.answer(edited.after, laid_out)


async def build(request: GatewayRequest) -> JsonResponse:
    """Create a workflow with its whole graph, or report all its problems.

    Errors that are allowed in other drafts prevent the creation, except for `not-runnable`. `details` has an
    entry for every invalid field and every error of the graph, with its `path` in the body. `dryRun` creates
    nothing and answers 200 with the errors.
    """
    is_dry_run = request.query[DRY_RUN]
    value = await read_json(request)
    plan = await asyncio.to_thread(
        workflow_builder.plan_workflow,
        request.caller,
        value,
        await request.catalog(),
        request.gateway.clock(),
    )
    warnings = plan.warnings[: limits.FINDINGS]
    if is_dry_run:
        read_idempotency_key(request.headers)  # an invalid key is refused, though no workflow is created
        errors = plan.errors[: limits.FINDINGS]
        return JsonResponse({"valid": not errors, "errors": errors, "warnings": warnings})
    if plan.errors:
        raise workflow_builder.refusal_error(plan.errors)
    nodes, connections = plan.stored.nodes, plan.stored.connections

    def built(workflow_id: str) -> Json:
        return {
            "workflowId": workflow_id,
            "status": plan.stored.workflow.status,
            "version": plan.stored.workflow.version,
            "nodes": [graph_shapes.shown_node(node) for node in nodes],
            "connections": [graph_shapes.shown_connection(edge) for edge in connections],
            "warnings": [dict(warning) for warning in warnings],
            "nodeCount": len(nodes),
            "connectionCount": len(connections),
        }

    idempotency_key = await offload.run(request.idempotency_key, value)
    return await request.gateway.workflow_editor.create(
        request.caller, plan.stored, AuditAction.WORKFLOW_BUILT, idempotency_key, shown=built
    )
