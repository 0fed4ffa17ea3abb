"""Retry and cancel of single tasks by people, with entries in the audit trail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog
from sqlalchemy import select
from sqlmodel import col

from engine.values import fingerprint
from gateway.access import audit_log
from gateway.http import errors
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct
from journal.tasks import task_decisions
from journal.tasks.task_decisions import DecisionRefusal, TaskDecision
from models.audit import AuditAction
from models.execution import Execution
from models.execution_visibility import visibility_condition
from models.task import Task
from models.task_states import TaskState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.errors import ApiError
    from journal.tasks.task_moves import TaskRow
    from journal.tasks.task_transaction import TaskEffects

log = structlog.get_logger()

_ACTIONS: Final[Mapping[TaskDecision, AuditAction]] = {
    TaskDecision.RETRY: AuditAction.TASK_RETRIED,
    TaskDecision.CANCEL: AuditAction.TASK_CANCELLED,
}


class DecidedTask(WireStruct):
    """Task after the decision of a person."""

    id: str
    execution_id: str
    state: TaskState
    """`cancel_requested`: its node has failed, and its worker is told to stop."""


async def retry(request: GatewayRequest) -> JsonResponse:
    """Let a task be claimed at once, in place of its delay or of the attempt of a worker that hangs.

    Such an attempt is lost to its worker and costs no attempt. A task that waits for a worker stays as it is.
    """
    return await _decide(request, TaskDecision.RETRY)


async def cancel(request: GatewayRequest) -> JsonResponse:
    """Cancel a task: its node fails at once with `task-cancelled`, and its worker is told to stop."""
    return await _decide(request, TaskDecision.CANCEL)


async def _decide(request: GatewayRequest, decision: TaskDecision) -> JsonResponse:
    """Apply a person's decision about a task, with an audit entry, and answer with the task.

    Raises 404 for an unknown task and 409 if it has ended or must not run again.
    """
    caller, gateway = request.caller, request.gateway
    task_id = request.path_params["id"]
    execution_id = await _find_execution(request, task_id)

    async def work(connection: AsyncConnection) -> tuple[TaskRow, TaskEffects]:
        transaction = await task_decisions.lock_task(connection, execution_id, task_id)
        task = transaction.tasks.get(task_id)
        if task is None:
            raise errors.not_found("task")
        before = fingerprint([str(task.state), task.fence, task.failures])
        refusal = task_decisions.apply(transaction, task, decision)
        if refusal is not None:
            raise _refusal_error(task, refusal)
        effects = await transaction.store()
        await audit_log.record_change(
            connection,
            caller,
            _ACTIONS[decision],
            task_id,
            before=before,
            after=fingerprint([str(task.state), task.fence, task.failures]),
        )
        return task, effects

    task, effects = await gateway.database.transaction(work, locks=execution_id)
    await gateway.task_hub.follow(effects)
    log.info("task decided", task_id=task_id, decision=decision.value, user_id=caller.user_id)
    return JsonResponse(DecidedTask(id=task_id, execution_id=execution_id, state=TaskState(task.state)))


async def _find_execution(request: GatewayRequest, task_id: str) -> str:
    """Return the execution of a task; raises a 404 error unless the caller may see it."""
    statement = (
        select(col(Task.execution_id))
        .join(Execution, col(Execution.id) == col(Task.execution_id))
        .where(
            col(Task.id) == task_id,
            col(Task.organization_id) == request.caller.organization_id,
            visibility_condition(request.caller),
        )
    )
    async with request.gateway.database.read() as connection:
        execution_id = await connection.scalar(statement)
    if execution_id is None:
        raise errors.not_found("task")
    return execution_id


def _refusal_error(task: TaskRow, refusal: DecisionRefusal) -> ApiError:
    """Return the 409 error for a decision that the state of the task doesn't permit."""
    if refusal is DecisionRefusal.AT_MOST_ONCE:
        return errors.conflict(
            "task-runs-once",
            f"{task.worker_id} performs the task, which runs at most once: cancel it, then resume its execution",
        )
    if task.state == TaskState.CANCEL_REQUESTED:
        return errors.conflict("task-ended", "The task is being cancelled already")
    return errors.conflict(
        "task-ended",
        f"The task has ended as {task.state}, and its node has the result: resume or replay the execution"
        f" {task.execution_id}",
    )
