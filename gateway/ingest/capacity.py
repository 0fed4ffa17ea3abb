"""Whether there is room for more messages: by the rates of sender and workflow, and by what waits to be begun."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.http import errors
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from gateway.http.request import GatewayRequest
    from gateway.ingest.ingest import RunTarget


async def require_capacity(request: GatewayRequest, ground: RunTarget, count: int = 1) -> None:
    """Raise 409 where a workflow is paused, and 429 where it, its organisation or the sender has had enough for now."""
    workflow = ground.workflow
    await require_not_paused(request, ground)
    await request.gateway.rates.take(request, workflow.id, count=count)
    await request.gateway.backlog.require_room(workflow.organization_id, workflow.id, count)


async def require_not_paused(request: GatewayRequest, ground: RunTarget) -> None:
    """Raise 409 where a workflow is paused, for whoever can come again, as senders of mails and webhooks can't."""
    if not ground.is_held:
        return
    # Nobody is refused from memory; what is planned on that is planned anew.
    workflows, workflow = request.gateway.workflows, ground.workflow
    workflows.forget(workflow.organization_id, workflow.id)
    if (await workflows.load(workflow.id, request.caller)).status is WorkflowStatus.PAUSED:
        raise errors.workflow_paused()
