"""Whether there is room for more: by the rates of the sender and of the workflow, and by what waits to be begun."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.arrivals.taking_in import Ground
    from gateway.request import Request


async def require(request: Request, ground: Ground, count: int = 1) -> None:
    """Raise 429 where a workflow, its organisation or the sender has had enough for now."""
    workflow = ground.workflow
    await request.gateway.rates.take(request, workflow.id, count=count)
    await request.gateway.backlog.require_room(workflow.organization_id, workflow.id, count)
