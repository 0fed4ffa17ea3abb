"""Steps of a bulk operation, which one gateway at a time performs under a lease.

A step is stored before it is performed. When its gateway dies, another one takes the operation at the end of the
lease and repeats the step: its acts are idempotent, so that each object is acted on and counted once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import structlog
from msgspec import Struct, field
from sqlalchemy import select
from sqlmodel import col

from engine.values import fingerprint
from gateway.access import audit_log
from gateway.executions import bulk_actions, replay_runs
from gateway.executions.bulk_actions import ChosenExecutions
from gateway.http import idempotency
from gateway.http.errors import ApiError
from gateway.http.keyset import PageCursor
from gateway.http.request_origin import RequestOrigin
from gateway.ingest import bulk_selection, dead_letter_rows
from gateway.ingest.redrive_runs import TOGETHER
from journal.store import ExecutionKey
from models import access_store, bulk_operation, ids
from models.access import KeyScope
from models.audit import AuditAction
from models.bulk_operation import LEASE_SECONDS, BulkAction, BulkOperation, BulkStatus
from models.errors import DatabaseUnavailable, LockWaitTimeout
from models.execution import Execution
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.ingest.bulk_services import BulkServices
    from gateway.ingest.dead_letter_rows import FailedRun
    from models.access import ApiCaller

log = structlog.get_logger()

STEP_OBJECTS: Final = 20
FIRST_RUN_SECONDS: Final = 1.0
"""Interval at which the end of the first run is looked for."""
POSTPONED_SECONDS: Final = 5.0
"""Pause before objects are tried again whose workflow had no capacity, or whose rows were locked."""
PASSING_STATUSES: Final = frozenset({429, 503})
"""HTTP statuses of refusals that pass by themselves."""
AUDITED_AS: Final[Mapping[BulkAction, AuditAction]] = {
    BulkAction.REDRIVE_DEAD_LETTERS: AuditAction.DEAD_LETTERS_REDRIVEN,
    BulkAction.REPLAY_DEAD_LETTERS: AuditAction.DEAD_LETTERS_REPLAYED,
    BulkAction.PURGE_DEAD_LETTERS: AuditAction.DEAD_LETTERS_PURGED,
    BulkAction.CANCEL_EXECUTIONS: AuditAction.EXECUTIONS_CANCELLED,
    BulkAction.RETRY_EXECUTIONS: AuditAction.EXECUTIONS_RETRIED,
    BulkAction.REPLAY_EXECUTIONS: AuditAction.EXECUTIONS_REPLAYED,
}


class StepResult(Struct):
    """Result of one step."""

    done: dict[str, str | None] = field(default_factory=dict)
    """Objects that were acted on, each with the run that was started in its place, None if there is none."""
    refused: dict[str, str] = field(default_factory=dict)
    """Codes of refusals by object."""
    postponed: list[str] = field(default_factory=list)
    """Objects to try again."""


class _OperationEnd(Exception):
    """End of an operation before a further step."""

    def __init__(self, status: BulkStatus, reason: str | None = None) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason


class OperationLeaseLost(Exception):
    """Another gateway performs the operation, or it has ended."""


class _OperationAuthor(Struct, frozen=True):
    """Author of an operation, for the audit trail."""

    organization_id: str
    shard: int
    user_id: str
    key_id: str


class OperationPerformance:
    """One operation while this gateway has its lease."""

    def __init__(self, services: BulkServices, operation: BulkOperation) -> None:
        self._services = services
        self._operation = operation
        self._is_repeating = bool(operation.step)
        """Whether the stored step may have been performed in part, by a gateway that has died."""

    async def run(self) -> None:
        """Perform steps at the pace of the operation until its end is stored; an unexpected error ends it as failed.

        Raises `OperationLeaseLost` when another gateway has taken the operation, or it was ended elsewhere, and
        `DatabaseUnavailable`.
        """
        try:
            while True:
                begun_at = monotonic()
                await asyncio.sleep(await self._take_step() - (monotonic() - begun_at))
        except _OperationEnd as end:
            await self._end(end.status, end.reason)
        except (OperationLeaseLost, DatabaseUnavailable):
            raise
        except Exception:
            log.exception("bulk operation failed", operation_id=self._operation.id)
            await self._end(BulkStatus.FAILED, "internal-error")

    async def release(self) -> None:
        """End this gateway's lease of the operation, so that another gateway continues it at once; nothing happens if
        the lease was lost.
        """
        await self._services.database.transaction(partial(bulk_operation.release, operation=self._operation))

    async def _take_step(self) -> float:
        """Renew the lease and perform one step; return the seconds from the start of this call to that of the next one.

        A stored step, interrupted or postponed, is performed before another one is chosen. With `first_alone`, only the
        first object is acted on until its run has completed. Raises `OperationLeaseLost`, `DatabaseUnavailable`, and
        `_OperationEnd` when no object is left, the operation was stopped, its API key lost its rights, or that first
        run failed.
        """
        await self._store({})  # so that the lease lasts, and changes by users are known
        if self._operation.status == BulkStatus.STOPPING and not self._is_repeating:
            raise _OperationEnd(BulkStatus.STOPPED)
        caller = await self._authenticate()
        if not self._operation.step:
            if not await self._may_follow_first():
                return FIRST_RUN_SECONDS
            await self._choose_step(caller)
        step = self._operation.step
        if not step:
            return 0
        try:
            result = await self._act(caller, step)
        except LockWaitTimeout:
            return POSTPONED_SECONDS
        await self._store_result(result)
        self._is_repeating = False
        if result.postponed:
            return POSTPONED_SECONDS
        return len(step) / self._operation.per_second

    async def _authenticate(self) -> ApiCaller:
        """Return the caller of the operation with the present rights of its key.

        Raises `_OperationEnd` (failed) if the key is no longer valid, or lacks the scope `workflows:execute`.
        """
        operation = self._operation
        found = (await access_store.find_keys_by_id(self._services.database, [operation.key_id])).get(
            operation.key_id
        )
        if found is None or not found.is_valid(self._services.database.clock.now()):
            raise _OperationEnd(BulkStatus.FAILED, "key-not-valid")
        if not found.caller.has_scope(KeyScope.WORKFLOWS_EXECUTE):
            raise _OperationEnd(BulkStatus.FAILED, "scope-required")
        return found.caller

    async def _may_follow_first(self) -> bool:
        """Return whether the next step may begin: True without `first_alone` and before the first object, else once the
        first run has completed.

        Its completion clears `first_alone` in the database. Raises `_OperationEnd` (failed) if the first object was
        refused, or its run ended otherwise or is gone.
        """
        operation = self._operation
        if not operation.first_alone or not (operation.done or operation.refused):
            return True
        statement = select(col(Execution.status)).where(
            col(Execution.id) == operation.first_execution_id,
            col(Execution.organization_id) == operation.organization_id,
        )
        async with self._services.database.read() as connection:
            status = await connection.scalar(statement)
        if status == ExecutionStatus.COMPLETED:
            await self._store({"first_alone": False})
            return True
        if status is None or status in TERMINAL_STATUSES:
            raise _OperationEnd(BulkStatus.FAILED, "first-failed")
        return False

    async def _choose_step(self, caller: ApiCaller) -> None:
        """Store the next objects behind the operation's cursor as its step: at most 20, and one second's worth of its
        pace.

        The step may be empty although others follow. With the last objects, `total` becomes the number of all that are
        acted on. Raises `_OperationEnd` (completed) if no object is left, or as many as the operation's total were
        acted on.
        """
        operation = self._operation
        left = operation.total - operation.done - operation.refused
        is_first = operation.first_alone and operation.done == operation.refused == 0
        limit = min(1 if is_first else STEP_OBJECTS, operation.per_second, left)
        if limit <= 0:
            raise _OperationEnd(BulkStatus.COMPLETED)
        cursor = PageCursor()
        if operation.cursor_at is not None:
            cursor = PageCursor(
                is_descending=False, created_at=operation.cursor_at, item_id=operation.cursor_id
            )
        async with self._services.database.read() as connection:
            found = await bulk_selection.select_next(connection, caller, operation, cursor, limit)
        if not found.execution_ids and found.cursor is None:
            raise _OperationEnd(BulkStatus.COMPLETED)
        behind = found.cursor
        values: dict[str, Any] = {"step": list(found.execution_ids)}
        if behind is not None:
            values |= {"cursor_at": behind.created_at, "cursor_id": behind.item_id}
        else:
            values["total"] = operation.done + operation.refused + len(found.execution_ids)
        await self._store(values)

    async def _store_result(self, result: StepResult) -> None:
        """Add the counts of a performed step to the operation, and the id of the first run that it started; its
        postponed objects become the next step. Raises the errors of `_store`.
        """
        operation = self._operation
        refusals = Counter(operation.refusals) + Counter(result.refused.values())
        started = next((run for run in result.done.values() if run is not None), None)
        await self._store(
            {
                "step": result.postponed,
                "done": operation.done + len(result.done),
                "refused": operation.refused + len(result.refused),
                "refusals": dict(refusals),
                "first_execution_id": operation.first_execution_id or started,
            }
        )

    async def _store(self, values: Mapping[str, Any]) -> None:
        """Set columns of the operation in the database, by name, renew its lease, and keep the new row.

        Raises `OperationLeaseLost` if another gateway has taken the operation, or it has ended.
        """
        stored = await self._services.database.transaction(
            partial(
                bulk_operation.store_progress,
                operation=self._operation,
                values=values,
                lease_seconds=LEASE_SECONDS,
            )
        )
        if stored is None:
            raise OperationLeaseLost
        self._operation = stored

    async def _end(self, status: BulkStatus, reason: str | None) -> None:
        """Store the end of the operation with its audit entry in one transaction, and log it; without the
        lease, only log it.
        """
        operation = self._operation

        async def end(connection: AsyncConnection) -> None:
            if await bulk_operation.store_end(connection, operation, status, reason):
                await _record_end(connection, operation, status)

        await self._services.database.transaction(end)
        log.info(
            "bulk operation ended",
            operation_id=operation.id,
            action=operation.action,
            status=status.value,
            reason=reason,
            done=operation.done,
            refused=operation.refused,
        )

    # ── acts ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _act(self, caller: ApiCaller, execution_ids: Sequence[str]) -> StepResult:
        """Perform the operation's action on the runs with these ids, and return the outcome of each.

        Runs that are gone, or that the caller may no longer see, are refused as `not-found`.
        """
        async with self._services.database.read() as connection:
            runs = await dead_letter_rows.read_runs(connection, caller, execution_ids)
        result = StepResult()
        for execution_id in execution_ids:
            if execution_id not in runs:
                result.refused[execution_id] = "not-found"
        match BulkAction(self._operation.action):
            case BulkAction.REDRIVE_DEAD_LETTERS:
                await self._redrive(caller, list(runs.values()), result)
            case BulkAction.PURGE_DEAD_LETTERS:
                await self._purge(list(runs.values()), result)
            case BulkAction.CANCEL_EXECUTIONS:
                await self._cancel(caller, list(runs), result)
            case BulkAction.RETRY_EXECUTIONS:
                await self._retry(caller, runs, result)
            case BulkAction.REPLAY_DEAD_LETTERS | BulkAction.REPLAY_EXECUTIONS:
                await self._replay(caller, runs, result)
        return result

    async def _redrive(self, caller: ApiCaller, failed: Sequence[FailedRun], result: StepResult) -> None:
        """Run the current workflow of each failed run on its input, ten at a time, mark the runs as settled, and add
        the outcomes to `result`.

        A run that an earlier attempt of this step has started is found by its idempotency key, and counts as done; a
        purged one is refused as `already-settled`, and a locked one is postponed.
        """

        async def redrive(one: FailedRun) -> None:
            key = idempotency.redrive_key(one.workflow_id, one.id)
            try:
                accepted, _ = await self._services.redriver.redrive_dead_letter(caller, one, key)
            except ApiError as error:
                _note_refusal(result, one.id, error)
                return
            except LockWaitTimeout:
                result.postponed.append(one.id)
                return
            if accepted.execution_id == dead_letter_rows.PURGED:
                result.refused[one.id] = "already-settled"
            else:
                result.done[one.id] = accepted.execution_id

        for start in range(0, len(failed), TOGETHER):
            await asyncio.gather(*map(redrive, failed[start : start + TOGETHER]))
        settled = [*result.done, *(one for one, code in result.refused.items() if code == "already-settled")]
        if settled:
            await self._services.database.transaction(
                partial(
                    dead_letter_rows.mark_settled,
                    execution_ids=settled,
                    now=self._services.database.clock.now(),
                )
            )

    async def _purge(self, failed: Sequence[FailedRun], result: StepResult) -> None:
        """Mark failed runs as purged, so that they leave the lists of dead letters, and add them to `result`
        as done.
        """
        await self._services.database.transaction(
            partial(dead_letter_rows.mark_purged, failed=failed, now=self._services.database.clock.now())
        )
        result.done |= {one.id: None for one in failed}

    async def _cancel(self, caller: ApiCaller, execution_ids: Sequence[str], result: StepResult) -> None:
        """Request the cancellation of executions and add the outcomes to `result`; ended ones are refused as
        `execution-ended`, and locked ones postponed.
        """
        services = self._services
        found = await bulk_actions.cancel(services.store, services.broker, caller, execution_ids)
        result.done |= dict.fromkeys(found.canceled)
        result.postponed += found.locked
        left = set(execution_ids).difference(found.canceled, found.locked)
        result.refused |= dict.fromkeys(left, "execution-ended")

    async def _retry(self, caller: ApiCaller, runs: Mapping[str, FailedRun], result: StepResult) -> None:
        """Resume failed executions as new ones and add the outcomes to `result`; those resumed meanwhile are refused as
        `already-resumed`, and locked ones postponed.

        Without capacity for all of them, none is resumed, and all are postponed.
        """
        services = self._services
        if not await self._has_capacity(caller, runs, result):
            return
        chosen = ChosenExecutions(self._operation.id, len(runs), list(runs))
        found = await bulk_actions.retry(
            services.database, services.acceptances, services.access, caller, chosen
        )
        result.done |= found.new_ids
        result.postponed += found.locked
        left = set(runs).difference(found.new_ids, found.locked)
        result.refused |= dict.fromkeys(left, "already-resumed")

    async def _replay(self, caller: ApiCaller, runs: Mapping[str, FailedRun], result: StepResult) -> None:
        """Replay executions one after the other and add the outcomes to `result`; a plan with an unconfirmed write is
        refused, and a locked execution is postponed.

        Without capacity for all of them, none is replayed, and all are postponed.
        """
        if not await self._has_capacity(caller, runs, result):
            return
        choice = bulk_selection.decode_options(self._operation)
        for execution_id, run in runs.items():
            key = ExecutionKey(execution_id, run.shard)
            new_id = ids.derive_id("exec", execution_id, self._operation.id)
            try:
                planned = await self._services.replays.plan(key, caller, choice)
                if planned.plan.unconfirmed:
                    result.refused[execution_id] = "confirmation-required"
                    continue
                services = self._services
                await replay_runs.start_planned(
                    services.database, services.access, services.acceptances, caller, key, new_id, planned
                )
            except ApiError as error:
                _note_refusal(result, execution_id, error)
            except LockWaitTimeout:
                result.postponed.append(execution_id)
            else:
                result.done[execution_id] = new_id

    async def _has_capacity(
        self, caller: ApiCaller, runs: Mapping[str, FailedRun], result: StepResult
    ) -> bool:
        """Return whether the backlogs have capacity for all these runs, and reserve it; otherwise add all to
        `result` as postponed.
        """
        counts = Counter(run.workflow_id for run in runs.values())
        try:
            for workflow_id, count in counts.items():
                await self._services.backlog.require_capacity(caller.organization_id, workflow_id, count)
        except ApiError as error:
            if error.status not in PASSING_STATUSES:
                raise
            result.postponed.extend(runs)
            return False
        return True


def _note_refusal(result: StepResult, execution_id: str, error: ApiError) -> None:
    """Add a refused object to `result`: as postponed if a retry may succeed (429, or 503 that no owner must
    fix), else with the error's code.
    """
    if error.status in PASSING_STATUSES and not error.is_for_owner:
        result.postponed.append(execution_id)
    else:
        result.refused[execution_id] = error.code


async def _record_end(connection: AsyncConnection, operation: BulkOperation, status: BulkStatus) -> None:
    """Insert the audit entry about an ended operation, in the caller's transaction: its author, filter and numbers.

    It is about the workflow of the filter, or about the organization.
    """
    facts = {
        "operation": operation.id,
        "filter": operation.selection,
        "total": operation.total,
        "done": operation.done,
        "refused": operation.refused,
        "status": status.value,
    }
    author = _OperationAuthor(operation.organization_id, operation.shard, operation.user_id, operation.key_id)
    origin = None
    if operation.request_id is not None and operation.address_hash is not None:
        origin = RequestOrigin(operation.request_id, operation.address_hash)
    await audit_log.record_change(
        connection,
        author,
        AUDITED_AS[BulkAction(operation.action)],
        operation.selection.get("workflowId") or operation.organization_id,
        before=None,
        after=fingerprint(facts),
        # Without an earlier filter, all of it would be one change, which is shown as a hash if it is long.
        changes=audit_log.list_changes({"filter": {}}, facts, shown=tuple(facts)),
        origin=origin,
    )
