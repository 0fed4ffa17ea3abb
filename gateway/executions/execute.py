"""The endpoint `execute`: accept a run and answer after its commit."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec.structs import replace

from concurrency import offload
from engine.triggers import trigger_output
from gateway.executions import acceptance, awaited_end, run_labels, test_runs
from gateway.executions.acceptance import RunRequest
from gateway.executions.awaited_end import OutcomeShape
from gateway.executions.test_runs import WHOLE, GraphSelection
from gateway.http import errors, limits, text_rules
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import GuardedWire, WireStruct, body_of, read_json
from gateway.workflows import graph_shapes
from gateway.workflows.graph_shapes import Connections, GraphId, Nodes
from models.access import KeyScope

if TYPE_CHECKING:
    from engine.values import Json
    from journal.definition_snapshot import LoadedWorkflow
    from nodes.catalog import NodeCatalog


class DefinitionOverride(GuardedWire):
    """Graph that replaces the workflow's own for one run; an empty one replaces nothing."""

    nodes: Nodes | None = None
    connections: Connections | None = None


class ExecuteRequest(GuardedWire):
    """Inputs and options of a run."""

    definition: DefinitionOverride | None = None
    trigger_inputs: dict[str, Any] | None = None
    inputs: dict[str, Any] | None = None
    """Alias of `triggerInputs`."""
    up_to: GraphId | None = None
    """Node id: only this node and its predecessors run."""
    pinned: dict[str, Any] | None = None
    """Outputs by node id, which these nodes return without running.

    Predecessors of such a node run only if other nodes need them. To run an ended execution again from one of
    its nodes, replay it instead.
    """
    callback_url: (
        Annotated[str, text_rules.describe_length(limits.CALLBACK_URL_LENGTH, min_length=1)] | None
    ) = None
    """URL that gets a message at the end of the run, signed with the organization's secret."""
    tags: run_labels.Tags | None = None
    """Tags by which lists find the run."""
    metadata: run_labels.Metadata | None = None
    """Metadata by which lists find the run, as in `?metadata.order=7`."""


class ExecuteResult(WireStruct):
    """Accepted run."""

    execution_id: str


class EndedExecuteResult(OutcomeShape, kw_only=True):
    """Accepted run that has ended."""

    execution_id: str


async def start(request: GatewayRequest) -> JsonResponse:
    """Run a workflow; the answer is sent when the run is committed.

    With `Prefer: wait=N`, it is sent when the run has ended, with its outputs, or after N seconds.

    A `definition` replaces the workflow's graph for this run and also needs the scope `workflows:write`. With
    `upTo` and `pinned` only a part of the graph runs, and only that part must be valid. A run with
    `definition` or `pinned` is visible to the caller, the workflow's owner and admins only.
    """
    value = await read_json(request)
    body = body_of(request, value, ExecuteRequest)
    acceptance.require_one_spelling(body.trigger_inputs, body.inputs)
    has_labels = body.tags or body.metadata
    labels = run_labels.read_labels(body.tags, body.metadata) if has_labels else ()
    idempotency_key = await offload.run(request.idempotency_key, value, workflow_id=request.path_params["id"])

    async def plan(workflow: LoadedWorkflow) -> RunRequest:
        run = await _plan_run(request, workflow, body)
        return replace(run, labels=labels) if labels else run

    preference = awaited_end.read_preference(request.headers, request.caller)
    accepted = await request.gateway.workflow_runs.accept(
        request, request.path_params["id"], plan, idempotency_key
    )
    headers = acceptance.response_headers(request.gateway.settings, accepted)
    execution_id = accepted.execution_id
    if preference is not None:
        headers |= preference.headers
        # The inputs are committed; don't hold them in memory during the wait.
        value, body.inputs, body.trigger_inputs = None, None, None
        request.release_body()
        outcome = await request.gateway.ends.wait_for_end(execution_id, request.caller, preference.seconds)
        if outcome is not None:
            ended = EndedExecuteResult(execution_id=execution_id, **msgspec.structs.asdict(outcome))
            return JsonResponse(ended, headers=headers)
    else:
        request.gateway.access.allow(execution_id, request.caller)
    return JsonResponse(ExecuteResult(execution_id=execution_id), status=201, headers=headers)


async def _plan_run(request: GatewayRequest, workflow: LoadedWorkflow, body: ExecuteRequest) -> RunRequest:
    """Return the run to accept: of the workflow itself, or of the other graph or part of a graph that the body selects.

    Raises a 403 error without the scope for another graph, 409 for a paused or archived workflow, 422 for an invalid
    graph or an unreachable callback URL.
    """
    override = body.definition
    if override is not None and not override.nodes and not override.connections:
        override = None
    if override is not None and not request.caller.has_scope(KeyScope.WORKFLOWS_WRITE):
        raise errors.scope_required(KeyScope.WORKFLOWS_WRITE)
    acceptance.require_open(workflow.status)
    piece = GraphSelection(body.up_to, body.pinned or {})
    inputs = body.trigger_inputs or body.inputs or {}
    if override is None and piece == WHOLE:
        kind = workflow.trigger_kind or "manual"
        run = RunRequest(workflow, kind, trigger_output(kind, inputs, request.gateway.clock()))
    else:
        # A thread, so that a large graph does not block other requests.
        catalog = await request.catalog()
        run = await asyncio.to_thread(
            _plan_changed_run, workflow, override, piece, inputs, catalog, request.gateway.clock()
        )
        run = replace(run, is_private=override is not None or bool(piece.pinned))
    graph_shapes.require_valid(run.workflow.validation)
    if body.callback_url is None:
        return run
    await request.gateway.callbacks.require_permitted(
        body.callback_url, request.caller.organization_id, has_key=request.has_key
    )
    return replace(run, callback_url=body.callback_url)


def _plan_changed_run(
    workflow: LoadedWorkflow,
    override: DefinitionOverride | None,
    piece: GraphSelection,
    inputs: Mapping[str, Json],
    catalog: NodeCatalog,
    now: datetime,
) -> RunRequest:
    """Return the run of another graph, or of a part of one (`piece`), with `inputs` for its trigger.

    Nothing is saved. A None `override` means the workflow's own graph. The run contains the findings of its
    validation. Raises a 422 error for invalid fields of nodes and connections, for unknown nodes in `piece`, and
    for too large pinned outputs.
    """
    if override is None:
        nodes, connections = test_runs.select_graph(workflow)
        return test_runs.plan_partial_run(workflow, nodes, connections, piece, inputs, catalog, now)
    problems = ProblemCollector()
    nodes = graph_shapes.stored_nodes(override.nodes or [], catalog, problems)
    connections = graph_shapes.stored_connections(override.connections or [], problems)
    if problems.found:
        found = [{**problem, "path": f"definition.{problem['path']}"} for problem in problems.found]
        raise errors.invalid(found)
    return test_runs.plan_partial_run(workflow, nodes, connections, piece, inputs, catalog, now)
