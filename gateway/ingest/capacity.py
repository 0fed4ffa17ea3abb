"""Admission checks for more inbound requests: rates of sender and workflow, and the backlog of pending runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.http import errors
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from gateway.executions.request_limits import BacklogLimits, RateLimitedRequest, RunRateLimiter
    from gateway.ingest.ingest import RunTarget
    from gateway.workflows.workflow_cache import WorkflowCache
    from journal.definition_snapshot import LoadedWorkflow
    from models.access import ApiCaller


class IngestCapacity:
    """Limits of inbound requests, which are checked while their runs are planned."""

    def __init__(self, rates: RunRateLimiter, backlog: BacklogLimits, workflows: WorkflowCache) -> None:
        self._rates = rates
        self._backlog = backlog
        self._workflows = workflows

    async def require(self, request: RateLimitedRequest, target: RunTarget, count: int = 1) -> None:
        """Require capacity for `count` runs, and add rate limit headers to the answer.

        Raises 409 for a paused workflow, and 429 when a limit of workflow, organization or sender is reached.
        """
        await self.require_not_paused(request.caller, target)
        await self._rates.take(request, target.workflow.id, count=count)
        await self.require_backlog(target.workflow, count)

    async def require_of_workflow(self, workflow: LoadedWorkflow) -> None:
        """Require capacity for a run that no sender requests itself; raises 429."""
        await self._rates.spend(self._rates.of_workflow(workflow.id))
        await self.require_backlog(workflow)

    async def require_backlog(self, workflow: LoadedWorkflow, count: int = 1) -> None:
        """Raise 429 when the backlog of the workflow or its organization is full."""
        await self._backlog.require_capacity(workflow.organization_id, workflow.id, count)

    async def require_not_paused(self, caller: ApiCaller, target: RunTarget) -> None:
        """Raise 409 when a workflow is paused; for senders that can retry, unlike those of mails and webhooks."""
        if not target.is_held:
            return
        # Reload before a refusal, which must not rest on a cached status. A plan made with it is made again.
        workflow = target.workflow
        self._workflows.forget(workflow.organization_id, workflow.id)
        if (await self._workflows.load(workflow.id, caller)).status is WorkflowStatus.PAUSED:
            raise errors.workflow_paused()
