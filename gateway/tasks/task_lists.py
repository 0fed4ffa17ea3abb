"""Tasks and workers as people see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import Raw
from sqlalchemy import func, select
from sqlmodel import col

from engine import inline_secrets
from gateway.http import errors, limits
from gateway.http.parameters import LIMIT, OFFSET, ChoiceParameter, TextParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from journal.tasks import task_service
from json_text import decoding
from models.execution import Execution
from models.execution_visibility import visibility_condition
from models.task import Task, TaskWorker
from models.task_states import TaskState

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import ColumnElement, Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.tasks.task_service import TaskService

STATE: Final = ChoiceParameter("state", "Only tasks in this state.", TaskState)
TYPE: Final = TextParameter("type", "Only tasks of this node type, such as `acme/resize`.")
EXECUTION: Final = TextParameter("executionId", "Only tasks of this execution.")
LISTED: Final = (STATE, TYPE, EXECUTION, LIMIT, OFFSET)
LISTED_WORKERS: Final = (LIMIT, OFFSET)


class TaskShape(WireStruct):
    """Task of a custom node: one node of one run, with all of its attempts."""

    id: str
    type: str
    version: str
    pool: str
    state: TaskState
    execution_id: str
    workflow_id: str
    node_id: str
    iteration: str
    """Turn of the enclosing loops; empty outside of loops."""
    attempt: int
    """Number of the present attempt, of the next one, or of the last one of a failed task."""
    max_attempts: int
    """Attempts that may fail; lost ones are counted apart."""
    failures: int
    losses: int
    """Attempts that ended without a report: at most three."""
    unacknowledged: int
    """Claims that no report has followed: at most ten."""
    worker_id: str | None
    progress: Any
    """Last progress that a worker has reported."""
    error: Any
    """Error of the last failed or lost attempt."""
    created_at: Instant
    started_at: Instant | None
    due_at: Instant | None
    """Time of the next attempt."""
    lease_until: Instant | None
    deadline: Instant | None
    ended_at: Instant | None


class TaskList(WireStruct):
    """Page of tasks, the newest first; `count` is at most 10,001."""

    count: int
    limit: int
    offset: int
    tasks: Sequence[TaskShape]


class TaskDetails(TaskShape, kw_only=True):
    """Task with its config, checkpoint and workers."""

    config: Any
    """Rendered config, without credentials."""
    checkpoint: Any
    input_bytes: int
    log_lines: int
    """Lines that its workers have sent to the log of the execution."""
    dropped_log_lines: int
    """Lines above the maximum of one task, which the log does not have."""
    idempotency_key: str
    concurrency_key: str | None
    workers: int
    """Present workers that perform such tasks."""
    explanation: str | None
    """Why no worker begins it; null if one does or can."""


class TaskWorkerShape(WireStruct):
    """Process that performs tasks."""

    id: str
    name: str
    sdk: str
    types: Sequence[Any]
    """Type and version of each node that it performs."""
    pools: Sequence[str]
    present: bool
    """Whether it has polled lately and takes tasks."""
    draining: bool
    """Whether it was asked to stop."""
    tasks: int
    """Tasks that it holds."""
    first_seen_at: Instant
    last_seen_at: Instant
    stopped_at: Instant | None


class TaskWorkerList(WireStruct):
    """Page of workers, the last seen first."""

    count: int
    limit: int
    offset: int
    workers: Sequence[TaskWorkerShape]


async def index(request: GatewayRequest) -> JsonResponse:
    """List the tasks of executions that the caller may see, the newest first."""
    query, caller = request.query, request.caller
    page = query.page()
    conditions: list[ColumnElement[bool]] = [
        col(Task.organization_id) == caller.organization_id,
        visibility_condition(caller),
    ]
    if (state := query[STATE]) is not None:
        states = [TaskState.READY, TaskState.DELAYED] if state is TaskState.READY else [state]
        conditions.append(col(Task.state).in_([one.value for one in states]))
    if (type_name := query[TYPE]) is not None:
        conditions.append(col(Task.type) == type_name)
    if (execution_id := query[EXECUTION]) is not None:
        conditions.append(col(Task.execution_id) == execution_id)
    found = (
        select(Task)
        .join(Execution, col(Execution.id) == col(Task.execution_id))
        .where(*conditions)
        .order_by(col(Task.created_at).desc(), col(Task.id).desc())
    )
    counted = found.order_by(None).with_only_columns(col(Task.id)).limit(limits.KEYSET_COUNT + 1).subquery()
    async with request.gateway.database.read() as connection:
        count = await connection.scalar(select(func.count()).select_from(counted))
        rows = (await connection.execute(found.limit(page.limit).offset(page.offset))).all()
    return JsonResponse(
        TaskList(
            count=count or 0,
            limit=page.limit,
            offset=page.offset,
            tasks=[TaskShape(**_fields(row)) for row in rows],
        )
    )


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a task, and why no worker performs it if none does."""
    caller, now = request.caller, request.gateway.clock()
    statement = (
        select(Task)
        .join(Execution, col(Execution.id) == col(Task.execution_id))
        .where(
            col(Task.id) == request.path_params["id"],
            col(Task.organization_id) == caller.organization_id,
            visibility_condition(caller),
        )
    )
    async with request.gateway.database.read() as connection:
        row = (await connection.execute(statement)).first()
        if row is None:
            raise errors.not_found("task")
        workers = await task_service.read_workers(
            connection, caller.organization_id, now, task_service.select_run(row.execution_id)
        )
    service = task_service.find_service(workers, row.type, row.version, row.pool, now)
    return JsonResponse(
        TaskDetails(
            **_fields(row),
            config=inline_secrets.remove_secrets(decoding.decode(row.config))[0],
            checkpoint=None if row.checkpoint is None else Raw(row.checkpoint.encode()),
            input_bytes=row.input_bytes,
            log_lines=row.log_lines,
            dropped_log_lines=max(row.log_lines - request.gateway.task_hub.tasks.max_log_lines, 0),
            idempotency_key=row.key,
            concurrency_key=None if row.concurrency_key is None else row.concurrency_key.partition(" ")[2],
            workers=service.present,
            explanation=_explain(row, service, now),
        )
    )


def _explain(row: Row[Any], service: TaskService, now: datetime) -> str | None:
    """Return why no worker performs a task: limited, delayed, or without a worker for its type.

    None if a worker performs it or can begin it, and for an ended task.
    """
    match row.state:
        case TaskState.LIMITED:
            return f"At most {row.concurrency_limit} tasks with its concurrency key are performed at once"
        case TaskState.DELAYED:
            seconds = max((row.due_at - now).total_seconds(), 0) if row.due_at else 0
            return (
                f"The next attempt begins in {seconds:.0f} s"
                if not service.explanation
                else service.explanation
            )
        case TaskState.READY:
            return service.explanation
        case _:
            return None


def _fields(row: Row[Any]) -> dict[str, Any]:
    """Return the fields of a task that lists and single tasks show; a delayed one is shown as ready."""
    state = TaskState.READY if row.state == TaskState.DELAYED else TaskState(row.state)
    return {
        "id": row.id,
        "type": row.type,
        "version": row.version,
        "pool": row.pool,
        "state": state,
        "execution_id": row.execution_id,
        "workflow_id": row.workflow_id,
        "node_id": row.node_id,
        "iteration": row.iteration,
        "attempt": (row.failures + row.losses or 1)
        if state is TaskState.FAILED
        else row.failures + row.losses + 1,
        "max_attempts": row.max_attempts,
        "failures": row.failures,
        "losses": row.losses,
        "unacknowledged": row.unacknowledged,
        "worker_id": row.worker_id,
        "progress": row.progress,
        "error": row.error,
        "created_at": instant(row.created_at),
        "started_at": optional_instant(row.started_at),
        "due_at": optional_instant(row.due_at),
        "lease_until": optional_instant(row.lease_until),
        "deadline": optional_instant(row.deadline_at),
        "ended_at": optional_instant(row.ended_at),
    }


async def workers(request: GatewayRequest) -> JsonResponse:
    """List the workers of the organization that have polled for tasks within about a week, the last seen first."""
    caller, page, now = request.caller, request.query.page(), request.gateway.clock()
    is_own = col(TaskWorker.organization_id) == caller.organization_id
    found = (
        select(TaskWorker)
        .where(is_own)
        .order_by(col(TaskWorker.last_seen_at).desc(), col(TaskWorker.id))
        .limit(page.limit)
        .offset(page.offset)
    )
    async with request.gateway.database.read() as connection:
        count = await connection.scalar(select(func.count()).select_from(TaskWorker).where(is_own))
        rows = (await connection.execute(found)).all()
        counts = await _count_held(connection, caller.organization_id, [row.id for row in rows])
    shown = [_worker(row, counts.get(row.id, 0), now) for row in rows]
    return JsonResponse(TaskWorkerList(count=count or 0, limit=page.limit, offset=page.offset, workers=shown))


async def _count_held(
    connection: AsyncConnection, organization_id: str, worker_ids: Sequence[str]
) -> Mapping[str, int]:
    """Return the numbers of tasks that workers of the organization hold, by worker id; none for one without tasks."""
    if not worker_ids:
        return {}
    held = (
        select(col(Task.worker_id), func.count().label("tasks"))
        .where(
            col(Task.organization_id) == organization_id,
            col(Task.worker_id).in_(worker_ids),
            col(Task.state).in_([TaskState.LEASED.value, TaskState.CANCEL_REQUESTED.value]),
        )
        .group_by(col(Task.worker_id))
    )
    return {row.worker_id: row.tasks for row in await connection.execute(held)}


def _worker(row: Row[Any], tasks: int, now: datetime) -> TaskWorkerShape:
    """Return a worker as the API shows it, with its number of tasks.

    It is present if it polled within 100 seconds and neither stops nor has stopped.
    """
    is_recent = now - row.last_seen_at < task_service.PRESENT_TIME
    return TaskWorkerShape(
        id=row.id,
        name=row.name,
        sdk=row.sdk,
        types=row.types,
        pools=row.pools,
        present=is_recent and row.stopped_at is None and not row.is_draining,
        draining=row.is_draining,
        tasks=tasks,
        first_seen_at=instant(row.first_seen_at),
        last_seen_at=instant(row.last_seen_at),
        stopped_at=optional_instant(row.stopped_at),
    )


async def drain(request: GatewayRequest) -> JsonResponse:
    """Ask a worker to stop: its next answer says so, and it gets no more tasks."""
    organization_id, worker_id = request.caller.organization_id, request.path_params["id"]
    if not await request.gateway.task_hub.drain(organization_id, worker_id):
        raise errors.not_found("worker")
    now = request.gateway.clock()
    async with request.gateway.database.read() as connection:
        row = (
            await connection.execute(
                select(TaskWorker).where(
                    col(TaskWorker.organization_id) == organization_id,
                    col(TaskWorker.id) == worker_id,
                )
            )
        ).first()
        if row is None:
            raise errors.not_found("worker")
        counts = await _count_held(connection, organization_id, [worker_id])
    return JsonResponse(_worker(row, counts.get(worker_id, 0), now))
