"""Reports about tasks: each one transaction for many workers, on either database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
from sqlalchemy import text

from journal.tasks import task_moves
from journal.tasks.task_items import (
    Completion,
    Failure,
    Heartbeat,
    ItemResult,
    LogLines,
    Release,
)
from journal.tasks.task_moves import ReportStatus
from journal.tasks.task_transaction import TaskTransaction
from models.task_states import HELD_CONDITION, TaskState

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.tasks.known_tasks import KnownTasks
    from journal.tasks.task_items import HeldAttempt, ItemKind, OutputCheck, WorkerReport
    from journal.tasks.task_moves import TaskRow
    from journal.tasks.task_transaction import TaskEffects
    from models.database import Database


class TaskReports:
    """Reports of task workers, applied in the database of a process."""

    def __init__(self, database: Database, known: KnownTasks, max_log_lines: int) -> None:
        self._database = database
        self._known = known
        self._max_log_lines = max_log_lines

    async def report(
        self, batch: Sequence[WorkerReport], check: OutputCheck
    ) -> tuple[list[list[ItemResult]], TaskEffects]:
        """Apply reports of workers in one transaction; return the results of the items of each report, in order, and
        the effects to announce.

        An output for which `check`, called before the transaction, returns a problem is refused. Attempts among
        `held` that the worker has lost, or should stop, are added to its results. Raises `DatabaseUnavailable`.
        """
        item_ids = sorted({item.id for report in batch for item in report.items})
        facts = await self._known.find(item_ids)
        problems = {
            id(item): problem
            for report in batch
            for item in report.items
            if isinstance(item, Completion)
            and item.id in facts
            and (problem := check(facts[item.id], item)) is not None
        }

        async def work(connection: AsyncConnection) -> tuple[list[list[ItemResult]], TaskEffects]:
            transaction = TaskTransaction(connection)
            reported = [facts[one] for one in item_ids if one in facts]
            final = {
                item.id
                for report in batch
                for item in report.items
                if isinstance(item, Completion | Failure | LogLines | Release)
            }
            await transaction.lock_runs(sorted({one.execution_id for one in reported if one.id in final}))
            held_ids = sorted({*item_ids, *(task_id for report in batch for task_id, _ in report.held)})
            claiming = [report for report in batch if report.claimed is not None]
            await transaction.lock_reported(
                held_ids,
                sorted({report.organization_id for report in claiming}),
                sorted({report.worker_id for report in claiming}),
            )
            results = [self._apply(transaction, report, problems) for report in batch]
            return results, await transaction.store()

        return await self._database.transaction(work)

    def _apply(
        self,
        transaction: TaskTransaction,
        report: WorkerReport,
        problems: Mapping[int, tuple[str, str]],
    ) -> list[ItemResult]:
        """Apply the items of a report, renew the leases of the other held tasks, and return all results.

        `problems` has code and message of the problem of an invalid output, by `id()` of its item.
        """
        results = [
            self._apply_item(transaction, report, item, problems.get(id(item))) for item in report.items
        ]
        named: set[HeldAttempt] = {(item.id, item.lease) for item in report.items}
        answered = named | {(item.id, None) for item in report.items}
        for attempt in report.held:
            task_id, lease = attempt
            task = _task_of(transaction, report, task_id)
            if task is not None and _holds(task, report.worker_id, lease):
                task_moves.renew(task, transaction.now)
                if task.state == TaskState.CANCEL_REQUESTED and attempt not in answered:
                    results.append(ItemResult(task_id, lease, ReportStatus.CANCELLED))
            elif attempt not in answered:
                is_cancelled = task is not None and task.state == TaskState.CANCELLED
                status = ReportStatus.CANCELLED if is_cancelled else ReportStatus.LOST
                results.append(ItemResult(task_id, lease, status))
        if report.claimed is not None:
            _return_unreceived(transaction, report, named)
        return results

    def _apply_item(
        self,
        transaction: TaskTransaction,
        report: WorkerReport,
        item: ItemKind,
        problem: tuple[str, str] | None,
    ) -> ItemResult:
        """Apply one item of a worker's report to its task: a result, failure, release, log lines or heartbeat.

        Returns the result of the item; lost for an unknown task and for lines of a worker without the lease.
        A task of an ended run is canceled first.
        """
        task = _task_of(transaction, report, item.id)
        if task is None:
            return ItemResult(item.id, item.lease, ReportStatus.LOST)
        run = transaction.run_of(task)
        if run is not None and run.is_ended and task.state == TaskState.LEASED:
            task_moves.cancel(task, transaction.now)
        match item:
            case Completion():
                return _complete(transaction, task, item, problem)
            case Failure():
                return _fail(transaction, task, item)
            case Release():
                return ItemResult(item.id, item.lease, task_moves.release(task, item.lease, transaction.now))
            case LogLines():
                if not task_moves.is_holder(task, item.lease):
                    return ItemResult(item.id, item.lease, ReportStatus.LOST)
                transaction.add_lines(task, item.lines, self._max_log_lines)
                return ItemResult(item.id, item.lease, ReportStatus.OK)
            case Heartbeat():
                return _beat(task, item, transaction.now)
        raise TypeError(item)

    async def upload(self, organization_id: str, task_id: str, lease: str, output: bytes) -> bool:
        """Keep a large output, in place of an earlier one, until the report that completes its task.

        Return False, and keep nothing, unless `lease` holds the task.
        """
        statement = text(
            f"UPDATE task SET output = :output, output_lease = :lease WHERE id = :task_id"
            f" AND organization_id = :organization_id AND lease = :lease AND {HELD_CONDITION}"
        )
        values = {
            "output": output.decode(),
            "lease": lease,
            "task_id": task_id,
            "organization_id": organization_id,
        }

        async def work(connection: AsyncConnection) -> bool:
            return (await connection.execute(statement, values)).rowcount == 1

        return await self._database.transaction(work)


def _task_of(transaction: TaskTransaction, report: WorkerReport, task_id: str) -> TaskRow | None:
    """Return the locked task with an id, None if it is missing, of another organization than the report's, or held by
    another worker.
    """
    task = transaction.tasks.get(task_id)
    if task is None or task.organization_id != report.organization_id:
        return None
    return None if task.is_held and task.worker_id != report.worker_id else task


def _holds(task: TaskRow, worker_id: str, lease: str | None) -> bool:
    """Return whether a worker holds a task under a lease; without one, under any of its leases."""
    if lease is None:
        return task.is_held and task.worker_id == worker_id
    return task_moves.is_holder(task, lease)


def _complete(
    transaction: TaskTransaction,
    task: TaskRow,
    item: Completion,
    problem: tuple[str, str] | None,
) -> ItemResult:
    """Complete a task with its output, or fail it for good because of the `problem` (code and message) of the output.

    Returns the result of the item: refused for such an output, and for a large one that was not sent before; without
    the lease, and for a task that is to be canceled, as `task_moves.complete`.
    """
    output, now = item.output, transaction.now
    if item.is_uploaded and task_moves.is_holder(task, item.lease):
        if task.output is None or task.output_lease != item.lease:
            message = "Send the output with PUT /tasks/{id}/output first, under the same lease"
            return ItemResult(item.id, item.lease, ReportStatus.REFUSED, "output-missing", message)
        output = task.output.encode()
    if problem is not None:
        code, message = problem
        status = task_moves.fail(task, item.lease, now, code, message, is_final=True)
        if status is ReportStatus.OK:
            transaction.answer_failure(task)
        if status in {ReportStatus.OK, ReportStatus.REPEATED}:
            return ItemResult(item.id, item.lease, ReportStatus.REFUSED, code, message)
        return ItemResult(item.id, item.lease, status)
    status = task_moves.complete(task, item.lease, now)
    if status is ReportStatus.OK:
        port = msgspec.json.encode(item.port)
        transaction.answer(task, b'{"output":%b,"port":%b}' % (output, port))
    return ItemResult(item.id, item.lease, status)


def _fail(transaction: TaskTransaction, task: TaskRow, item: Failure) -> ItemResult:
    """Count the failed attempt that a worker reports, and answer the node after the last one; return the
    item's result.
    """
    status = task_moves.fail(
        task,
        item.lease,
        transaction.now,
        item.code,
        item.message,
        is_final=item.is_final,
        delay=item.delay,
    )
    if status is ReportStatus.OK and task.state == TaskState.FAILED:
        transaction.answer_failure(task)
    if item.is_refusal and status in {ReportStatus.OK, ReportStatus.REPEATED}:
        return ItemResult(item.id, item.lease, ReportStatus.REFUSED, item.code, item.message)
    return ItemResult(item.id, item.lease, status)


def _beat(task: TaskRow, item: Heartbeat, now: int) -> ItemResult:
    """Renew the lease of a task, and store progress and checkpoint if given; return the item's result.

    The result says whether the worker should stop: canceled or lost.
    """
    if not task_moves.is_holder(task, item.lease):
        is_cancelled = task.lease == item.lease and task.state == TaskState.CANCELLED
        return ItemResult(item.id, item.lease, ReportStatus.CANCELLED if is_cancelled else ReportStatus.LOST)
    task_moves.renew(task, now)
    if item.progress is not None:
        task.progress = item.progress
    if item.checkpoint is not None:
        task.checkpoint = item.checkpoint
    is_cancelled = task.state == TaskState.CANCEL_REQUESTED
    return ItemResult(item.id, item.lease, ReportStatus.CANCELLED if is_cancelled else ReportStatus.OK)


def _return_unreceived(transaction: TaskTransaction, report: WorkerReport, named: set[HeldAttempt]) -> None:
    """Free the tasks of earlier claims that the worker has never received, since the answers were lost.

    They were claimed before the claim that its report acknowledges, and are neither in `held` of the report nor `named`
    by its items.
    """
    own = [
        task
        for task in transaction.tasks.values()
        if task.worker_id == report.worker_id
        and task.organization_id == report.organization_id
        and task.is_held
    ]
    times = [task.claimed_at or 0 for task in own if task.claim_id == report.claimed]
    if not times:
        return
    held = {*report.held, *named}
    for task in own:
        is_received = not held.isdisjoint({(task.id, task.lease), (task.id, None)})
        if not task.is_acknowledged and not is_received and (task.claimed_at or 0) <= max(times):
            task_moves.return_unreceived(task, transaction.now)
