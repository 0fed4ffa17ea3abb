"""Dispatch of events: runs of all subscribed workflows, committed together with the event."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct, field
from sqlalchemy import select
from sqlmodel import col

from concurrency import offload
from concurrency.loop_share import LoopShare
from engine import event_filters, values
from engine.expressions import ExpressionError
from engine.values import InvalidJson
from gateway.deployments.deployed_definitions import DefinitionMissing
from gateway.executions import acceptance
from gateway.http import errors, idempotency, limits
from gateway.http.errors import ApiError
from gateway.ingest.event_subscriptions import SUBSCRIBING
from gateway.ingest.ingest import RunDeferral, RunInput, RunTarget, describe_deferral, find_deferral
from gateway.workflows import graph_shapes
from journal.store import AcceptanceVerdict, EmittedEvent
from json_text import decoding
from models import ids
from models.execution import Execution
from models.ingest import Delivery
from models.ingest import EventRecord as EventRow
from models.workflow import WorkflowStatus
from models.workflow_triggers import TriggerKind, matching_patterns, parse_patterns

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from gateway.deployments.activation import CountedDeployment, DeploymentActivator
    from gateway.deployments.deployed_definitions import DeployedDefinitions
    from gateway.ingest.ingest import IngestCapacity, RequestIngestor
    from gateway.ingest.subscription_lookup import SubscriptionLookup
    from gateway.workflows.workflow_cache import WorkflowCache
    from journal.definition_snapshot import LoadedWorkflow
    from journal.store import IdempotencyKey, InboundRequest, IngestedRun, IngestResult
    from models.database import Database
    from senders.sender_event import SenderEvent

ANSWERED: Final = 200
BATCH_IDS: Final = 1_000
_encode = msgspec.json.Encoder().encode


class WorkflowEventOutcome(msgspec.Struct, frozen=True, array_like=True):
    """Outcome of an event for one workflow, as a delivery stores it."""

    workflow_id: str
    workflow_name: str
    execution_id: str | None
    error: tuple[str, str] | None = None
    """Code and message. For a run that may hit its concurrency limit: the error if the run doesn't exist."""


_decode_outcomes = decoding.build_decoder(list[WorkflowEventOutcome]).decode


class EventDispatchResult(Struct, frozen=True):
    """Result of an event."""

    event_id: str
    event_type: str
    outcomes: Sequence[WorkflowEventOutcome]
    is_repeated: bool = False
    """Repetition: the outcomes are those of the first event."""


class EventDispatchPlan(Struct):
    """Planned runs and outcomes of an event."""

    outcomes: list[WorkflowEventOutcome] = field(default_factory=list)
    runs: list[IngestedRun] = field(default_factory=list)
    deferrals: list[RunDeferral | None] = field(default_factory=list)
    """For each run the reason why it starts later, None for a start at once."""
    refusal: ApiError | None = None
    """Refusal for the last workflow without capacity."""
    has_other: bool = False
    """Whether there are outcomes other than such refusals."""

    @property
    def deferral(self) -> RunDeferral | None:
        """Reason why the run that may start first is deferred; None if any run starts at once, and without runs."""
        found = [one for one in self.deferrals if one is not None]
        if not found or len(found) < len(self.deferrals):
            return None
        dated = [(one.not_before, one.reason) for one in found if one.not_before is not None]
        return RunDeferral(min(dated)[1], min(dated)[0]) if dated else found[0]

    def add(self, workflow: LoadedWorkflow, run: IngestedRun, deferral: RunDeferral | None) -> None:
        """Add a run of an event for a workflow to the plan, with its outcome.

        For a run that may not wait for a concurrency slot, the outcome has an error, which counts only if no slot is
        free. `deferral` says why the run starts later, since its workflow is paused or asleep; None: it starts at once.
        """
        full = errors.concurrency_limit()
        error = None if run.may_wait else (full.code, full.message)
        self.outcomes.append(WorkflowEventOutcome(workflow.id, workflow.name, run.execution_id, error))
        self.runs.append(run)
        self.deferrals.append(deferral)
        self.has_other = True

    def fail(self, workflow: LoadedWorkflow, code: str, message: str) -> None:
        """Record an error as the final outcome of an event for a workflow; no run of it is started."""
        self.outcomes.append(WorkflowEventOutcome(workflow.id, workflow.name, None, (code, message)))
        self.has_other = True

    def refuse(self, workflow: LoadedWorkflow, error: ApiError) -> None:
        """Record a refusal, such as a full backlog, as the outcome for a workflow; no run of it is started.

        The last refusal is that of the whole event if no workflow has another outcome.
        """
        self.outcomes.append(
            WorkflowEventOutcome(workflow.id, workflow.name, None, (error.code, error.message))
        )
        self.refusal = error


def build_event_input(event: SenderEvent) -> dict[str, Json]:
    """Return the trigger's output for the runs that an event starts: `event_type`, `event_data`, `source`,
    and attributes if any.
    """
    event_input: dict[str, Json] = {
        "event_type": event.event_type,
        "event_data": event.data,
        "source": event.source,
    }
    if event.attributes:
        event_input["attributes"] = dict(event.attributes)
    return event_input


class EventDispatcher:
    """Runs the workflows that subscribe to an event, and commits the runs together with it."""

    def __init__(
        self,
        database: Database,
        subscribers: SubscriptionLookup,
        workflows: WorkflowCache,
        activation: DeploymentActivator,
        deployed: DeployedDefinitions,
        capacity: IngestCapacity,
        ingestor: RequestIngestor,
    ) -> None:
        self._database = database
        self._subscribers = subscribers
        self._workflows = workflows
        self._activation = activation
        self._deployed = deployed
        self._capacity = capacity
        self._ingestor = ingestor

    async def dispatch(
        self, inbound: InboundRequest, event: SenderEvent, idempotency_key: IdempotencyKey | None
    ) -> EventDispatchResult:
        """Ingest an event with a run of every workflow whose trigger matches it; return the outcome of each.

        All runs are committed together. A repeated idempotency key gives the outcomes of its first delivery.
        An error of one workflow is its outcome; a full backlog is raised if no workflow has another outcome.
        Raises 400 when the event can't be stored, 409 when workflows change all the time, 413 and 429 over a
        limit, 422 when its idempotency key had another body, and 503.
        """
        trigger = build_event_input(event)
        try:
            text = (await offload.run(values.encode_json, trigger)).decode()
        except InvalidJson as error:
            raise ApiError(400, error.code, error.message) from error
        emitted = EmittedEvent(ids.new_id("event"), event.event_type, event.source, text)
        planned = EventDispatchPlan()

        async def plan() -> InboundRequest:
            nonlocal planned
            planned = await self._plan_dispatch(inbound.organization_id, RunInput(trigger, text))
            answer = _encode(planned.outcomes).decode()
            return msgspec.structs.replace(
                inbound,
                runs=planned.runs,
                status=ANSWERED,
                event=emitted,
                answer=answer,
                idempotency=idempotency_key,
                **describe_deferral(planned.deferral),
            )

        try:
            taken = await self._ingestor.ingest_batch(plan)
        except ApiError:
            # An event that was answered before gets the same answer, even if it could not be ingested now.
            shard = inbound.shard
            earlier = idempotency_key and await acceptance.find_earlier(
                self._database, shard, idempotency_key
            )
            if not earlier:
                raise
            return await self._repeat_result(inbound, earlier.verdict, earlier.execution_id)
        if taken.verdict is not AcceptanceVerdict.ACCEPTED:
            return await self._repeat_result(inbound, taken.verdict, taken.delivery_id)
        self._ingestor.wake_deployments(planned.runs, taken.runs)
        return EventDispatchResult(emitted.event_id, event.event_type, _merge_outcomes(planned, taken))

    async def _plan_dispatch(self, organization_id: str, message: RunInput) -> EventDispatchPlan:
        """Return the runs and outcomes of an event, with the trigger output `message`, for all subscribed workflows.

        No run is stored yet, but capacity is taken and the activity of deployments is recorded. Raises a 413 error if
        the copies of the event are too large together, and a refusal if no workflow has another outcome.
        """
        event_type = str(_read_field(message.trigger, "event_type"))
        subscribed = await self._subscribers.find(organization_id, event_type)
        found, deployed = subscribed.found, subscribed.deployed
        _require_size(message, len(found))
        revisions = {one.workflow_id: one.revision for one in found}
        workflows = await self._workflows.load_several(organization_id, revisions)
        counted = await self._activation.record_runs(deployed) if deployed else {}
        planned, share = EventDispatchPlan(), LoopShare()
        for one in found:
            await share.yield_if_due()
            workflow = workflows.get(one.workflow_id)
            if workflow is not None and workflow.status in SUBSCRIBING:
                await self._plan_one(planned, workflow, counted.get(workflow.id), message)
        if planned.refusal is not None and not planned.has_other:
            raise planned.refusal
        return planned

    async def _plan_one(
        self,
        planned: EventDispatchPlan,
        workflow: LoadedWorkflow,
        counted: CountedDeployment | None,
        message: RunInput,
    ) -> None:
        """Add the run of an event for one workflow, or its error, to the plan, and take capacity for the run.

        `counted` is its deployment, with the reason if that may not start now; None without a deployment. Nothing is
        added if the definition that will run doesn't subscribe to the event, or its filter excludes it.
        """
        is_paused = workflow.status is WorkflowStatus.PAUSED
        if counted is not None:
            try:
                workflow = await self._deployed.load(workflow, counted.deployment)
            except DefinitionMissing as error:
                planned.fail(workflow, "invalid-definition", str(error))
                return
        trigger = workflow.trigger
        if trigger is None or not _matches_subscription(trigger.kind, trigger.config, message.trigger):
            return
        try:
            if not _passes_filter(trigger.config.get("filter"), message.trigger):
                return
            graph_shapes.require_valid(workflow.validation)
        except ExpressionError as error:
            planned.fail(
                workflow, "filter-failed", f"The filter of the trigger could not be evaluated: {error}"
            )
            return
        except ApiError as error:
            planned.fail(workflow, error.code, error.message)
            return
        try:
            await self._capacity.require_for_event(workflow)
        except ApiError as error:
            planned.refuse(workflow, error)
            return
        deferral = find_deferral(None if counted is None else counted.refusal, is_paused=is_paused)
        assigned_deployment_id = None if counted is None else workflow.id
        run = self._ingestor.build_run(
            RunTarget(workflow, trigger, assigned_deployment_id, deferral, is_paused), message
        )
        planned.add(workflow, run, deferral)

    async def _repeat_result(
        self, inbound: InboundRequest, verdict: AcceptanceVerdict, delivery_id: str
    ) -> EventDispatchResult:
        """Return the outcomes of the first event with the same key, and store this one as a duplicate.

        Raises a 422 error when it had another body, and 503 if they are no longer kept.
        """
        if verdict is AcceptanceVerdict.MISMATCH:
            raise idempotency.mismatch_error()
        async with self._database.read() as connection:
            row = (
                await connection.execute(
                    select(col(Delivery.answer), col(EventRow.id), col(EventRow.event_type))
                    .join(EventRow, col(EventRow.id) == col(Delivery.event_id))
                    .where(
                        col(Delivery.id) == delivery_id,
                        col(Delivery.organization_id) == inbound.organization_id,
                    )
                )
            ).first()
            if row is None:
                raise errors.not_ready("The outcome of this event is no longer kept")
            found = await _resolve_outcomes(connection, row.answer)
        await self._ingestor.note_repetition(inbound, status=ANSWERED, execution_id=_single_run(found))
        return EventDispatchResult(row.id, row.event_type, found, is_repeated=True)


# ── planning ────────────────────────────────────────────────────────────────────────────────────────────────


def _matches_subscription(kind: str, config: Mapping[str, Json], trigger: Json) -> bool:
    """Return whether a trigger with this kind and config is an event trigger that subscribes (by patterns such as
    `order.*`) to the type of the event in the trigger output `trigger`.

    It is checked again since a deployed trigger may differ from the current one.
    """
    patterns = matching_patterns(str(_read_field(trigger, "event_type")))
    return kind == TriggerKind.EVENT and not set(patterns).isdisjoint(parse_patterns(config))


def _passes_filter(condition: Json, trigger: Json) -> bool:
    return condition is None or event_filters.matches_event(
        _encode(condition).decode(), {"data": trigger, "trigger": trigger}
    )


def _read_field(trigger: Json, name: str) -> Json:
    return trigger.get(name) if isinstance(trigger, dict) else None


def _require_size(message: RunInput, count: int) -> None:
    """Raise a 413 error if copies of an event for `count` subscribers exceed 50 MB together: each run has its
    own copy.
    """
    if len(message.text or "") * count > limits.EVENT_FAN_OUT_BYTES:
        text = (
            f"{count:,} workflows subscribe to this event: together, their inputs may have"
            f" {limits.EVENT_FAN_OUT_BYTES:,} bytes"
        )
        raise ApiError(413, "payload-too-large", text)


# ── outcomes ────────────────────────────────────────────────────────────────────────────────────────────────


def _merge_outcomes(planned: EventDispatchPlan, taken: IngestResult) -> Sequence[WorkflowEventOutcome]:
    """Return the planned outcomes, with an error in place of each run that got no concurrency slot."""
    full = {
        run.execution_id
        for run, answer in zip(planned.runs, taken.runs, strict=True)
        if answer.verdict is AcceptanceVerdict.FULL
    }
    return [_resolve_outcome(one, is_there=one.execution_id not in full) for one in planned.outcomes]


def _resolve_outcome(outcome: WorkflowEventOutcome, *, is_there: bool) -> WorkflowEventOutcome:
    """Return an outcome without its error if its run exists (`is_there`), else without the run; one that has
    no run is unchanged.
    """
    if outcome.execution_id is None:
        return outcome
    if is_there:
        return msgspec.structs.replace(outcome, error=None)
    return msgspec.structs.replace(outcome, execution_id=None)


async def read_outcomes(connection: AsyncConnection, delivery: Delivery) -> Sequence[WorkflowEventOutcome]:
    """Return the outcomes of the event of a delivery, by workflow; empty if none subscribed.

    An outcome whose run does not exist has an error.
    """
    return await _resolve_outcomes(connection, delivery.answer or "[]")


async def _resolve_outcomes(connection: AsyncConnection, answer: str) -> Sequence[WorkflowEventOutcome]:
    """Return the outcomes in the stored answer of a delivery; a run that was not started is left out of its outcome."""
    found = _decode_outcomes(answer)
    unsure = [str(one.execution_id) for one in found if one.execution_id and one.error]
    there = {*(await _find_existing(connection, unsure))}
    return [_resolve_outcome(one, is_there=one.error is None or one.execution_id in there) for one in found]


async def _find_existing(connection: AsyncConnection, execution_ids: Sequence[str]) -> Sequence[str]:
    """Return those of the ids that are ids of stored executions."""
    found: list[str] = []
    for some in _split_batches(execution_ids):
        found += await connection.scalars(select(col(Execution.id)).where(col(Execution.id).in_(some)))
    return found


def _single_run(outcomes: Sequence[WorkflowEventOutcome]) -> str | None:
    runs = [one.execution_id for one in outcomes if one.execution_id is not None]
    return runs[0] if len(runs) == 1 else None


def _split_batches(names: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (names[start : start + BATCH_IDS] for start in range(0, len(names), BATCH_IDS))
