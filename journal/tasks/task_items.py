"""Reports of task workers, and their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from journal.tasks.task_moves import ReportStatus
from journal.tasks.task_transaction import LogText


class ItemKind(msgspec.Struct, frozen=True):
    """Base of the items of a report."""

    id: str
    lease: str


class Heartbeat(ItemKind, frozen=True):
    """Sign of life with the progress and the checkpoint of a task."""

    progress: str | None = None
    checkpoint: str | None = None


class Completion(ItemKind, frozen=True):
    """Output of a task."""

    port: str = "output"
    output: bytes = b"null"
    is_uploaded: bool = False
    """Whether the output was uploaded before."""


class Failure(ItemKind, frozen=True):
    """Failed attempt of a task."""

    code: str = "task-failed"
    message: str = ""
    is_final: bool = False
    delay: int | None = None
    """Microseconds until the next attempt; None for the delay of the node type."""
    is_refusal: bool = False
    """Whether the server refuses the output that the worker has reported."""


class Release(ItemKind, frozen=True):
    """Task that its worker gives back unbegun."""


class LogLines(ItemKind, frozen=True):
    """Lines for the log of the run."""

    lines: Sequence[LogText] = ()


class WorkerReport(msgspec.Struct, frozen=True):
    """Report of a worker about the tasks that it holds."""

    organization_id: str
    worker_id: str
    claimed: str | None
    """Last claim whose answer the worker has received."""
    held: Sequence[HeldAttempt]
    items: Sequence[ItemKind]


class ItemResult(msgspec.Struct, frozen=True):
    """Result of one item of a report, or of an attempt that the worker has lost or should stop."""

    id: str
    lease: str | None
    status: ReportStatus
    code: str | None = None
    message: str | None = None


class TaskFacts(msgspec.Struct, frozen=True):
    """Facts about a task that never change."""

    id: str
    organization_id: str
    execution_id: str
    type: str
    version: str


HeldAttempt = tuple[str, "str | None"]
"""Task and lease of an attempt; workers of earlier versions name the task alone."""

OutputCheck = Callable[[TaskFacts, Completion], "tuple[str, str] | None"]
"""Returns code and message of the problem of an output; None if it is valid."""
