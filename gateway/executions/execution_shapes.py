"""API shapes of executions, spans and log lines; JSON that is stored as text is passed through unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias
from urllib.parse import urlencode

from msgspec import UNSET, Meta, Raw, Struct, UnsetType, convert, structs

from engine import node_key
from engine.agents import call_approvals, call_waits
from engine.agents.agent_steps import StepKind, StepReuse, StepStatus
from engine.node_api import CONTINUE, NodeEffect
from engine.run_errors import FailureCause
from engine.run_records import SpanStatus
from gateway.executions import model_usage
from gateway.executions.execution_rows import ShownSpanStatus, SpanKind
from gateway.executions.model_usage import ModelUsageShape
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from journal.held_runs import UNTIL_RESUMED
from journal.waits.completion import CompletionAction, CompletionOutcome
from models.execution_label import TAG_KEY
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from engine.agents.agent_steps import AgentStep
    from gateway.executions.execution_rows import ExecutionRecord, Recorded
    from gateway.executions.large_outputs import ShownOutputs
    from gateway.executions.span_details import ShownConfig, SpanDetails
    from gateway.workflows.version_rows import VersionOfRun
    from journal.run_labels import RunLabel
    from journal.store import RunProgressReport
    from models.execution import Execution

Status: TypeAlias = Annotated[str, Meta(extra_json_schema={"enum": [*ExecutionStatus]})]
_MILLISECOND = timedelta(milliseconds=1)


class ExecutionErrorShape(WireStruct):
    """Reason for the failure of an execution."""

    code: str
    """`node-error` if a node has failed: `cause` has the code of the node."""
    message: str
    node_id: str | None
    attempt: int | None
    cause: FailureCause | UnsetType = UNSET
    """Error of the failed node, only beside `node-error`.

    Executions that ended before this field existed have none. `method` and `url` name the failed HTTP
    request, without query values and secrets. `executionId` is the execution of a sub-workflow that `nodeId`
    belongs to; without it, `nodeId` is a node of this execution.
    """


ErrorObject: TypeAlias = Annotated[
    Mapping[str, Any], Meta(extra_json_schema={"$ref": "#/components/schemas/ExecutionErrorShape"})
]
ErrorText: TypeAlias = Annotated[
    Raw, Meta(extra_json_schema={"$ref": "#/components/schemas/ExecutionErrorShape"})
]
"""Error as stored JSON text, passed through unchanged."""


class TriggerShape(WireStruct):
    """Trigger of a run; lists omit its data."""

    type: str
    data: Raw | UnsetType = UNSET
    """Output of the trigger. A webhook body over 256 kB is `{"$blob": …, "omitted": {bytes, reason, message, url}}`."""


class LeaseShape(WireStruct):
    """Lease of the process that executes a run."""

    owner: str
    """Name of the process, such as that of a pod."""
    until: Instant
    """End of the lease unless the process renews it; then another process continues the run."""


class FollowUpShape(WireStruct):
    """Progress of the completion actions of a run: its callback and its failure workflow."""

    pending: bool
    """True while an action remains to be done, at the end of the run or after a pause."""
    attempts: int
    last_error: str | None
    """Error of the last attempt; if `pending` is false, it was given up."""


class SuccessorShape(WireStruct):
    """Execution that was started in place of an ended one."""

    id: str
    status: ExecutionStatus
    kind: Literal["resume", "replay"]
    created_at: Instant


class ExecutionShape(WireStruct):
    """Execution; lists omit `config` and `outputs`."""

    id: str
    workflow_id: str
    version: int | None
    """Version of the workflow whose definition it executes; null if no version has it, as after an edit."""
    status: Status
    trigger: TriggerShape
    trigger_type: str
    user_id: str
    organization_id: str
    error: ErrorObject | None
    progress: int
    """Percentage of nodes that are settled; it never decreases, and only a completed execution has 100.

    In a loop of n items, each iteration counts for an n-th of the loop and of the nodes in it.
    """
    completed_nodes: int
    total_nodes: int
    resumed_from: str | None
    replay_of: str | None
    """Execution that this one, or the one that it resumes, replays."""
    parent_id: str | None
    """Execution with the node that started this one."""
    root_id: str | None
    """First execution of the tree of sub-workflows."""
    created_at: Instant
    not_before: Instant | None
    """Earliest start of a run that was delayed or deferred and has not started; null without one, as while its
    workflow is paused.
    """
    started_at: Instant | None
    ended_at: Instant | None
    updated_at: Instant
    duration_ms: int | None
    tags: Sequence[str] = ()
    metadata: Mapping[str, str] = {}
    """Values by key, as in `?metadata.order=7`."""
    config: Raw | UnsetType = UNSET
    outputs: Mapping[str, Raw] | UnsetType = UNSET
    """By node id. An output over 256 kB is `{"$blob": …, "omitted": {bytes, reason, message, url}}`."""
    usage: ModelUsageShape | UnsetType = UNSET
    """Tokens and cost of the language models that its nodes have called; absent in lists and without a call."""
    follow_up: FollowUpShape | UnsetType | None = UNSET
    """Null without a callback or failure workflow."""
    successors: Sequence[SuccessorShape] | UnsetType = UNSET
    """Newest five executions that resume or replay it, the newest first; absent without one, and in lists."""
    base_version: int | UnsetType = UNSET
    """Newest version when it was accepted, of which it executes an edit; absent with a `version`, and in lists."""
    attempt: int | UnsetType = UNSET
    """Number of claims since its last recorded progress: above 1 it has lost a process meanwhile; lists omit it."""
    lease: LeaseShape | UnsetType | None = UNSET
    """Null while no process executes it; lists omit it."""
    trace_url: str | UnsetType = UNSET
    """Page of its trace, where the server has `PILOTFLAME_TRACE_URL` and the run is traced; lists omit it."""


class ProgressShape(WireStruct):
    """Progress of a run; `outputs` is empty until it has ended."""

    execution_id: str
    status: Status
    progress: int
    completed_nodes: int
    total_nodes: int
    outputs: Mapping[str, Raw]
    """By node id. An output over 256 kB is `{"$blob": …, "omitted": {bytes, reason, message, url}}`."""
    error: ErrorText | None


class HeadShape(WireStruct):
    """Status and progress of a run in an event stream."""

    execution_id: str
    status: Status
    progress: int
    completed_nodes: int
    total_nodes: int
    error: ErrorObject | None


class SpanShape(WireStruct):
    """Span: one node in one run, one iteration of a loop, or one attempt of a node that was tried more than once."""

    id: str
    kind: SpanKind
    """Subject of the span: the node `nodeId`, an iteration of the loop `nodeId`, or an attempt of the node.

    The span of the node itself has its last state, input and output.
    """
    execution_id: str
    node_id: str
    node_label: str
    node_type: str
    status: Annotated[str, Meta(extra_json_schema={"enum": [*ShownSpanStatus]})]
    sequence: int
    iteration: str
    attempt: int
    port: str | None
    started_at: Instant | None
    ended_at: Instant | None
    wake_at: Instant | None
    next_attempt_at: Instant | None
    """Planned start of the next attempt; null unless this one has failed and another follows."""
    duration_ms: int | None
    input_data: Raw | None
    output_data: Raw | None
    """JSON; over 256 kB it is `{"$blob": …, "omitted": {bytes, reason, message, url}}`, as is `inputData`."""
    error: Raw | None
    unresolved: Raw | Sequence[str]
    reused_from: str | None
    """Execution that ran the node, if a replay has reused its result."""
    hashes: Mapping[str, str] | None
    """SHA-256 in hexadecimal of: type and version, config after defaults, mappings, input.

    Half a SHA-256 of: implementation, ports of incoming connections, values read outside the input.
    """
    usage: ModelUsageShape | UnsetType = UNSET
    """Tokens and cost of the language models that the node has called, in all attempts; absent without a call."""


class SpanDetailsShape(SpanShape, kw_only=True):
    """Span with everything that is known about it."""

    config: Raw | None
    """Config as rendered, with defaults and without credentials; of a write, as it was recorded.

    Null if the node did not start, or ran before its config was stored. Values that the node evaluates for each
    item, and conditions, keep their expressions.
    """
    hidden_fields: Sequence[str]
    """Places of the credentials that `config` lacks, such as `headers.authorization`."""
    attempts: Sequence[SpanShape]
    """Attempts of a node that was tried more than once."""
    logs: Sequence[LogShape]
    """Log lines of the node, the first 1,000."""
    effect: NodeEffect | None
    """Effect of the node under its config: `pure`, `read` or `write`; null if its definition is not stored."""
    idempotency_key: str
    """Key that every attempt of the node hands to the outside, such as in the header `Idempotency-Key`."""
    previous_duration_ms: int | None
    """Duration of the same node in the last run of the workflow before this one in which it completed."""
    steps: Sequence[StepShape] | UnsetType = UNSET
    """Steps of an agent so far, the first 1,000; absent for other nodes."""


class StepQuestion(WireStruct):
    """Open question to a person about a tool call, which `POST /executions/{id}/input` answers."""

    node_id: str
    """Id of the tool's node, under which it is asked."""
    iteration: str
    hash: str
    """SHA-256 of the call in hexadecimal, as `toolCall.hash` of the question."""
    url: str
    """Address of the question in the inbox of the dashboard."""


class StepShape(WireStruct):
    """Step of an agent: an answer of a model, or a tool call."""

    node_id: str
    iteration: str
    """Iteration of a loop; empty outside of loops."""
    number: int
    """Position among the steps of the node, from 0."""
    sequence: int
    """Number of its newest state among the records of the run."""
    kind: Annotated[str, Meta(extra_json_schema={"enum": [*StepKind]})]
    name: str
    """Id of the model, or name of the tool."""
    status: Annotated[str, Meta(extra_json_schema={"enum": [*StepStatus]})]
    """`started` until its outcome is recorded. A failed tool call has its error as `result`, which the model gets."""
    attempt: int
    lost_attempts: int
    """Attempts with an unknown outcome, since their worker was lost."""
    effect: str | None
    """Effect of a tool; null for a model, and for a tool that the agent doesn't have."""
    arguments: Raw | None
    """Arguments of a tool call."""
    result: Raw | None
    """Answer of a model as an object with `text`, `finishReason` and `toolCalls`, or the text of a tool."""
    started_at: Instant
    ended_at: Instant | None
    duration_ms: int | None
    inner_iteration: str | None
    """Iteration of the steps of the agent that does a tool call, if one does, under the id of the tool's node."""
    reused: bool
    """Whether a replay has taken it over from the replayed execution, which has its cost."""
    conversation: int | None
    """Number of its conversation, from 0, if its contents are not recorded (`recordContent: false`): a worker that is
    lost ends the conversation, and the next one begins another. Null for a step with contents.
    """
    usage: ModelUsageShape | UnsetType = UNSET
    """Tokens and cost of the language models that the step has called; absent without a call."""
    question: StepQuestion | UnsetType = UNSET
    """Question that a tool call with the status `waiting` waits for; absent for others, and once it is answered."""


class LogShape(WireStruct):
    """Line of a run's log."""

    id: str
    execution_id: str
    level: str
    message: str
    node_id: str | None
    sequence: int
    created_at: Instant


def show_summary(execution: Execution, labels: Sequence[RunLabel], version: int | None) -> ExecutionShape:
    """Return an execution as lists show it: without trigger data, config and outputs. `version` is None if no
    version has its definition.
    """
    return ExecutionShape(
        id=execution.id,
        workflow_id=execution.workflow_id,
        version=version,
        status=execution.status,
        trigger=TriggerShape(type=execution.trigger_type),
        trigger_type=execution.trigger_type,
        user_id=execution.user_id,
        organization_id=execution.organization_id,
        error=execution.error,
        progress=percent_done(execution.status, execution.progress),
        completed_nodes=execution.completed_nodes,
        total_nodes=execution.total_nodes,
        resumed_from=execution.resumed_from,
        replay_of=execution.replay_of,
        parent_id=execution.parent_id,
        root_id=execution.root_id,
        created_at=instant(execution.created_at),
        not_before=optional_instant(_find_earliest_start(execution)),
        started_at=optional_instant(execution.started_at),
        ended_at=optional_instant(execution.ended_at),
        updated_at=instant(execution.updated_at),
        duration_ms=_count_milliseconds(execution.started_at, execution.ended_at),
        tags=[value for key, value in labels if key == TAG_KEY],
        metadata={key: value for key, value in labels if key != TAG_KEY},
    )


def _find_earliest_start(execution: Execution) -> datetime | None:
    """Return the earliest start of a deferred run; None for one that is not deferred, or waits for a person."""
    is_deferred = execution.status == ExecutionStatus.WAITING and execution.started_at is None
    return execution.due_at if is_deferred and execution.due_at != UNTIL_RESUMED else None


def show_successors(rows: Sequence[Recorded], execution_id: str) -> Sequence[SuccessorShape]:
    """Return rows of executions that resume or replay the execution `execution_id` as the API shows them."""
    return [
        SuccessorShape(
            id=row.id,
            status=ExecutionStatus(row.status),
            kind="resume" if row.resumed_from == execution_id else "replay",
            created_at=instant(row.created_at),
        )
        for row in rows
    ]


def show_lease(execution: Execution) -> LeaseShape | None:
    """Return the lease of a run as the API shows it; None while no process executes it."""
    if execution.lease_owner is None or execution.lease_until is None:
        return None
    return LeaseShape(owner=execution.lease_owner, until=instant(execution.lease_until))


def show_execution(found: ExecutionRecord, outputs: ShownOutputs, version: VersionOfRun) -> ExecutionShape:
    """Return an execution as the API shows it, with its data; large outputs are shown as `outputs` decides."""
    shape = show_summary(found.execution, found.labels, version.number)
    shape.trigger = TriggerShape(
        type=found.execution.trigger_type, data=outputs.show_trigger(found.data.trigger)
    )
    shape.config = Raw(found.data.config)
    shape.outputs = _show_outputs(found, outputs)
    if found.model_calls:
        shape.usage = model_usage.show_usage(found.model_calls)
    shape.follow_up = _show_follow_up(found.execution)
    return shape


def show_progress(found: RunProgressReport, outputs: ShownOutputs) -> ProgressShape:
    """Return the progress of a run as the API shows it; large outputs are shown as `outputs` decides."""
    return ProgressShape(
        execution_id=found.execution_id,
        status=found.status,
        progress=percent_done(found.status, found.percent),
        completed_nodes=found.completed_nodes,
        total_nodes=found.total_nodes,
        outputs=_show_outputs(found, outputs),
        error=_to_raw(found.error),
    )


def show_head(execution: Execution) -> HeadShape:
    """Return status and progress of a run as event streams show them."""
    return HeadShape(
        execution_id=execution.id,
        status=execution.status,
        progress=percent_done(execution.status, execution.progress),
        completed_nodes=execution.completed_nodes,
        total_nodes=execution.total_nodes,
        error=execution.error,
    )


def show_span(row: Recorded, outputs: ShownOutputs) -> SpanShape:
    """Return a span or attempt, as `list_spans` reads it, in its API form; large inputs and outputs are shown
    as `outputs` decides.
    """
    is_retried = row.kind == SpanKind.ATTEMPT or row.status == SpanStatus.RETRYING
    return SpanShape(
        id=row.id,
        kind=_determine_kind(row),
        execution_id=row.execution_id,
        node_id=row.node_id,
        node_label=row.label,
        node_type=row.type,
        status=row.status,
        sequence=row.sequence,
        iteration=row.iteration,
        attempt=row.attempt,
        port=row.port,
        started_at=optional_instant(row.started_at),
        ended_at=optional_instant(row.ended_at),
        wake_at=optional_instant(row.wake_at),
        next_attempt_at=optional_instant(row.wake_at) if is_retried else None,
        duration_ms=_count_milliseconds(row.started_at, row.ended_at),
        input_data=_show_optional(row.input, outputs, is_reference=row.input_is_reference),
        output_data=_show_optional(row.output, outputs, is_reference=row.output_is_reference),
        error=_to_raw(row.error),
        unresolved=_to_raw(row.unresolved) or (),
        reused_from=row.reused_from,
        hashes=_show_hashes(row.hashes),
        usage=UNSET if row.model_calls is None else model_usage.show_usage([row.model_calls]),
    )


def show_span_details(
    details: SpanDetails, config: ShownConfig, outputs: ShownOutputs, questions: StepQuestions
) -> SpanDetailsShape:
    """Return a span as the API shows it alone: with config, attempts, log, previous duration, and the steps
    of an agent.
    """
    span = show_span(details.span, outputs)
    previous = details.previous
    return SpanDetailsShape(
        **structs.asdict(span),
        config=config.rendered,
        hidden_fields=config.hidden_fields,
        attempts=[show_span(row, outputs) for row in details.attempts],
        logs=[show_log(row) for row in details.logs],
        effect=config.effect,
        idempotency_key=details.idempotency_key,
        previous_duration_ms=None
        if previous is None
        else _count_milliseconds(previous.started_at, previous.ended_at),
        steps=UNSET if details.steps is None else [show_step(step, questions) for step in details.steps],
    )


class StepQuestions(Struct, frozen=True):
    """Open questions about the steps of one execution."""

    public_url: str
    execution_id: str
    nodes: Mapping[str, str]
    """Nodes of the questions by their iterations."""

    def show(self, step: AgentStep) -> StepQuestion | UnsetType:
        """Return the question that a step waits for; UNSET without one."""
        iteration = call_approvals.name_iteration(step)
        if step.status is not StepStatus.WAITING or iteration not in self.nodes:
            return UNSET
        node_id = self.nodes[iteration]
        query = urlencode({"tab": "all", "question": f"{self.execution_id}:{node_id}:{iteration}"})
        return StepQuestion(
            node_id=node_id,
            iteration=iteration,
            hash=step.request_hash,
            url=f"{self.public_url.rstrip('/')}/dashboard/approvals?{query}",
        )


def show_step(step: AgentStep, questions: StepQuestions) -> StepShape:
    """Return a step of an agent as the API shows it, with the question that it waits for."""
    return StepShape(
        node_id=step.node_id,
        iteration=step.iteration,
        number=step.number,
        sequence=step.sequence,
        kind=step.kind,
        name=step.name,
        status=step.status,
        attempt=step.attempt,
        lost_attempts=step.losses,
        effect=step.effect,
        arguments=None if step.arguments is None else Raw(step.arguments),
        result=None if step.result is None else Raw(step.result),
        started_at=instant(step.started_at),
        ended_at=optional_instant(step.ended_at),
        duration_ms=_count_milliseconds(step.started_at, step.ended_at),
        inner_iteration=call_waits.name_iteration(step) if step.kind is StepKind.TOOL else None,
        reused=step.reuse is StepReuse.REUSED,
        conversation=step.conversation,
        usage=model_usage.sum_records(step.model_calls) if step.model_calls else UNSET,
        question=questions.show(step),
    )


def _determine_kind(row: Recorded) -> SpanKind:
    is_iteration = row.kind == SpanKind.NODE and row.port == CONTINUE and row.hashes is None
    return SpanKind.TURN if is_iteration else SpanKind(row.kind)


def show_log(row: Recorded) -> LogShape:
    """Return a log line as the API shows it."""
    return LogShape(
        id=row.id,
        execution_id=row.execution_id,
        level=row.level,
        message=row.message,
        node_id=row.node_id,
        sequence=row.sequence,
        created_at=instant(row.created_at),
    )


def percent_done(status: str, stored: int) -> int:
    """Return the percentage of a run that is done: 100 if its status is completed, else the stored value."""
    return 100 if status == ExecutionStatus.COMPLETED else stored


def _show_outputs(found: ExecutionRecord | RunProgressReport, outputs: ShownOutputs) -> dict[str, Raw]:
    references = frozenset(found.references)
    return {
        node_id: outputs.show(text, is_reference=node_id in references) for node_id, text in found.outputs
    }


def _show_optional(text: str | None, outputs: ShownOutputs, *, is_reference: bool) -> Raw | None:
    return None if text is None else outputs.show(text, is_reference=is_reference)


def _to_raw(text: str | None) -> Raw | None:
    return None if text is None else Raw(text)


def _show_hashes(digests: bytes | None) -> dict[str, str] | None:
    if not digests:
        return None
    return {name: digest.hex() for name, digest in node_key.list_digests(digests).items()}


def _show_follow_up(execution: Execution) -> FollowUpShape | None:
    left = convert(execution.completion_action or {}, CompletionAction)
    if not left.is_external and execution.completion_outcome is None:
        return None
    outcome = convert(execution.completion_outcome or {}, CompletionOutcome)
    return FollowUpShape(pending=left.is_external, attempts=outcome.attempts, last_error=outcome.error)


def _count_milliseconds(started_at: datetime | None, ended_at: datetime | None) -> int | None:
    if started_at is None or ended_at is None:
        return None
    return max((ended_at - started_at) // _MILLISECOND, 0)
