"""Runs as database rows, the same for every database: their records, and the conditions by which claims take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine.run_errors import FailureCause
from engine.run_records import NodeSpan, RunError, SpanStatus
from journal.ended_runs import encode_error
from journal.explanations.blockers import BlockerCode
from journal.store import ClaimedRun
from json_text import decoding
from models import ids
from models.execution import ISOLATION_TARGETS
from models.loss_limits import SUSPECT_LOSSES
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
LOG_COLUMNS = ("execution_id", "sequence", "shard", "id", "level", "message", "node_id", "created_at")

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
    """Return SQL for the target of a released run: the isolation target for a suspect, otherwise its own."""
    apart = " ".join(f"WHEN '{target}' THEN '{isolated}'" for target, isolated in ISOLATION_TARGETS.items())
    return f"CASE WHEN {is_suspect} THEN CASE target {apart} ELSE target END ELSE target END"


def span_rows(batch: Sequence[RunWrite]) -> list[DatabaseRow]:
    """Return one row per node of each run: its last recorded span."""
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
        )
        for (write, span), span_id in zip(newest, ids.new_ids("span", len(newest)), strict=True)
    ]


def attempt_rows(batch: Sequence[RunWrite]) -> list[DatabaseRow]:
    """Return one row per attempt of each run: its last recorded state."""
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


def log_rows(batch: Sequence[RunWrite]) -> list[DatabaseRow]:
    """Return one row per log line."""
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
    """Return one row per question with mails to send: run, node and iteration."""
    return [
        (write.execution_id, span.node_id, span.iteration)
        for write in batch
        for span in write.spans
        if span.status is SpanStatus.WAITING and span.awaits is not None and _has_mails(span.awaits)
    ]


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
    """Return the span in a row with the columns `SPAN_COLUMNS`."""
    (_, node_id, iteration, _, _, sequence, label, kind, status, port, attempt, *rest) = row
    started_at, ended_at, wake_at, input_node, data, output, error, unresolved, *rest = rest
    awaits, resolved_config, hashes, input_blob, output_blob, reused_from, key_id, rendered_config = rest
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
    )


def decode_claim(row: Sequence[Any]) -> ClaimedRun:
    """Decode a claimed run from a row with the fields of `ClaimedRun` in their order."""
    execution_id, shard, organization_id, workflow_id, definition_hash, token, attempt, key_id, *rest = row
    has_journal, trigger, started_at, deadline_at, request, channel, user_id, wait_answer_count, *rest = rest
    concurrency_key, completion_action, write_key_id, trace_origin, may_have_more, claimed_at = rest
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
    )


def decode_error(stored: str | None) -> RunError | None:
    """Decode the error of a run or node from the JSON text of its column; None for NULL."""
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
    return None if raw is None else raw.decode()


def _to_bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def split_rivals(batch: Sequence[InboundRequest]) -> tuple[list[InboundRequest], list[InboundRequest]]:
    """Split requests into those without a common idempotency key, and the others, both in order.

    A statement can insert a key once.
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
    if one.idempotency is not None:
        yield one.idempotency
    for run in one.runs:
        if run.idempotency is not None:
            yield run.idempotency


def pending_sql(target: str) -> str:
    """Return the SQL condition that a run is pending at `target`, which is an SQL expression."""
    return f"status = 'pending' AND target = {target}"


def suspect_sql(max_isolation_losses: str) -> str:
    """Return the SQL condition under which a trial takes a pending run: a suspect with few enough isolation losses."""
    return f"{IS_SUSPECT_SQL} AND isolation_losses <= {max_isolation_losses}"


def blocked_rows(batch: Sequence[RunWrite]) -> list[tuple[str, str, str | None]]:
    """Return execution id, code and node of each write that ends a claim without ending its run."""
    return [
        (write.execution_id, (write.blocked_by or BlockerCode.QUEUED_BEHIND).value, write.blocked_node)
        for write in batch
        if write.blocked_by is not None
    ]
