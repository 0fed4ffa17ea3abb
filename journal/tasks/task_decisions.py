"""Decisions of people about single tasks: retry at once, and cancel."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from journal.tasks import task_moves
from journal.tasks.task_transaction import TaskTransaction
from models.task_states import TaskState

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.tasks.task_moves import TaskRow

CANCELLED_CODE: Final = "task-cancelled"
CANCELLED_MESSAGE: Final = "A person has cancelled the task"


class TaskDecision(StrEnum):
    """Decision of a person about a task."""

    RETRY = "retry"
    CANCEL = "cancel"


class DecisionRefusal(StrEnum):
    """Reason why a decision about a task is refused."""

    ENDED = "ended"
    """The task has ended, and its node has the result; or it is to be canceled."""
    AT_MOST_ONCE = "at-most-once"
    """A worker performs the task, which may not be begun again."""


async def lock_task(connection: AsyncConnection, execution_id: str, task_id: str) -> TaskTransaction:
    """Lock a task and its run for a person's decision (retry or cancel), and return the transaction.

    Its `tasks` and `runs` lack a task or run that no longer exists.
    """
    transaction = TaskTransaction(connection)
    await transaction.lock_runs([execution_id])
    await transaction.lock_tasks([task_id])
    return transaction


def apply(transaction: TaskTransaction, task: TaskRow, decision: TaskDecision) -> DecisionRefusal | None:
    """Apply a decision to a locked task, and return the refusal, or None; the caller stores the transaction.

    The node of a canceled task fails at once, also while its worker still has to stop.
    """
    if task.is_ended or task.state == TaskState.CANCEL_REQUESTED:
        return DecisionRefusal.ENDED
    if decision is TaskDecision.RETRY:
        if task.state == TaskState.LEASED and task.is_at_most_once:
            return DecisionRefusal.AT_MOST_ONCE
        task_moves.retry(task)
        return None
    task_moves.cancel(task, transaction.now)
    task.error = task_moves.encode_error(CANCELLED_CODE, CANCELLED_MESSAGE)
    transaction.answer_failure(task)
    return None
