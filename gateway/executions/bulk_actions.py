"""Selection of executions for bulk actions, and the actions in small batches."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog
from sqlalchemy import and_, exists, or_, select
from sqlmodel import col

from engine.values import fingerprint
from gateway.access import audit_log
from gateway.executions import acceptance, execution_rows, resume_runs
from gateway.executions.cancellation import request_end_of_run
from gateway.executions.test_runs import TEST
from gateway.http import idempotency
from journal import run_copies
from journal.blobs import orphan_blobs
from journal.blobs.blob_storage import BlobsUnavailable
from journal.dead_letters import IS_TAKEN_UP
from journal.run_deletion import IS_DELETABLE, delete_runs
from journal.store import AcceptanceVerdict, ExecutionKey
from json_text import decoding
from models import ids
from models.audit import AuditAction
from models.errors import LockWaitTimeout
from models.execution import Execution
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.execution_visibility import visibility_condition
from models.workflow import Workflow, WorkflowStatus

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.executions.acceptance import RunAcceptor
    from gateway.executions.execution_rows import ExecutionFilter
    from gateway.executions.long_poll import ExecutionAccess
    from journal.blobs.blob_store import BlobStore
    from journal.store import IdempotencyKey, JournalStore
    from messages.broker import Broker
    from models.access import ApiCaller
    from models.database import Database

log = structlog.get_logger()

CANCELS_AT_ONCE: Final = 20
RETRIES_AT_ONCE: Final = 20
"""Executions that one transaction resumes."""
DELETIONS_AT_ONCE: Final = 100


class ChosenExecutions(msgspec.Struct, frozen=True):
    """Executions that a bulk action has selected; stored, so that a repeated request acts on the same ones."""

    operation_id: str
    matched: int
    """Number of matching executions."""
    execution_ids: Sequence[str]
    """The oldest of them, up to the limit of the request."""


_encode = msgspec.json.Encoder().encode
_decode = decoding.build_decoder(ChosenExecutions).decode


# ── selection ───────────────────────────────────────────────────────────────────────────────────────────────

_OPEN: Final = exists().where(
    col(Workflow.id) == col(Execution.workflow_id),
    col(Workflow.deleted_at).is_(None),
    col(Workflow.status).in_([WorkflowStatus.DRAFT, WorkflowStatus.ACTIVE]),
)


def cancellable(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition for executions to cancel: visible to the caller, not ended, without a cancel
    request yet.
    """
    is_asked_for = col(Execution.request) == "cancel"
    goes_on = col(Execution.status).not_in(TERMINAL_STATUSES)
    return and_(visibility_condition(caller), goes_on, or_(col(Execution.request).is_(None), ~is_asked_for))


def retryable(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition for failed executions that the caller may see, in draft or active workflows, that were
    neither resumed nor replayed yet.

    Node tests are excluded: their purpose ends with the test. So are dead letters that were redriven or purged.
    """
    return _build_repeatable_condition(caller, col(Execution.status) == ExecutionStatus.FAILED)


def replayable(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition for ended executions that the caller may see, in draft or active workflows, that were
    neither resumed nor replayed yet.

    Node tests are excluded, and dead letters that were redriven or purged.
    """
    return _build_repeatable_condition(caller, col(Execution.status).in_(TERMINAL_STATUSES))


def _build_repeatable_condition(caller: ApiCaller, has_ended: ColumnElement[bool]) -> ColumnElement[bool]:
    # Clients may choose the trigger type `test` for any run, but only a node test is also private.
    is_node_test = and_(col(Execution.trigger_type) == TEST, col(Execution.is_private))
    return and_(
        *(visibility_condition(caller), has_ended, ~is_node_test, ~IS_TAKEN_UP),
        *(col(Execution.settled_at).is_(None), _OPEN.correlate(Execution)),
    )


def deletable(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition for executions that may be deleted and belong to workflows of the caller, or of anyone
    for an admin.

    They have ended, and no callback, other completion action or parent run needs them.
    """
    if caller.is_admin:
        return and_(visibility_condition(caller), IS_DELETABLE)
    own = exists().where(
        col(Workflow.id) == col(Execution.workflow_id), col(Workflow.owner_id) == caller.user_id
    )
    return and_(visibility_condition(caller), IS_DELETABLE, own.correlate(Execution))


async def find(
    database: Database, wanted: ExecutionFilter, condition: ColumnElement[bool], limit: int
) -> tuple[ChosenExecutions, Counter[str]]:
    """Return the oldest executions that match a filter and a condition, at most `limit`, and the number of the returned
    ones by workflow.

    `matched` of the result counts all matching ones, up to 10,001. `condition` must restrict the visibility.
    """
    async with database.read() as connection:
        matched, rows = await execution_rows.find_oldest(connection, wanted, condition, limit=limit)
    found = ChosenExecutions(ids.new_id("bulk"), matched, [row.id for row in rows])
    return found, Counter(row.workflow_id for row in rows)


async def record_action(
    database: Database, caller: ApiCaller, found: ChosenExecutions, action: AuditAction, about: str
) -> None:
    """Record a bulk action in the audit trail before it begins; `about` is the id of the workflow or organization.

    Nothing is recorded for an empty selection.
    """
    record = partial(_insert_audit_entry, caller=caller, found=found, action=action, about=about)
    await database.transaction(record)


async def begin_retry(
    database: Database,
    caller: ApiCaller,
    found: ChosenExecutions,
    about: str,
    idempotency_key: IdempotencyKey | None,
    *,
    action: AuditAction = AuditAction.EXECUTIONS_RETRIED,
) -> ChosenExecutions:
    """Record a retry or replay of the selection `found` in the audit trail, and return the selection to act on.

    With an idempotency key, that is the selection of the first request with it, and only that is recorded. `about` is
    the id of the workflow or organization for the audit entry. Raises a 422 error if that request had another body.
    """
    text, now = _encode(found).decode(), database.clock.now()

    async def keep(connection: AsyncConnection) -> str:
        bound = text
        if idempotency_key is not None:
            bound = await idempotency.reserve_key(
                connection, idempotency_key, shard=caller.shard, resource_id=text, now=now
            )
        if bound == text:
            await _insert_audit_entry(connection, caller=caller, found=found, action=action, about=about)
        return bound

    return _decode(await database.transaction(keep))


async def find_begun(
    database: Database, shard: int, idempotency_key: IdempotencyKey
) -> ChosenExecutions | None:
    """Return the executions that an earlier request with this idempotency key has selected; None if there was none.

    Raises a 422 error if the body of that request differs.
    """
    earlier = await acceptance.find_earlier(database, shard, idempotency_key)
    if earlier is None:
        return None
    if earlier.verdict is AcceptanceVerdict.MISMATCH:
        raise idempotency.mismatch_error()
    return _decode(earlier.execution_id)


async def _insert_audit_entry(
    connection: AsyncConnection,
    *,
    caller: ApiCaller,
    found: ChosenExecutions,
    action: AuditAction,
    about: str,
) -> None:
    """Insert the audit entry of a bulk action with a hash of the executions' ids; none for an empty selection."""
    hashed = fingerprint(list(found.execution_ids))
    before, after = (hashed, None) if action is AuditAction.EXECUTIONS_DELETED else (None, hashed)
    if found.execution_ids:
        await audit_log.record_change(connection, caller, action, about, before=before, after=after)


# ── actions ─────────────────────────────────────────────────────────────────────────────────────────────────


class BulkCancellation(msgspec.Struct, frozen=True):
    """Outcome of a request to cancel executions."""

    canceled: list[str]
    """Ids of the executions that are canceled or will be, in the order of the request, like the others."""
    locked: list[str]
    """Ids of those that another transaction locks: they may be canceled later."""


class BulkResumption(msgspec.Struct, frozen=True):
    """Outcome of a request to resume failed executions."""

    new_ids: dict[str, str]
    """Ids of the new executions by those of the failed ones."""
    locked: list[str]
    """Ids of the failed ones that another transaction locks: they may be resumed later."""


async def cancel(
    store: JournalStore, broker: Broker, caller: ApiCaller, execution_ids: Sequence[str]
) -> BulkCancellation:
    """Request the cancellation of executions, 20 at a time.

    It does not wait for their ends; those canceled before are included. Those that have ended otherwise, and that do
    not exist, are left out.
    """
    canceled, locked = set[str](), set[str]()

    async def ask_to_end(execution_id: str) -> None:
        key = ExecutionKey(execution_id, caller.shard)
        try:
            answer = await request_end_of_run(store, broker, key, "cancel")
        except LockWaitTimeout:
            locked.add(execution_id)
            return
        if answer is not None and answer.status not in TERMINAL_STATUSES - {ExecutionStatus.CANCELLED}:
            canceled.add(execution_id)

    for some in _split_batches(execution_ids, CANCELS_AT_ONCE):
        await asyncio.gather(*map(ask_to_end, some))
    return BulkCancellation(
        [one for one in execution_ids if one in canceled], [one for one in execution_ids if one in locked]
    )


async def retry(
    database: Database,
    acceptances: RunAcceptor,
    access: ExecutionAccess,
    caller: ApiCaller,
    chosen: ChosenExecutions,
) -> BulkResumption:
    """Resume failed executions as new ones.

    The new ids are derived from the failed ones and `operation_id` of `chosen`, so a repetition returns the same ones.
    Those that may not be resumed are left out. The caller sees the new ones at once, and workers are woken.
    """
    new_ids = {
        execution_id: ids.derive_id("exec", execution_id, chosen.operation_id)
        for execution_id in chosen.execution_ids
    }
    resumed: set[str] = set()
    locked: list[str] = []
    for some in _split_batches(chosen.execution_ids, RETRIES_AT_ONCE):
        keys = await _resume_unlocked(database, caller, {one: new_ids[one] for one in some}, locked)
        for execution_id, concurrency_key in keys.items():
            resumed.add(execution_id)
            access.allow(new_ids[execution_id], caller)
            acceptances.dispatch(concurrency_key)
    return BulkResumption({one: new_id for one, new_id in new_ids.items() if one in resumed}, locked)


async def _resume_unlocked(
    database: Database, caller: ApiCaller, new_ids: Mapping[str, str], locked: list[str]
) -> dict[str, str | None]:
    """Resume failed executions; return the concurrency key of each resumed one (None without a limit) by the failed
    one's id.

    `new_ids` has the ids of the new executions by the failed ones. If another transaction locks some of them, they are
    resumed one by one, and the locked ones are added to `locked`.
    """
    try:
        now = database.clock.now()
        return await database.transaction(partial(_resume, caller=caller, new_ids=new_ids, now=now))
    except LockWaitTimeout:
        if len(new_ids) == 1:
            locked.extend(new_ids)
            return {}
    resumed: dict[str, str | None] = {}
    for one, new_id in new_ids.items():
        resumed |= await _resume_unlocked(database, caller, {one: new_id}, locked)
    return resumed


async def _resume(
    connection: AsyncConnection, *, caller: ApiCaller, new_ids: Mapping[str, str], now: datetime
) -> dict[str, str | None]:
    """Insert copies of failed executions under new ids, and return their concurrency keys (or None) by failed id.

    Executions that an earlier call has resumed under these ids are included, with None; those that can't be resumed are
    left out. Raises `LockWaitTimeout` if another transaction locks any of them.
    """
    of_batch = col(Execution.id).in_(list(new_ids))
    # A separate statement, so that the next ones see the commit of the previous lock holder.
    locked = select(col(Execution.id)).where(of_batch).order_by(col(Execution.id)).with_for_update()
    await connection.execute(locked)
    made = select(col(Execution.resumed_from)).where(col(Execution.id).in_(list(new_ids.values())))
    resumed: dict[str, str | None] = dict.fromkeys(await connection.scalars(made))
    left: Select[*tuple[Any, ...]] = (
        select(
            *(col(Execution.id), col(Execution.status), col(Execution.workflow_id)),
            *(col(Execution.trigger_type), col(Execution.concurrency_key)),
        )
        .where(of_batch, retryable(caller))
        .order_by(col(Execution.id))  # so that two transactions reserve their keys in one order
    )
    for row in (await connection.execute(left)).all():
        failed, new_id = ExecutionKey(row.id, caller.shard), new_ids[row.id]
        if await resume_runs.settle_dead_letter(connection, row, failed, new_id, now) is not None:
            continue  # a redrive has come first
        await run_copies.insert_copy(
            connection, failed, new_id, caller.user_id, trigger_type=row.trigger_type
        )
        resumed[row.id] = row.concurrency_key
    return resumed


async def delete(database: Database, blobs: BlobStore, execution_ids: Sequence[str]) -> list[str]:
    """Delete ended executions with their data, 100 at a time; return the ids of the deleted ones. Visibility is not
    checked.

    Those that have not ended, or that another transaction locks, are left out. Blobs that can't be deleted now are left
    to the sweep of orphans, with a warning in the log.
    """
    deleted: list[str] = []
    for some in _split_batches(execution_ids, DELETIONS_AT_ONCE):
        gone = await delete_runs(database, some)
        deleted += [execution_id for execution_id in some if execution_id in gone]
        try:
            await orphan_blobs.delete_unused(blobs, database, list(gone.values()))
        except BlobsUnavailable as error:
            log.warning(
                "blobs of deleted executions not deleted", error=str(error)
            )  # a sweep of orphans deletes them
    return deleted


def _split_batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))
