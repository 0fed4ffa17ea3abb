"""Row insertion of accepted runs and inbound requests on SQLite, in transactions of the writer thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from journal.run_rows import TOUCH_INTERVAL_MICROSECONDS
from journal.store import (
    DIRECT_LEASE_SECONDS,
    DIRECT_TOKEN,
    AcceptanceResult,
    AcceptanceVerdict,
    InboundRequest,
    IngestedRun,
    IngestResult,
    RunAcceptance,
)
from models.execution import (
    DELAYED_TARGET,
    LIMITED_TARGET,
    PRIORITY_MICROSECONDS,
    SHARED_TARGET,
    UNPARSED_TARGET,
)
from models.execution_status import ExecutionStatus
from models.ids import turn_of_workflow
from models.timestamps import from_microseconds, to_microseconds

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from journal.store import IdempotencyKey


_LEASE = int(DIRECT_LEASE_SECONDS * 1_000_000)


def insert_runs(
    connection: sqlite3.Connection, batch: Sequence[RunAcceptance], now: int
) -> list[AcceptanceResult]:
    """Insert runs in the open transaction; answers are in the order of the batch. `now` is in microseconds since 1970.

    An answer tells whether a run is new, repeats a key, conflicts with it, is stale (its workflow has changed), or
    found no free slot.
    """
    is_current = _current_workflows(connection, batch)
    started_at = from_microseconds(now)
    answers: list[AcceptanceResult] = []
    inserted: list[RunAcceptance] = []
    for item in batch:
        key = item.idempotency
        has_place = item.may_wait or _has_free_slot(connection, item, inserted)
        is_accepted = is_current[item.workflow_id, item.workflow_revision] and has_place
        if key is not None and (earlier := _claim_key(connection, item, key, now, may_bind=is_accepted)):
            answers.append(earlier)
        elif not is_accepted and not _is_run_stored(connection, item):
            answers.append(
                AcceptanceResult(
                    AcceptanceVerdict.STALE if has_place else AcceptanceVerdict.FULL, item.execution_id
                )
            )
        else:
            answers.append(
                AcceptanceResult(
                    AcceptanceVerdict.ACCEPTED, item.execution_id, started_at if item.worker else None
                )
            )
            inserted.append(item)
    _insert_executions(connection, inserted, now)
    return answers


def ingest(connection: sqlite3.Connection, batch: Sequence[InboundRequest], now: int) -> list[IngestResult]:
    """Store inbound requests with their runs in the open transaction; return answers, as `JournalStore.ingest`, in the
    order of the batch.

    `now` is in microseconds since 1970.
    """
    return [_ingest_one(connection, write, now) for write in batch]


def _ingest_one(connection: sqlite3.Connection, write: InboundRequest, now: int) -> IngestResult:
    """Store one inbound request with its runs, or return the answer to an earlier one with its idempotency key; if one
    of its workflows has changed, store nothing (`STALE`).

    Runs without a needed free slot are not stored (`FULL`). If no run gets a slot, and there is no event, neither
    delivery nor key is stored, so that the request may be repeated. `now` is in microseconds since 1970.
    """
    is_current = all(_current_workflows(connection, write.runs).values())
    key = write.idempotency
    if key is not None:
        bound = _bind_key(connection, write.shard, key, write.delivery_id, now, may_bind=False)
        if bound is not None and bound[0] is not AcceptanceVerdict.ACCEPTED:
            return IngestResult(*bound)
    if not is_current and not _is_delivery_stored(connection, write):
        return IngestResult(AcceptanceVerdict.STALE, write.delivery_id)
    runs = insert_runs(connection, write.runs, now)
    is_stored_without_runs = not runs or write.event is not None
    if key is not None and (
        is_stored_without_runs or any(run.verdict is not AcceptanceVerdict.FULL for run in runs)
    ):
        # A request without any accepted run may be repeated.
        _bind_key(connection, write.shard, key, write.delivery_id, now, may_bind=is_current)
    if is_stored_without_runs or any(run.verdict is AcceptanceVerdict.ACCEPTED for run in runs):
        # A request without new runs is a duplicate; the first delivery has the details.
        _insert_delivery(connection, write, runs, now)
    if write.event is not None:
        _insert_event(connection, write, now)
    return IngestResult(AcceptanceVerdict.ACCEPTED, write.delivery_id, runs)


def _is_delivery_stored(connection: sqlite3.Connection, write: InboundRequest) -> bool:
    """Return whether this same request was stored before, by a call with a lost answer."""
    statement = "SELECT 1 FROM delivery WHERE id = ?"
    return connection.execute(statement, (write.delivery_id,)).fetchone() is not None


def _insert_delivery(
    connection: sqlite3.Connection, one: InboundRequest, runs: Sequence[AcceptanceResult], now: int
) -> None:
    """Insert the delivery of an inbound request; an existing one stays.

    If the request has several runs and no event, the stored answer is the list of the ids of its accepted runs. `now`
    is in microseconds since 1970.
    """
    answer = one.answer
    if one.event is None and len(runs) > 1:
        accepted_ids = [run.execution_id for run in runs if run.verdict is AcceptanceVerdict.ACCEPTED]
        answer = msgspec.json.encode(accepted_ids).decode()
    connection.execute(
        "INSERT INTO delivery (id, shard, organization_id, workflow_id, user_id, route, sender, content_hash,"
        " content_bytes, outcome, status, execution_id, event_id, answer, redriven_from,"
        " reason, not_before, created_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (
            one.delivery_id,
            one.shard,
            one.organization_id,
            one.workflow_id,
            one.user_id,
            one.route,
            one.sender,
            one.content_hash,
            one.content_bytes,
            one.outcome,
            one.status,
            one.runs[0].execution_id if len(one.runs) == 1 else None,
            one.event.event_id if one.event else None,
            answer,
            one.redriven_from,
            one.reason,
            to_microseconds(one.not_before) if one.not_before else None,
            now,
        ),
    )


def _insert_event(connection: sqlite3.Connection, one: InboundRequest, now: int) -> None:
    """Insert the event that an inbound request sends to its subscribers, if the request has one; an event that is
    stored stays. `now` is in microseconds since 1970.
    """
    if (event := one.event) is not None:
        connection.execute(
            "INSERT INTO event (id, shard, organization_id, user_id, event_type, source, data, created_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (
                event.event_id,
                one.shard,
                one.organization_id,
                one.user_id,
                event.event_type,
                event.source,
                event.data,
                now,
            ),
        )


def _delay_microseconds(item: RunAcceptance) -> int | None:
    """Return the time in microseconds before which a run must not start; None without a delay."""
    if not isinstance(item, IngestedRun) or item.delay_until is None:
        return None
    return to_microseconds(item.delay_until)


def _initial_status(item: RunAcceptance) -> ExecutionStatus:
    """Return `running` for a run assigned to a worker, `waiting` for a delayed one, else `pending`."""
    if item.worker:
        return ExecutionStatus.RUNNING
    return ExecutionStatus.WAITING if _delay_microseconds(item) else ExecutionStatus.PENDING


def _direct_times(item: RunAcceptance, now: int) -> tuple[str | None, int | None, int | None, int | None]:
    """Return worker, end of its lease, start and deadline of a run that is assigned to a worker at once; None
    four times for others.

    Times are microseconds since 1970.
    """
    if not item.worker:
        return None, None, None, None
    return item.worker, now + _LEASE, now, now + int(item.timeout_seconds * 1_000_000)


def _initial_target(item: RunAcceptance) -> str:
    """Return the target of a new run, the first that applies: unparsed, limited, delayed, its deployment, or
    shared by all workers.
    """
    if isinstance(item, IngestedRun) and not item.is_read:
        return UNPARSED_TARGET
    if item.concurrency_key is not None:
        return LIMITED_TARGET
    return DELAYED_TARGET if _delay_microseconds(item) else item.assigned_deployment_id or SHARED_TARGET


def _current_workflows(
    connection: sqlite3.Connection, batch: Sequence[RunAcceptance]
) -> dict[tuple[str, int], bool]:
    """Return by workflow id and revision whether the workflow still has this revision and is not deleted."""
    statement = (
        "SELECT 1 FROM workflow"
        " WHERE id = ? AND shard = ? AND revision = ? AND organization_id = ? AND deleted_at IS NULL"
    )
    return {
        (workflow_id, revision): connection.execute(
            statement, (workflow_id, shard, revision, organization_id)
        ).fetchone()
        is not None
        for workflow_id, shard, revision, organization_id in {
            (item.workflow_id, item.shard, item.workflow_revision, item.organization_id) for item in batch
        }
    }


def _claim_key(
    connection: sqlite3.Connection, item: RunAcceptance, key: IdempotencyKey, now: int, *, may_bind: bool
) -> AcceptanceResult | None:
    """Return the answer to an earlier request with this key; None without one, and then the key is bound to this run
    if `may_bind`.

    `now` is in microseconds since 1970.
    """
    bound = _bind_key(connection, item.shard, key, item.execution_id, now, may_bind=may_bind)
    return None if bound is None else AcceptanceResult(*bound)


def _bind_key(
    connection: sqlite3.Connection,
    shard: int,
    key: IdempotencyKey,
    resource_id: str,
    now: int,
    *,
    may_bind: bool,
) -> tuple[AcceptanceVerdict, str] | None:
    """Return the verdict and resource id for a key that was bound before and has not expired; otherwise None, and the
    key is bound to `resource_id` if `may_bind`.

    A key that was bound to `resource_id` itself is accepted. `now` is in microseconds.
    """
    identity = (shard, key.scope, key.key)
    found = connection.execute(
        "SELECT fingerprint, resource_id, expires_at FROM idempotency WHERE shard = ? AND scope = ? AND key = ?",
        identity,
    ).fetchone()
    if found is not None and found[2] > now:
        fingerprint, first_id, _ = found
        if first_id == resource_id:
            return AcceptanceVerdict.ACCEPTED, resource_id
        return (
            AcceptanceVerdict.REPEATED if fingerprint == key.fingerprint else AcceptanceVerdict.MISMATCH,
            first_id,
        )
    if may_bind:
        connection.execute(
            "INSERT OR REPLACE INTO idempotency (shard, scope, key, fingerprint, resource_id, expires_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (*identity, key.fingerprint, resource_id, now + key.lifetime_seconds * 1_000_000),
        )
    return None


def _has_free_slot(
    connection: sqlite3.Connection, item: RunAcceptance, inserted: Sequence[RunAcceptance]
) -> bool:
    """Return whether fewer runs than the limit hold or await a slot of the run's key, those of this batch included.

    True without a limit.
    """
    live: int = connection.execute(
        "SELECT (SELECT count(*) FROM execution WHERE concurrency_key = ?1 AND concurrency_key IS NOT NULL"
        f" AND target <> '{LIMITED_TARGET}' AND ended_at IS NULL) + (SELECT count(*) FROM execution"
        f" WHERE concurrency_key = ?1 AND target = '{LIMITED_TARGET}' AND status = 'pending')",
        (item.concurrency_key,),
    ).fetchone()[0]
    live += sum(one.concurrency_key == item.concurrency_key for one in inserted)
    return item.concurrency_limit is None or live < item.concurrency_limit


def _is_run_stored(connection: sqlite3.Connection, item: RunAcceptance) -> bool:
    """Return whether this same run was accepted before, by a call with a lost answer."""
    statement = "SELECT 1 FROM execution WHERE id = ? AND shard = ?"
    return connection.execute(statement, (item.execution_id, item.shard)).fetchone() is not None


def _insert_executions(connection: sqlite3.Connection, batch: Sequence[RunAcceptance], now: int) -> None:
    """Insert the definitions, executions, data and labels of accepted runs; rows that exist stay.

    The age of a definition that exists begins anew, so that retention keeps it. `now` is in microseconds.
    """
    definitions = {
        (item.organization_id, item.definition_hash, item.shard, item.definition, now)
        for item in batch
        if item.definition is not None
    }
    connection.executemany(
        "INSERT INTO definition (organization_id, hash, shard, body, created_at) VALUES (?, ?, ?, ?, ?)"
        # A new use renews the age, to the hour, so that retention won't delete the definition before its use.
        " ON CONFLICT (organization_id, hash) DO UPDATE SET created_at = excluded.created_at"
        f" WHERE created_at < excluded.created_at - {TOUCH_INTERVAL_MICROSECONDS}",
        definitions,
    )
    connection.executemany(
        "INSERT INTO execution (id, shard, organization_id, workflow_id, user_id, status, target, trigger_type,"
        " definition_hash, rank, queue_turn, is_fresh, token, attempt, timeout_microseconds, completed_nodes,"
        " total_nodes, key_id, has_journal, channel, created_at, updated_at, parent_id, root_id, depth,"
        " wait_answer_count, concurrency_key, concurrency_limit, completion_action, assigned_deployment_id, is_private,"
        " is_tainted,"
        " due_at, trace_origin, lease_owner, lease_until, started_at, deadline_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?, ?, 0, ?, ?, ?, ?, ?, ?, 0, ?, ?, ?, ?, ?, ?, ?,"
        " ?, ?, ?, ?, ?)"
        " ON CONFLICT DO NOTHING",
        [
            (
                item.execution_id,
                item.shard,
                item.organization_id,
                item.workflow_id,
                item.user_id,
                _initial_status(item),
                _initial_target(item),
                item.trigger_type,
                item.definition_hash,
                (_delay_microseconds(item) or now) - item.priority * PRIORITY_MICROSECONDS,
                turn_of_workflow(item.workflow_id),
                not item.worker,
                DIRECT_TOKEN if item.worker else 0,
                1 if item.worker else 0,
                int(item.timeout_seconds * 1_000_000),
                item.total_nodes,
                item.execution_id,
                item.channel,
                now,
                now,
                item.parent_id,
                item.root_id,
                item.depth,
                item.concurrency_key,
                item.concurrency_limit,
                item.completion_action,
                item.assigned_deployment_id,
                item.is_private,
                item.is_tainted,
                _delay_microseconds(item),
                item.trace_origin,
                *_direct_times(item, now),
            )
            for item in batch
        ],
    )
    if labels := [(item, *label) for item in batch for label in item.labels]:
        connection.executemany(
            "INSERT INTO execution_label (execution_id, key, value, shard, organization_id, created_at)"
            " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            [
                (item.execution_id, key, value, item.shard, item.organization_id, now)
                for item, key, value in labels
            ],
        )
    connection.executemany(
        "INSERT INTO execution_data (execution_id, shard, trigger, config, organization_id, workflow_id, created_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        [
            (
                item.execution_id,
                item.shard,
                item.trigger,
                item.config,
                item.organization_id,
                item.workflow_id,
                now,
            )
            for item in batch
        ],
    )
