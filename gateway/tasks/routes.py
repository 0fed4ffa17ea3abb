"""Routes of task workers, and of the lists of tasks and workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from gateway.http.operation_docs import HeaderDoc, OperationDoc
from gateway.http.route import EXECUTE, READ, WRITE, Route
from gateway.tasks import task_decisions, task_lists, task_protocol
from models.access import KeyScope

WORK: Final = KeyScope.TASKS_WORK
BODY_CODES: Final = ("malformed-json", "malformed-body", "unsupported-media-type", "payload-too-large")
LEASE: Final = HeaderDoc("X-Task-Lease", "Lease of the task, from the claim.")

ROUTES: Final[Sequence[Route]] = (
    Route(
        "POST",
        "/api/v1/tasks/claim",
        WORK,
        task_protocol.claim,
        body=task_protocol.ClaimTasks,
        answer=task_protocol.ClaimedTasks,
        docs=OperationDoc(refusals=("worker-stopped", "worker-id-taken", "node-type-not-allowed")),
    ),
    Route(
        "POST",
        "/api/v1/tasks/report",
        WORK,
        task_protocol.report,
        body=task_protocol.ReportTasks,
        answer=task_protocol.ReportResults,
        docs=OperationDoc(refusals=("worker-id-taken",)),
    ),
    Route(
        "POST",
        "/api/v1/tasks/stop",
        WORK,
        task_protocol.stop,
        body=task_protocol.StopWorker,
        answer=task_protocol.StoppedWorker,
        docs=OperationDoc(refusals=("worker-id-taken",)),
    ),
    Route(
        "GET",
        "/api/v1/tasks",
        READ,
        task_lists.index,
        query=task_lists.LISTED,
        answer=task_lists.TaskList,
    ),
    Route("GET", "/api/v1/tasks/{id}", READ, task_lists.show, answer=task_lists.TaskDetails),
    Route(
        "POST",
        "/api/v1/tasks/{id}/retry",
        EXECUTE,
        task_decisions.retry,
        answer=task_decisions.DecidedTask,
        docs=OperationDoc(refusals=("task-ended", "task-runs-once")),
    ),
    Route(
        "POST",
        "/api/v1/tasks/{id}/cancel",
        EXECUTE,
        task_decisions.cancel,
        answer=task_decisions.DecidedTask,
        docs=OperationDoc(refusals=("task-ended", "task-runs-once")),
    ),
    Route(
        "GET",
        "/api/v1/tasks/{id}/input",
        WORK,
        task_protocol.show_input,
        answer=dict[str, Any],
        docs=OperationDoc(takes=(LEASE,), refusals=("lease-lost", "worker-id-taken")),
    ),
    Route(
        "PUT",
        "/api/v1/tasks/{id}/output",
        WORK,
        task_protocol.store_output,
        status=204,
        docs=OperationDoc(takes=(LEASE,), refusals=("lease-lost", "worker-id-taken", *BODY_CODES)),
    ),
    Route(
        "GET",
        "/api/v1/workers",
        READ,
        task_lists.workers,
        query=task_lists.LISTED_WORKERS,
        answer=task_lists.TaskWorkerList,
    ),
    Route(
        "POST",
        "/api/v1/workers/{id}/drain",
        WRITE,
        task_lists.drain,
        answer=task_lists.TaskWorkerShape,
    ),
)
