"""Resume of failed runs: a new execution that starts from the committed results of the failed one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlmodel import col

from gateway.executions import acceptance
from gateway.http import errors, idempotency
from journal import run_copies
from journal.dead_letters import IS_TAKEN_UP
from models.execution import Execution
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.execution_visibility import visibility_condition
from models.ingest import INTAKE_KINDS
from models.workflow import Workflow, WorkflowStatus

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.errors import ApiError
    from journal.store import ExecutionKey
    from models.access import ApiCaller


async def resume_execution(
    connection: AsyncConnection,
    failed: ExecutionKey,
    new_id: str,
    caller: ApiCaller,
    now: datetime,
    *,
    keeps_conversations: bool,
) -> str | None:
    """Insert the execution `new_id` as a copy of a failed one, with its committed results; return its concurrency key
    or None.

    If `new_id` exists, nothing is inserted, and the key is returned again. Agents without a result begin new
    conversations unless `keeps_conversations`. Raises a 404 error, and 409 if it has not failed, was resumed, replayed
    or redriven, or its workflow is paused, archived or deleted.
    """
    earlier = await lock_ended(connection, failed, caller)
    if earlier.status != ExecutionStatus.FAILED:
        message = f"Only a failed execution can be resumed: this one is {earlier.status}"
        raise errors.conflict("execution-not-failed", message)
    require_open(earlier)
    concurrency_key: str | None = earlier.concurrency_key
    if await connection.scalar(select(col(Execution.id)).where(col(Execution.id) == new_id)) is not None:
        return concurrency_key  # an earlier attempt was committed, but its answer was lost
    await require_not_taken_up(connection, failed)
    redriven = await settle_dead_letter(connection, earlier, failed, new_id, now)
    if redriven is not None:
        raise already_taken_up(redriven)
    await run_copies.insert_copy(
        connection,
        failed,
        new_id,
        caller.user_id,
        trigger_type=earlier.trigger_type,
        keeps_conversations=keeps_conversations,
    )
    return concurrency_key


async def lock_ended(connection: AsyncConnection, ended: ExecutionKey, caller: ApiCaller) -> Row[Any]:
    """Lock an execution until the transaction ends, and return a row of its status, trigger type and concurrency key,
    and of its workflow's id, status and time of deletion.

    The lock excludes resume, replay and deletion. The caller checks whether the execution has ended. Raises a 404 error
    unless the caller may see it, and `LockWaitTimeout` if another transaction locks it for too long.
    """
    statement: Select[*tuple[Any, ...]] = (
        select(
            *(col(Execution.status), col(Execution.trigger_type), col(Execution.concurrency_key)),
            col(Execution.workflow_id),
            *(col(Workflow.status).label("workflow_status"), col(Workflow.deleted_at)),
        )
        .join(Workflow, col(Workflow.id) == col(Execution.workflow_id))
        .where(col(Execution.id) == ended.execution_id, visibility_condition(caller))
        .with_for_update(of=Execution)
    )
    found: Row[Any] | None = (await connection.execute(statement)).first()
    if found is None:
        raise errors.not_found("execution")
    return found


def require_ended(status: str) -> None:
    """Raise a 409 error unless the status is that of an ended execution."""
    if status not in TERMINAL_STATUSES:
        message = f"Only an ended execution can be replayed: this one is {status}"
        raise errors.conflict("execution-not-ended", message)


def require_open(found: Row[Any]) -> None:
    """Raise a 409 error if the workflow of an execution is deleted, paused or archived; `found` is a row of
    `lock_ended`.
    """
    if found.deleted_at is not None:
        raise errors.conflict("workflow-deleted", "The execution's workflow is deleted")
    acceptance.require_open(WorkflowStatus(found.workflow_status))


async def settle_dead_letter(
    connection: AsyncConnection, ended: Row[Any], source: ExecutionKey, new_id: str, now: datetime
) -> str | None:
    """Use up the redrive key of a dead letter for its successor `new_id`, so that a redrive that has read it starts no
    second run.

    Return the id of the run that a redrive has started before; None without one, also for a purged dead letter, and if
    the redriven run was deleted. Nothing happens for other executions.
    """
    if ended.status != ExecutionStatus.FAILED or ended.trigger_type not in INTAKE_KINDS:
        return None
    key = idempotency.redrive_key(ended.workflow_id, source.execution_id)
    successor = await idempotency.reserve_key(
        connection, key, shard=source.shard, resource_id=new_id, now=now
    )
    # A separate statement after the wait for the key, so that it sees the commit of a competing redrive.
    found: str | None = await connection.scalar(
        select(col(Execution.id)).where(col(Execution.id) == successor)
    )
    return found


async def require_not_taken_up(connection: AsyncConnection, ended: ExecutionKey) -> None:
    """Raise a 409 error if an execution was resumed or replayed; its details name the newest execution of its chain.

    A chain is an execution with all executions that resume or replay it, directly or by way of others.
    """
    # A separate statement after the lock, so that it sees the commit of a competing resume.
    taken_up_key = select(col(Execution.key_id)).where(col(Execution.id) == ended.execution_id, IS_TAKEN_UP)
    key_id = await connection.scalar(taken_up_key)
    if key_id is None:
        return
    of_chain = col(Execution.key_id) == key_id
    resumed = select(col(Execution.id), col(Execution.created_at)).where(
        of_chain, col(Execution.resumed_from).is_not(None)
    )
    replayed = select(col(Execution.id), col(Execution.created_at)).where(
        of_chain, col(Execution.replay_of).is_not(None)
    )
    chain = resumed.union(replayed).subquery()
    newest = await connection.scalar(
        select(chain.c.id).order_by(chain.c.created_at.desc(), chain.c.id.desc()).limit(1)
    )
    raise already_taken_up(str(newest))


def already_taken_up(newest: str) -> ApiError:
    """Return the 409 error for a second resume, replay or redrive; its details name the newest of the chain."""
    message = (
        f"The execution was resumed, replayed or redriven already: continue the newest of its chain, {newest}"
    )
    detail = errors.problem("id", "already-resumed", message)
    return errors.conflict("already-resumed", message, details=[{**detail, "executionId": newest}])
