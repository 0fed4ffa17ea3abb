"""Execute: a run is taken in, and the answer is sent once it is committed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import msgspec

from engine.values import canonical
from gateway import acceptance, errors, graph_shapes, idempotency
from gateway.errors import ApiError
from gateway.graph_shapes import Connections, Nodes
from gateway.request import Request
from gateway.responses import JsonResponse, location
from gateway.text import Problems
from gateway.wire import Wire, convert, read_json
from journal.store import Acceptance, Accepted, DefinitionKey, Verdict
from models import ids
from models.access import KeyScope

if TYPE_CHECKING:
    from gateway.workflow_cache import LoadedWorkflow
    from journal.store import IdempotencyKey
    from nodes.catalog import Catalog

_encode = msgspec.json.Encoder().encode


class Override(Wire):
    """A graph to run in the place of the workflow's own, this once; an empty one replaces nothing."""

    nodes: Nodes | None = None
    connections: Connections | None = None


class Execute(Wire):
    """What a run is to work on."""

    definition: Override | None = None
    trigger_inputs: dict[str, Any] | None = None


class Started(Wire):
    """A run that was taken in."""

    execution_id: str


async def start(request: Request) -> JsonResponse:
    """Run a workflow; the answer comes as soon as the run is taken in, for good.

    A `definition` is run in the place of the workflow's own graph, and needs the scope `workflows:write` too.
    """
    value = await read_json(request)
    body = convert(value, Execute)
    workflow_id = request.path_params["id"]
    promise = idempotency.requested(request, value, workflow_id=workflow_id)
    accepted = await _accepted(request, body, promise)
    if accepted.verdict is Verdict.STALE:
        # The workflow has moved on since it was loaded: it may be gone, closed, or another graph.
        request.gateway.workflows.forget(request.caller.organization_id, workflow_id)
        accepted = await _accepted(request, body, promise)
    if accepted.verdict is Verdict.STALE:
        raise errors.conflict("workflow-changed", "The workflow is being changed: try again")
    if accepted.verdict is Verdict.MISMATCH:
        raise idempotency.mismatch()
    request.gateway.access.allow(accepted.execution_id, request.caller)
    headers = location(request.gateway.settings, accepted.execution_id)
    if accepted.verdict is Verdict.REPEATED:
        headers |= idempotency.REPLAYED
    return JsonResponse(Started(execution_id=accepted.execution_id), status=201, headers=headers)


async def _accepted(request: Request, body: Execute, promise: IdempotencyKey | None) -> Accepted:
    """Try to take the run in, by the workflow as it was loaded last; raises 404, 409 and 422."""
    caller = request.caller
    override = body.definition
    if override is not None and not override.nodes and not override.connections:
        override = None
    workflow = await request.gateway.workflows.load(request.path_params["id"], caller)
    try:
        runnable = await _runnable_now(request, workflow, override)
    except ApiError:
        # Whatever has become of the workflow since: a request that was answered before is answered the same.
        if promise is None:
            raise
        earlier = await acceptance.earlier(request.gateway.database, caller.lane, promise)
        if earlier is None:
            raise
        return earlier
    definition = DefinitionKey(runnable.organization_id, runnable.definition_hash, runnable.lane)
    acceptances = request.gateway.acceptances
    trigger_kind = runnable.trigger_kind or "manual"
    return await acceptances.accept(
        Acceptance(
            execution_id=ids.new("exec"),
            lane=runnable.lane,
            organization_id=runnable.organization_id,
            workflow_id=runnable.id,
            workflow_revision=runnable.revision,
            user_id=caller.user_id,
            trigger_type=trigger_kind,
            trigger=_encode(acceptance.trigger_output(trigger_kind, body.trigger_inputs or {})).decode(),
            config=runnable.config,
            definition_hash=runnable.definition_hash,
            definition=None if acceptances.is_stored(definition) else runnable.definition,
            timeout_seconds=runnable.timeout_seconds,
            total_nodes=runnable.total_nodes,
            inbox=request.gateway.broker.inbox,
            idempotency=promise,
        )
    )


async def _runnable_now(
    request: Request, workflow: LoadedWorkflow, override: Override | None
) -> LoadedWorkflow:
    """Return what is to be run, by the workflow as it was loaded last; raises 403, 404, 409 and 422."""
    try:
        return await _runnable(request, workflow, override)
    except ApiError:
        # It may have been mended or opened since: nothing is refused from memory.
        workflows = request.gateway.workflows
        workflows.forget(workflow.organization_id, workflow.id)
        current = await workflows.load(workflow.id, request.caller)
        if current is workflow:
            raise
        return await _runnable(request, current, override)


async def _runnable(request: Request, workflow: LoadedWorkflow, override: Override | None) -> LoadedWorkflow:
    """Return what is to be run; raises 403, 409 and 422."""
    if override is not None and not request.caller.may(KeyScope.WORKFLOWS_WRITE):
        raise errors.scope_required(KeyScope.WORKFLOWS_WRITE)
    acceptance.require_open(workflow.status)
    runnable = workflow
    if override is not None:
        # In a thread: others are served while a large graph is gone through.
        runnable = await asyncio.to_thread(_overridden, workflow, override, request.gateway.catalog)
    graph_shapes.require_valid(runnable.validation)
    return runnable


def _overridden(workflow: LoadedWorkflow, override: Override, catalog: Catalog) -> LoadedWorkflow:
    """Return the workflow as it would be with another graph; nothing of it is saved."""
    problems = Problems()
    nodes = graph_shapes.stored_nodes(override.nodes or [], catalog, problems)
    connections = graph_shapes.stored_connections(override.connections or [], problems)
    if problems.found:
        found = [{**problem, "path": f"definition.{problem['path']}"} for problem in problems.found]
        raise errors.invalid(found)
    text = canonical(graph_shapes.definition(nodes, connections, workflow.settings))
    return replace(
        workflow,
        definition=text.decode(),
        definition_hash=sha256(text).hexdigest(),
        validation=graph_shapes.check(nodes, connections, catalog),
        trigger_kind=graph_shapes.trigger_kind(nodes, catalog),
        total_nodes=len(nodes),
    )
