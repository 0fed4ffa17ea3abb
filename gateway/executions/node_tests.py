"""Tests of single nodes: real runs on inputs that a client provides."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Raw

from concurrency import offload
from gateway.executions import acceptance, execution_rows, execution_shapes, test_runs
from gateway.executions.acceptance import RunRequest
from gateway.executions.execution_shapes import LogShape, Status
from gateway.executions.test_runs import NodeTestInput
from gateway.http import errors, limits
from gateway.http.parameters import PageBounds
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import StrictWire, WireStruct, body_of, read_json
from gateway.workflows import graph_shapes
from journal.store import ExecutionKey
from models.access import KeyScope
from models.execution_status import TERMINAL_STATUSES

if TYPE_CHECKING:
    from gateway.executions.execution_rows import Recorded
    from journal.definition_snapshot import LoadedWorkflow
    from journal.store import RunProgressReport


class NodeTestRequest(StrictWire):
    """Input of a node test."""

    input: Any = None
    """Input of the node, as if from a single predecessor; for a trigger, the inputs of the run."""
    trigger: dict[str, Any] | None = None
    """Inputs of the workflow's trigger, for paths that begin with `trigger`."""
    nodes: dict[str, Any] | None = None
    """Outputs of other nodes by their ids, for paths that begin with `nodes`."""
    config: dict[str, Any] | None = None
    """Config that replaces the node's own for this run; also needs the scope `workflows:write`."""
    wait: Annotated[float, Meta(ge=0, le=limits.WAIT_SECONDS)] = limits.TEST_WAIT_DEFAULT_SECONDS
    """Seconds for which the answer waits for the end."""


class NodeTestResult(WireStruct):
    """Result of a node test; `status` is that of the execution."""

    execution_id: str
    status: Status
    error: Raw | None
    logs: Sequence[LogShape]
    output: Raw | None = None
    port: str | None = None
    """Port of the output."""
    unresolved: Raw | Sequence[str] = ()
    """Paths without a value."""
    duration_ms: int | None = None


class PendingNodeTest(WireStruct):
    """Node test that has not ended within `wait` seconds; the execution shows its result."""

    execution_id: str
    status: Status


async def run_node(request: GatewayRequest) -> JsonResponse:
    """Run one node of a workflow on your own input. Writes of the node are real.

    The test is an execution with the trigger type `test`. It uses the stored config, mappings and retries of the node.
    A loop runs with its body. No predecessor runs: provide their data in `input`, and other paths in `trigger` and
    `nodes`. If it has not ended after `wait` seconds, the answer is 202.
    """
    value = await read_json(request)
    body = body_of(request, value, NodeTestRequest)
    workflow_id, node_id = request.path_params["id"], request.path_params["sub"]
    idempotency_key = await offload.run(
        request.idempotency_key, value, workflow_id=f"{workflow_id}/{node_id}"
    )

    async def plan(workflow: LoadedWorkflow) -> RunRequest:
        return await _plan_run(request, workflow, body)

    accepted = await request.gateway.workflow_runs.accept(request, workflow_id, plan, idempotency_key)
    headers = acceptance.response_headers(request.gateway.settings, accepted)
    key = ExecutionKey(accepted.execution_id, request.caller.shard)
    progress = await request.gateway.waiting.wait_for_progress(key, request.caller, body.wait)
    if progress is None:
        raise errors.not_found("execution")
    if progress.status not in TERMINAL_STATUSES:
        request.gateway.access.allow(accepted.execution_id, request.caller)
        pending = PendingNodeTest(execution_id=accepted.execution_id, status=progress.status)
        return JsonResponse(pending, status=202, headers=headers)
    return JsonResponse(await _read_result(request, key, progress), headers=headers)


async def _plan_run(request: GatewayRequest, workflow: LoadedWorkflow, body: NodeTestRequest) -> RunRequest:
    """Return the run of one node to accept; the node is named by the path.

    Raises a 403 error without the scope for another config, 404 for an unknown node, 409 for a paused or archived
    workflow, 422 for invalid input.
    """
    caller, catalog = request.caller, await request.catalog()
    if body.config is not None and not caller.has_scope(KeyScope.WORKFLOWS_WRITE):
        raise errors.scope_required(KeyScope.WORKFLOWS_WRITE)
    acceptance.require_open(workflow.status)
    given = NodeTestInput(body.input, body.trigger or {}, body.nodes or {}, body.config)
    # A thread, so that a large graph does not block other requests.
    run = await asyncio.to_thread(
        test_runs.plan_node_test,
        workflow,
        request.path_params["sub"],
        given,
        catalog,
        request.gateway.clock(),
    )
    graph_shapes.require_valid(run.workflow.validation)
    return run


def _is_of_node(row: Recorded) -> bool:
    return not row.iteration and row.kind == execution_rows.SpanKind.NODE


async def _read_result(
    request: GatewayRequest, key: ExecutionKey, progress: RunProgressReport
) -> NodeTestResult:
    """Return the result of an ended node test, with output, port and error of the tested node and up to 1,000
    log lines.
    """
    whole = PageBounds(limits.RECORDS_MAX, 0)
    async with request.gateway.database.read() as connection:
        _, spans = await execution_rows.list_spans(
            connection, key, whole, node_id=request.path_params["sub"], statuses=()
        )
        _, lines = await execution_rows.list_logs(connection, key, whole, levels=())
    tried = NodeTestResult(
        execution_id=key.execution_id,
        status=progress.status,
        error=None if progress.error is None else Raw(progress.error),
        logs=[execution_shapes.show_log(row) for row in lines],
    )
    outputs = request.gateway.large_outputs.explain(key.execution_id)
    for span in (execution_shapes.show_span(row, outputs) for row in spans if _is_of_node(row)):
        tried.output, tried.port = span.output_data, span.port
        tried.error = span.error or tried.error
        tried.unresolved = span.unresolved
        tried.duration_ms = span.duration_ms
    return tried
