"""Acceptance of runs: planned with the cached workflow, one commit for many requests, and one wakeup of workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import msgspec
import structlog
from msgspec import Struct
from sqlalchemy import select, tuple_
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from gateway.executions.run_assignment import RunAssigner
from gateway.http import errors, idempotency, limits
from gateway.http.errors import ApiError
from gateway.http.responses import location
from journal import concurrency_limits
from journal.concurrency_limits import LimitAction
from journal.definition_snapshot import LoadedWorkflow
from journal.group_commit import GroupCommit
from journal.store import AcceptanceResult, AcceptanceVerdict, DefinitionKey, RunAcceptance
from journal.waits import completion
from messages import wakeups
from models import ids
from models.errors import DatabaseUnavailable
from models.execution import Idempotency
from models.workflow import WorkflowStatus
from telemetry import instruments, run_origin

if TYPE_CHECKING:
    from sqlalchemy import Row

    from engine.values import Json
    from gateway.executions.event_wait_delivery import EventWaitDelivery
    from gateway.executions.long_poll import ExecutionPollHub
    from gateway.executions.request_limits import BacklogLimits, RateLimitedRequest, RunRateLimiter
    from gateway.settings import GatewaySettings
    from gateway.workflows.workflow_cache import WorkflowCache
    from journal.run_labels import RunLabel
    from journal.store import IdempotencyKey, InboundRequest, IngestedRun, IngestResult, JournalStore
    from messages.broker import Broker
    from models.access import ApiCaller
    from models.database import Database

log = structlog.get_logger()

STORED_SECONDS: Final = 3600.0
"""Seconds for which a definition counts as stored after its insertion."""
MAX_STORED: Final = 10_000
RUN_CHARACTERS: Final = 5_000
"""Characters that a run counts besides its texts."""
MAX_CHARACTERS: Final = 10_000_000
"""Limit of characters in one commit, enough for about 2,000 small runs.

A single larger item still gets a commit.
"""
KEYS_AT_ONCE: Final = 500

_CLOSED: Final[Mapping[WorkflowStatus, str]] = {
    WorkflowStatus.PAUSED: "The workflow is paused: set it to active to run it",
    WorkflowStatus.ARCHIVED: "The workflow is archived: set it to draft or active to run it",
}
"""Message for each workflow status that refuses runs."""

_encode = msgspec.json.Encoder().encode


instruments.declare("executions_accepted_total", "idempotent_replays_total", "deliveries_total")


class PodNotifier(Protocol):
    """Notifies pods of new runs."""

    async def notify_pods(self, workflow_ids: Collection[str]) -> None:
        """Notify the waiting polls of the pods of these workflows that there are runs to claim; a lost
        notification only delays them.
        """


class RunAcceptor:
    """Accepts runs and inbound requests for one gateway, in group commits."""

    def __init__(
        self,
        database: Database,
        store: JournalStore,
        broker: Broker,
        waiting: ExecutionPollHub,
        pods: PodNotifier,
        events: EventWaitDelivery,
    ) -> None:
        self._database = database
        self._store = store
        self._broker = broker
        self._waiting = waiting
        self._pods = pods
        self._events = events
        self._group: GroupCommit[RunAcceptance, AcceptanceResult] = GroupCommit(
            self._commit, weigh=_count_characters, max_weight=MAX_CHARACTERS
        )
        # A separate group: each of these runs takes a transaction of its own, which others need not wait for.
        self._separate: GroupCommit[RunAcceptance, AcceptanceResult] = GroupCommit(self._commit)
        # Inbound requests have a group commit of their own too: each may start a thousand runs.
        self._ingests: GroupCommit[InboundRequest, IngestResult] = GroupCommit(
            self._ingest_batch,
            weigh=lambda write: sum(map(_count_characters, write.runs)),
            max_weight=MAX_CHARACTERS,
        )
        self._admissions: set[asyncio.Task[None]] = set()
        self._wakeups: GroupCommit[None, None] = GroupCommit(self._wake)
        self.assigner = RunAssigner(store, broker, self.wake_workers)
        self._pod_notifications: GroupCommit[str, None] = GroupCommit(self._notify_pods)
        self._parser_wakeups: GroupCommit[None, None] = GroupCommit(self._wake_mail_parsers)
        self._stored: TTLCache[DefinitionKey, bool] = TTLCache(STORED_SECONDS, MAX_STORED)

    async def accept(self, acceptance: RunAcceptance) -> AcceptanceResult:
        """Store a run with others in one transaction, and return its outcome after the commit: nothing is stored with
        another verdict than `ACCEPTED`, such as `REPEATED`, `STALE` or `FULL`.

        An accepted run begins by itself, without `dispatch`. A run that must not wait for a concurrency slot is stored
        separately. Raises a 503 error while 2,000 runs wait, and `DatabaseUnavailable`.
        """
        group = self._group if acceptance.may_wait else self._separate
        if group.depth >= limits.ACCEPTANCES_WAITING:
            raise errors.not_ready("Too many executions wait to be accepted: try again")
        return await group.submit(acceptance)

    async def ingest(self, write: InboundRequest) -> IngestResult:
        """Store an inbound request (a delivery with its runs) with others in one transaction, and return the outcome
        after the commit, that of a repeated request with the id of the first delivery.

        Its runs begin by themselves, without `dispatch`, those that are deferred or delayed at their time. Raises a 503
        error while 2,000 requests wait, and `DatabaseUnavailable`.
        """
        if self._ingests.depth >= limits.ACCEPTANCES_WAITING:
            raise errors.not_ready("Too many executions wait to be accepted: try again")
        return await self._ingests.submit(write)

    @property
    def channel(self) -> str:
        """Redis channel on which this gateway is notified of the ends of its runs."""
        return self._broker.channel

    def is_stored(self, definition: DefinitionKey) -> bool:
        """Return whether the database surely has a definition, so that its text need not be sent again.

        False may be wrong: only definitions that this process stored within the last hour are remembered.
        """
        return self._stored.get(definition) is not None

    def dispatch(self, concurrency_key: str | None) -> None:
        """Let a committed run begin, in the background: wake the workers, or admit runs of its concurrency
        key to free slots.
        """
        if concurrency_key is None:
            self.wake_workers()
        else:
            self._begin_admission(concurrency_key)

    def wake_workers(self) -> None:
        """Wake the workers in the background, after a commit; concurrent wakeups are merged into one."""
        self._wakeups.submit(None)

    async def drain(self) -> None:
        """Wait until all accepted requests are committed, their runs are sent or admitted, and all notifications are
        sent; call it before the process stops.
        """
        await self._group.drain()
        await self._separate.drain()
        await self._ingests.drain()
        await self.assigner.drain()
        while self._admissions:
            await asyncio.wait(self._admissions)
        await self._wakeups.drain()
        await self._parser_wakeups.drain()
        await self._pod_notifications.drain()

    async def _commit(self, batch: Sequence[RunAcceptance]) -> Sequence[AcceptanceResult]:
        """Assign runs of a batch to workers with free slots, and store all in one transaction; return their outcomes in
        order.

        After the commit, assigned runs are sent, and the processes that can claim the others are notified. If the
        commit fails, the slots are freed, and the error is raised.
        """
        # Expect the executions before the commit, so that no later change is missed.
        self._waiting.expect({one.execution_id: one.total_nodes for one in batch})
        batch = self.assigner.assign(batch)
        try:
            answers = await self._store.accept(batch)
        except BaseException:
            self.assigner.withdraw(batch)
            raise
        self.assigner.send(batch, answers)
        _count_replays(answers)
        accepted = [
            one
            for one, answer in zip(batch, answers, strict=True)
            if answer.verdict is AcceptanceVerdict.ACCEPTED
        ]
        self._remember(accepted)
        self._notify(accepted)
        return answers

    async def _ingest_batch(self, batch: Sequence[InboundRequest]) -> Sequence[IngestResult]:
        """Store a batch of inbound requests in one transaction; return their outcomes in order.

        After the commit, runs are sent to their workers or announced, events are delivered to waiting nodes, and mail
        parsers are woken.
        """
        batch = self.assigner.assign_requests(batch)
        try:
            answers = await self._store.ingest(batch)
        except BaseException:
            self.assigner.withdraw([run for write in batch for run in write.runs])
            raise
        accepted: list[IngestedRun] = []
        for write, answer in zip(batch, answers, strict=True):
            if answer.runs:
                self.assigner.send(write.runs, answer.runs)
                of_runs = zip(write.runs, answer.runs, strict=True)
                accepted += [run for run, one in of_runs if one.verdict is AcceptanceVerdict.ACCEPTED]
            else:
                self.assigner.withdraw(write.runs)
            if write.event is not None and answer.verdict is AcceptanceVerdict.ACCEPTED:
                self._events.submit(write.event.event_id)
            _count_delivery(write, answer)
        self._remember(accepted)
        self._notify([run for run in accepted if run.is_read and run.delay_until is None])
        if any(not run.is_read for run in accepted):
            self._parser_wakeups.submit(None)
        return answers

    def _remember(self, accepted: Sequence[RunAcceptance]) -> None:
        """Count the accepted runs in the metrics, and remember for an hour that the database has their definitions."""
        for one in accepted:
            if instruments.is_exposed:
                instruments.counter("executions_accepted_total", one.trigger_type).inc()
            if one.definition is not None:
                self._stored.put(
                    DefinitionKey(one.organization_id, one.definition_hash, one.shard), value=True
                )

    def _notify(self, accepted: Sequence[RunAcceptance]) -> None:
        """Notify pods and workers in the background of runs that may start now, and admit runs of their concurrency
        keys to free slots.

        Runs that were sent to a worker directly need no notification.
        """
        if any(
            one.concurrency_key is None and one.assigned_deployment_id is None and not one.worker
            for one in accepted
        ):
            self.wake_workers()
        for one in accepted:
            if one.concurrency_key is None and one.assigned_deployment_id is not None:
                self._pod_notifications.submit(one.assigned_deployment_id)
            if one.concurrency_key is not None:
                self._begin_admission(one.concurrency_key)

    def _begin_admission(self, key: str) -> None:
        """Start to admit waiting runs of a concurrency key in the background, so that a lock on the key delays no runs
        of other keys.
        """
        task = asyncio.create_task(self._admit(key))
        self._admissions.add(task)
        task.add_done_callback(self._admissions.discard)

    async def _admit(self, key: str) -> None:
        """Give free concurrency slots to waiting runs of a key, and notify workers and pods if a run got one.

        An unavailable database is only logged: the scheduler makes up for it.
        """
        try:
            if await concurrency_limits.admit_waiting_runs(self._database, key):
                self.wake_workers()
                # Keys begin with the workflow id; if that workflow has no deployment, no pod polls for it.
                await self._pods.notify_pods({key.partition(":")[0]})
        except DatabaseUnavailable as error:
            log.debug("concurrency slots not granted", key=key, error=str(error))

    async def _notify_pods(self, batch: Sequence[str]) -> Sequence[None]:
        await self._pods.notify_pods(set(batch))
        return [None] * len(batch)

    async def _wake_mail_parsers(self, batch: Sequence[None]) -> Sequence[None]:
        await wakeups.wake_mail_parsers(self._broker)
        return batch

    async def _wake(self, batch: Sequence[None]) -> Sequence[None]:
        await wakeups.wake_workers(self._broker)
        return batch


def _count_replays(answers: Sequence[AcceptanceResult | IngestResult]) -> None:
    replays = sum(answer.verdict is AcceptanceVerdict.REPEATED for answer in answers)
    if replays:
        instruments.counter("idempotent_replays_total").inc(replays)


def _count_delivery(write: InboundRequest, answer: IngestResult) -> None:
    if instruments.is_exposed and answer.verdict is AcceptanceVerdict.ACCEPTED:
        instruments.counter("deliveries_total", write.route, write.outcome).inc()
    _count_replays([answer])


def _count_characters(run: RunAcceptance) -> int:
    return RUN_CHARACTERS + len(run.trigger) + len(run.definition or "")


def require_open(status: WorkflowStatus) -> None:
    """Raise a 409 error if a workflow of this status accepts no runs: an archived or paused one."""
    if status in _CLOSED:
        raise errors.conflict(f"workflow-{status}", _CLOSED[status])


async def find_earlier(database: Database, shard: int, key: IdempotencyKey) -> AcceptanceResult | None:
    """Return the outcome of an earlier request with this idempotency key: `REPEATED`, or `MISMATCH` for
    another body.

    None if the key is unused or expired.
    """
    statement = select(col(Idempotency.fingerprint), col(Idempotency.resource_id)).where(
        col(Idempotency.shard) == shard,
        col(Idempotency.scope) == key.scope,
        col(Idempotency.key) == key.key,
        col(Idempotency.expires_at) > database.clock.now(),
    )
    async with database.read() as connection:
        row = (await connection.execute(statement)).first()
    if row is None:
        return None
    return _as_bound(row, key)


async def find_all_earlier(
    database: Database, shard: int, keys: Sequence[IdempotencyKey]
) -> dict[IdempotencyKey, AcceptanceResult]:
    """Return the outcomes of earlier requests by their idempotency keys: `REPEATED`, or `MISMATCH` for another body.

    Unused and expired keys are omitted.
    """
    pair = tuple_(col(Idempotency.scope), col(Idempotency.key))
    asked = {(key.scope, key.key): key for key in keys}
    pairs = list(asked)
    found: dict[IdempotencyKey, AcceptanceResult] = {}
    async with database.read() as connection:
        for start in range(0, len(pairs), KEYS_AT_ONCE):
            statement = select(Idempotency).where(
                col(Idempotency.shard) == shard,
                pair.in_(pairs[start : start + KEYS_AT_ONCE]),
                col(Idempotency.expires_at) > database.clock.now(),
            )
            for row in await connection.execute(statement):
                key = asked[row.scope, row.key]
                found[key] = _as_bound(row, key)
    return found


def _as_bound(row: Row[*tuple[Any, ...]], key: IdempotencyKey) -> AcceptanceResult:
    verdict = AcceptanceVerdict.REPEATED if row.fingerprint == key.fingerprint else AcceptanceVerdict.MISMATCH
    return AcceptanceResult(verdict, row.resource_id)


class RunRequest(Struct, frozen=True):
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
    labels: Sequence[RunLabel] = ()
    """Tags and metadata."""
    is_private: bool = False
    """Visible only to its user, the owner and admins: it runs more than the workflow and its inputs."""


RunPlanner: TypeAlias = Callable[[LoadedWorkflow], Awaitable[RunRequest]]
"""Returns the run of a workflow; raises `ApiError`. It may be called again with another revision."""


def require_one_spelling(trigger_inputs: object, inputs: object) -> None:
    """Raise a 422 error if a body has the inputs of a run under both names, `inputs` and `triggerInputs`; None is an
    absent one.
    """
    if trigger_inputs is not None and inputs is not None:
        message = "inputs and triggerInputs have the same meaning: send only one of them"
        raise errors.invalid([errors.problem("inputs", "ambiguous", message)])


def response_headers(settings: GatewaySettings, accepted: AcceptanceResult) -> dict[str, str]:
    """Return the headers for an accepted run: its `Location`, and `Idempotent-Replayed` if the idempotency key was used
    before.
    """
    headers = location(settings, accepted.execution_id)
    return {**headers, **idempotency.REPLAYED} if accepted.verdict is AcceptanceVerdict.REPEATED else headers


class WorkflowRunAcceptor:
    """Accepts runs that callers request for one workflow each, within rate limits and backlog limits."""

    def __init__(
        self,
        database: Database,
        workflows: WorkflowCache,
        rates: RunRateLimiter,
        backlog: BacklogLimits,
        acceptances: RunAcceptor,
    ) -> None:
        self._database = database
        self._workflows = workflows
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
        """Accept a run of a workflow for the caller of a request, once per idempotency key, and return the outcome.

        `plan` makes the run; it is called again if the workflow has changed meanwhile. The answer gets rate limit
        headers. A used key gives the run of its first request, with the verdict `REPEATED`. Raises 403 for a language
        model that the caller may not use, 404, 409, 422 (also for a key used with another body), 429, 503, and the
        errors of `plan`.
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
        return accepted

    async def _accept(
        self,
        caller: ApiCaller,
        workflow: LoadedWorkflow,
        plan: RunPlanner,
        idempotency_key: IdempotencyKey | None,
    ) -> AcceptanceResult:
        """Plan a run and store it, and return the outcome, which may be `STALE` or `MISMATCH`.

        A repeated request gets its first answer even if the run would be refused now. Raises a 409 error if its
        concurrency key has no free slot and its runs may not wait, 429 for a full backlog, and the errors of
        `_plan_run`.
        """
        try:
            run = await self._plan_run(caller, plan, workflow)
            await self._backlog.require_capacity(workflow.organization_id, workflow.id)
        except ApiError:
            # A repeated request gets its first answer, even if the workflow has changed since.
            if idempotency_key is None:
                raise
            earlier = await find_earlier(self._database, caller.shard, idempotency_key)
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
                completion_action=completion.requested_actions(
                    runnable.settings, callback_url=run.callback_url
                ),
                assigned_deployment_id=run.assigned_deployment_id,
                is_private=run.is_private,
                labels=run.labels,
                trace_origin=run_origin.current_origin(),
            )
        )
        if accepted.verdict is AcceptanceVerdict.FULL:
            raise errors.concurrency_limit()
        return accepted

    async def _plan_run(self, caller: ApiCaller, plan: RunPlanner, workflow: LoadedWorkflow) -> RunRequest:
        """Return the run that `plan` makes of the workflow; if it refuses, call it again with the stored workflow if
        that differs.

        So no request is refused because of the cache. Raises the errors of `plan`, 403 for a language model that the
        caller may not use, and 404 if the workflow was deleted meanwhile.
        """
        try:
            return await self._plan_permitted(caller, plan, workflow)
        except ApiError:
            # The workflow may have been corrected or opened since: no request is refused because of the cache.
            self._workflows.forget(workflow.organization_id, workflow.id)
            current = await self._workflows.load(workflow.id, caller)
            if current is workflow:
                raise
            return await self._plan_permitted(caller, plan, current)

    async def _plan_permitted(
        self, caller: ApiCaller, plan: RunPlanner, workflow: LoadedWorkflow
    ) -> RunRequest:
        """Return the run that `plan` makes of a workflow; raises its errors, and 403 for a language model that the
        caller may not use.
        """
        run = await plan(workflow)
        await require_models(self._database, caller.user_id, run.workflow)
        return run


async def require_models(database: Database, user_id: str, workflow: LoadedWorkflow) -> None:
    """Raise a 403 error if a workflow names a language model that the user of its run may not use."""
    if not workflow.models:
        return
    from gateway.ai_models import model_access  # noqa: PLC0415 - loaded with the first workflow that names a model

    await model_access.require_usable(
        database, workflow.models, organization_id=workflow.organization_id, user_id=user_id
    )
