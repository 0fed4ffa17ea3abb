"""Many executions at once: cancelled, retried or deleted by a filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

import structlog
from msgspec import Meta
from sqlalchemy import ColumnElement

from gateway.executions import bulk_actions
from gateway.executions.bulk_actions import ChosenExecutions
from gateway.executions.execution_rows import ExecutionFilter
from gateway.http import idempotency, limits
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import StrictWire, WireStruct, body_of, decode_body, read_json
from models.audit import AuditAction
from models.execution_status import ExecutionStatus

log = structlog.get_logger()


class BulkFilter(StrictWire):
    """Which executions; one that names no field finds all that there are."""

    workflow_id: str | None = None
    status: ExecutionStatus | list[ExecutionStatus] | None = None
    trigger_type: str | None = None
    created_after: Annotated[datetime, Meta(tz=True)] | None = None
    """Accepted at this time or later."""
    created_before: Annotated[datetime, Meta(tz=True)] | None = None

    def wanted(self) -> ExecutionFilter:
        statuses = [self.status] if isinstance(self.status, ExecutionStatus) else self.status
        return ExecutionFilter(
            workflow_id=self.workflow_id,
            statuses=statuses or (),
            trigger_type=self.trigger_type,
            parent_id=None,
            since=self.created_after,
            until=self.created_before,
        )


class BulkRequest(StrictWire):
    """What a request is to act on. A field that isn't known is refused: it might have been meant to spare something."""

    filter: BulkFilter
    dry_run: bool = False
    """Find what it would act on, and leave it as it is."""
    limit: Annotated[int, Meta(ge=1, le=limits.BULK_EXECUTIONS)] = limits.BULK_EXECUTIONS
    """How many to act on, the oldest first; the answer says how many remain."""


class BulkResult(WireStruct):
    """What became of a request about many executions."""

    dry_run: bool
    matched: int
    """Executions that could be acted on, and that the filter has found."""
    affected: int
    """Those of them that were acted on; others may have changed meanwhile."""
    remaining: int
    """Those beyond the limit, for the next request."""
    execution_ids: Sequence[str]
    """The first 100 of those that were acted on, or would have been."""


class BulkRetryResult(BulkResult):
    """What became of a request to retry."""

    new_execution_ids: Sequence[str]
    """What goes on from each of `executionIds`, in their order."""


async def cancel(request: GatewayRequest) -> JsonResponse:
    """Cancel the executions that a filter finds and that have not ended, the oldest first."""
    body = await decode_body(request, BulkRequest)
    chosen = await _chosen(
        request, body, bulk_actions.cancellable(request.caller), AuditAction.EXECUTIONS_CANCELLED
    )
    if body.dry_run:
        return JsonResponse(BulkResult(**_counts(chosen, None)))
    cancelled = await bulk_actions.cancel(request.gateway, request.caller, chosen.execution_ids)
    log.info("executions cancelled", executions=len(cancelled), matched=chosen.matched)
    return JsonResponse(BulkResult(**_counts(chosen, cancelled)))


async def delete(request: GatewayRequest) -> JsonResponse:
    """Delete the executions that a filter finds, with their spans, logs and contents, the oldest first.

    It takes the owner of their workflow or an admin, and leaves what has not ended, what somebody is still to be told
    of, and what was started by an execution that goes on.
    """
    body = await decode_body(request, BulkRequest)
    chosen = await _chosen(
        request, body, bulk_actions.deletable(request.caller), AuditAction.EXECUTIONS_DELETED
    )
    if body.dry_run:
        return JsonResponse(BulkResult(**_counts(chosen, None)))
    deleted = await bulk_actions.delete(request.gateway, chosen.execution_ids)
    log.info("executions deleted", executions=len(deleted), matched=chosen.matched)
    return JsonResponse(BulkResult(**_counts(chosen, deleted)))


async def retry(request: GatewayRequest) -> JsonResponse:
    """Resume the failed executions that a filter finds, the oldest first: each as a new one that goes on from there.

    One that was resumed already is passed over, and so are those of workflows that are closed or gone.
    """
    value = await read_json(request)
    body = body_of(request, value, BulkRequest)
    idempotency_key = idempotency.requested_key(request, value)
    earlier = None if idempotency_key is None else await bulk_actions.begun(request, idempotency_key)
    if earlier is not None:
        return await _retried(request, earlier, headers=idempotency.REPLAYED)
    found, by_workflow = await bulk_actions.find(
        request, body.filter.wanted(), bulk_actions.retryable(request.caller), body.limit
    )
    if body.dry_run:
        preview = BulkRetryResult(**_counts(found, None), new_execution_ids=[])
        return JsonResponse(preview)
    for workflow_id, runs in by_workflow.items():
        await request.gateway.backlog.require_room(request.caller.organization_id, workflow_id, runs)
    chosen = await bulk_actions.begin_retry(request, found, _about(request, body), idempotency_key)
    return await _retried(request, chosen, headers={} if chosen == found else idempotency.REPLAYED)


async def _retried(
    request: GatewayRequest, chosen: ChosenExecutions, headers: Mapping[str, str]
) -> JsonResponse:
    resumed = await bulk_actions.retry(request.gateway, request.caller, chosen)
    log.info("executions retried", executions=len(resumed), matched=chosen.matched)
    listed = list(resumed.values())[: limits.BULK_LISTED]
    answer = BulkRetryResult(**_counts(chosen, list(resumed)), new_execution_ids=listed)
    return JsonResponse(answer, headers=headers)


async def _chosen(
    request: GatewayRequest, body: BulkRequest, condition: ColumnElement[bool], action: AuditAction
) -> ChosenExecutions:
    """Return what is to be acted on, once it is traced that it will be."""
    found, _ = await bulk_actions.find(request, body.filter.wanted(), condition, body.limit)
    if not body.dry_run:
        await bulk_actions.trace(request, found, action, _about(request, body))
    return found


def _about(request: GatewayRequest, body: BulkRequest) -> str:
    """Return what the audit trail says was changed: a workflow's executions, or an organisation's."""
    return body.filter.workflow_id or request.caller.organization_id


def _counts(chosen: ChosenExecutions, done: Sequence[str] | None) -> dict[str, Any]:
    """Return what is told of every request; of one that does nothing, `done` is None."""
    listed = chosen.execution_ids if done is None else done
    return {
        "dry_run": done is None,
        "matched": chosen.matched,
        "affected": len(done or ()),
        "remaining": chosen.matched - (0 if done is None else len(chosen.execution_ids)),
        "execution_ids": listed[: limits.BULK_LISTED],
    }
