"""Execute: a run is taken in, and the answer is sent once it is committed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

from concurrency import offload
from engine.triggers import trigger_output
from gateway import errors, limits
from gateway.executions import acceptance, callbacks, intake, tries
from gateway.executions.intake import Run
from gateway.executions.tries import WHOLE, Piece
from gateway.http import idempotency, text
from gateway.http.request import Request
from gateway.http.responses import JsonResponse
from gateway.http.text import Problems
from gateway.http.wire import GuardedWire, Wire, body_of, read_json
from gateway.workflows import graph_shapes
from gateway.workflows.graph_shapes import Connections, GraphId, Nodes
from models.access import KeyScope

if TYPE_CHECKING:
    from engine.values import Json
    from journal.definition_snapshot import LoadedWorkflow
    from nodes.catalog import NodeCatalog


class Override(GuardedWire):
    """A graph to run in the place of the workflow's own, this once; an empty one replaces nothing."""

    nodes: Nodes | None = None
    connections: Connections | None = None


class Execute(GuardedWire):
    """What a run is to work on."""

    definition: Override | None = None
    trigger_inputs: dict[str, Any] | None = None
    inputs: dict[str, Any] | None = None
    """The same as `triggerInputs`."""
    up_to: GraphId | None = None
    """The id of a node: it and what leads to it are run, and nothing else."""
    pinned: dict[str, Any] | None = None
    """Outputs by node id: these nodes give them out without being run, nor is run what leads to them alone."""
    callback_url: Annotated[str, text.allowed(limits.CALLBACK_URL_LENGTH, min_length=1)] | None = None
    """Is told how the run has ended, by a message that is signed with the organisation's secret."""


class Started(Wire):
    """A run that was taken in."""

    execution_id: str


async def start(request: Request) -> JsonResponse:
    """Run a workflow; the answer comes as soon as the run is taken in, for good.

    A `definition` is run in the place of the workflow's own graph, and needs the scope `workflows:write` too. With
    `upTo` and `pinned` only a part of the graph is run, and only that part has to be valid. Only the caller, the
    workflow's owner and admins see a run with `definition` or `pinned`.
    """
    value = await read_json(request)
    body = body_of(request, value, Execute)
    intake.require_one_spelling(body.trigger_inputs, body.inputs)
    promise = await offload.run(idempotency.requested, request, value, workflow_id=request.path_params["id"])

    async def plan(workflow: LoadedWorkflow) -> Run:
        return await _planned(request, workflow, body)

    accepted = await intake.ingest(request, plan, promise)
    headers = intake.headers(request, accepted)
    return JsonResponse(Started(execution_id=accepted.execution_id), status=201, headers=headers)


async def _planned(request: Request, workflow: LoadedWorkflow, body: Execute) -> Run:
    """Return what is to be run; raises 403, 409 and 422."""
    override = body.definition
    if override is not None and not override.nodes and not override.connections:
        override = None
    if override is not None and not request.caller.has_scope(KeyScope.WORKFLOWS_WRITE):
        raise errors.scope_required(KeyScope.WORKFLOWS_WRITE)
    acceptance.require_open(workflow.status)
    piece = Piece(body.up_to, body.pinned or {})
    inputs = body.trigger_inputs or body.inputs or {}
    if override is None and piece == WHOLE:
        kind = workflow.trigger_kind or "manual"
        run = Run(workflow, kind, trigger_output(kind, inputs, request.gateway.clock()))
    else:
        # In a thread: others are served while a large graph is gone through.
        catalog = request.gateway.catalog
        run = await asyncio.to_thread(
            _changed, workflow, override, piece, inputs, catalog, request.gateway.clock()
        )
        run = replace(run, is_private=override is not None or bool(piece.pinned))
    graph_shapes.require_valid(run.workflow.validation)
    if body.callback_url is None:
        return run
    await callbacks.require(request, body.callback_url)
    return replace(run, callback_url=body.callback_url)


def _changed(
    workflow: LoadedWorkflow,
    override: Override | None,
    piece: Piece,
    inputs: Mapping[str, Json],
    catalog: NodeCatalog,
    now: datetime,
) -> Run:
    """Return the run of another graph, or of a piece of one; nothing of it is saved."""
    if override is None:
        nodes, connections = tries.graph_of(workflow)
        return tries.run_of_piece(workflow, nodes, connections, piece, inputs, catalog, now)
    problems = Problems()
    nodes = graph_shapes.stored_nodes(override.nodes or [], catalog, problems)
    connections = graph_shapes.stored_connections(override.connections or [], problems)
    if problems.found:
        found = [{**problem, "path": f"definition.{problem['path']}"} for problem in problems.found]
        raise errors.invalid(found)
    return tries.run_of_piece(workflow, nodes, connections, piece, inputs, catalog, now)
