"""Bulk actions: cancel, retry or delete the executions that a filter selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import structlog
from msgspec import Meta
from sqlalchemy import ColumnElement

from gateway.executions import bulk_actions
from gateway.executions.bulk_actions import ChosenExecutions
from gateway.executions.bulk_filter import BulkFilter
from gateway.http import idempotency, limits
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import StrictWire, WireStruct, body_of, decode_body, read_json
from models.access import ApiCaller
from models.audit import AuditAction

log = structlog.get_logger()


class BulkRequest(StrictWire):
    """Body of a bulk action.

    Unknown fields are refused, since a misspelled filter would select more executions.
    """

    filter: BulkFilter
    dry_run: bool = False
    """Report the selected executions without changing them."""
    limit: Annotated[int, Meta(ge=1, le=limits.BULK_EXECUTIONS)] = limits.BULK_EXECUTIONS
    """Number of executions to act on, the oldest first; the answer has the number of remaining ones."""


class BulkResult(WireStruct):
    """Result of a bulk action."""

    dry_run: bool
    matched: int
    """Executions that match the filter and allow the action, counted up to 10,001."""
    affected: int
    """Executions that the action has changed; others may have changed in the meantime."""
    remaining: int
    """Executions beyond the limit, for the next request."""
    execution_ids: Sequence[str]
    """The first 100 executions that were changed, or would be with `dryRun: false`."""


class BulkRetryResult(BulkResult):
    """Result of a bulk retry."""

    new_execution_ids: Sequence[str]
    """The new execution for each of `executionIds`, in the same order."""


async def cancel(request: GatewayRequest) -> JsonResponse:
    """Cancel the executions that match a filter and have not ended, the oldest first.

    The answer does not wait for their ends; it has the number of those that remain beyond `limit`. With `dryRun`, they
    are only counted, and the first 100 listed.
    """
    body = await decode_body(request, BulkRequest)
    chosen = await _choose_executions(
        request, body, bulk_actions.cancellable(request.caller), AuditAction.EXECUTIONS_CANCELLED
    )
    if body.dry_run:
        return JsonResponse(BulkResult(**_count_results(chosen, None)))
    found = await bulk_actions.cancel(
        request.gateway.store, request.gateway.broker, request.caller, chosen.execution_ids
    )
    log.info("executions cancelled", executions=len(found.canceled), matched=chosen.matched)
    return JsonResponse(BulkResult(**_count_results(chosen, found.canceled)))


async def delete(request: GatewayRequest) -> JsonResponse:
    """Delete the executions that match a filter, with their spans, logs and blobs, the oldest first.

    Those of other people's workflows are skipped, except for an admin. Executions that have not ended, have a pending
    callback or other completion action, or were started by an execution that has not ended are kept. With `dryRun`,
    nothing is deleted.
    """
    body = await decode_body(request, BulkRequest)
    chosen = await _choose_executions(
        request, body, bulk_actions.deletable(request.caller), AuditAction.EXECUTIONS_DELETED
    )
    if body.dry_run:
        return JsonResponse(BulkResult(**_count_results(chosen, None)))
    deleted = await bulk_actions.delete(request.gateway.database, request.gateway.blobs, chosen.execution_ids)
    log.info("executions deleted", executions=len(deleted), matched=chosen.matched)
    return JsonResponse(BulkResult(**_count_results(chosen, deleted)))


async def retry(request: GatewayRequest) -> JsonResponse:
    """Resume the failed executions that match a filter, the oldest first, each as a new execution.

    Executions that were resumed or replayed already, and those of paused, archived or deleted workflows, are skipped.
    The answer has the number of those that remain beyond `limit`. Nothing is resumed with `dryRun`, or if a backlog is
    full (429).
    """
    value = await read_json(request)
    body = body_of(request, value, BulkRequest)
    idempotency_key = request.idempotency_key(value)
    gateway, caller = request.gateway, request.caller
    earlier = None
    if idempotency_key is not None:
        earlier = await bulk_actions.find_begun(gateway.database, caller.shard, idempotency_key)
    if earlier is not None:
        return await _retry_chosen(request, earlier, headers=idempotency.REPLAYED)
    found, by_workflow = await bulk_actions.find(
        gateway.database,
        body.filter.to_filter(caller.organization_id),
        bulk_actions.retryable(caller),
        body.limit,
    )
    if body.dry_run:
        preview = BulkRetryResult(**_count_results(found, None), new_execution_ids=[])
        return JsonResponse(preview)
    for workflow_id, runs in by_workflow.items():
        await gateway.backlog.require_capacity(caller.organization_id, workflow_id, runs)
    subject = _audit_subject(body, caller)
    chosen = await bulk_actions.begin_retry(gateway.database, caller, found, subject, idempotency_key)
    return await _retry_chosen(request, chosen, headers={} if chosen == found else idempotency.REPLAYED)


async def _retry_chosen(
    request: GatewayRequest, chosen: ChosenExecutions, headers: Mapping[str, str]
) -> JsonResponse:
    """Resume the chosen executions, and return the answer with these headers and at most 100 new ids."""
    gateway = request.gateway
    found = await bulk_actions.retry(
        gateway.database, gateway.acceptances, gateway.access, request.caller, chosen
    )
    resumed = found.new_ids
    log.info("executions retried", executions=len(resumed), matched=chosen.matched)
    listed = list(resumed.values())[: limits.BULK_LISTED]
    answer = BulkRetryResult(**_count_results(chosen, list(resumed)), new_execution_ids=listed)
    return JsonResponse(answer, headers=headers)


async def _choose_executions(
    request: GatewayRequest, body: BulkRequest, condition: ColumnElement[bool], action: AuditAction
) -> ChosenExecutions:
    """Return the executions that match the body's filter and `condition`, the oldest first, up to the body's limit.

    Unless it is a dry run, the action is recorded in the audit trail, before it begins.
    """
    wanted = body.filter.to_filter(request.caller.organization_id)
    found, _ = await bulk_actions.find(request.gateway.database, wanted, condition, body.limit)
    if not body.dry_run:
        await bulk_actions.record_action(
            request.gateway.database, request.caller, found, action, _audit_subject(body, request.caller)
        )
    return found


def _audit_subject(body: BulkRequest, caller: ApiCaller) -> str:
    """Return the subject of the audit entry: the id of the filter's workflow, or of the organization."""
    return body.filter.workflow_id or caller.organization_id


def _count_results(chosen: ChosenExecutions, done: Sequence[str] | None) -> dict[str, Any]:
    """Return the fields of a bulk result as keyword arguments, with at most 100 ids.

    `done` holds the ids of changed executions, None for a dry run. `remaining` counts the matching executions beyond
    the limit; in a dry run, all that match.
    """
    listed = chosen.execution_ids if done is None else done
    return {
        "dry_run": done is None,
        "matched": chosen.matched,
        "affected": len(done or ()),
        "remaining": chosen.matched - (0 if done is None else len(chosen.execution_ids)),
        "execution_ids": listed[: limits.BULK_LISTED],
    }
