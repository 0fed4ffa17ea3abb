"""Runs as database rows, the same for every database: their records, and the conditions by which claims take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine.agents.agent_steps import AgentStep, StepKind, StepReuse, StepStatus
from engine.model_calls import ModelCallRecord, sum_cost
from engine.run_errors import FailureCause
from engine.run_records import NodeSpan, RunError, SpanStatus, encode_error
from engine.task_node import NewTask
from journal.explanations.blockers import BlockerCode
from journal.store import ClaimedRun
from json_text import decoding
from models import ids
from models.execution import ISOLATION_TARGETS
from models.loss_limits import SUSPECT_LOSSES
from models.task_states import TaskState
from models.timestamps import from_microseconds, to_microseconds

if TYPE_CHECKING:
    from datetime import datetime

    from journal.store import IdempotencyKey, InboundRequest, RunWrite

SPAN_COLUMNS = (
    "execution_id",
    "node_id",
    "iteration",
    "shard",
    "id",
    "sequence",
    "label",
    "type",
    "status",
    "port",
    "attempt",
    "started_at",
    "ended_at",
    "wake_at",
    "input_node",
    "input",
    "output",
    "error",
    "unresolved",
    "awaits",
    "resolved_config",
    "hashes",
    "input_blob",
    "output_blob",
    "reused_from",
    "key_id",
    "rendered_config",
    "model_calls",
)
SPAN_KEY = ("execution_id", "node_id", "iteration")
SPAN_FIXED_COLUMNS = (*SPAN_KEY, "shard", "id")
"""Columns that a newer row of the same node does not change."""
ATTEMPT_COLUMNS = (
    *(
        "execution_id",
        "node_id",
        "iteration",
        "attempt",
        "shard",
        "id",
        "sequence",
        "label",
        "type",
        "status",
    ),
    *("started_at", "ended_at", "next_attempt_at", "error"),
)
ATTEMPT_KEY = ("execution_id", "node_id", "iteration", "attempt")
ATTEMPT_CHANGES = "started_at = coalesce(excluded.started_at, attempt_span.started_at), " + ", ".join(
    f"{column} = excluded.{column}"
    for column in ATTEMPT_COLUMNS
    if column not in {*ATTEMPT_KEY, "shard", "id", "started_at"}
)
"""SQL assignments with which a newer row of the same attempt replaces the older one."""
STEP_COLUMNS = (
    *("execution_id", "node_id", "iteration", "number", "shard", "id", "sequence", "kind", "name", "status"),
    *("attempt", "losses", "effect", "call_id", "key", "request_hash", "arguments", "result", "model_calls"),
    *("cost", "reuse", "started_at", "ended_at", "conversation"),
)
STEP_KEY = ("execution_id", "node_id", "iteration", "number")
STEP_CHANGES = ", ".join(
    f"{column} = excluded.{column}" for column in STEP_COLUMNS if column not in {*STEP_KEY, "shard", "id"}
)
"""SQL assignments with which a newer row of the same step replaces the older one."""
LOG_COLUMNS = ("execution_id", "sequence", "shard", "id", "level", "message", "node_id", "created_at")

MICROSECONDS = 1_000_000
TOUCH_INTERVAL_MICROSECONDS = 3_600_000_000
"""Minimum age of a definition for a new use to renew its age."""

DatabaseRow = tuple[Any, ...]

IS_NO_SUSPECT_SQL: Final = f"attempt < {SUSPECT_LOSSES}"
"""Condition of claims for normal execution, where suspects have the same target as other runs."""
# In the index, started runs are apart from runs that have never started.
IS_SUSPECT_SQL: Final = f"NOT is_fresh AND attempt >= {SUSPECT_LOSSES}"
CLAIM_ORDER: Final = ("is_fresh", "rank")
"""Order of the runs of one workflow at one target: runs that have started, then the oldest."""
TRIAL_ORDER: Final = ("isolation_losses", "attempt", "rank")
"""Order of suspects at one target, of all organizations."""


LOSS_PLACEHOLDER = 987_654_321
"""Placeholder in `CRASHED_ERROR` for the number of lost workers, which only the statement knows."""
CRASHED_ERROR = encode_error(
    RunError("crashed", f"{LOSS_PLACEHOLDER} workers in a row died on this run", attempt=LOSS_PLACEHOLDER)
)
OUT_OF_MEMORY_ERROR = encode_error(
    RunError(
        "crashed",
        f"{LOSS_PLACEHOLDER} workers in a row died on this run; the last ran out of memory while it was at work",
        attempt=LOSS_PLACEHOLDER,
    )
)


def release_target_sql(is_suspect: str) -> str:
    """Return SQL for the target of a released run: the isolation target for a suspect, otherwise its own.

    `is_suspect` is an SQL condition.
    """
    apart = " ".join(f"WHEN '{target}' THEN '{isolated}'" for target, isolated in ISOLATION_TARGETS.items())
    return f"CASE WHEN {is_suspect} THEN CASE target {apart} ELSE target END ELSE target END"


def span_rows(batch: Sequence[RunWrite]) -> list[DatabaseRow]:
    """Return one row per node and iteration of each run, its last recorded span, with the values of `SPAN_COLUMNS`."""
    newest = [
        (write, span)
        for write in batch
        for span in {(span.node_id, span.iteration): span for span in write.spans}.values()
    ]
    return [
        (
            write.execution_id,
            span.node_id,
            span.iteration,
            write.shard,
            span_id,
            span.sequence,
            span.label,
            span.type,
            span.status.value,
            span.port,
            span.attempt,
            _to_microseconds(span.started_at),
            _to_microseconds(span.ended_at),
            _to_microseconds(span.wake_at),
            span.input_node,
            _to_text(span.input),
            _to_text(span.output),
            encode_error(span.error),
            msgspec.json.encode(span.unresolved).decode() if span.unresolved else None,
            _to_text(span.awaits),
            _to_text(span.resolved_config),
            span.hashes,
            _to_text(span.input_blob),
            _to_text(span.output_blob),
            span.reused_from,
            span.key_id,
            _to_text(span.rendered_config),
            _to_text(span.model_calls),
        )
        for (write, span), span_id in zip(newest, ids.new_ids("span", len(newest)), strict=True)
    ]


def attempt_rows(batch: Sequence[RunWrite]) -> list[DatabaseRow]:
    """Return one row per attempt of each node, its last recorded state, with the values of `ATTEMPT_COLUMNS`."""
    newest = [
        (write, one)
        for write in batch
        for one in {(one.node_id, one.iteration, one.attempt): one for one in write.attempts}.values()
    ]
    return [
        (
            write.execution_id,
            one.node_id,
            one.iteration,
            one.attempt,
            write.shard,
            span_id,
            one.sequence,
            one.label,
            one.type,
            one.status.value,
            _to_microseconds(one.started_at),
            _to_microseconds(one.ended_at),
            _to_microseconds(one.next_attempt_at),
            encode_error(one.error),
        )
        for (write, one), span_id in zip(newest, ids.new_ids("span", len(newest)), strict=True)
    ]


def step_rows(batch: Sequence[RunWrite]) -> list[DatabaseRow]:
    """Return one row per step of agents, its last recorded state, with the values of `STEP_COLUMNS`."""
    newest = [
        (write, step)
        for write in batch
        for step in {(step.node_id, step.iteration, step.number): step for step in write.steps}.values()
    ]
    return [
        (
            *(write.execution_id, step.node_id, step.iteration, step.number, write.shard, step_id),
            *(step.sequence, step.kind.value, step.name, step.status.value, step.attempt, step.losses),
            *(step.effect, step.call_id, step.key, step.request_hash),
            _to_text(step.arguments),
            _to_text(step.result),
            msgspec.json.encode(step.model_calls).decode() if step.model_calls else None,
            sum_cost(step.model_calls) if step.model_calls else None,
            None if step.reuse is None else step.reuse.value,
            to_microseconds(step.started_at),
            _to_microseconds(step.ended_at),
            step.conversation,
        )
        for (write, step), step_id in zip(newest, ids.new_ids("step", len(newest)), strict=True)
    ]


def decode_step(row: Sequence[Any]) -> AgentStep:
    """Return the step in a row with the columns `STEP_COLUMNS`; times are microseconds since 1970 there."""
    (_, node_id, iteration, number, _, _, sequence, kind, name, status, attempt, losses, *rest) = row
    effect, call_id, key, request_hash, arguments, result, model_calls, _, reuse, *rest = rest
    started_at, ended_at, conversation = rest
    return AgentStep(
        *(node_id, iteration, number, sequence, StepKind(kind), name, StepStatus(status)),
        started_at=from_microseconds(started_at),
        ended_at=_to_moment(ended_at),
        attempt=attempt,
        losses=losses,
        effect=effect,
        call_id=call_id,
        key=key,
        request_hash=request_hash,
        arguments=_to_bytes(arguments),
        result=_to_bytes(result),
        model_calls=decoding.decode(model_calls, tuple[ModelCallRecord, ...]) if model_calls else (),
        reuse=None if reuse is None else StepReuse(reuse),
        conversation=conversation,
    )


def log_rows(batch: Sequence[RunWrite]) -> list[DatabaseRow]:
    """Return one row per log line of the writes, with a new id and the values of `LOG_COLUMNS`."""
    lines = [(write, line) for write in batch for line in write.logs]
    return [
        (
            write.execution_id,
            line.sequence,
            write.shard,
            log_id,
            line.level,
            line.message,
            line.node_id,
            to_microseconds(line.created_at),
        )
        for (write, line), log_id in zip(lines, ids.new_ids("log", len(lines)), strict=True)
    ]


def approval_rows(batch: Sequence[RunWrite]) -> list[DatabaseRow]:
    """Return one row per waiting question that is to be sent by mail: run, node and iteration."""
    return [
        (write.execution_id, span.node_id, span.iteration)
        for write in batch
        for span in write.spans
        if span.status is SpanStatus.WAITING and span.awaits is not None and _has_mails(span.awaits)
    ]


TASK_COLUMNS = (
    *("execution_id", "node_id", "iteration", "id", "type", "version", "content_hash", "pool", "queue"),
    *("key", "config", "input", "input_bytes", "timeout_microseconds", "lease_microseconds"),
    *("max_attempts", "first_delay_microseconds", "max_delay_microseconds", "delay_grows"),
    *("concurrency_key", "concurrency_limit", "state", "start_timeout_microseconds"),
    *("is_write", "is_at_most_once"),
)
"""Columns of a new task; its start timeout becomes the time of a check."""
_decode_task = decoding.build_decoder(NewTask).decode


def task_rows(batch: Sequence[RunWrite]) -> list[DatabaseRow]:
    """Return one row of `TASK_COLUMNS`, with a new id, for each node that begins to wait for a task."""
    newest = [
        (write, span)
        for write in batch
        for span in {(span.node_id, span.iteration): span for span in write.spans}.values()
        if span.task is not None and span.status is SpanStatus.WAITING
    ]
    if not newest:
        return []
    task_ids = ids.new_ids("task", len(newest))
    return [_task_row(write, span, task_id) for (write, span), task_id in zip(newest, task_ids, strict=True)]


def _task_row(write: RunWrite, span: NodeSpan, task_id: str) -> DatabaseRow:
    task = _decode_task(span.task or b"")
    has_limit = task.concurrency_key is not None
    start_timeout = task.start_timeout_seconds
    return (
        *(write.execution_id, span.node_id, span.iteration, task_id),
        *(task.type, task.version, task.content_hash, task.pool),
        f"{task.type}@{task.version}#{task.pool}",
        task.key,
        bytes(task.config).decode(),
        bytes(task.input).decode() if task.has_input else None,
        task.input_bytes,
        round(task.timeout_seconds * MICROSECONDS),
        round(task.lease_seconds * MICROSECONDS),
        task.max_attempts,
        round(task.first_delay_seconds * MICROSECONDS),
        round(task.max_delay_seconds * MICROSECONDS),
        task.delay_grows,
        f"{write.organization_id} {task.concurrency_key}" if has_limit else None,
        task.concurrency_limit,
        (TaskState.LIMITED if has_limit else TaskState.READY).value,
        None if start_timeout is None else round(start_timeout * MICROSECONDS),
        *(task.is_write, task.is_at_most_once),
    )


def cancelled_task_rows(batch: Sequence[RunWrite]) -> list[tuple[str, str, str]]:
    """Return run, node and iteration of each task that its run has no use for any more."""
    return [(write.execution_id, *place) for write in batch for place in write.cancelled_tasks]


TASK_INSERT_COLUMNS = (
    *(name for name in TASK_COLUMNS if name != "start_timeout_microseconds"),
    *(
        "shard",
        "organization_id",
        "workflow_id",
        "queue_turn",
        "rank",
        "check_at",
        "created_at",
        "updated_at",
    ),
    *("is_fresh", "is_acknowledged", "failures", "losses", "unacknowledged", "fence", "log_lines"),
)
"""Columns of the statement that inserts tasks: those of its run, and times, follow."""


def task_values_sql(given: str, run: str, now: str, true: str, false: str) -> str:
    """Return SQL for the values of a new task's row, in the order of `TASK_INSERT_COLUMNS`.

    `given` and `run` are the SQL names of the rows with the task's values and of its run; `now`, `true` and
    `false` are SQL too.
    """
    own = [f"{given}.{name}" for name in TASK_COLUMNS if name != "start_timeout_microseconds"]
    of_run = [f"{run}.{name}" for name in ("shard", "organization_id", "workflow_id", "queue_turn", "rank")]
    check = f"{now} + {given}.start_timeout_microseconds"
    return ", ".join([*own, *of_run, check, now, now, true, false, "0", "0", "0", "0", "0"])


_CANCELLED = "state IN ('ready', 'limited', 'delayed')"


def cancel_tasks_sql(now: str) -> str:
    """Return SQL that cancels open tasks, and asks workers to stop those that they hold; the caller adds a
    condition. `now` is an SQL expression in microseconds since 1970.
    """
    return (
        f"UPDATE task SET state = CASE WHEN {_CANCELLED} THEN 'cancelled' ELSE 'cancel_requested' END,"
        f" ended_at = CASE WHEN {_CANCELLED} THEN {now} END,"
        f" check_at = CASE WHEN {_CANCELLED} THEN NULL ELSE lease_until END, due_at = NULL, updated_at = {now}"
        " WHERE ended_at IS NULL AND state <> 'cancel_requested'"
    )


def _has_mails(awaits: bytes) -> bool:
    if b'"notify"' not in awaits:
        return False
    request = decoding.decode(awaits).get("request")
    return isinstance(request, dict) and isinstance(request.get("notify"), dict)


def metadata_rows(batch: Sequence[RunWrite]) -> list[DatabaseRow]:
    """Return one row per key of metadata that nodes have set: run, shard, key and value."""
    return [
        (write.execution_id, write.shard, key, value)
        for write in batch
        for key, value in write.metadata.items()
    ]


def decode_span(row: Sequence[Any]) -> NodeSpan:
    """Return the span in a row with the columns `SPAN_COLUMNS`; times are microseconds since 1970 there."""
    (_, node_id, iteration, _, _, sequence, label, kind, status, port, attempt, *rest) = row
    started_at, ended_at, wake_at, input_node, data, output, error, unresolved, *rest = rest
    awaits, resolved_config, hashes, input_blob, output_blob, reused_from, key_id, *rest = rest
    rendered_config, model_calls = rest
    return NodeSpan(
        node_id=node_id,
        label=label,
        type=kind,
        status=SpanStatus(status),
        sequence=sequence,
        started_at=_to_moment(started_at),
        ended_at=_to_moment(ended_at),
        iteration=iteration,
        port=port,
        attempt=attempt,
        input_node=input_node,
        input=_to_bytes(data),
        output=_to_bytes(output),
        error=decode_error(error),
        unresolved=tuple(decoding.decode(unresolved)) if unresolved else (),
        wake_at=_to_moment(wake_at),
        awaits=_to_bytes(awaits),
        resolved_config=_to_bytes(resolved_config),
        hashes=hashes,
        input_blob=_to_bytes(input_blob),
        output_blob=_to_bytes(output_blob),
        reused_from=reused_from,
        key_id=key_id,
        rendered_config=_to_bytes(rendered_config),
        model_calls=_to_bytes(model_calls),
    )


def decode_claim(row: Sequence[Any]) -> ClaimedRun:
    """Decode a claimed run from a row with the fields of `ClaimedRun` in their order."""
    execution_id, shard, organization_id, workflow_id, definition_hash, token, attempt, key_id, *rest = row
    has_journal, trigger, started_at, deadline_at, request, channel, user_id, wait_answer_count, *rest = rest
    concurrency_key, completion_action, write_key_id, trace_origin, is_tainted, may_have_more, claimed_at = (
        rest
    )
    return ClaimedRun(
        execution_id=execution_id,
        shard=shard,
        organization_id=organization_id,
        workflow_id=workflow_id,
        definition_hash=definition_hash,
        token=token,
        attempt=attempt,
        key_id=key_id,
        has_journal=bool(has_journal),
        trigger=trigger,
        started_at=from_microseconds(started_at),
        deadline_at=from_microseconds(deadline_at),
        request=request,
        channel=channel,
        user_id=user_id,
        wait_answer_count=wait_answer_count,
        concurrency_key=concurrency_key,
        completion_action=completion_action,
        may_have_more=bool(may_have_more),
        claimed_at=from_microseconds(claimed_at),
        write_key_id=write_key_id or "",
        trace_origin=trace_origin,
        is_tainted=bool(is_tainted),
    )


def decode_error(stored: str | None) -> RunError | None:
    """Decode the error of a run or node from the JSON text of its column; None for None."""
    if stored is None:
        return None
    fields = decoding.decode(stored)
    cause = msgspec.convert(fields.get("cause"), FailureCause | None)
    return RunError(fields["code"], fields["message"], fields.get("nodeId"), fields.get("attempt"), cause)


def _to_microseconds(moment: datetime | None) -> int | None:
    return None if moment is None else to_microseconds(moment)


def _to_moment(count: int | None) -> datetime | None:
    return None if count is None else from_microseconds(count)


def _to_text(raw: bytes | None) -> str | None:
    """Decode JSON bytes for a text column; None for None."""
    return None if raw is None else raw.decode()


def _to_bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def split_rivals(batch: Sequence[InboundRequest]) -> tuple[list[InboundRequest], list[InboundRequest]]:
    """Divide requests into those that one statement can store, and those that share an idempotency key with
    an earlier one.

    Both are in their order.
    """
    chosen: list[InboundRequest] = []
    others: list[InboundRequest] = []
    taken: set[tuple[int, str, str]] = set()
    for one in batch:
        keys = {(one.shard, key.scope, key.key) for key in _unique_keys(one)}
        if taken.isdisjoint(keys):
            chosen.append(one)
        else:
            others.append(one)
        taken |= keys
    return chosen, others


def _unique_keys(one: InboundRequest) -> Iterator[IdempotencyKey]:
    """Yield the idempotency keys of a request and of its runs."""
    if one.idempotency is not None:
        yield one.idempotency
    for run in one.runs:
        if run.idempotency is not None:
            yield run.idempotency


def pending_sql(target: str) -> str:
    """Return the SQL condition that a run is pending at `target`, which is an SQL expression."""
    return f"status = 'pending' AND target = {target}"


def suspect_sql(max_isolation_losses: str) -> str:
    """Return the SQL condition of runs that may be run on trial: suspects that lost at most so many workers
    on trials.

    `max_isolation_losses` is an SQL expression.
    """
    return f"{IS_SUSPECT_SQL} AND isolation_losses <= {max_isolation_losses}"


def blocked_rows(batch: Sequence[RunWrite]) -> list[tuple[str, str, str | None]]:
    """Return execution id, reason and node (None without one) of each write that blocks its run, which then waits or is
    released.

    Other writes are left out.
    """
    return [
        (write.execution_id, (write.blocked_by or BlockerCode.QUEUED_BEHIND).value, write.blocked_node)
        for write in batch
        if write.blocked_by is not None
    ]
