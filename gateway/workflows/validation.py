"""Endpoints that validate a workflow's graph and compute its required scopes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from engine import config_places
from engine.findings import MAX_FINDINGS, FindingType, GraphFinding, ValidationResult
from engine.node_api import UnknownNodeType
from engine.validation import validate_graph
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct
from gateway.workflows import editing, finding_shapes, graph_shapes, output_samples, versions
from gateway.workflows.finding_shapes import FindingShape
from journal import definition_snapshot
from models.audit import AuditAction
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.agents.workflow_traits import TraitsById
    from engine.graph import ParsedGraph
    from gateway.workflows.output_samples import PastOutput
    from gateway.workflows.stored_workflow import StoredWorkflow
    from models.access import ApiCaller
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
    """Validate a workflow's graph and list all errors and warnings, with suggestions.

    Paths are checked against outputs of earlier runs too. Nothing is changed.
    """
    return await _answer_findings(request)


async def check_version(request: GatewayRequest) -> JsonResponse:
    """Validate the graph of a version, as `validate` does, before it is restored or deployed.

    Nothing is changed.
    """
    return await _answer_findings(request, version=request.path_params["version"])


async def _answer_findings(request: GatewayRequest, *, version: str | None = None) -> JsonResponse:
    """Validate the graph of the requested workflow, or of a version of it, and return the answer with the findings."""
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request.requested_object)
        if version is not None:
            stored = await versions.find_restored(connection, stored, version)
        catalog = await request.gateway.catalogs.read(connection, request.caller.organization_id)
        inputs = await read_inputs(connection, request.caller, stored, catalog, request.gateway.clock())
    # A thread, so that a large graph does not block other requests.
    validation = await asyncio.to_thread(check_graph, inputs)
    return editing.answer(stored, _show_validation(stored, validation))


class ValidationInputs(NamedTuple):
    """Workflow with the stored data that its validation needs."""

    stored: StoredWorkflow
    graph: ParsedGraph
    catalog: NodeCatalog
    past: Sequence[PastOutput]
    traits: TraitsById
    warnings: Sequence[GraphFinding]
    """Warnings about workers, tool servers and prices, which change without an edit."""


async def read_inputs(
    connection: AsyncConnection,
    caller: ApiCaller,
    stored: StoredWorkflow,
    catalog: NodeCatalog,
    now: datetime,
) -> ValidationInputs:
    """Read the data for `check_graph`."""
    graph = graph_shapes.graph_of(stored)
    return ValidationInputs(
        stored,
        graph,
        catalog,
        await output_samples.recent_outputs(connection, stored.workflow, caller),
        await _read_traits(connection, caller, graph, catalog),
        [
            *await _unserved_nodes(connection, stored, catalog, now),
            *await _refused_calls(connection, caller, stored, graph, catalog),
        ],
    )


def check_graph(inputs: ValidationInputs) -> ValidationResult:
    """Validate a workflow."""
    is_draft = inputs.stored.workflow.status == WorkflowStatus.DRAFT
    samples = output_samples.output_samples(inputs.past, inputs.graph, inputs.catalog)
    validation = validate_graph(
        inputs.graph, inputs.catalog, is_draft=is_draft, samples=samples, traits=inputs.traits
    )
    return replace(validation, warnings=(*validation.warnings, *inputs.warnings)[:MAX_FINDINGS])


async def _unserved_nodes(
    connection: AsyncConnection, stored: StoredWorkflow, catalog: NodeCatalog, now: datetime
) -> list[GraphFinding]:
    """Return a warning for each custom node whose tasks no worker performs now; none for types that are unknown."""
    custom = list(definition_snapshot.list_custom_types(stored.nodes))
    if not custom:
        return []
    from journal.tasks import task_service  # noqa: PLC0415 - loaded with the first custom node

    workers = await task_service.read_workers(
        connection,
        stored.workflow.organization_id,
        now,
        task_service.select_workflow(stored.workflow.id),
    )
    found: list[GraphFinding] = []
    for use in custom:
        try:
            node_type = catalog.get(use.type, use.version)
        except UnknownNodeType:
            continue
        if node_type.task is None:
            continue
        pool = node_type.task.pool
        service = task_service.find_service(workers, node_type.type, node_type.version, pool, now)
        if service.explanation is not None:
            message = f'Node "{use.node["label"]}" ({use.type}): {service.explanation}'
            suggestion = "Start a worker. Its tasks wait until then."
            found.append(GraphFinding(FindingType.NO_WORKER, message, suggestion, str(use.node["id"])))
    return found


async def _read_traits(
    connection: AsyncConnection, caller: ApiCaller, graph: ParsedGraph, catalog: NodeCatalog
) -> TraitsById:
    """Return the traits of the workflows that a graph calls, such as the effect and reads of private data, by their
    ids.

    One that is missing or that the caller may not read has the traits `UNKNOWN`.
    """
    from engine.agents import workflow_traits  # noqa: PLC0415 - loaded with the first validation

    called = workflow_traits.list_called(graph)
    if not called:
        return {}
    from execution import workflow_traits as stored_traits  # noqa: PLC0415 - loaded with the first called workflow

    return await stored_traits.read(connection, caller, called, catalog)


async def _refused_calls(
    connection: AsyncConnection,
    caller: ApiCaller,
    stored: StoredWorkflow,
    graph: ParsedGraph,
    catalog: NodeCatalog,
) -> Sequence[GraphFinding]:
    """Return the warnings about calls that a run would be refused: of tools of tool servers, and of unpriced models."""
    from gateway.workflows import price_findings, tool_findings  # noqa: PLC0415 - loaded with the first validation

    settings = stored.workflow.settings
    return [
        *await tool_findings.find_refused_tools(connection, caller, graph),
        *await price_findings.find_unpriced_models(connection, caller, settings, graph, catalog),
    ]


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


def _show_validation(stored: StoredWorkflow, validation: ValidationResult) -> ValidationShape:
    """Return the findings of a validation as the API shows them."""
    return ValidationShape(
        workflow_id=stored.workflow.id,
        valid=validation.is_valid,
        errors=finding_shapes.show_findings(validation.errors),
        warnings=finding_shapes.show_findings(validation.warnings),
        node_count=len(stored.nodes),
        connection_count=len(stored.connections),
        truncated=validation.is_truncated,
    )
