"""Requests for one run: planned with the cached workflow, and accepted idempotently."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from gateway.executions import acceptance
from gateway.http import errors, idempotency
from gateway.http.errors import ApiError
from gateway.http.responses import location
from journal import concurrency_limits
from journal.concurrency_limits import LimitAction
from journal.definition_snapshot import LoadedWorkflow
from journal.store import AcceptanceResult, AcceptanceVerdict, DefinitionKey, RunAcceptance
from journal.waits import completion
from models import ids

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.executions.acceptance import RunAcceptor
    from gateway.executions.backlog import BacklogLimits
    from gateway.executions.execution_access import ExecutionAccess
    from gateway.executions.rate_limits import RateLimitedRequest, RunRateLimiter
    from gateway.settings import GatewaySettings
    from gateway.workflows.workflow_cache import WorkflowCache
    from journal.store import IdempotencyKey
    from models.access import ApiCaller
    from models.database import Database

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class RunRequest:
    """Run to accept."""

    workflow: LoadedWorkflow
    """Workflow with the definition to run, which may differ from its own."""
    trigger_type: str
    trigger: Json
    """Output of the trigger node."""
    callback_url: str = ""
    """URL that gets a message at the end of the run."""
    assigned_deployment_id: str | None = None
    """Deployment whose pods run it; None: any worker."""
    is_private: bool = False
    """Visible only to its user, the owner and admins: it runs more than the workflow and its inputs."""


RunPlanner: TypeAlias = Callable[[LoadedWorkflow], Awaitable[RunRequest]]
"""Returns the run of a workflow; raises `ApiError`. It may be called again with another revision."""


def require_one_spelling(trigger_inputs: object, inputs: object) -> None:
    """Raise 422 if a body has the inputs of a run under both names."""
    if trigger_inputs is not None and inputs is not None:
        message = "inputs and triggerInputs have the same meaning: send only one of them"
        raise errors.invalid([errors.problem("inputs", "ambiguous", message)])


def response_headers(settings: GatewaySettings, accepted: AcceptanceResult) -> dict[str, str]:
    """Return the headers of an answer about an accepted run: its location, and whether it is a replay."""
    headers = location(settings, accepted.execution_id)
    return {**headers, **idempotency.REPLAYED} if accepted.verdict is AcceptanceVerdict.REPEATED else headers


class WorkflowRunAcceptor:
    """Accepts runs that callers request for one workflow each, within rate limits and backlog limits."""

    def __init__(
        self,
        database: Database,
        workflows: WorkflowCache,
        access: ExecutionAccess,
        rates: RunRateLimiter,
        backlog: BacklogLimits,
        acceptances: RunAcceptor,
    ) -> None:
        self._database = database
        self._workflows = workflows
        self._access = access
        self._rates = rates
        self._backlog = backlog
        self._acceptances = acceptances

    async def accept(
        self,
        request: RateLimitedRequest,
        workflow_id: str,
        plan: RunPlanner,
        idempotency_key: IdempotencyKey | None,
    ) -> AcceptanceResult:
        """Accept a run of a workflow for the caller of a request, once per idempotency key.

        Returns the run of an earlier request with the key. Adds rate limit headers to the answer of the
        request. Raises 404, 409, 422, 429, and the errors of `plan`.
        """
        caller = request.caller
        workflow = await self._workflows.load(workflow_id, caller)
        await self._rates.take(request, workflow.id)
        accepted = await self._accept(caller, workflow, plan, idempotency_key)
        if accepted.verdict is AcceptanceVerdict.STALE:
            # The workflow has changed since it was loaded: it may be deleted, closed, or have another graph.
            self._workflows.forget(workflow.organization_id, workflow.id)
            workflow = await self._workflows.load(workflow.id, caller)
            accepted = await self._accept(caller, workflow, plan, idempotency_key)
        if accepted.verdict is AcceptanceVerdict.STALE:
            raise errors.conflict("workflow-changed", "The workflow is being changed: try again")
        if accepted.verdict is AcceptanceVerdict.MISMATCH:
            raise idempotency.mismatch_error()
        self._access.allow(accepted.execution_id, caller)
        return accepted

    async def _accept(
        self,
        caller: ApiCaller,
        workflow: LoadedWorkflow,
        plan: RunPlanner,
        idempotency_key: IdempotencyKey | None,
    ) -> AcceptanceResult:
        try:
            run = await self._plan_run(caller, plan, workflow)
            await self._backlog.require_capacity(workflow.organization_id, workflow.id)
        except ApiError:
            # A repeated request gets its first answer, even if the workflow has changed since.
            if idempotency_key is None:
                raise
            earlier = await acceptance.find_earlier(self._database, caller.shard, idempotency_key)
            if earlier is None:
                raise
            return earlier
        runnable = run.workflow
        definition = DefinitionKey(runnable.organization_id, runnable.definition_hash, runnable.shard)
        limit = concurrency_limits.concurrency_limit(runnable.settings, runnable.id, run.trigger)
        accepted = await self._acceptances.accept(
            RunAcceptance(
                execution_id=ids.new_id("exec"),
                shard=runnable.shard,
                organization_id=runnable.organization_id,
                workflow_id=runnable.id,
                workflow_revision=runnable.revision,
                user_id=caller.user_id,
                trigger_type=run.trigger_type,
                trigger=_encode(run.trigger).decode(),
                config=runnable.config,
                definition_hash=runnable.definition_hash,
                definition=None if self._acceptances.is_stored(definition) else runnable.definition,
                timeout_seconds=runnable.timeout_seconds,
                total_nodes=runnable.total_nodes,
                channel=self._acceptances.channel,
                idempotency=idempotency_key,
                concurrency_key=limit.key if limit else None,
                concurrency_limit=limit.runs if limit else None,
                may_wait=limit is None or limit.on_limit is LimitAction.QUEUE,
                follow_up=completion.requested_actions(runnable.settings, callback_url=run.callback_url),
                assigned_deployment_id=run.assigned_deployment_id,
                is_private=run.is_private,
            )
        )
        if accepted.verdict is AcceptanceVerdict.FULL:
            raise errors.concurrency_limit()
        return accepted

    async def _plan_run(self, caller: ApiCaller, plan: RunPlanner, workflow: LoadedWorkflow) -> RunRequest:
        """Return the run, planned with the workflow as it was loaded last."""
        try:
            return await plan(workflow)
        except ApiError:
            # The workflow may have been corrected or opened since: no request is refused because of the cache.
            self._workflows.forget(workflow.organization_id, workflow.id)
            current = await self._workflows.load(workflow.id, caller)
            if current is workflow:
                raise
            return await plan(current)
