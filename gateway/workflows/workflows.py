"""Endpoints of workflows: list, create, show, update, delete, status and statistics."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sqlalchemy.ext.asyncio import AsyncConnection

from concurrency import offload
from gateway.deployments import deployment_changes
from gateway.executions.cancellation import request_end_of_run
from gateway.http import errors, keyset, read_only
from gateway.http.keyset import AFTER, KeysetPage, ListPage
from gateway.http.parameters import LIMIT, OFFSET, ChoiceParameter, FlagParameter, TextParameter, sorted_by
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.wire import GuardedWire, WireStruct, body_of, decode_body, read_json
from gateway.workflows import editing, workflow_rows, workflow_shapes
from gateway.workflows.editing import WorkflowEdit
from gateway.workflows.stored_workflow import StoredWorkflow
from gateway.workflows.workflow_rows import WorkflowFilter
from gateway.workflows.workflow_shapes import CreateWorkflow, UpdateWorkflow, WorkflowSummary
from journal.deployments import desired_state
from journal.store import ExecutionKey
from models.audit import AuditAction
from models.lifecycle_policy import StoppedReason
from models.workflow import WorkflowStatus

CANCELS_AT_ONCE = 20


STATUS = ChoiceParameter("status", "Only workflows of this status.", WorkflowStatus)
TAG = TextParameter("tag", "Only workflows with this tag.")
SEARCH = TextParameter("search", "Only workflows with this text in their name or description.")
SORT = sorted_by(workflow_rows.SORTABLE)
LISTED = (STATUS, TAG, SEARCH, LIMIT, OFFSET, AFTER, SORT)
FORCE = FlagParameter(
    "force", "Undeploy the workflow, and cancel the executions that have not ended, instead of refusing."
)


class SetStatus(GuardedWire):
    """New status of a workflow."""

    read_only: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            *("workflowId", "deploymentStatus", "stoppedReason", "reason", "reasonCode", "replicas"),
            *("readyReplicas", "version", "definitionHash", "readyDefinitionHash", "drainUntil"),
            *("observedAt", "updatedAt", "warnings"),
        ),
        "",
    )

    status: WorkflowStatus


class WorkflowList(KeysetPage, kw_only=True):
    """Page of a list of workflows; `count` is the total, with `after` up to 10,000."""

    count: int
    limit: int
    offset: int
    workflows: Sequence[WorkflowSummary]


class WorkflowCounts(WireStruct):
    """Number of workflows, in total and by status."""

    total: int
    draft: int
    active: int
    paused: int
    archived: int


class WorkflowStats(WorkflowCounts, kw_only=True):
    """Number of workflows of the organization, in total and by status."""

    readable: WorkflowCounts
    """Those that the caller may read."""


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────


async def index(request: GatewayRequest) -> JsonResponse:
    """List the workflows that the caller may read."""
    query = request.query
    part, order = query.page(), query[SORT]
    wanted = WorkflowFilter(query[STATUS], query[TAG], query[SEARCH])
    bounds = keyset.read_bounds(query, SORT)
    async with request.gateway.database.read() as connection:
        page: ListPage[Any] = (
            await workflow_rows.list_workflows(connection, request.caller, wanted, part, order)
            if bounds is None
            else await workflow_rows.list_page(connection, request.caller, wanted, bounds)
        )
    return JsonResponse(
        WorkflowList(
            count=page.count,
            count_is_lower_bound=page.is_lower_bound,
            limit=part.limit,
            offset=part.offset,
            next=page.next_cursor,
            workflows=[WorkflowSummary(**workflow_shapes.summary_fields(one)) for one in page.items],
        )
    )


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a workflow with its graph."""
    stored = await request.gateway.workflow_editor.read(request.requested_object)
    return editing.answer(stored, workflow_shapes.show_workflow(stored))


async def stats(request: GatewayRequest) -> JsonResponse:
    """Count the organization's workflows by status, and in `readable` those among them that the caller may read."""
    async with request.gateway.database.read() as connection:
        counts, readable = await workflow_rows.count_by_status(connection, request.caller)
    return JsonResponse({**_show_counts(counts), "readable": _show_counts(readable)})


def _show_counts(counts: Mapping[str, int]) -> Mapping[str, int]:
    """Return numbers by status with their total and with zeros as the API shows them."""
    shown = {status.value: counts.get(status, 0) for status in WorkflowStatus}
    return {"total": sum(shown.values()), **shown}


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────


async def create(request: GatewayRequest) -> JsonResponse:
    """Create a workflow.

    It is a draft unless `status` says otherwise, and belongs to the caller. A repetition with the same
    `Idempotency-Key` creates nothing.
    """
    value = await read_json(request)
    body = body_of(request, value, CreateWorkflow)
    # A thread, so that a large graph does not block other requests.
    made = await asyncio.to_thread(
        workflow_shapes.build_workflow, request.caller, body, await request.catalog(), request.gateway.clock()
    )
    read_only.warn_of_new(request, value, CreateWorkflow, lambda: workflow_shapes.show_workflow(made))
    idempotency_key = await offload.run(request.idempotency_key, value)
    return await request.gateway.workflow_editor.create(
        request.caller, made, AuditAction.WORKFLOW_CREATED, idempotency_key
    )


async def update(request: GatewayRequest) -> JsonResponse:
    """Change a workflow; absent fields do not change.

    Nodes, connections and tags are replaced as a whole; `settings` and `config` are merged, and null removes
    a key.
    """
    value = await read_json(request)
    body = body_of(request, value, UpdateWorkflow)
    catalog = await request.catalog()

    def change(before: StoredWorkflow) -> StoredWorkflow:
        read_only.require_same(value, UpdateWorkflow, lambda: workflow_shapes.show_workflow(before))
        return workflow_shapes.apply_changes(before, body, catalog)

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object,
        AuditAction.WORKFLOW_UPDATED,
        change,
    )
    return editing.answer(edited.after, workflow_shapes.show_workflow(edited.after))


async def set_status(request: GatewayRequest) -> JsonResponse:
    """Set a workflow's status. An active workflow needs a valid graph; archiving a workflow undeploys it."""
    wanted = (await decode_body(request, SetStatus)).status

    async def undeploy_archived(connection: AsyncConnection, edited: WorkflowEdit) -> None:
        if wanted is WorkflowStatus.ARCHIVED:
            workflow_id = edited.after.workflow.id
            await deployment_changes.undeploy_workflow(
                connection, request.caller, workflow_id, reason=StoppedReason.ARCHIVED
            )

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object,
        AuditAction.WORKFLOW_STATUS_SET,
        lambda before: before.with_columns(status=wanted),
        anyway=undeploy_archived,
    )
    if wanted is WorkflowStatus.ARCHIVED:
        await request.gateway.deployer.notify(edited.after.workflow.id)
    return editing.answer(edited.after, workflow_shapes.show_workflow(edited.after))


async def delete(request: GatewayRequest) -> NoContent:
    """Delete a workflow; its executions are kept.

    Refused while it is deployed, or has executions that have not ended. With `force`, it is undeployed and
    they are cancelled.
    """
    is_forced = request.query[FORCE]
    live: list[ExecutionKey] = []

    async def look_for_runs(connection: AsyncConnection, edited: WorkflowEdit) -> None:
        workflow_id = edited.before.workflow.id
        deployment = await desired_state.find_deployment(connection, workflow_id)
        if deployment is not None and deployment.is_deployed and not is_forced:
            message = "The workflow is deployed: undeploy it first, or do both with ?force=true"
            raise errors.conflict("workflow-deployed", message)
        await deployment_changes.undeploy_workflow(connection, request.caller, workflow_id)
        # The workflow is deleted in this transaction: no further run is accepted, so these are all.
        live[:] = await workflow_rows.list_live_executions(connection, edited.before.workflow)
        if live and not is_forced:
            message = f"{len(live)} executions have not ended: wait for them, or cancel them with ?force=true"
            raise errors.conflict("workflow-running", message)

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object,
        AuditAction.WORKFLOW_DELETED,
        lambda before: before.with_columns(deleted_at=request.gateway.clock()),
        also=look_for_runs,
    )
    await request.gateway.deployer.notify(edited.after.workflow.id)
    store, broker = request.gateway.store, request.gateway.broker
    for start in range(0, len(live), CANCELS_AT_ONCE):
        cancelled = live[start : start + CANCELS_AT_ONCE]
        await asyncio.gather(*(request_end_of_run(store, broker, one, "cancel") for one in cancelled))
    return NoContent()
