"""Admission checks for more inbound requests: rates of sender and workflow, and the backlog of pending runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.http import errors
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from gateway.http.request import GatewayRequest
    from gateway.ingest.ingest import RunTarget


async def require_capacity(request: GatewayRequest, target: RunTarget, count: int = 1) -> None:
    """Raise 409 for a paused workflow, and 429 when a limit of workflow, organization or sender is reached."""
    workflow = target.workflow
    await require_not_paused(request, target)
    await request.gateway.rates.take(request, workflow.id, count=count)
    await request.gateway.backlog.require_capacity(workflow.organization_id, workflow.id, count)


async def require_not_paused(request: GatewayRequest, target: RunTarget) -> None:
    """Raise 409 when a workflow is paused; for senders that can retry, unlike those of mails and webhooks."""
    if not target.is_held:
        return
    # Reload before a refusal, which must not rest on a cached status. A plan made with it is made again.
    workflows, workflow = request.gateway.workflows, target.workflow
    workflows.forget(workflow.organization_id, workflow.id)
    if (await workflows.load(workflow.id, request.caller)).status is WorkflowStatus.PAUSED:
        raise errors.workflow_paused()
