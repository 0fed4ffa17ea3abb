"""Ingest of inbound requests: turns one request into runs, idempotently, in one transaction.

Admission is checked while a run is planned: rates of sender and workflow, and the backlog of pending runs. Workflows
come from the cache; a plan is made again when a workflow has changed in the meantime.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
from msgspec import Struct
from sqlalchemy import select
from sqlmodel import col

from gateway.executions import acceptance
from gateway.http import errors, idempotency
from gateway.http.errors import ApiError
from gateway.ingest import delivery_log
from gateway.workflows import graph_shapes
from journal import concurrency_limits, held_runs, run_labels
from journal.blobs import large_values
from journal.concurrency_limits import LimitAction
from journal.store import AcceptanceResult, AcceptanceVerdict, DefinitionKey, IngestedRun, IngestResult
from journal.waits import completion
from models import ids
from models.ingest import Delivery, DeliveryOutcome
from models.lifecycle_policy import StartRefusalCode
from models.workflow import WorkflowStatus
from telemetry import run_origin

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.deployments.activation import DeploymentActivator
    from gateway.deployments.deployed_definitions import DeployedDefinitions
    from gateway.executions.acceptance import RunAcceptor
    from gateway.executions.long_poll import ExecutionAccess
    from gateway.executions.request_limits import BacklogLimits, RateLimitedRequest, RunRateLimiter
    from gateway.ingest.delivery_log import DeliveryLog
    from gateway.workflows.workflow_cache import WorkflowCache
    from journal.definition_snapshot import LoadedWorkflow, TriggerNode
    from journal.run_labels import RunLabel
    from journal.store import IdempotencyKey, InboundRequest
    from models.access import ApiCaller
    from models.database import Database
    from models.lifecycle_policy import StartRefusal


_encode = msgspec.json.Encoder().encode
ATTEMPTS: Final = 5
"""Number of plans before the ingest gives up, when workflows change in the meantime."""

WritePlanner: TypeAlias = Callable[[], Awaitable["InboundRequest"]]
"""Return the planned write; raises `ApiError`. Called again when a workflow has changed."""


class RunDeferral(Struct, frozen=True):
    """Reason why the run of an accepted request may not start now."""

    reason: str
    """Code and sentence, as a delivery stores them."""
    not_before: datetime | None = None
    """Earliest start; None if it depends on a person."""


PAUSED: Final = RunDeferral("workflow-paused: The workflow is paused: the run starts when it is active again")
_REASONS: Final[Mapping[StartRefusalCode, str]] = {
    StartRefusalCode.OUTSIDE_WINDOW: "outside-window: The run starts when the window of the workflow opens",
    StartRefusalCode.STOPPED_MANUALLY: "stopped-manually: The deployment was stopped: the run starts after its start",
    StartRefusalCode.NOT_DEPLOYED: "not-deployed: The workflow is being undeployed: the run starts once it is deployed",
}


def find_deferral(refusal: StartRefusal | None, *, is_paused: bool) -> RunDeferral | None:
    """Return the reason why a run may not start now, None if it may: its workflow is paused, or else its deployment
    refuses to start.
    """
    if is_paused:
        return PAUSED
    return None if refusal is None else RunDeferral(_REASONS[refusal.code], refusal.opens_at)


def describe_deferral(
    deferral: RunDeferral | None, delay_until: datetime | None = None
) -> Mapping[str, object]:
    """Return outcome, reason and earliest start of a delivery, as fields of its `InboundRequest`.

    Without a deferral it is accepted, without a reason. `delay_until` is the time to which the sender has delayed its
    run; the later of it and the deferral's time counts.
    """
    if deferral is None:
        return {"outcome": DeliveryOutcome.ACCEPTED, "reason": None, "not_before": delay_until}
    times = [one for one in (deferral.not_before, delay_until) if one is not None]
    return {
        "outcome": DeliveryOutcome.DEFERRED,
        "reason": deferral.reason,
        "not_before": max(times, default=None),
    }


class RunTarget(Struct, frozen=True):
    """Workflow that a request runs, as it will be executed."""

    workflow: LoadedWorkflow
    """Workflow with its deployed definition, if it is deployed."""
    trigger: TriggerNode
    assigned_deployment_id: str | None
    """Deployment whose pods execute the run; None for any worker."""
    deferral: RunDeferral | None = None
    """Reason why the run may not start now."""
    is_paused: bool = False
    """The run starts only after the workflow is resumed from its pause."""

    @property
    def is_deferred(self) -> bool:
        return self.deferral is not None


class RunInput(Struct, frozen=True):
    """Input and options of one run."""

    trigger: Json
    """Output of the trigger node."""
    text: str | None = None
    """The same output as JSON, if it is encoded already."""
    priority: int = 0
    delay_until: datetime | None = None
    callback_url: str = ""
    idempotency_key: IdempotencyKey | None = None
    is_read: bool = True
    """False for an unparsed mail: a worker parses it, and stores the output of the trigger then."""
    labels: Sequence[RunLabel] = ()
    """Tags and metadata that the sender has given."""
    execution_id: str | None = None
    """Id of the run, if blobs are already stored for it."""


class RequestIngestor:
    """Turns inbound requests into runs of their workflows, each request in one transaction."""

    def __init__(
        self,
        database: Database,
        workflows: WorkflowCache,
        activation: DeploymentActivator,
        deployed: DeployedDefinitions,
        acceptances: RunAcceptor,
        access: ExecutionAccess,
        deliveries: DeliveryLog,
    ) -> None:
        self._database = database
        self._workflows = workflows
        self._activation = activation
        self._deployed = deployed
        self._acceptances = acceptances
        self._access = access
        self._deliveries = deliveries

    async def resolve_target(self, caller: ApiCaller, workflow_id: str, kind: str) -> RunTarget:
        """Return the target of a request: a workflow that the caller may read, with its trigger of a kind, as it will
        run.

        For a deployed workflow that is the deployed definition, and the activity is recorded, which keeps its pods up.
        Before a refusal, the cached workflow is read again. Raises 404, 409 for a workflow that is neither active nor
        paused, and 422 for another trigger or an invalid graph.
        """
        workflow = await self._workflows.load(workflow_id, caller)
        try:
            return await self._resolve_target(workflow, kind)
        except ApiError:
            # Reload before a refusal: the workflow may have been corrected or activated since it was cached.
            self._workflows.forget(workflow.organization_id, workflow.id)
            current = await self._workflows.load(workflow_id, caller)
            if current is workflow:
                raise
            return await self._resolve_target(current, kind)

    def build_run(self, target: RunTarget, message: RunInput) -> IngestedRun:
        """Return the run of a message, not stored yet; it runs with the rights of the workflow's owner, not of the
        sender.

        Its id is new unless the message has one. A run of a paused workflow waits until the workflow is resumed, in
        place of the message's own delay.
        """
        workflow = target.workflow
        definition = DefinitionKey(workflow.organization_id, workflow.definition_hash, workflow.shard)
        limit = (
            concurrency_limits.concurrency_limit(workflow.settings, workflow.id, message.trigger)
            if message.is_read
            else None
        )
        return IngestedRun(
            execution_id=message.execution_id or ids.new_id("exec"),
            shard=workflow.shard,
            organization_id=workflow.organization_id,
            workflow_id=workflow.id,
            workflow_revision=workflow.revision,
            user_id=workflow.owner_id,
            trigger_type=target.trigger.kind,
            trigger=message.text or _encode(message.trigger).decode(),
            config=workflow.config,
            definition_hash=workflow.definition_hash,
            definition=None if self._acceptances.is_stored(definition) else workflow.definition,
            timeout_seconds=workflow.timeout_seconds,
            total_nodes=workflow.total_nodes,
            channel=self._acceptances.channel,
            priority=message.priority,
            idempotency=message.idempotency_key,
            concurrency_key=limit.key if limit else None,
            concurrency_limit=limit.runs if limit else None,
            may_wait=limit is None or limit.on_limit is LimitAction.QUEUE,
            completion_action=completion.requested_actions(
                workflow.settings, callback_url=message.callback_url
            ),
            assigned_deployment_id=target.assigned_deployment_id,
            delay_until=held_runs.UNTIL_RESUMED if target.is_paused else message.delay_until,
            is_read=message.is_read,
            labels=_choose_labels(workflow, message),
            trace_origin=run_origin.current_origin(),
        )

    async def ingest_request(
        self,
        caller: ApiCaller,
        inbound: InboundRequest,
        kind: str,
        plan: Callable[[RunTarget], Awaitable[RunInput]],
        idempotency_key: IdempotencyKey | None,
        *,
        status: int = 201,
        own_key: IdempotencyKey | None = None,
        refuse_reuse: Callable[[], ApiError] = idempotency.mismatch_error,
    ) -> AcceptanceResult:
        """Ingest the one run of a request with its delivery, or return the earlier run with the same idempotency key,
        even if the request would be refused now.

        `plan` makes the input for the target; unless its body is a blob, it is also set as the payload of `inbound`.
        `own_key` identifies the request itself; if it was used for other content, `refuse_reuse` returns the error. The
        deployment of a new run is woken; a repetition, answered with `status`, is stored as a duplicate. Raises 404,
        409, 422, 429, 503, and the errors of `plan`.
        """
        workflow_id = str(inbound.workflow_id)
        runs: list[IngestedRun] = []

        async def plan_write() -> InboundRequest:
            target = await self.resolve_target(caller, workflow_id, kind)
            runs[:] = [self.build_run(target, await plan(target))]
            if not runs[0].trigger.startswith(large_values.SEPARATE_BODY):
                inbound.payload = runs[0].trigger
            delay_until = None if target.is_paused else runs[0].delay_until
            return msgspec.structs.replace(
                inbound,
                runs=runs,
                status=status,
                idempotency=own_key,
                **describe_deferral(target.deferral, delay_until),
            )

        try:
            taken = await self.ingest_batch(plan_write)
            if taken.verdict is AcceptanceVerdict.MISMATCH:
                raise refuse_reuse()
            accepted = taken.runs[0] if taken.runs else await self._find_first_run(taken)
        except ApiError:
            # A request that was answered before gets the same answer, even if the workflow has changed since.
            earlier = idempotency_key and await acceptance.find_earlier(
                self._database, caller.shard, idempotency_key
            )
            if not earlier:
                raise
            accepted = earlier
        if accepted.verdict is AcceptanceVerdict.MISMATCH:
            raise idempotency.mismatch_error()
        if accepted.verdict is AcceptanceVerdict.FULL:
            raise errors.concurrency_limit()
        if accepted.verdict is AcceptanceVerdict.REPEATED:
            await self.note_repetition(inbound, status=status, execution_id=accepted.execution_id)
        else:
            self.wake_deployments(runs, [accepted])
        self._access.allow(accepted.execution_id, caller)
        return accepted

    async def ingest_batch(self, plan: WritePlanner) -> IngestResult:
        """Ingest the planned runs in one commit, and return their results; plan again, up to five times, if a
        workflow has changed.

        Raises the errors of `plan`, 409 when workflows change all the time, and 503.
        """
        for _ in range(ATTEMPTS):
            write = await plan()
            taken = await self._acceptances.ingest(write)
            if taken.verdict is not AcceptanceVerdict.STALE:
                return taken
            for workflow_id in {run.workflow_id for run in write.runs}:
                self._workflows.forget(write.organization_id, workflow_id)
        raise errors.conflict("workflow-changed", "The workflow is being changed: try again")

    async def find_repetition(
        self, inbound: InboundRequest, idempotency_key: IdempotencyKey, *, status: int
    ) -> AcceptanceResult | None:
        """Return the run of an earlier request with the same key, and store this request, answered with `status`, as a
        duplicate; None for a first request.

        None also for a key that was used with another body, which is refused later.
        """
        earlier = await acceptance.find_earlier(self._database, inbound.shard, idempotency_key)
        if earlier is None or earlier.verdict is not AcceptanceVerdict.REPEATED:
            return None
        await self.note_repetition(inbound, status=status, execution_id=earlier.execution_id)
        return earlier

    async def note_repetition(
        self, inbound: InboundRequest, *, status: int, execution_id: str | None
    ) -> None:
        """Store a request that repeats an earlier one, and is answered with `status`, as a duplicate; `execution_id` is
        the earlier run, None for none or several.
        """
        now = self._database.clock.now()
        await self._deliveries.note(
            delivery_log.repetition_delivery(inbound, now, status=status, execution_id=execution_id)
        )

    def wake_deployments(self, runs: Sequence[IngestedRun], answers: Sequence[AcceptanceResult]) -> None:
        """Wake the deployments of accepted runs that may start now, in the background; `answers` are the
        outcomes of `runs` in their order.
        """
        for assigned_deployment_id in {
            run.assigned_deployment_id
            for run, answer in zip(runs, answers, strict=True)
            if answer.verdict is AcceptanceVerdict.ACCEPTED
            and run.assigned_deployment_id is not None
            and run.delay_until is None
        }:
            self._activation.wake_deployment(assigned_deployment_id)

    async def _resolve_target(self, workflow: LoadedWorkflow, kind: str) -> RunTarget:
        """Return the target of a request for a loaded workflow, and record the activity of its deployment.

        Raises 409 unless the workflow is active or paused, and 422 for another trigger or an invalid graph.
        """
        is_paused = workflow.status is WorkflowStatus.PAUSED
        if workflow.status is not WorkflowStatus.ACTIVE and not is_paused:
            raise errors.workflow_not_active()
        assigned_deployment_id, refusal = None, None
        if workflow.is_deployed:
            found = await self._activation.record_run(workflow.id)
            if found is not None:
                workflow = await self._deployed.load(workflow, found.deployment)
                assigned_deployment_id, refusal = workflow.id, found.refusal
        if workflow.trigger is None or workflow.trigger.kind != kind:
            raise errors.no_such_trigger(kind)
        if workflow.validation.errors:
            graph_shapes.require_valid(workflow.validation)
        deferral = find_deferral(refusal, is_paused=is_paused)
        return RunTarget(workflow, workflow.trigger, assigned_deployment_id, deferral, is_paused)

    async def require_models(self, caller: ApiCaller, target: RunTarget) -> None:
        """Raise a 403 error if the target names a language model that the workflow's owner may not use.

        Before a refusal, the workflow is loaded again. Raises the errors of `resolve_target` then.
        """
        workflow = target.workflow
        try:
            await acceptance.require_models(self._database, workflow.owner_id, workflow)
        except ApiError:
            # Reload before a refusal, which must not rest on a cached graph. A plan made with it is made again.
            self._workflows.forget(workflow.organization_id, workflow.id)
            current = await self.resolve_target(caller, workflow.id, target.trigger.kind)
            await acceptance.require_models(self._database, current.workflow.owner_id, current.workflow)

    async def _find_first_run(self, taken: IngestResult) -> AcceptanceResult:
        """Return the run of the first request with the same key; raises a 503 error if it isn't stored yet."""
        async with self._database.read() as connection:
            execution_id = await connection.scalar(
                select(col(Delivery.execution_id)).where(col(Delivery.id) == taken.delivery_id)
            )
        if execution_id is None:
            raise errors.not_ready("The outcome of this delivery is not stored yet: try again")
        return AcceptanceResult(taken.verdict, execution_id)


def _choose_labels(workflow: LoadedWorkflow, message: RunInput) -> Sequence[RunLabel]:
    """Return the labels (tags, metadata) of a run: those of the message replace those of the settings with
    the same key.

    Empty for an unparsed mail, which gets its labels when it is parsed.
    """
    if not message.is_read:
        return ()  # by the settings, when the mail is parsed
    given = {key for key, _ in message.labels}
    settings = run_labels.read_settings_metadata(workflow.settings, message.trigger)
    return [*message.labels, *(label for label in settings if label[0] not in given)]


# ── capacity ────────────────────────────────────────────────────────────────────────────────────────────────


class IngestCapacity:
    """Limits of inbound requests, which are checked while their runs are planned."""

    def __init__(self, rates: RunRateLimiter, backlog: BacklogLimits, workflows: WorkflowCache) -> None:
        self._rates = rates
        self._backlog = backlog
        self._workflows = workflows

    async def require(self, request: RateLimitedRequest, target: RunTarget, count: int = 1) -> None:
        """Take capacity for `count` runs from all limits, and add rate limit headers to the answer.

        Raises a 409 error for a paused workflow, and 429 when a limit of workflow, organization or sender is reached;
        tokens of rate limits stay taken if then a backlog is full.
        """
        await self.require_not_paused(request.caller, target)
        await self._rates.take(request, target.workflow.id, count=count)
        await self.require_backlog(target.workflow, count)

    async def require_for_event(self, workflow: LoadedWorkflow) -> None:
        """Take capacity for one run of an event from the workflow's rate limit and the backlogs, not from limits of the
        sender.

        Raises a 429 error when a limit is reached.
        """
        await self._rates.spend(self._rates.of_workflow(workflow.id))
        await self.require_backlog(workflow)

    async def require_backlog(self, workflow: LoadedWorkflow, count: int = 1) -> None:
        """Reserve `count` runs in the backlogs of the workflow and its organization; raises a 429 error if
        either is full.
        """
        await self._backlog.require_capacity(workflow.organization_id, workflow.id, count)

    async def require_not_paused(self, caller: ApiCaller, target: RunTarget) -> None:
        """Raise a 409 error if the target's workflow is paused, by its present state in the database.

        For senders that can retry; senders of mails and webhooks can't, so their runs are kept.
        """
        if not target.is_paused:
            return
        # Reload before a refusal, which must not rest on a cached status. A plan made with it is made again.
        workflow = target.workflow
        self._workflows.forget(workflow.organization_id, workflow.id)
        if (await self._workflows.load(workflow.id, caller)).status is WorkflowStatus.PAUSED:
            raise errors.workflow_paused()
